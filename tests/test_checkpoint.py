"""Checkpoints and the run folder: kills at any moment, damaged and untrusted files, locks, and which run is resumed."""

import errno
import io
import json
import os
import pickle
import shutil
import signal
import zipfile

import numpy as np
import pytest
import runs
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import checkpoint
import data
import train
from checkpoint import load_checkpoint
from utils import UserError

run, start, small_data, unbroken = runs.run, runs.start, runs.small_data, runs.unbroken  # fixtures


@pytest.fixture
def stopped(run, tmp_path):
    """The folder of a run that was stopped in its second epoch; last.pt, previous.pt and best.pt are in it."""
    runs.stop(run, "later", "--save-minutes", "0")
    return tmp_path / "run"


@pytest.fixture
def refused(run, capsys):
    """A function that asserts that a run is refused in one line, with status 2, and returns the line."""
    def refused(*flags: str, **kwargs) -> str:
        capsys.readouterr()
        assert run(*flags, **kwargs) == 2
        printed = capsys.readouterr()
        assert printed.err.startswith("train.py: error: ") and printed.err.count("\n") == 1, printed.err
        assert printed.out == ""
        return printed.err
    return refused


def flip(path, record="data/0"):
    """Flip one bit in the middle of a record of a checkpoint, or of the archive's list of records."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        if record == "the list":
            position = (archive.start_dir + len(content)) // 2
        else:
            entry = archive.getinfo(f"archive/{record}")
            values = archive.read(entry)
            position = content.index(values, entry.header_offset) + len(values) // 2
    content[position] ^= 16
    path.write_bytes(content)


def files(folder):
    """Read all files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
