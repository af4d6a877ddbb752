"""Training: exact resume, signals, failed saves, divergence, compiled steps, and what a run prints and writes."""

import csv
import errno
import functools
import inspect
import io
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations, count, product
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import runs
import torch
from conftest import one_by_one
from torch import nn

import checkpoint
import data
import evaluate
import hardware
import models
import options
import process
import train

CHOICES = {
    "place": ("first", "middle", "last", "between", "evaluation"),
    "optimizer": ("sgd", "muon", "adam", "adamw", "rmsprop", "adagrad", "adadelta"),
    "scheduler": ("cosine", "warm-up", "onecycle", "constant"),
    "loaders": ("device>device", "device>workers", "workers>device", "workers>workers"),  # before and after the stop
    "precision": ("fp32", "bf16", "fp16"),
    "dropout": ("0", "0.3"),
    "validation": ("0", "10"),
    "stops": ("once", "twice"),
    "rest": ("plain", "smoothing", "mixing"),
}
FLAGS = {"warm-up": ["--scheduler", "cosine", "--warmup-epochs", "0.5"],
         "smoothing": ["--label-smoothing", "0.1", "--grad-clip", "0", "--block", "preact", "--se", "block",
                       "--cutmix", "1", "--plain-epochs", "1"],
         "mixing": ["--mixup", "0.2", "--cutmix", "1", "--trivial-augment", "--ema", "0.9", "--small-epochs", "1",
                    "--bias-lr", "4", "--alternating-flip"]}


def every_pair() -> list[dict[str, str]]:
    """Select cases so that every pair of two choices is in at least one of them."""
    rng, cases = random.Random(0), []
    missing = {frozenset(pair) for a, b in combinations(CHOICES.items(), 2)
               for pair in product(product([a[0]], a[1]), product([b[0]], b[1]))}
    while missing:
        candidates = [{name: rng.choice(values) for name, values in CHOICES.items()} for _ in range(300)]
        pairs = [{frozenset(pair) for pair in combinations(case.items(), 2)} & missing for case in candidates]
        best = max(range(300), key=lambda index: len(pairs[index]))
        cases, missing = [*cases, candidates[best]], missing - pairs[best]
    return cases


@pytest.fixture
def workers_in_process(monkeypatch):
    """Let `--workers` load in this process, which is faster; another test has worker processes."""
    loader = data.WorkersLoader
    monkeypatch.setattr(data, "WorkersLoader", lambda *args, workers: loader(*args, workers=0))


# --- exact resume ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", every_pair(), ids=lambda choice: " ".join(choice.values()))
def test_resumed_equals_unbroken(choice, run, tmp_path, workers_in_process):
    flags = ["--optimizer", choice["optimizer"], "--precision", choice["precision"], "--dropout", choice["dropout"],
             "--val-size", choice["validation"], *FLAGS.get(choice["rest"], []),
             *FLAGS.get(choice["scheduler"], ["--scheduler", choice["scheduler"]])]
    flags += ["--block", "basic"] * (choice["optimizer"] == "muon")  # refuses preact
    before, after = (["--workers", str(int(name == "workers"))] for name in choice["loaders"].split(">"))
    assert run(*flags, folder="unbroken") == 0
    runs.stop(run, choice["place"], *flags, *before)
    if choice["stops"] == "twice":
        runs.stop(run, "later", "--resume", *after)
    assert run("--resume", *after) == 0
    runs.assert_same_run(tmp_path / "run", tmp_path / "unbroken")


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPUs")


@pytest.mark.parametrize("device, precision, compiled", [
    pytest.param("cpu", "fp32", "--compile", marks=[pytest.mark.slow, needs_compiler]),
    *(pytest.param("cuda", *case, marks=needs_cuda)
      for case in product(("fp32", "bf16", "fp16"), ("--no-compile", "--compile")))])
@pytest.mark.parametrize("place", ["middle", "between"])
def test_resume_compiled_and_on_cuda(place, device, precision, compiled, run, tmp_path):
    flags = ["--device", device, "--precision", precision, compiled, "--deterministic", "--dropout", "0.3"]
    assert run(*flags, folder="unbroken") == 0
    assert runs.read(tmp_path / "unbroken")["environment"]["compile"] == (compiled == "--compile")
    runs.stop(run, place, *flags)
    assert run("--resume") == 0
    runs.assert_same_run(tmp_path / "run", tmp_path / "unbroken")


