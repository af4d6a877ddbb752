"""Small training runs that a test can stop, kill or disturb, and a bitwise comparison of run folders."""

import contextlib
import io
import itertools
import json
import multiprocessing
import os
import pickle
import re
import signal
import socket
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo  # the first step of an optimizer imports it; here, once for all processes of `Child`

import data
import evaluate
import train
import utils

ROOT = Path(__file__).resolve().parent.parent
NETWORK = ["--num-blocks", "1", "1", "--channels", "8", "--se-reduction", "2"]
# 30 images: 4 steps an epoch, some milliseconds each, the last one with 6 images.
SMALL = [*NETWORK, "--batch-size", "8", "--epochs", "2", "--limit-train", "30", "--limit-test", "20", "--lr", "0.01",
         "--device", "cpu", "--precision", "fp32"]
MAY_DIFFER = {"seconds", "images_per_second", "args", "environment"}  # between two checkpoints of the same run
RESULTS = "last_accuracy best_accuracy best_epoch test_accuracy test_weights per_class".split()
# Finished epochs, and steps of the current one; the last step of an epoch is 4, or 3 with a validation set.
PLACES = {"first": (0, 1), "middle": (0, 2), "last": (0, 4), "between": (1, 0), "evaluation": (1, 0), "later": (1, 2)}

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs the start method forkserver")


def write_data(folder: Path, count: int) -> Path:
    """Write batch files of `count` training and 20 test images, all random, and return their folder."""
    rng = np.random.default_rng(0)
    for name, size in (("data_batch_1", count), ("test_batch", 20)):
        images = rng.integers(0, 256, (size, 32, 32, 3), dtype=np.uint8)
        write_batch(folder / name, images, np.arange(size) % 10)
    return folder


def make_split(count: int = 70) -> data.Split:
    """Make `count` random images with random labels."""
    rng = np.random.default_rng(count)
    return data.Split(torch.from_numpy(rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)),
                      torch.from_numpy(rng.integers(0, 10, count)), list("abcdefghij"))


