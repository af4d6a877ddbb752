"""Runs for the tests of safety: small ones, stopped where a test wants it, and compared to the last bit."""

import contextlib
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import batches
import plots
import train
from trainer import Trainer

# Two blocks on 30 images: 4 steps an epoch, the last one with fewer images, some milliseconds each.
SMALL = ["--num-blocks", "1", "1", "--channels", "8", "--se-reduction", "2", "--batch-size", "8", "--epochs", "2",
         "--limit-train", "30", "--limit-test", "20", "--lr", "0.01", "--device", "cpu", "--precision", "fp32",
         "--no-download"]
STATE = ("model", "ema", "optimizer", "scheduler", "scaler", "epoch", "step", "best_accuracy", "history", "rng",
         "classes")
TIMES = ("seconds", "images_per_second")
# Epochs completed, and steps in the running one; the last step of an epoch is 4, or 3 with a validation set.
PLACES = {"first": (0, 1), "middle": (0, 2), "last": (0, 4), "between": (1, 0), "evaluation": (1, 0), "later": (1, 2)}


def write_data(folder: Path) -> Path:
    """Write batch files of 30 and 20 random images, and return their folder."""
    rng = np.random.default_rng(0)
    for name, count in (("data_batch_1", 30), ("test_batch", 20)):
        images = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        batches.write_batch(folder / name, images, np.arange(count) % 10, name)
    return folder


class Killed(BaseException):
    """Stands for a kill within this process: nothing of the program may catch it."""


# --- in this process -------------------------------------------------------------------------------------------------


def stop_at(monkeypatch, place: str) -> None:
    """Stop the run in this process at one of its `PLACES`: by a signal, `between` epochs by `Killed`, once saved."""
    train_step, finish_epoch, (epoch, step) = Trainer.train_step, Trainer.finish_epoch, PLACES[place]

    def step_and_signal(self, *batch):
        train_step(self, *batch)
        if (self.epoch, self.step) == (epoch, min(step, len(self.loader))):
            signal.raise_signal(signal.SIGTERM)

    def finish_and_stop(self):
        finish_epoch(self)
        if place == "evaluation" and self.epoch == epoch:
            signal.raise_signal(signal.SIGTERM)
        if place == "between" and self.epoch == epoch:
            self.save()
            raise Killed

    monkeypatch.setattr(Trainer, "train_step", step_and_signal)
    monkeypatch.setattr(Trainer, "finish_epoch", finish_and_stop)


def read(folder: Path, name: str = "last.pt") -> dict[str, Any]:
    """Read a checkpoint as it lies there, without the program's own reader."""
    return torch.load(folder / name, weights_only=True)


def difference(found: Any, expected: Any, place: str = "") -> str | None:
    """Name the first place where two nested values differ in type or in a bit, apart from times."""
    if type(found) is not type(expected):
        return f"{place}: {type(found)} and {type(expected)}"
    if isinstance(found, torch.Tensor):
        same = found.dtype == expected.dtype and torch.equal(found, expected)
        return None if same else f"{place}: tensors differ"
    if isinstance(found, dict):
        found, expected = ({key: value for key, value in d.items() if key not in TIMES} for d in (found, expected))
        if list(found) != list(expected):
            return f"{place}: keys {list(found)} and {list(expected)}"
        pairs = [(key, found[key], expected[key]) for key in found]
    elif isinstance(found, list | tuple):
        if len(found) != len(expected):
            return f"{place}: lengths {len(found)} and {len(expected)}"
        pairs = [(i, *pair) for i, pair in enumerate(zip(found, expected, strict=True))]
    else:
        return None if found == expected else f"{place}: {found!r} and {expected!r}"
    return next(filter(None, (difference(a, b, f"{place}.{key}") for key, a, b in pairs)), None)


def metrics(folder: Path) -> str:
    """Read metrics.csv without its two columns of time, which are the last ones."""
    return re.sub(r",[^,\n]*,[^,\n]*$", "", (folder / "metrics.csv").read_text(), flags=re.MULTILINE)


def assert_same_run(found: Path, expected: Path) -> None:
    """Assert that two run folders hold the same bits: the whole state, the best weights, and metrics.csv."""
    for name, keys in (("last.pt", STATE), ("best.pt", ("model", "epoch", "accuracy", "picked_by"))):
        states = [read(folder, name) for folder in (found, expected)]
        where = difference(*({key: state[key] for key in keys} for state in states))
        assert where is None, f"{name}{where}"
        if name == "last.pt":
            assert difference(*(state["totals"]["sums"] for state in states)) is None, "the running sums differ"
            rows = len(states[0]["history"])
    assert metrics(found) == metrics(expected), "metrics.csv differs"
    assert metrics(found).count("\n") == 1 + rows, "metrics.csv has other rows than the history"


# --- in a process of its own -----------------------------------------------------------------------------------------


