"""Several ranks: the same sums as one process, to 1e-8 in float64; one end for all; whole runs under torchrun."""

import csv
import datetime
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import runs
import torch
from runs import ROOT, SMALL, Child, at_step, free_port, make_split, read, wait_for, write_data
from torch import distributed as dist
from torch import nn

import cifar10
import data
import distributed
import download
import evaluate
import hardware
import options
import train
from checkpoint import COLUMNS, RunFolder, TrainState
from distributed import World
from process import Signals, set_up_process
from utils import RunError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs the start method forkserver")

# --- in float64 ------------------------------------------------------------------------------------------------------

# Training images, and flags; each 5 steps an epoch, 20 in all. For two ranks batches are uneven (4 and 3 images), and
# the last one has 3 images, or one, so that the second rank has none.
CASES = {"smaller last batch": (31, ["--momentum", "0.9", "--grad-clip", "0.05"]),
         "last batch of one": (29, ["--momentum", "0.9", "--grad-clip", "0", "--label-smoothing", "0.1"])}
EPOCHS, STEPS, CPU = 4, 5, torch.device("cpu")


class InDouble(nn.Module):
    """The network in float64, given the loader's float32; without statistics of a batch, which ranks do not share."""

    def __init__(self, args):
        super().__init__()
        torch.manual_seed(0)
        self.network = options.build_model(args).double().to(memory_format=torch.channels_last)  # as on most devices

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.network.eval()(inputs.double())


def train_in_double(world: World, folder: Path) -> dict[str, dict]:
    """Train every case, and return the weights and the history of each."""
    found = {}
    for name, (count, flags) in CASES.items():
        args, _ = options.parse_args([*SMALL, "--batch-size", "7", "--epochs", str(EPOCHS), "--lr", "0.1", *flags])
        model, loader = InDouble(args), data.DeviceLoader(make_split(count), args, CPU, world)
        state = TrainState(args, model, len(loader), "fp32")
        run = train.Run(args, world, CPU, "fp32", RunFolder(folder), loader, make_split(22), make_split(22),
                        train.build_forward(args, model, CPU, "fp32"))
        for _ in range(EPOCHS):
            train.train_one_epoch(run, state, Signals())
            train.finish_epoch(run, state, Signals())
        found[name] = {"weights": model.state_dict(), "history": state.history}
    return found


def train_in_double_first(rank: int, folder: Path, port: str) -> None:
    """Train the cases as one of two ranks, and write the results; what `Child` does before its own run."""
    os.environ["MASTER_PORT"], own_port = port, os.environ["MASTER_PORT"]
    world = distributed.start()
    evaluate.CPU_BATCH_SIZE = 4  # so that both have images to evaluate
    torch.save({"world": tuple(world), **train_in_double(world, folder)}, folder / f"{rank}.pt")
    distributed.stop()
    os.environ["MASTER_PORT"] = own_port
    if rank:  # in the run that follows
        RunFolder.lock = RunFolder.load = RunFolder.save = None  # only rank 0 may call them


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
    return [*SMALL, "--limit-train", "33", "--epochs", "4", "--lr", "0.02", "--dropout", "0.2", "--ema", "0.9",
            "--data-dir", folder]


@pytest.fixture(scope="module")
def two(flags, tmp_path_factory):
    """Two ranks that trained the cases in float64, and then a whole run."""
    folder = tmp_path_factory.mktemp("two")
    return folder, *run_ranks([*flags, "--output-dir", folder / "unbroken"], folder, train_in_double_first,
                              (folder, free_port()))


def test_two_ranks_equal_one(two, tmp_path):
    for case, expected in train_in_double(World(), tmp_path).items():
        for rank in range(2):
            found = torch.load(two[0] / f"{rank}.pt")[case]
            for name, value in expected["weights"].items():
                torch.testing.assert_close(found["weights"][name], value, rtol=0, atol=1e-8)
            for row, wanted in zip(found["history"], expected["history"], strict=True):
                wanted = {name: wanted[name] for name in COLUMNS[:-2] if wanted[name] is not None}  # no times
                assert {name: row[name] for name in wanted} == pytest.approx(wanted, rel=1e-6)  # logits are float32
                assert row["train_loss"] == pytest.approx(wanted["train_loss"], rel=1e-9)


def test_rank_0_prints_and_writes_and_metrics_are_of_all_images(two, flags):
    folder, statuses, (printed, silent) = two
    assert statuses == [0, 0], printed + silent
    assert "2 ranks" in printed and "accuracy: last epoch" in printed and silent == ""
    rows = list(csv.DictReader((folder / "unbroken" / "metrics.csv").open()))
    assert [(row["epoch"], row["step"]) for row in rows] == [("1", "5"), ("2", "10"), ("3", "15"), ("4", "20")]
    correct = [float(row["train_accuracy"]) * 33 / 100 for row in rows]
    assert correct == pytest.approx([round(number) for number in correct], abs=1e-3)
    model, *_ = evaluate.load_checkpoint_model(folder / "unbroken" / "last.pt")
    test = data.load_split(flags[-1], cifar10.TEST_FILES)
    loss, _ = evaluate.score(evaluate.predict_logits(model, test.images, CPU), test.targets)
    assert float(rows[-1]["test_loss"]) == pytest.approx(loss, rel=1e-5)  # with the batch norm statistics of rank 0


