# Every target does its own set-up. All you need is Python 3.10 or newer and make.
PYTHON ?= python3
BIN := .venv/bin
CHECK := 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12")'

.PHONY: demo train test test-slow lint bench clean

demo: .venv/requirements  ## train on generated images; no download, three minutes at most
	$(BIN)/python train.py @recipes/demo.txt --overwrite

train: .venv/requirements  ## the published recipe on CIFAR-10; starts or resumes checkpoints/se-resnet
	$(BIN)/python train.py --resume auto

test: .venv/requirements-dev  ## all tests but the slow ones, offline
	$(BIN)/python -m pytest -m "not slow"

test-slow: .venv/requirements-dev  ## the slow tests
	$(BIN)/python -m pytest -m slow

lint: .venv/requirements-dev
	$(BIN)/ruff check .

bench: .venv/requirements  ## speed of this program and of the published code
	$(BIN)/python tools/bench.py

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis

# The stamp is written last, so that an interrupted set-up is repeated. An environment that you have made is used.
.venv/requirements: requirements.txt
	test -x $(BIN)/pip || { $(PYTHON) -c $(CHECK) && $(PYTHON) -m venv .venv; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/requirements-dev: requirements-dev.txt .venv/requirements
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@