class Child:
    """The program in a new process, forked from a server that imported torch once.

    Args:
        argv: The command line.
        log: File that takes its output.
        prepare: Called in the process before the program, such as `kill_at_call`; a function of a module.
        args: Of `prepare`.
        env: Added to the environment.
    """

    def __init__(self, argv: list[str], log: Path, prepare: Callable | None = None, args: tuple = (), **env: str):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["runs"])
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # for the server: older versions forget the path
            forkserver.ensure_running()
        self.log = log
        self.process = context.Process(target=_run_child, args=(argv, log, prepare, args, env))
        self.process.start()

    def wait(self, timeout_s: float = 120) -> int:
        """Wait for the end; return the exit status, or minus the signal that ended it."""
        self.process.join(timeout_s)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"still running after {timeout_s} s: {self.output()}")
        return self.process.exitcode

    def output(self) -> str:
        """Read what it has printed so far."""
        return self.log.read_text()

    def signal(self, number: int) -> None:
        """Send it a signal; one that has just ended does not mind, and `wait` tells how it ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)


def _run_child(argv: list[str], log: Path, prepare: Callable | None, args: tuple, env: dict[str, str]) -> None:
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(env)
    multiprocessing.set_start_method(os.environ.get("START_METHOD", "fork"), force=True)  # of the program's workers
    torch.set_num_threads(1)
    plots.safely = no_picture  # takes a second
    if prepare is not None:
        prepare(*args)
    sys.exit(train.main(argv))


def no_picture(*_: Any) -> None:
    """Draw nothing."""


def free_port() -> str:
    """Find a port that no one listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def wait_for(condition: Callable[[], Any], timeout_s: float = 120) -> Any:
    """Wait until a condition holds, and return it."""
    end = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)
    return found


# What `Child` takes as `prepare`


def at_step(epoch: int, step: int, action: Callable) -> None:
    """Do something at the end of a step."""
    train_step = Trainer.train_step

    def step_and_act(self, *batch):
        train_step(self, *batch)
        if (self.epoch, self.step) == (epoch, step):
            action(self)

    Trainer.train_step = step_and_act


def pause_after(epoch: int, step: int, marker: Path) -> None:
    """Make a marker that names the worker processes at the end of a step, and wait until it is gone."""
    def mark_and_wait(_):
        marker.write_text(" ".join(str(process.pid) for process in multiprocessing.active_children()))
        wait_for(lambda: not marker.exists())
    at_step(epoch, step, mark_and_wait)


def pause_before(owner: Any, name: str, marker: Path, action: Callable = lambda: None) -> None:
    """Make a marker before a function is called, wait until it is gone, and go on after an action."""
    function = getattr(owner, name)

    def mark_and_wait(*args):
        marker.write_text("")
        wait_for(lambda: not marker.exists())
        action()
        return function(*args)

    setattr(owner, name, mark_and_wait)


def pause_at_start(marker: Path) -> None:
    """Pause before the data are read."""
    pause_before(train, "load_data", marker)


def close_streams(epoch: int, step: int, marker: Path) -> None:
    """Pause at the end of a step, with output to pipes that no one reads any more."""
    at_step(epoch, step, lambda _: break_pipes())
    pause_after(epoch, step, marker)


def close_streams_late(marker: Path) -> None:
    """Pause in the evaluation after each epoch, and go on with output to pipes that no one reads any more."""
    pause_before(Trainer, "predict", marker, break_pipes)


def break_pipes() -> None:
    """Replace the output by pipes whose readers are gone."""
    for number in (1, 2):
        reader, writer = os.pipe()
        os.dup2(writer, number)
        os.close(reader)


def kill_at_call(number: int, epoch: int, step: int) -> None:
    """Kill the process at a call that changes a file, counted from the end of a step; step 0 counts from the start.

    The process ends with status 99 at the step after, if there were fewer calls.
    """
    train_step, calls = Trainer.train_step, 0 if (epoch, step) == (0, 0) else None

    def step_and_count(self, *batch):
        nonlocal calls
        if calls is not None:
            os._exit(99)
        train_step(self, *batch)
        if (self.epoch, self.step) == (epoch, step):
            calls = 0

    def lethal(function: Callable) -> Callable:
        def count_and_call(*args, **kwargs):
            nonlocal calls
            calls = None if calls is None else calls + 1
            if calls == number:
                if function is write_bytes:  # in the midst of it
                    write_bytes(args[0], bytes(args[1])[:-100])
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return count_and_call

    write_bytes = Path.write_bytes
    Trainer.train_step, Path.write_bytes, Path.unlink = step_and_count, lethal(write_bytes), lethal(Path.unlink)
    os.replace, os.fsync = lethal(os.replace), lethal(os.fsync)


def fill_disk(epoch: int, step: int) -> None:
    """Let no file grow over 4 kB from the end of a step on, as on a full disk."""
    import resource
    at_step(epoch, step, lambda _: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)))


def remove_folder(epoch: int, step: int) -> None:
    """Remove the run folder at the end of a step."""
    at_step(epoch, step, lambda trainer: shutil.rmtree(trainer.folder.path))


def record_memory(path: Path, *steps: int) -> None:
    """Add this process's resident bytes to a file, a line after each of some steps of the whole run."""
    import resource
    train_step = Trainer.train_step

    def step_and_record(self, *batch):
        train_step(self, *batch)
        if self.epoch * len(self.loader) + self.step in steps:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            with open(path, "a") as file:
                file.write(f"{pages * resource.getpagesize()}\n")

    Trainer.train_step = step_and_record


def break_loss(epoch: int, step: int) -> None:
    """Make the loss NaN from the step after."""
    def spoil(trainer):
        trainer.criterion = lambda logits, _: logits.sum() * float("nan")
    at_step(epoch, step, spoil)
