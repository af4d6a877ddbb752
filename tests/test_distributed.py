"""Several processes: the same sums as one, to 1e-8 in float64; and whole runs under torchrun, killed and stopped."""

import copy
import csv
import math
import os
import re
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from runs import Child, assert_same_run, at_step, free_port, read
from torch import nn
from torch.nn import functional as F

import data
import evaluate
import models
import options
import utils
from trainer import Trainer
from utils import Processes, RunFolder, Signals, UserError

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs the start method forkserver")

# --- in float64 ------------------------------------------------------------------------------------------------------

# Training images, and flags; each 5 steps an epoch, 20 in all. The last batch has 3 images, or one, for two processes.
CASES = {
    "smaller last batch": (31, ["--momentum", "0.9", "--grad-clip", "0.05"]),
    "last batch of one": (29, ["--momentum", "0.9", "--grad-clip", "0", "--label-smoothing", "0.1"]),
}
EPOCHS, STEPS, LR, DECAY = 4, 5, 0.1, 5e-4
FLAGS = ["--num-blocks", "1", "1", "--channels", "8", "--se-reduction", "2", "--batch-size", "7", "--lr", str(LR),
         "--epochs", str(EPOCHS), "--weight-decay", str(DECAY), "--device", "cpu", "--precision", "fp32"]


class InDouble(nn.Module):
    """The network in float64, fed with the loader's float32."""

    def __init__(self, flags: list[str]):
        super().__init__()
        torch.manual_seed(0)
        self.network = models.build_model(**options.model_args(options.parse_args(flags)[0])).double()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.network(inputs.double())


def make_split(count: int) -> data.Split:
    rng = np.random.default_rng(count)
    return data.Split(torch.from_numpy(rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)),
                      torch.from_numpy(rng.integers(0, 10, count)), list("abcdefghij"))


def make_trainer(case: str, folder: Path, processes: Processes, *more: str) -> Trainer:
    count, flags = CASES[case]
    args, _ = options.parse_args([*FLAGS, *flags, *more])
    loader = data.DeviceLoader(make_split(count), args.batch_size, torch.device("cpu"), 0, processes=processes)
    return Trainer(args, InDouble([*FLAGS, *flags]), loader, make_split(22), "test", RunFolder(folder),
                   torch.device("cpu"), processes)


