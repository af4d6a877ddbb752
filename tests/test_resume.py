"""Exact resume: a run that is stopped and resumed ends in the same bits as one that never stopped."""

import os
import shutil
import signal
from itertools import combinations, product

import pytest
import torch
from runs import (
    SMALL,
    Child,
    Killed,
    assert_same_run,
    free_port,
    metrics,
    no_picture,
    pause_after,
    read,
    stop_at,
    wait_for,
    write_data,
)

import plots
import train

CHOICES = {
    "place": ("first", "middle", "last", "between", "evaluation"),
    "optimizer": ("sgd", "adam", "adamw", "rmsprop", "adagrad", "adadelta"),
    "scheduler": ("cosine", "warm-up", "onecycle", "constant"),
    "loaders": ("device>device", "device>workers", "workers>device", "workers>workers"),  # before and after the stop
    "precision": ("fp32", "bf16", "fp16"),
    "dropout": ("0", "0.3"),
    "validation": ("0", "10"),
    "stops": ("once", "twice"),
    "rest": ("plain", "smoothing", "mixing"),
}
FLAGS = {"warm-up": ["--scheduler", "cosine", "--warmup-epochs", "0.5"],
         "smoothing": ["--label-smoothing", "0.1", "--grad-clip", "0", "--block", "preact", "--se", "block"],
         "mixing": ["--mixup", "0.2", "--cutmix", "1", "--trivial-augment", "--ema", "0.9"]}
LOADERS = {"device": ["--loader", "device"], "workers": ["--loader", "workers", "--workers", "0"]}
# Every pair of two choices is in at least one of these cases.
GRID = """
first sgd cosine workers>workers fp16 0.3 10 once mixing
first adam constant device>device fp32 0.3 10 once mixing
first adamw onecycle device>device fp32 0.3 10 once mixing
first rmsprop warm-up workers>device bf16 0.3 10 once plain
first adagrad warm-up workers>workers fp32 0 0 twice smoothing
first adadelta onecycle device>workers fp16 0 10 twice plain
middle sgd constant device>workers bf16 0 0 twice mixing
middle adam warm-up workers>device fp32 0 10 once smoothing
middle adamw cosine device>device fp16 0 0 twice smoothing
middle rmsprop cosine workers>workers fp32 0.3 10 once smoothing
middle adagrad onecycle workers>workers bf16 0.3 0 twice plain
middle adadelta constant workers>device fp32 0.3 10 once smoothing
last sgd onecycle device>device fp16 0 0 once smoothing
last adam onecycle device>workers bf16 0.3 0 twice mixing
last adamw warm-up device>workers bf16 0.3 0 once plain
last rmsprop cosine device>workers fp32 0 10 twice smoothing
last adagrad constant workers>device fp16 0.3 0 twice mixing
last adadelta constant workers>workers fp32 0 10 once smoothing
between sgd constant workers>device fp32 0 0 once smoothing
between adam cosine device>device bf16 0 10 twice plain
between adamw onecycle workers>workers fp32 0.3 10 twice plain
between rmsprop constant device>device bf16 0.3 10 twice plain
between adagrad cosine device>workers fp32 0.3 10 twice mixing
between adadelta warm-up device>device fp16 0 0 once mixing
evaluation sgd warm-up device>workers fp32 0 0 twice plain
evaluation adam constant workers>workers fp16 0.3 0 once plain
evaluation adamw constant workers>device bf16 0 0 once mixing
evaluation rmsprop onecycle workers>device fp16 0 0 twice mixing
evaluation adagrad onecycle device>device bf16 0.3 10 once smoothing
evaluation adadelta cosine workers>device bf16 0 0 once smoothing
""".strip().splitlines()


@pytest.fixture(scope="module")
def small_data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(plots, "safely", no_picture)


@pytest.fixture
def run(tmp_path, small_data):
    """Give a function that runs the program in this process, in a folder of that name."""
    def run(name, *flags):
        places = ["--data-dir", str(small_data), "--checkpoint-dir", str(tmp_path), "--name", name]
        return train.main([*places, *([] if "--resume" in flags else SMALL), *flags])
    return run