def test_a_restart_by_torchrun_continues_the_run(flags, stopped, run, unbroken, monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    capsys.readouterr()
    assert run(*flags) == 0
    assert "resumed in epoch 2 after step 2" in capsys.readouterr().out
    runs.assert_same_run(stopped, unbroken)
    assert run(*flags, folder="other") == 0  # its first start failed before it saved anything


# --- kills -----------------------------------------------------------------------------------------------------------


@runs.needs_fork
@pytest.mark.parametrize("epoch, step, calls", [(0, 0, 6), (1, 1, 7)])
def test_killed_at_each_call_that_changes_a_file(epoch, step, calls, start, run, tmp_path, unbroken):
    """At the start of a run, and in a save with a new best.pt."""
    for number in range(1, 100):
        child = start("--save-minutes", "0", prepare=runs.kill_at_call, args=(number, epoch, step))
        if child.wait() == 99:
            break
        assert child.wait() == -signal.SIGKILL, child.output()
        assert run("--resume", "auto") == 0
        assert not list((tmp_path / "run").glob(".*.tmp"))
        runs.assert_same_run(tmp_path / "run", unbroken)
        shutil.rmtree(tmp_path / "run")
    assert number > calls


@runs.needs_fork
def test_killed_while_overwrite_removes_an_old_run(start, run, tmp_path, unbroken):
    for number in range(1, 100):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(unbroken, tmp_path / "run")
        if start("--overwrite", prepare=runs.kill_at_call, args=(number, 0, 0)).wait() == 99:
            break
        assert run("--resume", "auto") == 0  # continues the old run, or starts the new one
        assert runs.difference(runs.read(tmp_path / "run")["model"], runs.read(unbroken)["model"]) is None
    assert number > 10


@runs.needs_fork
@pytest.mark.parametrize("workers", ["0", "2"])
def test_the_lock_ends_with_its_process(workers, start, run, tmp_path, unbroken):
    """Also while worker processes outlive it: for some seconds, and here stopped, so that they surely do."""
    child = start("--workers", workers, "--save-minutes", "0", prepare=runs.pause_after,
                  args=(0, 2, tmp_path / "marker"))
    runs.wait_for((tmp_path / "marker").exists)
    processes = [int(word) for word in (tmp_path / "marker").read_text().split()]
    assert bool(processes) == (workers != "0")
    for process in processes:
        os.kill(process, signal.SIGSTOP)
    try:
        child.signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        assert run("--resume") == 0
    finally:
        for process in processes:
            os.kill(process, signal.SIGKILL)  # fails if it was not alive all the time
    runs.assert_same_run(tmp_path / "run", unbroken)


# --- damaged files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("record", ["data.pkl", "data/0", "data/20", "the list"])
def test_a_damaged_last_is_replaced_by_previous(record, run, stopped, unbroken, capsys):
    flip(stopped / "last.pt", record)
    before = (stopped / "previous.pt").read_bytes()
    runs.stop(run, "later", "--resume")
    assert (stopped / "previous.pt").read_bytes() == before  # still the only good one in the first save
    warning, = (line for line in capsys.readouterr().err.splitlines() if "warning" in line)
    assert warning.startswith(f"warning: {stopped / 'last.pt'} is damaged or not a checkpoint")
    assert warning.endswith(f"continuing from {stopped / 'previous.pt'}")
    assert run("--resume") == 0
    runs.assert_same_run(stopped, unbroken)


def test_two_damaged_files_are_both_named_and_left_alone(refused, stopped):
    for name in ("last.pt", "previous.pt"):
        flip(stopped / name)
    before = files(stopped)
    error = refused("--resume")
    assert str(stopped / "last.pt") in error and str(stopped / "previous.pt") in error
    assert files(stopped) == before


def kill_before_last(path):
    """Leave best.pt as a kill between the writes of best.pt and last.pt would, after the second epoch."""
    torch.save(torch.load(path) | {"epoch": 2, "accuracy": 99.0}, path)


@pytest.mark.parametrize("damage", [flip, os.remove, kill_before_last])
@pytest.mark.parametrize("flags", [[], ["--val-size", "10"]])
def test_a_lost_best_is_selected_among_the_coming_epochs(damage, flags, run, tmp_path, capsys, monkeypatch):
    accuracies = iter([50.0, 40.0, 45.0, 60.0])  # two epochs before the stop, the third one, the test set
    monkeypatch.setattr(train.evaluate, "score", lambda logits, targets: (1.0, next(accuracies)))
    with monkeypatch.context() as patch:
        train_step = train.train_step
        patch.setattr(train, "train_step", lambda run, state, *batch: (
            train_step(run, state, *batch), (state.epoch, state.step) == (2, 1) and signal.raise_signal(15)))
        assert run("--epochs", "3", *flags) == 143
    damage(tmp_path / "run" / "best.pt")
    capsys.readouterr()
    assert run("--resume") == 0
    assert capsys.readouterr().err.count("the best epoch will be selected among the remaining epochs\n") == 1
    best = runs.read(tmp_path / "run", "best.pt")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert (best["epoch"], best["accuracy"]) == (results["best_epoch"], results["best_accuracy"]) == (3, 45)
    assert len(rows) == 4 and rows[3].startswith("3,") and ",45," in rows[3]


@pytest.mark.parametrize("flags", [[], ["--val-size", "10"]])
def test_a_damaged_best_of_a_finished_run(flags, run, tmp_path, capsys):
    assert run(*flags) == 0
    flip(tmp_path / "run" / "best.pt")
    assert run("--resume", "--precision", "bf16") == 0
    assert "best.pt is damaged" in (err := capsys.readouterr().err) and "bitwise" not in err
    assert load_checkpoint(tmp_path / "run" / "best.pt")["epoch"] == 2
    assert json.loads((tmp_path / "run" / "results.json").read_text())["precision"] == "fp32"  # of the training


@pytest.mark.parametrize("damage", [lambda text: text + "7,99,0,0,0,,,0,0,0,0\n", lambda text: text[:-20]])
def test_metrics_are_written_anew_and_other_files_are_left_alone(damage, run, stopped, unbroken):
    path = stopped / "metrics.csv"
    path.write_text(damage(path.read_text()))
    left, own = stopped / ".last.pt.4711.tmp", stopped / ".notes.tmp"
    for path in (left, own):
        path.write_text("half a file")
    assert run("--resume") == 0
    runs.assert_same_run(stopped, unbroken)
    assert not left.exists() and own.exists()


# --- which run -------------------------------------------------------------------------------------------------------


def test_paths_of_resume(run, refused, tmp_path, unbroken, monkeypatch):
    run_folder = tmp_path / "run"
    assert "no run in" in refused("--resume")
    assert "not found" not in refused("--resume", str(tmp_path / "none"))
    assert list(tmp_path.iterdir()) == []  # not even a lock
    monkeypatch.chdir(tmp_path)
    for place, path in [("first", "auto"), ("middle", str(run_folder)), ("last", "run/last.pt")]:
        runs.stop(run, place, "--resume", path)
    before = files(run_folder)
    assert "--init-from" in refused("--resume", "run/args.json")
    assert "--epochs 9" in refused("--resume", "run/previous.pt", "--epochs", "9")
    assert files(run_folder) == before
    assert run("--resume", "run/previous.pt") == 0
    runs.assert_same_run(run_folder, unbroken)
    assert "use --init-from" in refused("--resume", "run/best.pt")


@pytest.mark.parametrize("left, automatic", [(["best.pt"], 0), (["best.pt", "metrics.csv"], 2), (["results.json"], 2)])
def test_what_is_left_of_a_run_is_not_overwritten(left, automatic, run, refused, tmp_path, unbroken):
    (tmp_path / "run").mkdir()
    for name in left:
        shutil.copy(unbroken / name, tmp_path / "run")
    assert "holds a run; continue it with --resume, replace it with --overwrite" in refused()
    assert sorted(files(tmp_path / "run")) == sorted(left)
    assert run("--resume", "auto") == automatic  # best.pt alone is left by a kill in the first save


def test_overwrite_removes_the_run_and_no_other_files(run, refused, tmp_path):
    assert run() == 0
    notes = [tmp_path / "run" / name for name in ("notes.txt", "my-weights.pt", "me.png")]
    for path in notes:
        path.write_text("mine")
    refused()
    assert run("--overwrite", "--epochs", "1") == 0
    assert all(path.exists() for path in notes) and runs.read(tmp_path / "run")["epoch"] == 1
    assert not (tmp_path / "run" / "previous.pt").exists() or runs.read(tmp_path / "run", "previous.pt")["step"] == 0


def test_a_run_that_began_while_the_data_were_read_is_kept(refused, tmp_path, unbroken, monkeypatch):
    load_data = data.load_data
    monkeypatch.setattr(data, "load_data", lambda *args: (
        shutil.copytree(unbroken, tmp_path / "run", dirs_exist_ok=True), load_data(*args))[1])
    assert "holds a run" in refused()
    assert files(tmp_path / "run") == files(unbroken)


@runs.needs_fork
@pytest.mark.parametrize("prepare, args", [(runs.pause_after, (0, 2)), (runs.pause_before, ("train", "save"))],
                         ids=["after a save", "before the first save"])
def test_two_runs_in_one_folder(prepare, args, start, refused, tmp_path, unbroken):
    first = start("--save-minutes", "0", prepare=prepare, args=(*args, tmp_path / "marker"))
    runs.wait_for((tmp_path / "marker").exists)
    before, has_saved = files(tmp_path / "run"), (tmp_path / "run" / "last.pt").exists()
    for flags in [["--resume"], ["--overwrite"], ["--resume", "auto"], []]:
        in_use = f"the run folder {tmp_path / 'run'} is in use by another process"
        assert ("holds a run" if has_saved and not flags else in_use) in refused(*flags)
    assert files(tmp_path / "run") == before
    first.signal(signal.SIGKILL)


def test_a_folder_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot write to the run folder" in refused(folder="file/run")
    assert "no run in" in refused("--resume", folder="file/run")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_costs_one_line(number, run, tmp_path, unbroken, capsys, monkeypatch):
    def fail(_):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(checkpoint, "_lock_file", fail)
    assert run() == 0
    assert capsys.readouterr().err == (f"warning: {tmp_path / 'run'} is on a file system without locks "
                                       f"({os.strerror(number)}); do not start a second run in it\n")
    runs.assert_same_run(tmp_path / "run", unbroken)


# --- checkpoints of other origin -------------------------------------------------------------------------------------


def repacked(path, change):
    """Rewrite the pickle in a checkpoint; all checksums are right."""
    target = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            new.writestr(entry.filename, change(content) if entry.filename.endswith("data.pkl") else content)
    path.write_bytes(target.getvalue())


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("numpy", [b"numpy.core.", b"numpy._core."])  # as NumPy 1 and 2 write it
def test_checkpoints_of_the_published_code(prefix, numpy, unbroken, tmp_path):
    weights, path = runs.read(unbroken)["model"], tmp_path / "ckpt.pth"
    config = {"num_blocks": [4, 4, 3], "channels": None, "lr": 0.1, "squeeze_and_excitation": True, "resume": False,
              "optimizer": "sgd", "total_params": np.int64(sum(np.prod(value.size()) for value in weights.values()))}
    torch.save({"net": {prefix + name: value for name, value in weights.items()}, "acc": 93.5, "epoch": 7,
                "config": config}, path)
    repacked(path, lambda content: content.replace(b"numpy._core.", b"numpy.core.").replace(b"numpy.core.", numpy))
    with zipfile.ZipFile(path) as archive:
        assert numpy + b"multiarray\nscalar" in archive.read("ckpt/data.pkl")
    found = load_checkpoint(path)
    assert runs.difference(found["model"], dict(weights)) is None and found["args"] == {}


class Caller:
    """Pickles as a call of `os.system`, which would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def edit(**changes):
    """Return a function that replaces entries of a checkpoint, or removes those that are None."""
    def edited(path, _):
        content = torch.load(path) | changes
        torch.save({name: value for name, value in content.items() if value is not None}, path)
    return edited


WRONG = {
    "pickle of a call": (lambda path, marker: path.write_bytes(pickle.dumps(Caller(marker))), "damaged or not a"),
    "archive with a call": (lambda path, marker: repacked(path, lambda _: pickle.dumps(Caller(marker), 2)), "Unpick"),
    "archive without data": (lambda path, _: zipfile.ZipFile(path, "w").close(), "damaged or not a"),
    "truncated": (lambda path, _: os.truncate(path, 20_000), "damaged or not a"),
    "tensor": (lambda path, _: torch.save(torch.zeros(3), path), "damaged or not a"),
    "no settings": (edit(args=None), "KeyError: 'args'"),
    "no optimizer": (edit(optimizer=None), "weights only and cannot be resumed"),
    "no schedule": (edit(scheduler=None), "does not fit this run (KeyError: 'scheduler')"),
    "other version": (edit(version=1), "version 1, expected 2"),
    "other step": (edit(step=1), "expected 4 steps per epoch; has the training set changed?"),
    "other network": (edit(model={"linear.bias": torch.zeros(10)}), "architecture: conv1.weight is missing there"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_checkpoint_that_cannot_be_resumed_costs_one_line(name, refused, stopped, tmp_path):
    damage, reason = WRONG[name]
    (stopped / "previous.pt").unlink()
    damage(stopped / "last.pt", tmp_path / "marker")
    error = refused("--resume")
    assert str(stopped) in error and reason in error and not (tmp_path / "marker").exists()


def test_flipped_and_cut_bytes_are_found_or_do_no_harm(unbroken, tmp_path):
    content, expected = (unbroken / "best.pt").read_bytes(), load_checkpoint(unbroken / "best.pt")
    path, position, found = tmp_path / "best.pt", st.integers(0, len(content) - 1), []
    directory = content.index(b"PK\x01\x02")

    @settings(max_examples=150, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))
    @given(st.lists(st.tuples(position | st.integers(directory, len(content) - 1), st.integers(0, 7)), max_size=4),
           position, st.booleans())
    def check(flips, end, cut):
        changed = bytearray(content)
        for place, bit in flips:
            changed[place] ^= 1 << bit
        path.write_bytes(changed[:end] if cut else changed)
        try:
            assert runs.difference(load_checkpoint(path), expected) is None, flips
        except UserError as error:
            assert "\n" not in str(error) and str(path) in str(error)
            found.append(error)

    check()
    assert len(found) > 50