def train_in_double(rank: int, folder: Path, port: str) -> None:
    """Train every case as one of two processes, and write what came of it; what `Child` does before its own run."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    own_port, os.environ["MASTER_PORT"] = os.environ["MASTER_PORT"], port
    processes = utils.start_processes()
    evaluate.BATCH_SIZE, found = 4, {}  # so that both have images to evaluate
    for name in CASES:
        trainer = make_trainer(name, folder, processes)
        for _ in range(EPOCHS):
            trainer.train_epoch(Signals())
            trainer.finish_epoch()
        found[name] = {"weights": trainer.model.state_dict(), "history": trainer.history}
    try:
        processes.first_do(refuse)
    except UserError as error:
        found["error"] = str(error)
    except SystemExit as error:
        found["error"] = f"SystemExit {error.code}"
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()
    os.environ["MASTER_PORT"] = own_port
    if rank:  # in the run that follows
        utils.write_atomically = RunFolder.open = RunFolder.clear = refuse


def refuse(*_) -> None:
    """Fail, if anyone calls it."""
    raise UserError("only the first process may do this")


@cache
def train_halves_apart(case: str) -> tuple[nn.Module, list[dict[str, float]]]:
    """Do in one process and plain words what two should: each half of a batch by itself, then one step."""
    count, flags = CASES[case]
    args, _ = options.parse_args([*FLAGS, *flags])
    model, test = InDouble([*FLAGS, *flags]).train(), make_split(22)
    velocities, history, step = [torch.zeros_like(p) for p in model.parameters()], [], 0
    for epoch in range(EPOCHS):
        sums = {"loss": 0.0, "hits": 0}
        for inputs, targets in data.DeviceLoader(make_split(count), 7, torch.device("cpu"), 0).epoch(epoch):
            middle = (len(targets) + 1) // 2
            gradients = [torch.zeros_like(p) for p in model.parameters()]
            # batch norm's averages are those that the first process sees
            for half, network in ((slice(middle), model), (slice(middle, None), copy.deepcopy(model))):
                if not len(targets[half]):
                    continue
                logits = network(inputs[half])
                loss = F.cross_entropy(logits, targets[half], reduction="sum", label_smoothing=args.label_smoothing)
                sums["loss"] += loss.item()
                sums["hits"] += int((logits.argmax(1) == targets[half]).sum())
                for total, part in zip(gradients, torch.autograd.grad(loss, network.parameters()), strict=True):
                    total += part / len(targets)
            lr = LR * (1 + math.cos(math.pi * step / (EPOCHS * STEPS))) / 2
            with torch.no_grad():
                for p, gradient, velocity in zip(model.parameters(), gradients, velocities, strict=True):
                    if args.grad_clip:
                        gradient.clamp_(-args.grad_clip, args.grad_clip)
                    velocity.mul_(0.9).add_(gradient + DECAY * p)
                    p.sub_(lr * velocity)
            step += 1
        model.eval()
        with torch.no_grad():  # one image at a time
            logits = torch.cat([model(evaluate.to_input(image[None])) for image in test.images])
        model.train()
        history.append({"train_loss": sums["loss"] / count, "train_accuracy": 100 * sums["hits"] / count,
                        "test_loss": F.cross_entropy(logits, test.targets).item(),
                        "test_accuracy": 100 * int((logits.argmax(1) == test.targets).sum()) / 22})
    assert step == EPOCHS * STEPS == 20
    return model, history


@pytest.fixture(scope="module")
def two(data_dir, tmp_path_factory):
    """Let two processes train the cases in float64, and then the run that those under torchrun must equal."""
    folder, ports = tmp_path_factory.mktemp("two"), (free_port(), free_port())
    children = [Child([*places(data_dir, folder, "unbroken"), *RUN], folder / f"{rank}.log", train_in_double,
                      (rank, folder, ports[0]), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=ports[1]) for rank in range(2)]
    statuses = [child.wait() for child in children]
    return folder, statuses, [child.output() for child in children]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one_that_runs_both_halves_apart(two, case):
    model, _ = train_halves_apart(case)
    start = InDouble(FLAGS).state_dict()
    for rank in range(2):
        weights = torch.load(two[0] / f"{rank}.pt")[case]["weights"]
        for name, expected in model.state_dict().items():
            torch.testing.assert_close(weights[name], expected, rtol=0, atol=1e-8)
            assert not torch.equal(expected, start[name])


@pytest.mark.parametrize("case", CASES)
def test_metrics_of_two_processes_are_those_of_all_images(two, case):
    _, expected = train_halves_apart(case)
    for rank in range(2):
        history = torch.load(two[0] / f"{rank}.pt")[case]["history"]
        for row, wanted in zip(history, expected, strict=True):
            assert {name: row[name] for name in wanted} == pytest.approx(wanted, rel=1e-6)
            assert row["train_loss"] == pytest.approx(wanted["train_loss"], rel=1e-9)


def test_a_user_s_mistake_on_the_first_process_ends_all_and_is_told_once(two):
    errors = [torch.load(two[0] / f"{rank}.pt")["error"] for rank in range(2)]
    assert errors == ["only the first process may do this", "SystemExit 2"]


def die_in_the_third_step(rank: int) -> None:
    """Let the second process be killed."""
    if rank == 1:
        at_step(0, 3, lambda _: os.kill(os.getpid(), signal.SIGKILL))


def test_a_lost_process_is_told_in_one_line(data_dir, tmp_path):
    port = free_port()
    left, lost = (Child([*places(data_dir, tmp_path, "left"), *RUN], tmp_path / f"{rank}.log", die_in_the_third_step,
                        (rank,), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                        MASTER_PORT=port) for rank in range(2))
    assert (left.wait(), lost.wait()) == (1, -signal.SIGKILL)
    assert left.output().splitlines()[-1].startswith("train.py: error: another process of this run was lost")
    assert "Traceback" not in left.output()


# --- votes -----------------------------------------------------------------------------------------------------------


class Vote(Processes):
    """One of two processes that votes alone; something can happen while it waits for the other."""

    def max(self, tensor):
        self.meanwhile()
        return tensor

    def meanwhile(self) -> None:
        pass


@pytest.mark.parametrize(("device", "expected"), [("cpu", [1, 2, 3, 4, 5]), ("cuda", [2, 4, 5])])
def test_gpus_vote_at_the_log_interval_and_at_the_end_of_an_epoch(tmp_path, device, expected):
    trainer = make_trainer("last batch of one", tmp_path, Processes(), "--log-interval", "2")
    signals, stopped = Signals(), []
    trainer.processes, trainer.device, signals.stop = Vote(0, 0, 2), torch.device(device), 15
    for trainer.step in range(1, STEPS + 1):
        if trainer.agree(signals) == (15, False):
            stopped.append(trainer.step)
    assert stopped == expected


def test_a_signal_that_comes_during_a_vote_is_not_lost(tmp_path, monkeypatch):
    trainer, signals = make_trainer("last batch of one", tmp_path, Processes()), Signals()
    trainer.processes = Vote(0, 0, 2)
    monkeypatch.setattr(Vote, "meanwhile", lambda _: setattr(signals, "save", True))
    assert trainer.agree(signals) == (None, False)
    monkeypatch.undo()
    assert trainer.agree(signals) == (None, True)
    assert trainer.agree(signals) == (None, False)


# --- whole runs ------------------------------------------------------------------------------------------------------

# 5 steps an epoch, the last of one image, which only the first process has; dropout, which differs between the two.
RUN = ["--num-blocks", "1", "1", "--channels", "8", "--se-reduction", "2", "--batch-size", "8", "--limit-train", "33",
       "--limit-test", "20", "--epochs", "4", "--lr", "0.02", "--dropout", "0.2", "--device", "cpu", "--precision",
       "fp32", "--synthetic"]
# A first life in which a process is killed, a second in which the agent is told to end, as by a job queue.
WRAPPER = """
import os, signal, sys, time
import plots, runs, train, utils
from trainer import Trainer

life, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
train_step, note, heard = Trainer.train_step, utils.Signals._note, []

def note_and_tell(*args):
    note(*args)
    heard.append(True)

def train_step_and_end(self, *batch):
    train_step(self, *batch)
    done = self.epoch * len(self.loader) + self.step
    if life == 0 and rank == {killed} and done == {kill_at}:
        os.kill(os.getpid(), signal.SIGKILL)
    if life == 1 and rank == 0 and done == {end_at}:
        os.kill(os.getppid(), signal.SIGTERM)
        while not heard:  # until the agent has passed it on
            time.sleep(0.01)

Trainer.train_step, utils.Signals._note, plots.safely = train_step_and_end, note_and_tell, runs.no_picture
sys.exit(train.main([*sys.argv[1:], "--save-minutes", "0" if life == 0 else "60"]))
"""


def places(data_dir: Path, folder: Path, name: str) -> list[str]:
    return ["--data-dir", str(data_dir), "--checkpoint-dir", str(folder), "--name", name]


def torchrun(script: Path, *flags: str, timeout_s: float = 120) -> tuple[int, str, str]:
    """Run a program on two processes, and again on two if one of them dies; return status, stdout and stderr."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "--max-restarts", "1", str(script), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as agent:
        try:
            said, complained = agent.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            agent.terminate()  # and with it those that it started
            pytest.fail(f"still running after {timeout_s} s: {agent.communicate()}")
    return agent.returncode, said, complained


def test_a_run_on_two_processes_is_told_and_written_by_the_first(two):
    folder, statuses, (said, silent) = two
    assert statuses == [0, 0], said + silent
    assert "2 processes" in said and "last test accuracy" in said
    assert "epoch" not in silent and "accuracy" not in silent
    rows = list(csv.DictReader((folder / "unbroken" / "metrics.csv").open()))
    assert [(row["epoch"], row["step"]) for row in rows] == [("1", "5"), ("2", "10"), ("3", "15"), ("4", "20")]
    hits = [float(row["train_accuracy"]) * 33 / 100 for row in rows]
    assert hits == pytest.approx([round(number) for number in hits], abs=1e-3)


@pytest.mark.parametrize(("killed", "kill_at", "end_at"), [
    (1, 4, 11), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(0, 1, 5), (0, 5, 6), (1, 10, 19)])])
def test_torchrun_goes_on_after_a_killed_process_and_after_sigterm(two, data_dir, tmp_path, killed, kill_at, end_at):
    wrapper = tmp_path / "wrapper.py"
    wrapper.write_text(WRAPPER.format(killed=killed, kill_at=kill_at, end_at=end_at))
    flags = [*places(data_dir, tmp_path, "broken"), *RUN, "--resume", "auto"]
    _, said, complained = torchrun(wrapper, *flags)
    beginnings = re.findall(r"^run .*\((.*)\)$", said, re.MULTILINE)
    epoch, step = divmod(kill_at - 1, STEPS)  # the last one saved
    assert beginnings == ["new", f"from epoch {epoch + 1}, step {step}" if epoch or step else "new"], complained
    assert "all saved; go on with: " in said
    saved = read(tmp_path / "broken")
    assert saved["epoch"] * STEPS + saved["step"] == end_at
    status, _, complained = torchrun(ROOT / "train.py", *flags)
    assert status == 0, complained
    assert (tmp_path / "broken" / "results.json").exists()
    assert_same_run(tmp_path / "broken", two[0] / "unbroken")