def run_and_stop(run, place, *flags):
    """Run until the place is reached."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, place)
        if place == "between":
            with pytest.raises(Killed):
                run("stopped", *flags)
        else:
            assert run("stopped", *flags) == 143


def test_the_grid_has_every_pair():
    rows = [dict(zip(CHOICES, line.split(), strict=True)) for line in GRID]
    for (a, values), (b, others) in combinations(CHOICES.items(), 2):
        assert {(row[a], row[b]) for row in rows} == set(product(values, others))


@pytest.mark.parametrize("case", GRID)
def test_resumed_equals_unbroken(case, run, tmp_path):
    choice = dict(zip(CHOICES, case.split(), strict=True))
    flags = ["--optimizer", choice["optimizer"], "--precision", choice["precision"], "--dropout", choice["dropout"],
             "--val-size", choice["validation"], *FLAGS.get(choice["rest"], []),
             *FLAGS.get(choice["scheduler"], ["--scheduler", choice["scheduler"]])]
    before, after = (LOADERS[name] for name in choice["loaders"].split(">"))
    assert run("unbroken", *flags) == 0
    run_and_stop(run, choice["place"], *flags, *before)
    if choice["stops"] == "twice":
        run_and_stop(run, "later", "--resume", *after)
    assert run("stopped", "--resume", *after) == 0
    assert_same_run(tmp_path / "stopped", tmp_path / "unbroken")


def test_with_worker_processes_and_another_number_of_them_after_the_stop(run, tmp_path):
    assert run("unbroken", "--dropout", "0.3") == 0
    run_and_stop(run, "middle", "--dropout", "0.3", "--loader", "workers", "--workers", "2")
    assert run("stopped", "--resume", "--workers", "1") == 0
    assert_same_run(tmp_path / "stopped", tmp_path / "unbroken")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPUs")
@pytest.mark.parametrize("place", ["middle", "between"])
def test_compiled_with_dropout(place, run, tmp_path):
    flags = ["--compile", "--dropout", "0.3"]
    assert run("unbroken", *flags) == 0
    assert read(tmp_path / "unbroken")["environment"]["compile"]
    run_and_stop(run, place, *flags)
    assert run("stopped", "--resume") == 0
    assert_same_run(tmp_path / "stopped", tmp_path / "unbroken")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("compiled", ["--no-compile", "--compile"])
def test_on_cuda_with_deterministic(precision, compiled, run, tmp_path):
    flags = ["--device", "cuda", "--deterministic", "--dropout", "0.3", "--precision", precision, compiled]
    assert run("unbroken", *flags) == 0
    run_and_stop(run, "middle", *flags)
    assert run("stopped", "--resume") == 0
    assert_same_run(tmp_path / "stopped", tmp_path / "unbroken")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs the start method forkserver")
def test_two_processes_that_only_one_is_told_to_stop(small_data, tmp_path):
    places = ["--data-dir", str(small_data), "--checkpoint-dir", str(tmp_path), "--name"]
    flags = [*SMALL, "--dropout", "0.3", "--mixup", "0.2"]

    def start(name, *argv, prepare=(None, None), args=()):
        port = free_port()
        world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return [Child([*places, name, *argv], tmp_path / f"{name}.{rank}.log", prepare[rank], args, RANK=str(rank),
                      LOCAL_RANK=str(rank), **world) for rank in range(2)]

    unbroken = start("unbroken", *flags)
    marker = tmp_path / "marker"
    stopped = start("stopped", *flags, prepare=(None, pause_after), args=(0, 2, marker))
    wait_for(marker.exists)
    stopped[1].signal(signal.SIGTERM)
    marker.unlink()
    assert [child.wait() for child in stopped] == [143, 143], stopped[0].output()
    assert read(tmp_path / "stopped")["step"] == 2
    resumed = start("stopped", "--resume")
    assert [child.wait() for child in unbroken + resumed] == [0] * 4
    assert_same_run(tmp_path / "stopped", tmp_path / "unbroken")
    assert len(read(tmp_path / "stopped")["rng"]) == 2


def test_workers_may_be_given_beside_resume_auto(run, tmp_path):
    run_and_stop(run, "middle", "--loader", "workers", "--workers", "1")
    assert run("stopped", "--resume", "auto", "--workers", "0") == 0
    assert read(tmp_path / "stopped")["args"]["workers"] == 0


def test_another_number_of_processes_is_told(run, tmp_path, capsys):
    run_and_stop(run, "middle")
    checkpoint = torch.load(tmp_path / "stopped" / "last.pt")
    sums = checkpoint["totals"]["sums"][0]
    checkpoint["totals"]["sums"], checkpoint["environment"]["processes"] = [sums / 2, sums / 2], 2
    torch.save(checkpoint, tmp_path / "stopped" / "last.pt")
    assert run("unbroken") == run("stopped", "--resume") == 0
    assert "warning: the run goes on, but not to the bit: processes 2 -> 1" in capsys.readouterr().err
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "unbroken")
