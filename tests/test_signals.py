"""Signals: the first ends a run once all is saved, the second at once, and SIGUSR1 saves and goes on."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import (
    SMALL,
    Child,
    assert_same_run,
    close_streams,
    close_streams_late,
    free_port,
    pause_after,
    pause_at_start,
    pause_before,
    read,
    wait_for,
    write_data,
)

import train
from trainer import Trainer

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs the start method forkserver")
ROOT = Path(train.__file__).parent


@pytest.fixture(scope="module")
def small_data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def start(tmp_path, small_data):
    """Give a function that starts the program in a process of its own; `run` is the name of its folder."""
    def start(*flags, run="run", prepare=None, args=(), **env):
        places = ["--data-dir", str(small_data), "--checkpoint-dir", str(tmp_path), "--name", run]
        flags = [*places, *([] if "--resume" in flags else SMALL), *flags]
        return Child(flags, tmp_path / f"{run}.log", prepare, args, **env)
    return start


@pytest.fixture
def paused(start, tmp_path):
    """Give a function that starts a run and waits until it pauses at the end of the third step."""
    def paused(*flags, prepare=pause_after, args=(0, 3), **kwargs):
        child = start(*flags, prepare=prepare, args=(*args, tmp_path / "marker"), **kwargs)
        wait_for((tmp_path / "marker").exists)
        return child
    return paused


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("flags", [[], ["--loader", "workers", "--workers", "2"]])
def test_a_signal_ends_the_run_after_the_step_and_all_is_saved(number, status, flags, paused, start, tmp_path):
    assert start(run="unbroken").wait() == 0
    child = paused(*flags)
    child.signal(number)
    (tmp_path / "marker").unlink()
    assert child.wait() == status, child.output()
    assert "stopped in epoch 1 after step 3, all saved; go on with: " in child.output()
    assert (read(tmp_path / "run")["epoch"], read(tmp_path / "run")["step"]) == (0, 3)
    assert start("--resume").wait() == 0
    assert_same_run(tmp_path / "run", tmp_path / "unbroken")


@pytest.mark.parametrize("method", ["fork", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_loader_workers_leave_signals_to_the_main_process(method, paused, tmp_path):
    """A terminal, `timeout` and job queues signal every process of a job; a dead worker would end the run unsaved."""
    child = paused("--loader", "workers", "--workers", "2", START_METHOD=method)
    for worker in (tmp_path / "marker").read_text().split():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(int(worker), number)
    (tmp_path / "marker").unlink()
    assert child.wait() == 0, child.output()  # its second epoch needs the workers


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_at_once_and_leaves_good_files(number, paused, start, tmp_path):
    child = paused("--save-minutes", "0")
    child.signal(number)
    wait_for(lambda: "again ends at once" in child.output())
    time.sleep(0.6)  # two within half a second are one: terminals and torchrun pass the same one on
    child.signal(number)
    assert child.wait() == -number  # what a shell shows as 130 or 143
    assert read(tmp_path / "run")["step"] == 2
    (tmp_path / "marker").unlink()
    assert start("--resume").wait() == 0


def test_one_signal_that_arrives_twice_is_one(paused, tmp_path):
    child = paused()
    child.signal(signal.SIGTERM)
    child.signal(signal.SIGTERM)
    (tmp_path / "marker").unlink()
    assert child.wait() == 143 and read(tmp_path / "run")["step"] == 3


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_the_last_evaluation_saves_and_says_how_to_go_on(number, status, paused, start, tmp_path):
    child = paused("--epochs", "1", prepare=pause_before, args=(Trainer, "finish_epoch"))
    child.signal(number)
    (tmp_path / "marker").unlink()
    assert child.wait() == status, child.output()
    assert "stopped after the last epoch, all saved; go on with: " in child.output()
    assert read(tmp_path / "run")["epoch"] == 1 and not (tmp_path / "run" / "results.json").exists()
    assert start("--resume").wait() == 0
    assert (tmp_path / "run" / "results.json").exists()


def test_sigterm_before_the_first_step_leaves_by_the_door(paused, tmp_path):
    """What has been begun, such as a download, is cleaned up."""
    child = paused(prepare=pause_at_start, args=())
    child.signal(signal.SIGTERM)
    assert child.wait() == 143, child.output()


def test_sigusr1_saves_and_goes_on(paused, tmp_path):
    child = paused()
    assert not (tmp_path / "run" / "last.pt").exists()
    child.signal(signal.SIGUSR1)
    (tmp_path / "marker").unlink()
    assert child.wait() == 0, child.output()
    assert read(tmp_path / "run", "previous.pt")["step"] == 3  # the end of the run has moved it there


def test_sigusr1_before_the_first_step_does_no_harm(paused, tmp_path):
    """Reading data and compiling take minutes, in which a queue's early warning may come."""
    child = paused(prepare=pause_at_start, args=())
    child.signal(signal.SIGUSR1)
    (tmp_path / "marker").unlink()
    assert child.wait() == 0, child.output()


@pytest.mark.parametrize("prepare, args, saved", [(close_streams, (0, 3), (0, 3)), (close_streams_late, (), (1, 1))])
def test_a_signal_ends_a_run_whose_output_is_closed(prepare, args, saved, paused, tmp_path):
    """In `train.py 2>&1 | tee log`, Ctrl-C ends tee first: there is no one left to tell."""
    child = paused(prepare=prepare, args=args)
    child.signal(signal.SIGINT)
    (tmp_path / "marker").unlink()
    assert child.wait() == 130
    assert (read(tmp_path / "run")["epoch"], read(tmp_path / "run")["step"]) == saved


def test_the_printed_command_goes_on(paused, tmp_path):
    child = paused(run="a run")
    child.signal(signal.SIGTERM)
    (tmp_path / "marker").unlink()
    assert child.wait() == 143
    command = re.search("go on with: (.*)", child.output())[1]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # as in an active environment
    done = subprocess.run(command, shell=True, cwd=ROOT, env={**os.environ, "PATH": path}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert read(tmp_path / "a run")["epoch"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("number, to_all", [(signal.SIGTERM, False), (signal.SIGINT, True), (signal.SIGTERM, True)])
def test_a_signal_to_torchrun_or_to_all_its_processes(number, to_all, small_data, tmp_path):
    """A queue signals torchrun or everyone, a terminal everyone; torchrun passes it on once more."""
    unbroken = torchrun(small_data, tmp_path, "unbroken", *SMALL, "--epochs", "40")
    assert unbroken.wait(300) == 0
    stopped = torchrun(small_data, tmp_path, "stopped", *SMALL, "--epochs", "40", "--save-minutes", "0")
    wait_for((tmp_path / "stopped" / "metrics.csv").exists)
    (os.killpg if to_all else os.kill)(stopped.pid, number)
    assert stopped.wait(300) != 0
    output = (tmp_path / "stopped.log").read_text()
    assert "all saved; go on with: " in output, output
    assert output.count("again ends at once") == 1  # of two processes
    assert 0 <= read(tmp_path / "stopped")["epoch"] < 40
    assert torchrun(small_data, tmp_path, "stopped", "--resume").wait(300) == 0
    assert_same_run(tmp_path / "stopped", tmp_path / "unbroken")


def torchrun(data, folder, name, *flags):
    """Start a run of two processes by torchrun, in a process group of its own."""
    places = ["--data-dir", str(data), "--checkpoint-dir", str(folder), "--name", name]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port()]
    with open(folder / f"{name}.log", "w") as log:
        return subprocess.Popen([*command, "train.py", *places, *flags], cwd=ROOT, stdout=log, stderr=log,
                                start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