def test_the_seed_sets_the_initial_weights():
    first, again, other = (train.build_model(options.parse_args([*runs.NETWORK, "--seed", seed])[0], None).conv1.weight
                           for seed in "112")
    assert torch.equal(first, again) and not torch.equal(first, other)


# --- steps -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("images", "tolerance"), [(128, 0), (568, 2**-23)])
def test_training_equals_the_published_loop(images, tolerance, run, tmp_path):
    """Two steps are bitwise identical; after nine, the last with 56 images, fused kernels differ in a bit."""
    flags = ["--data-dir", str(runs.write_data(tmp_path, images)), "--limit-train", str(images), "--batch-size", "64",
             "--epochs", "1", "--lr", "0.05", "--scheduler", "constant", "--grad-clip", "0.01"]
    torch.manual_seed(5)
    model = models.SEResNet(num_blocks=[1, 1], channels=8, se_reduction=2).to(memory_format=torch.channels_last)
    torch.save(model.state_dict(), tmp_path / "weights.pt")  # a plain state_dict
    assert run(*flags, "--init-from", str(tmp_path / "weights.pt")) == 0

    args = options.parse_args([*runs.SMALL, *flags])[0]
    train_split, _, test_split = data.load_data(args, train.World())
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    model.train()
    total_loss = correct = 0
    for inputs, targets in data.build_loader(train_split, args, torch.device("cpu"), train.World()).epoch(0):
        optimizer.zero_grad()
        outputs = model(inputs)
        loss = criterion(outputs, targets)
        loss.backward()
        nn.utils.clip_grad_value_(model.parameters(), 0.01)
        optimizer.step()
        total_loss += loss.item() * len(targets)
        correct += (outputs.argmax(1) == targets).sum().item()

    for name, value in runs.read(tmp_path / "run")["model"].items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=tolerance, atol=tolerance / 2, msg=name)
    logits = one_by_one(model.eval(), test_split.images)
    row = runs.read(tmp_path / "run")["history"][0]
    assert row["train_loss"] == pytest.approx(total_loss / images)
    assert row["train_accuracy"] == 100 * correct / images
    assert row["test_loss"] == pytest.approx(criterion(logits, test_split.targets).item(), rel=1e-5)
    assert row["test_accuracy"] == 100 * (logits.argmax(1) == test_split.targets).double().mean().item()


class GraphLike:
    """Stands for a function compiled with CUDA graphs: the next call overwrites the results of this one."""

    def __init__(self, function, **_):
        self.function, self.results, self.shapes = function, (), []
        self.parameters = [*inspect.getclosurevars(function).nonlocals["model"].parameters()]

    def __call__(self, inputs, targets, *mix):
        assert all(p.grad is None for p in self.parameters)  # overwritten, too: torch would refuse to touch them
        assert not mix or mix[0] is not targets  # compiled as the same tensor twice, it would ignore targets_b
        for result in self.results:
            result.detach().fill_(-1)
        self.shapes.append((len(inputs), inputs.shape[2]))
        self.results = self.function(inputs, targets, *mix)
        return self.results


@pytest.mark.parametrize("flags", [[], ["--mixup", "0.2", "--ema", "0.9"], ["--small-epochs", "1"]])
def test_full_batches_run_compiled_and_trying_it_changes_nothing(flags, run, tmp_path, monkeypatch, capsys):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda *args, **kwargs: compiled.append(GraphLike(*args)) or compiled[-1])
    assert run("--dropout", "0.3", *flags, folder="eager") == 0
    assert ", not compiled\n" in capsys.readouterr().out and not compiled
    assert run("--dropout", "0.3", *flags, "--compile") == 0
    assert ", compiled\n" in capsys.readouterr().out
    small = [(8, 24)] if "--small-epochs" in flags else []
    # first the trials; the batches of 6 run eagerly
    assert compiled[0].shapes == [(8, 32), *small] + 3 * (small or [(8, 32)]) + 3 * [(8, 32)]
    runs.assert_same_run(tmp_path / "run", tmp_path / "eager")


