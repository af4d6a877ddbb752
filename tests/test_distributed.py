"""Several ranks: the same sums as one process, to 1e-8 in float64; one end for all; whole runs under torchrun."""

import copy
import csv
import datetime
import math
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from runs import SMALL, Child, assert_same_run, at_step, break_loss, free_port, make_split, read, wait_for, write_data
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F

import augment
import data
import distributed
import download
import evaluate
import options
import train
from checkpoint import RunFolder, TrainState
from distributed import World
from process import Signals, set_up_process
from utils import RunError, UserError

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs the start method forkserver")

# --- in float64 ------------------------------------------------------------------------------------------------------

# Training images, and flags; each 5 steps an epoch, 20 in all. For two ranks batches are uneven (4 and 3 images), and
# the last one has 3 images, or one, so that the second rank has none.
CASES = {
    "smaller last batch": (31, ["--momentum", "0.9", "--grad-clip", "0.05"]),
    "last batch of one": (29, ["--momentum", "0.9", "--grad-clip", "0", "--label-smoothing", "0.1"]),
}
EPOCHS, STEPS, LR, DECAY, CPU = 4, 5, 0.1, 5e-4, torch.device("cpu")
FLAGS = [*SMALL, "--batch-size", "7", "--lr", str(LR), "--epochs", str(EPOCHS), "--weight-decay", str(DECAY)]


class InDouble(nn.Module):
    """The network in float64, given the loader's float32."""

    def __init__(self, args):
        super().__init__()
        torch.manual_seed(0)
        self.network = options.build_model(args).double().to(memory_format=torch.channels_last)  # as on most devices

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.network(inputs.double())


def train_in_double(rank: int, folder: Path, port: str) -> None:
    """Train every case as one of two ranks, and write the results; what `Child` does before its own run."""
    os.environ["MASTER_PORT"], own_port = port, os.environ["MASTER_PORT"]
    world = distributed.start()
    evaluate.CPU_BATCH_SIZE, found = 4, {"world": tuple(world)}  # so that both have images to evaluate
    for name, (count, flags) in CASES.items():
        args, _ = options.parse_args([*FLAGS, *flags])
        model, loader = InDouble(args), data.DeviceLoader(make_split(count), args, CPU, world)
        state = TrainState(args, model, len(loader), "fp32")
        run = train.Run(args, world, CPU, "fp32", RunFolder(folder), loader, make_split(22), make_split(22),
                        train.build_forward(args, model, CPU, "fp32"))
        for _ in range(EPOCHS):
            train.train_one_epoch(run, state, Signals())
            train.finish_epoch(run, state)
        found[name] = {"weights": model.state_dict(), "history": state.history}
    torch.save(found, folder / f"{rank}.pt")
    distributed.stop()
    os.environ["MASTER_PORT"] = own_port
    if rank:  # in the run that follows
        RunFolder.lock = RunFolder.load = RunFolder.save = refuse


def refuse(*_) -> None:
    raise UserError("only rank 0 may do this")


def train_halves_apart(case: str) -> tuple[nn.Module, list[dict[str, float]]]:
    """Do in one process what two ranks should do: each half of a batch by itself, then one step."""
    count, flags = CASES[case]
    args, _ = options.parse_args([*FLAGS, *flags])
    model, test = InDouble(args).train(), make_split(22)
    velocities, history, step = [torch.zeros_like(p) for p in model.parameters()], [], 0
    for epoch in range(EPOCHS):
        loss_sum = correct = 0
        for inputs, targets in data.DeviceLoader(make_split(count), args, CPU).epoch(epoch):
            middle = (len(targets) + 1) // 2
            gradients = [torch.zeros_like(p) for p in model.parameters()]
            # the running statistics of batch norm are those of rank 0
            for half, network in ((slice(middle), model), (slice(middle, None), copy.deepcopy(model))):
                if not len(targets[half]):
                    continue
                logits = network(inputs[half])
                loss = F.cross_entropy(logits, targets[half], reduction="sum", label_smoothing=args.label_smoothing)
                loss_sum += loss.item()
                correct += int((logits.argmax(1) == targets[half]).sum())
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
            logits = torch.cat([model(augment.to_input(image[None])) for image in test.images])
        model.train()
        history.append({"train_loss": loss_sum / count, "train_accuracy": 100 * correct / count,
                        "test_loss": F.cross_entropy(logits, test.targets).item(),
                        "test_accuracy": 100 * int((logits.argmax(1) == test.targets).sum()) / 22})
    assert step == EPOCHS * STEPS == 20
    return model, history


# --- ranks without a launcher ----------------------------------------------------------------------------------------