def write_batch(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """Write images (N, 32, 32, 3) uint8 and labels as a batch file with the official keys."""
    batch = {b"batch_label": b"test", b"labels": labels.tolist(),
             b"data": images.transpose(0, 3, 1, 2).reshape(len(images), 3072),
             b"filenames": [b"%06d.png" % index for index in range(len(images))]}
    path.write_bytes(pickle.dumps(batch, protocol=2))


def command_line(data_dir: Path, folder: Path, *flags: str) -> list[str]:
    """Return the arguments of a small run; a resumed one takes its settings from the checkpoint."""
    settings = [] if "--resume" in flags and "auto" not in flags else SMALL
    return [*settings, "--data-dir", str(data_dir), "--output-dir", str(folder), *flags]


# --- stopping and comparing ------------------------------------------------------------------------------------------


def stop(run: Callable[..., int], place: str, *flags: str, number: int = signal.SIGTERM, **kwargs: Any) -> None:
    """Run until one of the `PLACES`; stop there by a signal, or `between` epochs without one, after saving."""
    finish_epoch, (epoch, step) = train.finish_epoch, PLACES[place]

    def finish_and_stop(run, state, signals):
        if place == "evaluation" and state.epoch + 1 == epoch:
            signal.raise_signal(number)
        status = finish_epoch(run, state, signals)
        if place == "between" and state.epoch == epoch:
            train.save(run, state)
            raise KeyboardInterrupt
        return status

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", train.train_step)  # restores it
        patch.setattr(train, "finish_epoch", finish_and_stop)
        at_step(epoch, step, lambda *_: signal.raise_signal(number))
        assert run(*flags, **kwargs) == (130 if place == "between" or number == signal.SIGINT else 143)


def read(folder: Path, name: str = "last.pt") -> dict[str, Any]:
    """Read a checkpoint without the program's own reader."""
    return torch.load(folder / name, weights_only=True)


def difference(found: Any, expected: Any) -> str | None:
    """Name the first place where two nested values differ in type or in a bit."""
    found, expected = dict(flatten(found)), dict(flatten(expected))
    places = found.keys() | expected.keys()
    return min((place for place in places if found.get(place) != expected.get(place)), default=None)


def flatten(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the places and the plain values in a nested value."""
    if isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if key not in MAY_DIFFER:
                yield from flatten(item, f"{place}.{key}")
    elif isinstance(value, torch.Tensor):
        yield place, (value.dtype, value.shape, value.numpy().tobytes())
    else:
        yield place, (type(value), value)


def metrics(folder: Path) -> str:
    """Read metrics.csv without its two columns of time, which are the last ones."""
    return re.sub(r",[^,\n]*,[^,\n]*$", "", (folder / "metrics.csv").read_text(), flags=re.MULTILINE)


def assert_same_run(found: Path, expected: Path) -> None:
    """Assert that two run folders are bitwise identical: the whole state, the best weights, and metrics.csv."""
    for name in ("last.pt", "best.pt"):
        where = difference(read(found, name), read(expected, name))
        assert where is None, f"{name}{where}"
    assert metrics(found) == metrics(expected), "metrics.csv differs"
    for name in RESULTS if (found / "results.json").exists() else ():
        where = [json.loads((folder / "results.json").read_text())[name] for folder in (found, expected)]
        assert where[0] == where[1], f"results.json: {name}"
    assert metrics(found).count("\n") == 1 + len(read(found)["history"]), "metrics.csv has other rows than the history"


# --- files of other origin -------------------------------------------------------------------------------------------


class Call:
    """Pickles as the call of a function with arguments."""

    def __init__(self, *call: Any):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def trap(path: Path) -> Call:
    """Return what makes a folder if it is unpickled."""
    return Call(os.mkdir, str(path))


def repack(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Rewrite the pickle in a checkpoint; all checksums are right."""
    target = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            new.writestr(entry.filename, change(content) if entry.filename.endswith("data.pkl") else content)
    path.write_bytes(target.getvalue())


# --- a process of its own --------------------------------------------------------------------------------------------


class Child:
    """The program in a new process, forked from a server that imported torch once; `log` takes its output.

    Before the program, the process calls `prepare(*args)`, a function of a module such as `kill_at_call`.
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

    def wait(self, timeout_s: float = 300) -> int:
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
        """Send it a signal; one that has just ended does not mind, and `wait` returns how it ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)


def _run_child(argv: list[str], log: Path, prepare: Callable | None, args: tuple, env: dict[str, str]) -> None:
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(env)
    multiprocessing.set_start_method("forkserver", force=True)  # as Python 3.14 does
    data.START_METHOD = os.environ.get("START_METHOD") or data.START_METHOD
    torch.set_num_threads(1)
    draw_nothing(pytest.MonkeyPatch())
    if prepare is not None:
        prepare(*args)
    sys.exit(train.main(argv))


def draw_nothing(patch: pytest.MonkeyPatch) -> None:
    """Let a run draw nothing: pictures take a second."""
    for module, name in ((train, "draw_curves"), (evaluate, "draw_pictures")):
        patch.setattr(module, name, lambda *_: None)


def free_port() -> str:
    """Find a port that no one listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


def wait_for(condition: Callable[[], Any], timeout_s: float = 300) -> Any:
    """Wait until a condition holds, and return it."""
    end = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)
    return found


# --- what `Child` takes as `prepare` ---------------------------------------------------------------------------------


def at_step(epoch: int, step: int, action: Callable[[train.Run, train.TrainState], Any]) -> None:
    """Do something at the end of a step, or of the last one of a shorter epoch."""
    train_step = train.train_step

    def step_and_act(run, state, *batch):
        train_step(run, state, *batch)
        if (state.epoch, state.step) == (epoch, min(step, len(run.loader))):
            action(run, state)

    train.train_step = step_and_act


def pause_after(epoch: int, step: int, marker: Path) -> None:
    """Make a marker that names the worker processes at the end of a step, and wait until it is gone."""
    def mark_and_wait(*_):
        workers = " ".join(str(process.pid) for process in multiprocessing.active_children())
        utils.write_text(marker, workers)  # at once: the test reads it as soon as it is there
        wait_for(lambda: not marker.exists())
    at_step(epoch, step, mark_and_wait)


def break_pipes_after(epoch: int, step: int, marker: Path) -> None:
    """Pause at the end of a step, and replace the output by pipes whose readers are gone."""
    pause_after(epoch, step, marker)
    for number in (1, 2):
        reader, writer = os.pipe()
        os.dup2(writer, number)
        os.close(reader)


def kill_at_call(number: int, epoch: int, step: int) -> None:
    """Kill the process at a call that changes a file, counted from the end of a step; step 0 counts from the start.

    The process ends with status 99 at the step after, if there were fewer calls.
    """
    calls, write_bytes, unlink = itertools.count(1), Path.write_bytes, Path.unlink

    def lethal(function: Callable) -> Callable:
        def count_and_call(path, *args, **kwargs):
            if (function is not unlink or path.exists()) and next(calls) == number:
                if function is write_bytes:  # in the middle of it
                    write_bytes(path, bytes(args[0])[:-100])
                os.kill(os.getpid(), signal.SIGKILL)
            return function(path, *args, **kwargs)
        return count_and_call

    def arm(*_):
        Path.write_bytes, Path.unlink, os.replace = map(lethal, (write_bytes, unlink, os.replace))

    at_step(epoch, step, arm)
    at_step(epoch, step + 1, lambda *_: os._exit(99))
    if step == 0:
        arm()


def fill_disk(epoch: int, step: int) -> None:
    """Let no file grow over 4 kB from the end of a step on, as on a full disk."""
    import resource
    at_step(epoch, step, lambda *_: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)))