def test_a_compiler_that_fails_in_the_backward_pass_costs_one_line(run, unbroken, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("backend='inductor' raised:\nno C compiler" + 40 * "\nmore")

    def fail_backward(function, **_):
        def compiled(*args):
            loss, correct = function(*args)
            loss.grad_fn.register_hook(fail)
            return loss, correct
        return compiled

    monkeypatch.setattr(torch, "compile", fail_backward)
    assert run("--compile") == 0
    printed = capsys.readouterr()
    assert re.fullmatch("warning: torch.compile failed .*raised: no C compiler .*; training without it\n", printed.err)
    assert ", not compiled\n" in printed.out and printed.out.startswith("compiling: ")
    runs.assert_same_run(tmp_path / "run", unbroken)


# --- new runs --------------------------------------------------------------------------------------------------------


def test_init_from_takes_the_averaged_weights_and_the_network(run, tmp_path, capsys):
    assert run("--num-blocks", "2", "1", "--ema", "0.9", "--no-normalize", folder="source") == 0
    source = runs.read(tmp_path / "source")
    argv = [*runs.SMALL[len(runs.NETWORK):], "--data-dir", source["args"]["data_dir"], "--output-dir",
            str(tmp_path / "run"), "--init-from", str(tmp_path / "source" / "last.pt"), "--lr", "0"]
    assert train.main(argv) == 0
    found = runs.read(tmp_path / "run")
    assert found["args"]["num_blocks"] == [2, 1] and not found["args"]["normalize"]
    assert found["ema"] is None and len(found["history"]) == 2
    for name, value in found["model"].items():
        if "running" not in name and "tracked" not in name:  # batch norm statistics move also at lr 0
            assert torch.equal(value, source["ema"][name]) and not torch.equal(value, source["model"][name])
    assert train.main([*argv, "--overwrite", "--channels", "16"]) == 2
    assert "--channels 16 differs from the checkpoint's 8" in capsys.readouterr().err


# --- what a run prints and writes ------------------------------------------------------------------------------------


def test_lines_and_metrics(run, tmp_path, capsys):
    assert run() == 0
    printed = capsys.readouterr()
    assert printed.err == ""  # no progress bar where it is not a terminal
    lines, folder = printed.out.splitlines(), tmp_path / "run"
    assert lines[:5] == [
        f"device  {hardware.describe(hardware.CPU)}, fp32, 1 thread, not compiled",
        "model   SE-ResNet [1, 1], 5,342 parameters", "data    30 training and 20 test images",
        "recipe  2 epochs of 4 steps, batch 8, sgd, lr 0.01, cosine", f"folder  {folder} (new run)"]
    assert (folder / "metrics.csv").read_text().startswith("epoch,step,lr,train_loss,train_accuracy,val_loss,"
        "val_accuracy,test_loss,test_accuracy,seconds,images_per_second\n")
    rows = list(csv.DictReader((folder / "metrics.csv").open(newline="")))
    for line, row, saved, epoch in zip(lines[5:7], rows, runs.read(folder)["history"], (1, 2), strict=True):
        lr = 0.005 * (1 + math.cos(math.pi * (4 * epoch - 1) / 8))
        numbers = {name: float(value) for name, value in row.items() if value}
        assert numbers.keys() == row.keys() - {"val_loss", "val_accuracy"}
        assert (numbers["epoch"], numbers["step"], numbers["lr"]) == (epoch, 4 * epoch, pytest.approx(lr, rel=1e-5))
        assert numbers == pytest.approx({name: saved[name] for name in numbers}, rel=1e-5)
        assert line == ("epoch {epoch}/2  training loss {train_loss:.4f}, accuracy {train_accuracy:.2f}%  test "
                        "loss {test_loss:.4f}, accuracy {test_accuracy:.2f}%  lr {lr:.4g}  {images_per_second:.0f} "
                        "images/s").format(**saved)
    accuracies = [float(row["test_accuracy"]) for row in rows]
    best = accuracies.index(max(accuracies))
    assert lines[7] == (f"test accuracy: last epoch {accuracies[-1]:.2f}%, best {accuracies[best]:.2f}% "
                        f"(epoch {best + 1})")
    assert "selected on the test set" in lines[8] and str(folder) in lines[9] and len(lines) == 10
    results = json.loads((folder / "results.json").read_text())
    assert (results["best_epoch"], results["best_accuracy"]) == (best + 1, accuracies[best])
    assert results["last_accuracy"] == results["test_accuracy"] == accuracies[-1]
    assert results["machines"] == [results["device"]] == [hardware.describe(hardware.CPU)]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for flags in (["--resume", "auto"], ["--resume", str(folder)]):  # `make train` again
        assert run(*flags) == 0
        again = capsys.readouterr().out.splitlines()
        assert again[0] == f"this run is finished: {folder / 'results.json'}" and again[1:4] == lines[7:]
        assert f"--init-from {folder / 'best.pt'} --output-dir NEW" in again[4] and len(again) == 5
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_with_validation_the_test_set_is_used_once(run, tmp_path, capsys, monkeypatch):
    accuracies, drawn = iter([50.0, 50.0, 40.0, 30.0]), []  # three epochs, and the test set
    monkeypatch.setattr(evaluate, "score", lambda logits, targets: (1.0, next(accuracies)))
    monkeypatch.setattr(evaluate, "draw_pictures", lambda _, *shown: drawn.append(shown))
    assert run("--val-size", "10", "--epochs", "3", "--no-normalize") == 0
    assert "10 validation images" in (out := capsys.readouterr().out)
    assert "validation accuracy: last epoch 40.00%, best 50.00% (epoch 1)\ntest accuracy of best.pt 30.00%" in out
    (logits, test), = drawn
    best, *_ = evaluate.load_checkpoint_model(tmp_path / "run/best.pt")
    torch.testing.assert_close(logits, one_by_one(best, test.images, False), rtol=1e-4, atol=1e-5)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["test_weights"], results["selected_on"], results["best_epoch"]) == ("best", "validation", 1)
    assert results["per_class"] == evaluate.per_class(logits, test.targets, test.classes)
    assert results["calibration_error"] == evaluate.calibration_error(logits, test.targets)
    assert all(row["test_loss"] is row["test_accuracy"] is None for row in runs.read(tmp_path / "run")["history"])


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for the 5 s of a step and the 100 s of an evaluation."""
    now, train_step, predict_logits = [0.0], train.train_step, evaluate.predict_logits
    for module in (train, checkpoint):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0], monotonic=lambda: now[0]))

    def take(seconds, function):
        def take_and_call(*args, **kwargs):
            now[0] += seconds
            return function(*args, **kwargs)
        return take_and_call
    monkeypatch.setattr(train, "train_step", take(5, train_step))
    monkeypatch.setattr(evaluate, "predict_logits", take(100, predict_logits))
    return now


STEPS = ["--batch-size", "1", "--epochs", "3"]  # 30 steps, 150 s and an evaluation of 100 s


def test_without_a_terminal_a_line_a_minute_tells_the_time_left(run, clock, capsys):
    runs.stop(run, "later", *STEPS)
    lines = capsys.readouterr().out.splitlines()[5:]
    assert [line.partition(":")[0] for line in lines if " left: " in line] == [
        # at first, an evaluation of 20 images is taken for a third of training on as many
        "epoch 1/3, step 12 of 30, 8 min left", "epoch 1/3, step 24 of 30, 7 min left"]
    assert re.fullmatch(r"epoch 1/3, .*left: loss \d\.\d{3}, accuracy \d+\.\d\d%, lr 0\.\d+, 0 images/s", lines[0])
    assert run("--resume") == 0  # after step 2 of the second epoch
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines() if " left: " in line] == [
        "epoch 2/3, step 14 of 30, 7 min left", "epoch 2/3, step 26 of 30, 6 min left",
        "epoch 3/3, step 12 of 30, 3 min left", "epoch 3/3, step 24 of 30, 2 min left"]


def test_small_images_count_less_in_the_time_left(run, clock, capsys):
    runs.stop(run, "later", *STEPS, "--small-epochs", "1")
    # a full-size step is expected to take 5 s / 0.5625
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines() if " left: " in line] == [
        "epoch 1/3, step 12 of 30, 13 min left", "epoch 1/3, step 24 of 30, 12 min left"]


def test_pictures_at_most_every_five_minutes_on_a_signal_and_at_the_end(run, clock, monkeypatch):
    drawn = []
    monkeypatch.setattr(train, "draw_curves", lambda run, state: drawn.append((state.epoch, state.step, clock[0])))
    runs.stop(run, "later", *STEPS, folder="stopped")
    assert drawn == [(1, 1, 255), (1, 2, 260)]
    drawn.clear()
    clock[0] = 0
    assert run(*STEPS) == 0  # saves every minute, after 12 steps
    assert drawn == [(1, 1, 255), (2, 13, 565), (3, 0, 750)]


@pytest.mark.parametrize("missing", ["stdout", "stderr", "signals"])
def test_a_run_without_a_stream_or_signals(missing, run, unbroken, tmp_path, monkeypatch):
    """As with `>&-`, or without a console on Windows; and in a notebook, since Python handles signals in one thread."""
    if missing == "signals":
        assert ThreadPoolExecutor().submit(run).result() == 0
    else:
        monkeypatch.setattr(sys, missing, None)
        assert run() == 0
    runs.assert_same_run(tmp_path / "run", unbroken)


def test_on_a_terminal_a_bar_gives_way_to_the_line_of_the_epoch(run, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(train, "tqdm", functools.partial(train.tqdm, mininterval=0))
    assert run() == 0
    assert re.findall(r"\repoch (\d)/2 +0%\|.*?\r +\r(epoch \d)/2  training loss", terminal.getvalue(), re.DOTALL) == [
        ("1", "epoch 1"), ("2", "epoch 2")]
    assert " s left: loss " in terminal.getvalue()


# --- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", process.STOP_SIGNALS)  # without SIGHUP under nohup
def test_a_signal_stops_the_run_and_the_printed_command_resumes_it(number, run, tmp_path, monkeypatch, capfd, unbroken):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [os.path.relpath(train.__file__)])
    runs.stop(run, "middle", "--output-dir", "a run", number=number)
    printed = capfd.readouterr()
    assert printed.err == "\nSaving, then stopping. Press Ctrl-C again to quit without saving.\n"
    place, command = re.search("\nstopped in (.*), all saved; resume with: (.*)\n$", printed.out).groups()
    assert place == "epoch 1 after step 2" and runs.read(tmp_path / "a run")["step"] == 2
    assert run(*shlex.split(command)[2:]) == 0
    assert f"--output-dir {tmp_path}/run is not used; the run continues in a run" in capfd.readouterr().err
    assert runs.read(tmp_path / "a run")["args"]["output_dir"] == "a run"
    runs.assert_same_run(tmp_path / "a run", unbroken)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_the_last_evaluation_of_each_split(number, status, run, tmp_path, capsys, monkeypatch):
    to_input, finish_run, batches = evaluate.to_input, train.finish_run, []
    monkeypatch.setattr(evaluate, "to_input", lambda *args: batches.append(args) or to_input(*args))
    runs.stop(run, "evaluation", "--epochs", "1", "--val-size", "10", number=number)
    assert "stopped in epoch 1 after step 3, all saved; resume" in capsys.readouterr().out and not batches
    with monkeypatch.context() as patch:
        patch.setattr(train, "finish_run", lambda *args: signal.raise_signal(number) or finish_run(*args))
        assert run("--resume", "--precision", "bf16") == status
    assert "stopped after the last epoch, all saved; resume with: " in capsys.readouterr().out and len(batches) == 1
    with monkeypatch.context() as patch:  # what is written last says that the run is finished
        patch.setattr(evaluate, "draw_pictures", Mock(side_effect=OSError))
        assert run("--resume") == 1 and not (tmp_path / "run" / "results.json").exists()
    assert run("--resume") == 0
    assert json.loads((tmp_path / "run" / "results.json").read_text())["precision"] == "fp32"  # of the training


@runs.needs_fork
@pytest.mark.parametrize("method", [
    "", *(pytest.param(name, marks=pytest.mark.slow) for name in ("forkserver", "spawn"))])
def test_loader_workers_leave_signals_to_the_main_process(method, paused, tmp_path, unbroken):
    """A terminal, `timeout` and job queues signal every process of a job; a dead worker would end the run unsaved."""
    child = paused("--workers", "2", START_METHOD=method)
    workers = (tmp_path / "marker").read_text().split()
    if not method and sys.platform == "linux":  # a server between them and the run would not survive the signals
        assert {Path(f"/proc/{pid}/stat").read_text().split()[3] for pid in workers} == {str(child.process.pid)}
    for worker, number in product(workers, process.STOP_SIGNALS):
        os.kill(int(worker), number)
    (tmp_path / "marker").unlink()
    assert workers and child.wait() == 0, child.output()  # its second epoch needs the workers
    runs.assert_same_run(tmp_path / "run", unbroken)


@runs.needs_fork
def test_a_signal_ends_a_run_whose_output_is_closed(paused, tmp_path):
    """In `train.py 2>&1 | tee log`, Ctrl-C ends tee first."""
    child = paused(prepare=runs.break_pipes_after)
    child.signal(signal.SIGINT)
    (tmp_path / "marker").unlink()
    assert child.wait() == 130 and runs.read(tmp_path / "run")["step"] == 3


# --- failed saves ----------------------------------------------------------------------------------------------------


@runs.needs_fork
def test_a_full_disk_fails_the_run_only_at_its_end(start, run, tmp_path, unbroken):
    child = start("--save-minutes", "0", prepare=runs.fill_disk, args=(0, 3))
    assert child.wait() == 1
    *warnings, error = (line for line in child.output().splitlines() if re.search("error|warning|Traceback", line))
    reason = f"cannot save ({tmp_path / 'run' / 'last.pt'}: File too large); "
    assert set(warnings) == {f"warning: {reason}training continues, the next save tries again"}
    assert error == f"train.py: error: {reason}the files saved before are intact"
    assert "epoch 2/2  training" in child.output()
    assert runs.read(tmp_path / "run")["step"] == 2 and runs.read(tmp_path / "run", "previous.pt")["step"] == 1
    assert not list((tmp_path / "run").glob(".*.tmp"))
    assert run("--resume") == 0
    runs.assert_same_run(tmp_path / "run", unbroken)


def test_saving_works_again_after_some_failures(run, tmp_path, unbroken, monkeypatch, capsys):
    replace, calls = os.replace, count()

    def fail_three_times(*args):
        if next(calls) in (8, 9, 10):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(*args)

    monkeypatch.setattr(os, "replace", fail_three_times)
    assert run("--save-minutes", "0") == 0
    assert capsys.readouterr().err.count("warning: cannot save") == 3
    runs.assert_same_run(tmp_path / "run", unbroken)


# --- divergence ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spoil, what", [
    (lambda state: state.totals.fill_(math.inf), "the loss"), (lambda state: state.totals.fill_(math.inf), "a weight"),
    (lambda state: next(state.model.parameters()).data.fill_(float("nan")), "a weight"),
    (lambda state: state.model.bn1.running_var.fill_(math.inf), "a weight")],
    ids=["loss", "sums", "weight", "statistics"])
def test_a_diverged_run_stops_and_is_never_saved(spoil, what, run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "train_step", train.train_step)  # restores it
    runs.at_step(1, 2, lambda _, state: spoil(state))
    if what == "a weight":  # where the loss is read only at the log interval, a save can come before it
        monkeypatch.setattr(train, "log_progress", lambda run, state, *_: setattr(state, "seconds", 1.0))
    assert run("--save-minutes", "0") == 1
    assert capsys.readouterr().err == (
        f"train.py: error: {what} is not finite in epoch 2, step 2, at lr 0.003087; try a smaller --lr, or --precision "
        f"fp32 (the last checkpoint is {tmp_path / 'run' / 'last.pt'})\n")
    assert (runs.read(tmp_path / "run")["epoch"], runs.read(tmp_path / "run")["step"]) == (1, 1)