def run_ranks(argv, folder: Path, prepare=None, args=(), size: int = 2, **env) -> tuple[list[int], list[str]]:
    """Run train.py on ranks that know what srun sets, RANK and WORLD_SIZE; return their statuses and outputs."""
    env = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), **env}
    children = [Child([*map(str, argv)], folder / f"{rank}.log", prepare, (rank, *args), RANK=str(rank), **env)
                for rank in range(size)]
    statuses = [child.wait() for child in children]
    # torch 2.10 prints a line of its own per rank
    return statuses, [re.sub(r"^\[Gloo\] .*\n", "", child.output(), flags=re.M) for child in children]


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """A run of 5 steps an epoch, the last of one image, which only rank 0 has; dropout differs between the ranks."""
    folder = write_data(tmp_path_factory.mktemp("data"), 33)
    return [*SMALL, "--limit-train", "33", "--epochs", "4", "--lr", "0.02", "--dropout", "0.2", "--data-dir", folder]


@pytest.fixture(scope="module")
def two(flags, tmp_path_factory):
    """Two ranks that trained the cases in float64, and then a whole run."""
    folder = tmp_path_factory.mktemp("two")
    return folder, *run_ranks([*flags, "--output-dir", folder / "unbroken"], folder, train_in_double,
                              (folder, free_port()))


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one_process_that_runs_both_halves(two, case):
    model, history = train_halves_apart(case)
    for rank in range(2):
        found = torch.load(two[0] / f"{rank}.pt")[case]
        for name, expected in model.state_dict().items():
            torch.testing.assert_close(found["weights"][name], expected, rtol=0, atol=1e-8)
        for row, expected in zip(found["history"], history, strict=True):
            assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-6)  # logits are float32
            assert row["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-9)


def test_rank_0_prints_and_writes_and_metrics_are_of_all_images(two):
    folder, statuses, (printed, silent) = two
    assert statuses == [0, 0], printed + silent
    assert "2 ranks" in printed and "accuracy: last epoch" in printed and silent == ""
    rows = list(csv.DictReader((folder / "unbroken" / "metrics.csv").open()))
    assert [(row["epoch"], row["step"]) for row in rows] == [("1", "5"), ("2", "10"), ("3", "15"), ("4", "20")]
    correct = [float(row["train_accuracy"]) * 33 / 100 for row in rows]
    assert correct == pytest.approx([round(number) for number in correct], abs=1e-3)


def print_world(rank: int) -> None:
    """Print this rank's place, as on two machines with two ranks and one."""
    socket.gethostname = lambda: "beta" if rank == 1 else "alpha"
    print(tuple(distributed.start()), flush=True)
    sys.exit(0)


def test_local_rank_and_size_come_from_the_host_names(two, tmp_path):
    assert [torch.load(two[0] / f"{rank}.pt")["world"] for rank in range(2)] == [(0, 0, 2, 2), (1, 1, 2, 2)]
    _, outputs = run_ranks([], tmp_path, print_world, size=3, LOCAL_RANK="7")
    assert outputs == ["(0, 0, 3, 2)\n", "(1, 0, 3, 1)\n", "(2, 1, 3, 2)\n"]


@pytest.mark.parametrize("has_nccl", [True, False])
def test_gpu_tensors_use_nccl_where_torch_has_it_on_the_selected_device(has_nccl, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(dist, "is_nccl_available", lambda: has_nccl)
    monkeypatch.setattr(dist, "new_group", lambda **kwargs: calls.append(kwargs) or "nccl group")
    for name in ("all_reduce", "broadcast"):
        monkeypatch.setattr(dist, name, lambda tensor, group, **_: calls.append((tensor.is_cuda, group)))
    for is_cuda in (False, True):
        World(0, 0, 2, 2).sum(SimpleNamespace(is_cuda=is_cuda))
        World(0, 0, 2, 2).broadcast([SimpleNamespace(is_cuda=is_cuda)])
    distributed._gpu_group.cache_clear()
    made = [{"backend": "nccl", "timeout": datetime.timedelta(minutes=10), "device_id": torch.device("cuda", 3)}]
    group = "nccl group" if has_nccl else None
    assert calls == [(False, None), (False, None), *made * has_nccl, (True, group), (True, group)]


@pytest.mark.parametrize(("changes", "status", "line"), [
    ({"MASTER_ADDR": None}, 2, "RANK and WORLD_SIZE are set, but the ranks cannot meet .*MASTER_ADDR"),
    ({"RANK": "1", "WORLD_SIZE": "1"}, 2, "RANK and WORLD_SIZE are set.*RANK is 1 and WORLD_SIZE is 1"),
    ({"RANK": "first"}, 2, "RANK and WORLD_SIZE are set.*'first'"),
    ({}, 1, "cannot meet the other ranks at 127.0.0.1:.*EADDRINUSE.*MASTER_PORT is free")])
def test_ranks_that_cannot_meet_are_one_line(changes, status, line, monkeypatch, flags, tmp_path, refused):
    with socket.socket() as busy:
        busy.bind(("0.0.0.0", 0))
        busy.listen()
        settings = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(busy.getsockname()[1])} | changes
        for name, value in settings.items():
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
        error = refused(train.main, [*map(str, flags), "--output-dir", str(tmp_path)], status=status)
    assert re.match(f"train.py: error: {line}", error), error


def handle_signals(rank: int, marker: Path) -> None:
    """Handle signals in Python, as train.py does, and make a marker when the rank begins to wait."""
    set_up_process()
    rendezvous = dist.rendezvous
    dist.rendezvous = lambda url: [marker.write_text(""), rendezvous(url)][1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("rank", "address"), [(0, "127.0.0.1"), (1, "no-such-host.invalid")])
def test_a_signal_ends_a_rank_that_waits_for_the_others(number, rank, address, flags, tmp_path):
    marker = tmp_path / "waiting"
    child = Child([*map(str, flags)], tmp_path / "log", handle_signals, (rank, marker), RANK=str(rank), WORLD_SIZE="2",
                  MASTER_ADDR=address, MASTER_PORT=free_port())
    wait_for(marker.exists)
    child.signal(number)
    assert child.wait() == -number  # by the default action, and not by Python's handler


@pytest.mark.parametrize(("error", "expected", "text"), [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to"), torch.OutOfMemoryError, "^CUDA out of memory"),
    (dist.DistBackendError("NCCL error in: x.cpp:1\nncclSystemError: \nLast error:\nno route to host"), RunError,
     r"lost contact with another rank \(no route to host\).*--resume")])
def test_a_collective_that_fails_says_why(error, expected, text, monkeypatch):
    def fail(*_, **__):
        raise error
    monkeypatch.setattr(dist, "all_reduce", fail)
    with pytest.raises(expected, match=text):
        World(0, 0, 2, 2).sum(torch.zeros(1))


# --- every end is that of all ranks ----------------------------------------------------------------------------------


def leave_no_server(rank: int) -> None:
    download.URLS = ("http://127.0.0.1:9/",)
    download.ATTEMPTS = 1


def lose_contact(rank: int) -> None:
    if rank == 1:
        at_step(0, 3, lambda *_: os.kill(os.getpid(), signal.SIGKILL))


def diverge(rank: int) -> None:
    if rank == 1:
        break_loss(0, 2)


def spoil_statistics(rank: int) -> None:
    """Put a NaN into what only rank 1 has, its batch norm statistics, before a save."""
    if rank == 1:
        at_step(0, 2, lambda _, state: next(state.model.buffers()).fill_(float("nan")))


@pytest.mark.parametrize(("break_files", "prepare", "mistake", "statuses", "line"), [
    (lambda folder: (folder / "data_batch_1").write_bytes(b"nothing"), print, [], [2, 2], r".*data_batch_1"),
    (lambda folder: [path.unlink() for path in folder.iterdir()], leave_no_server, [], [2, 2], r".*--data-dir"),
    (lambda folder: (folder / "run/args.json/file").mkdir(parents=True), print, [], [1, 1], r".*args\.json"),
    (print, diverge, [], [1, 1], r"the loss is not finite in epoch 1, step 3"),
    (print, spoil_statistics, [], [1, 1], r"a weight is not finite"),
    (print, lose_contact, [], [1, -signal.SIGKILL], r"lost contact with another rank.*--resume"),
    # found by every rank, at different places
    (print, print, ["--lr", "x"], [2, 2], "argument --lr: invalid float value: 'x'"),
    (print, print, ["--max-params", "9"], [2, 2], r"the network has .* above --max-params \(9\)"),
    (print, print, ["--resume", "nowhere"], [2, 2], "--resume nowhere: not a run folder"),
])
def test_an_error_ends_all_ranks_with_one_line(flags, tmp_path, break_files, prepare, mistake, statuses, line):
    break_files(write_data(tmp_path, 33))
    places = ["--data-dir", tmp_path, "--output-dir", tmp_path / "run", "--save-minutes", "0"]
    found, outputs = run_ranks([*flags, *places, *mistake], tmp_path, prepare, https_proxy="http://127.0.0.1:9",
                               no_proxy="")
    assert found == statuses, outputs
    errors = re.findall(r"^train\.py: error: .*$|^Traceback.*$", "".join(outputs), re.M)
    assert len(errors) == 1 and re.match(f"train.py: error: {line}", errors[0]), outputs


@pytest.mark.parametrize(("device", "expected"), [("cpu", [1, 2, 3, 4, 5]), ("cuda", [2, 4, 5])])
def test_gpus_agree_on_signals_at_the_log_interval_and_at_the_end_of_an_epoch(device, expected):
    world = SimpleNamespace(is_main=True, size=2, max=lambda values: values)  # one of two ranks, which votes alone
    run = SimpleNamespace(world=world, device=torch.device(device), loader=range(5),
                          folder=SimpleNamespace(saved_at=0), args=SimpleNamespace(save_minutes=1e9, log_interval=2))
    signals = SimpleNamespace(stop=143)
    votes = {step: train.check_signals(run, SimpleNamespace(step=step), signals) for step in range(1, 6)}
    assert [step for step, vote in votes.items() if vote == [143, 0]] == expected


# --- whole runs ------------------------------------------------------------------------------------------------------


def stop_after(rank: int, size: int, epoch: int, step: int) -> None:
    """Let one rank get a signal at the end of a step."""
    if rank == size - 1:
        at_step(epoch, step, lambda *_: signal.raise_signal(signal.SIGTERM))


def test_resume_with_another_number_of_ranks(flags, tmp_path):
    folder = tmp_path / "run"
    run_flags = [*flags, "--output-dir", folder]
    for size, epoch, step, change in ((2, 0, 2, None), (1, 1, 3, "ranks 2 -> 1"), (3, 2, 1, "ranks 1 -> 3")):
        statuses, outputs = run_ranks(run_flags, tmp_path, stop_after, (size, epoch, step), size)
        assert statuses == [143] * size, outputs
        assert change is None or "resuming, but not bitwise-identically" in outputs[0] and change in outputs[0]
        saved, run_flags = read(folder), ["--resume", folder]
        assert (saved["epoch"], saved["step"], len(saved["totals"])) == (epoch, step, size)
    assert run_ranks(run_flags, tmp_path, print, size=2)[0] == [0, 0]
    history = read(folder)["history"]
    correct = [row["train_accuracy"] * 33 / 100 for row in history]  # of all images, by whatever ranks
    assert len(history) == 4 and correct == pytest.approx([round(number) for number in correct], abs=1e-9)


# A first life in which a rank is killed, a second in which the launcher is told to stop, as by a job queue.
KILLED_AND_STOPPED = """
import os, signal, sys, time
import evaluate, process, train

life, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
train_step, note, noted = train.train_step, process.Signals._note, []

def note_and_remember(*args):
    note(*args)
    noted.append(True)

def train_step_and_end(run, state, *batch):
    train_step(run, state, *batch)
    step = state.epoch * len(run.loader) + state.step
    if life == 0 and rank == {killed} and step == {kill_at}:
        os.kill(os.getpid(), signal.SIGKILL)
    if life == 1 and rank == 0 and step == {end_at}:
        os.kill(os.getppid(), signal.SIGTERM)
        while not noted:  # until the launcher has passed it on
            time.sleep(0.01)

train.train_step, process.Signals._note = train_step_and_end, note_and_remember
train.draw_curves = evaluate.draw_pictures = lambda *_: None
sys.exit(train.main([*sys.argv[1:], "--save-minutes", "0" if life == 0 else "60"]))
"""


def torchrun(script: Path, *flags, restarts: int = 1, timeout_s: float = 600) -> tuple[int, str, str]:
    """Run two ranks that torchrun starts again when one of them fails; return status, stdout and stderr."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "--max-restarts", str(restarts), str(script), *map(str, flags)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as agent:
        try:
            printed, errors = agent.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            agent.terminate()  # and with it the ranks
            pytest.fail(f"still running after {timeout_s} s: {agent.communicate()}")
    return agent.returncode, printed, errors


@pytest.mark.parametrize(("killed", "kill_at", "end_at"), [
    (1, 4, 11), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(0, 1, 5), (0, 5, 6), (1, 10, 19)])])
def test_torchrun_resumes_after_a_killed_rank_and_after_sigterm(two, flags, tmp_path, killed, kill_at, end_at):
    script, folder = tmp_path / "script.py", tmp_path / "run"
    script.write_text(KILLED_AND_STOPPED.format(killed=killed, kill_at=kill_at, end_at=end_at))
    flags = [*flags, "--output-dir", folder, "--resume", "auto"]
    _, printed, errors = torchrun(script, *flags)
    starts = re.findall(r"^folder .*\((.*)\)$", printed, re.MULTILINE)
    epoch, step = divmod(kill_at - 1, STEPS)  # the last one saved
    restart = f"resumed in epoch {epoch + 1} after step {step}" if epoch or step else "new run"
    assert starts == ["new run", restart], errors
    assert "all saved; resume with: torchrun --nproc-per-node 2 " in printed
    saved = read(folder)
    assert saved["epoch"] * STEPS + saved["step"] == end_at
    assert run_ranks(flags, tmp_path, print)[0] == [0, 0]
    assert_same_run(folder, two[0] / "unbroken")