def print_world(rank: int) -> None:
    """Print this rank's place, as on two machines with two ranks and one."""
    socket.gethostname = lambda: "beta" if rank == 1 else "alpha"
    print(tuple(distributed.start()), flush=True)
    sys.exit(0)


def test_local_rank_and_size_come_from_the_host_names(two, tmp_path):
    assert [torch.load(two[0] / f"{rank}.pt")["world"] for rank in range(2)] == [(0, 0, 2, 2), (1, 1, 2, 2)]
    _, outputs = run_ranks([], tmp_path, print_world, size=3, LOCAL_RANK="7")
    assert outputs == ["(0, 0, 3, 2)\n", "(1, 0, 3, 1)\n", "(2, 1, 3, 2)\n"]


def test_a_torch_without_ranks_trains(run, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_available", lambda: False)
    monkeypatch.delattr(torch.distributed, "is_initialized")
    assert run("--epochs", "1") == 0


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
        at_step(0, 3, lambda _, state: state.totals.fill_(float("nan")))


def spoil_statistics(rank: int) -> None:
    """Put a NaN into what only rank 1 has, its batch norm statistics, before a save."""
    if rank == 1:
        at_step(0, 2, lambda _, state: next(state.model.buffers()).fill_(float("nan")))


def select_fp16(rank: int) -> None:
    """Let rank 1 select another precision, as an older GPU does."""
    if rank == 1:
        hardware.select_precision = lambda *_: "fp16"


@pytest.mark.parametrize(("break_files", "prepare", "mistake", "statuses", "line"), [
    (lambda folder: (folder / "data_batch_1").write_bytes(b"nothing"), print, [], [2, 2], r".*data_batch_1"),
    (lambda folder: [path.unlink() for path in folder.iterdir()], leave_no_server, [], [2, 2], r".*--data-dir"),
    (lambda folder: (folder / "run/args.json/file").mkdir(parents=True), print, [], [1, 1], r".*args\.json"),
    (print, diverge, [], [1, 1], r"the loss is not finite in epoch 1, step 3"),
    (print, spoil_statistics, [], [1, 1], r"a weight is not finite"),
    (print, select_fp16, [], [2, 2], "the ranks have selected cpu in fp16 and cpu in fp32; choose one with --device"),
    (print, lose_contact, [], [1, -signal.SIGKILL], r"lost contact with another rank.*--resume"),
    # found by every rank, at different places
    (print, print, ["--lr", "x"], [2, 2], "argument --lr: invalid float value: 'x'"),
    (print, print, ["--max-params", "9"], [2, 2], r"the network has .* above --max-params \(9\)"),
    (print, print, ["--resume", "nowhere"], [2, 2], "--resume nowhere: not a run folder")])
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
        assert len({tuple(rng["cpu"][:8].tolist()) for rng in saved["rng"]}) == size  # different seeds of dropout
    assert run_ranks(run_flags, tmp_path, print, size=2)[0] == [0, 0]
    history = read(folder)["history"]
    correct = [row["train_accuracy"] * 33 / 100 for row in history]  # of all images, by whatever ranks
    assert len(history) == 4 and correct == pytest.approx([round(number) for number in correct], abs=1e-9)


def train_killed_and_stopped(killed: int, kill_at: int, end_at: int) -> None:
    """Kill a rank in its first life; in the second, let the launcher be told to stop, as by a job queue."""
    life, rank = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
    note, noted = Signals._note, []

    def note_and_remember(*args):
        note(*args)
        noted.append(True)

    def stop_launcher(*_):
        os.kill(os.getppid(), signal.SIGTERM)
        wait_for(lambda: noted)  # until the launcher has passed it on
    Signals._note = note_and_remember
    runs.draw_nothing(pytest.MonkeyPatch())
    if (life, rank) == (0, killed):
        at_step((kill_at - 1) // STEPS, (kill_at - 1) % STEPS + 1, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    if (life, rank) == (1, 0):
        at_step((end_at - 1) // STEPS, (end_at - 1) % STEPS + 1, stop_launcher)
    sys.exit(train.main([*sys.argv[1:], "--save-minutes", "0" if life == 0 else "60"]))


@pytest.mark.parametrize(("killed", "kill_at", "end_at"), [
    (1, 4, 11), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(0, 1, 5), (0, 5, 6), (1, 10, 19)])])
def test_torchrun_resumes_after_a_killed_rank_and_after_sigterm(two, flags, tmp_path, killed, kill_at, end_at):
    script, folder = tmp_path / "script.py", tmp_path / "run"
    script.write_text(f"import test_distributed as t\nt.train_killed_and_stopped({killed}, {kill_at}, {end_at})\n")
    flags = [*flags, "--output-dir", folder]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1",
         script, *flags, "--overwrite"], capture_output=True, text=True, timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"})
    starts = re.findall(r"^folder .*\((.*)\)$", done.stdout, re.MULTILINE)
    epoch, step = divmod(kill_at - 1, STEPS)  # the last one saved
    restart = f"resumed in epoch {epoch + 1} after step {step}" if epoch or step else "new run"
    assert starts == ["new run", restart], done.stderr
    assert "all saved; resume with: torchrun --nproc-per-node 2 " in done.stdout
    saved = read(folder)
    assert saved["epoch"] * STEPS + saved["step"] == end_at
    assert run_ranks([*flags, "--resume", "auto"], tmp_path, print)[0] == [0, 0]
    runs.assert_same_run(folder, two[0] / "unbroken")
