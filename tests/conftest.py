"""Shared fixtures: small runs, a trained network, and plain computations of what networks predict."""

import functools
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
import torch
from torch import nn

import cifar10
import data
import evaluate
import predict
import synthetic
import train

# The published constants once more, so that a slip in models/ shows.
MEAN, STD = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2023, 0.1994, 0.2010])

# What --deterministic sets, which is too late for cuBLAS where an earlier test of this process has used it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(scope="session", autouse=True)
def save_time():
    """Compute with one thread, which is faster for small tensors; draw each file of generated images once."""
    torch.set_num_threads(1)
    synthetic.make_batch = functools.cache(synthetic.make_batch)


@pytest.fixture
def refused(capsys):
    """A function that calls a program on what must be refused in one line, and returns the line."""
    def refused(program, *argv, status: int = 2, **kwargs) -> str:
        capsys.readouterr()
        try:
            found = program(*argv, **kwargs)
        except SystemExit as exit:  # argparse's way out
            found = exit.code
        printed = capsys.readouterr()
        assert (found, printed.out) == (status, "") and re.fullmatch(r"\w+\.py: error: .*\n", printed.err), printed
        return printed.err
    return refused


@pytest.fixture
def no_pictures(monkeypatch):
    """Draw nothing during training: pictures take a second."""
    runs.draw_nothing(monkeypatch)


# --- small runs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def small_data(tmp_path_factory) -> Path:
    """A folder with batch files of 30 and 20 random images."""
    return runs.write_data(tmp_path_factory.mktemp("small"), 30)


@pytest.fixture
def run(small_data, tmp_path, no_pictures):
    """A function that runs train.py in this process and returns its status; its folder is tmp_path / `folder`."""
    return lambda *flags, folder="run": train.main(runs.command_line(small_data, tmp_path / folder, *flags))


@pytest.fixture
def start(small_data, tmp_path):
    """A function that starts train.py in a process of its own, in the folder tmp_path / "run"."""
    def start(*flags: str, **kwargs: Any) -> runs.Child:
        return runs.Child(runs.command_line(small_data, tmp_path / "run", *flags), tmp_path / "log", **kwargs)
    return start


@pytest.fixture
def paused(start, tmp_path):
    """A function that starts a run in a process and waits until it pauses, after the third step."""
    def paused(*flags: str, prepare: Callable = runs.pause_after, **env: str) -> runs.Child:
        child = start(*flags, prepare=prepare, args=(0, 3, tmp_path / "marker"), **env)
        runs.wait_for((tmp_path / "marker").exists)
        return child
    return paused


@pytest.fixture(scope="session")
def unbroken(small_data, tmp_path_factory) -> Path:
    """The folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    with pytest.MonkeyPatch.context() as patch:
        runs.draw_nothing(patch)
        assert train.main(runs.command_line(small_data, folder)) == 0
    return folder


# --- a trained network -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def trained(small_data, tmp_path_factory) -> Path:
    """The last.pt of a small network, trained without pictures until it predicts several classes."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        runs.draw_nothing(patch)
        flags = "--synthetic --limit-train 96 --limit-test 50 --epochs 8 --batch-size 16 --lr 0.05 --no-augment".split()
        assert train.main(runs.command_line(small_data, folder, *flags)) == 0
    return folder / "last.pt"


@pytest.fixture(scope="session")
def test_set() -> data.Split:
    """The 50 generated test images."""
    return data.load_split("", cifar10.TEST_FILES, use_synthetic=True, limit=50)


@pytest.fixture(scope="session")
def expected(trained, test_set) -> torch.Tensor:
    """The probabilities of the test images, computed one by one."""
    return one_by_one(evaluate.load_checkpoint_model(trained)[0], test_set.images).softmax(1)


@pytest.fixture
def run_evaluate(trained, small_data):
    """A function that runs evaluate.py in this process and returns its status."""
    return lambda *flags, checkpoint=trained: evaluate.main([
        str(checkpoint), "--data-dir", str(small_data), "--limit-test", "50", "--device", "cpu", "--precision", "fp32",
        *map(str, flags)])


@pytest.fixture
def run_predict(trained):
    """A function that runs predict.py in this process and returns its status."""
    return lambda *argv, checkpoint=trained: predict.main(
        [str(checkpoint), *map(str, argv), "--device", "cpu", "--precision", "fp32"])


def one_by_one(model: nn.Module, images: torch.Tensor, normalize: bool = True) -> torch.Tensor:
    """Compute logits of (N, 32, 32, 3) uint8 images without any of the program's own code."""
    with torch.no_grad():
        inputs = [image.permute(2, 0, 1) / 255 for image in images]
        inputs = [(image - MEAN[:, None, None]) / STD[:, None, None] if normalize else image for image in inputs]
        return torch.cat([model(image[None]) for image in inputs])


def six_views(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Average the probabilities over flips and diagonal shifts by one pixel, with NumPy's own padding."""
    padded = np.pad(images.numpy(), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    shifted = [torch.from_numpy(padded[:, i:i + 32, i:i + 32].copy()) for i in range(3)]
    return sum(one_by_one(model, view).softmax(1) for each in shifted for view in (each, each.flip(2))) / 6
