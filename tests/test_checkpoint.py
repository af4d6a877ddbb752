"""Checkpoints and the run folder: kills at any moment, damaged and untrusted files, locks, and which run is resumed."""

import argparse
import errno
import os
import pickle
import random
import shutil
import signal
import zipfile

import pytest
import runs
import torch

import checkpoint
import data
from utils import UserError


@pytest.fixture
def stopped(run, tmp_path):
    """The folder of a run that was stopped in its second epoch; last.pt, previous.pt and best.pt are in it."""
    runs.stop(run, "later", "--save-minutes", "0")
    return tmp_path / "run"


def flip(path, record="data/0"):
    """Flip one bit in the middle of a record of a checkpoint."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo(f"archive/{record}")
        values = archive.read(entry)
    content[content.index(values, entry.header_offset) + len(values) // 2] ^= 16
    path.write_bytes(content)


def files(folder):
    """Read all files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_restart_by_torchrun_begins_where_nothing_was_saved(run, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert run("--overwrite") == 0


# --- kills -----------------------------------------------------------------------------------------------------------


@runs.needs_fork
@pytest.mark.parametrize("flags, epoch, step, calls", [([], 0, 0, 6), ([], 1, 1, 7), (["--overwrite"], 0, 0, 10)])
def test_killed_at_each_call_that_changes_a_file(flags, epoch, step, calls, start, run, tmp_path, unbroken):
    """At the start of a run, in a save with a new best.pt, and while --overwrite removes an old run."""
    for number in range(1, 100):
        if flags:
            shutil.copytree(unbroken, tmp_path / "run")
        child = start("--save-minutes", "0", *flags, prepare=runs.kill_at_call, args=(number, epoch, step))
        if child.wait() == 99:
            break
        assert child.wait() == -signal.SIGKILL, child.output()
        assert run("--resume", "auto") == 0
        assert not list((tmp_path / "run").glob(".*.tmp"))
        runs.assert_same_run(tmp_path / "run", unbroken)
        shutil.rmtree(tmp_path / "run")
    assert number > calls


@runs.needs_fork
@pytest.mark.parametrize("workers", ["0", "2"])
def test_the_lock_ends_with_its_process(workers, paused, run, tmp_path, unbroken):
    """Also while worker processes outlive it: for some seconds, and here stopped, so that they surely do."""
    child = paused("--workers", workers, "--save-minutes", "0")
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


@pytest.mark.parametrize("record", ["data.pkl", "data/0", "data/20"])
def test_a_damaged_last_is_replaced_by_previous(record, run, refused, stopped, unbroken, capsys):
    flip(stopped / "last.pt", record)
    before = (stopped / "previous.pt").read_bytes()
    runs.stop(run, "later", "--resume")
    assert (stopped / "previous.pt").read_bytes() == before  # still the only good one in the first save
    warning, = (line for line in capsys.readouterr().err.splitlines() if "warning" in line)
    assert warning.startswith(f"warning: {stopped / 'last.pt'} is damaged or not a checkpoint")
    assert warning.endswith(f"continuing from {stopped / 'previous.pt'}")
    assert run("--resume") == 0
    runs.assert_same_run(stopped, unbroken)
    for path in (stopped / "last.pt", stopped / "previous.pt"):
        flip(path, record)
    before, error = files(stopped), refused(run, "--resume")
    assert str(stopped / "last.pt") in error and str(stopped / "previous.pt") in error and files(stopped) == before


@pytest.mark.parametrize("damage", [flip, os.remove, lambda path: path.write_text("of an older epoch")])
def test_best_and_metrics_are_written_anew_and_other_files_are_left_alone(damage, run, stopped, unbroken):
    damage(stopped / "best.pt")
    (stopped / "metrics.csv").write_text((stopped / "metrics.csv").read_text()[:-20])
    for name in (".last.pt.tmp", ".notes.tmp"):
        (stopped / name).write_text("half a file")
    assert run("--resume") == 0
    runs.assert_same_run(stopped, unbroken)
    assert [path.name for path in stopped.glob(".*.tmp")] == [".notes.tmp"]


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_the_momentum_of_a_device_with_another_memory_format(optimizer, run, tmp_path):
    """Apple GPUs save it contiguous."""
    flags = ["--optimizer", optimizer]
    assert run(*flags, folder="unbroken") == 0
    runs.stop(run, "later", *flags)
    saved = runs.read(tmp_path / "run")
    for state in saved["optimizer"]["state"].values():
        state |= {name: value.contiguous() for name, value in state.items()}
    torch.save(saved, tmp_path / "run/last.pt")
    assert run("--resume") == 0
    runs.assert_same_run(tmp_path / "run", tmp_path / "unbroken")


# --- which run -------------------------------------------------------------------------------------------------------


def test_paths_of_resume(run, refused, tmp_path, unbroken, monkeypatch):
    run_folder = tmp_path / "run"
    monkeypatch.chdir(tmp_path)
    for place, path in [("first", "auto"), ("middle", str(run_folder)), ("last", "run/last.pt")]:
        runs.stop(run, place, "--resume", path)
    before = files(run_folder)
    assert "--init-from" in refused(run, "--resume", "run/args.json")
    assert "--epochs 9" in refused(run, "--resume", "run/previous.pt", "--epochs", "9")
    assert files(run_folder) == before
    assert run("--resume", "run/previous.pt") == 0
    runs.assert_same_run(run_folder, unbroken)
    assert "use --init-from" in refused(run, "--resume", "run/best.pt")


@pytest.mark.parametrize("left", ["best.pt", "metrics.csv", "results.json"])
def test_what_is_left_of_a_run_is_not_overwritten(left, run, refused, tmp_path, unbroken):
    (tmp_path / "run").mkdir()
    shutil.copy(unbroken / left, tmp_path / "run")
    for flags in ([], ["--resume", "auto"]):
        assert "holds a run; continue it with --resume, replace it with --overwrite" in refused(run, *flags)
    assert list(files(tmp_path / "run")) == [left]


def test_overwrite_removes_the_run_and_no_other_files(run, refused, tmp_path):
    assert run() == 0
    notes = [tmp_path / "run" / name for name in ("notes.txt", "my-weights.pt", "me.png")]
    for path in notes:
        path.write_text("mine")
    refused(run)
    assert run("--overwrite", "--epochs", "1") == 0
    assert all(path.exists() for path in notes) and runs.read(tmp_path / "run")["epoch"] == 1


def test_a_run_that_began_while_the_data_were_read_is_kept(run, refused, tmp_path, unbroken, monkeypatch):
    load_data = data.load_data
    monkeypatch.setattr(data, "load_data", lambda *args: (
        shutil.copytree(unbroken, tmp_path / "run", dirs_exist_ok=True), load_data(*args))[1])
    assert "holds a run" in refused(run)
    assert files(tmp_path / "run") == files(unbroken)


@runs.needs_fork
def test_two_runs_in_one_folder(paused, run, refused, tmp_path):
    first = paused("--save-minutes", "0")
    before = files(tmp_path / "run")
    assert "holds a run" in refused(run)
    for flags in (["--overwrite"], ["--resume", "auto"], ["--resume"]):
        assert f"the run folder {tmp_path / 'run'} is in use by another process" in refused(run, *flags)
    assert files(tmp_path / "run") == before
    first.signal(signal.SIGKILL)


def test_a_folder_that_cannot_be_written(run, refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot write to the run folder" in refused(run, folder="file/run")
    assert "no run in" in refused(run, "--resume", folder="file/run")


def test_a_file_system_without_locks_costs_one_line(run, tmp_path, capsys, monkeypatch):
    def fail(_):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(checkpoint, "_lock_file", fail)
    assert run("--epochs", "1") == 0
    assert capsys.readouterr().err == (f"warning: {tmp_path / 'run'} is on a file system without locks (No locks "
                                       "available); do not start a second run in it\n")


# --- checkpoints of other origin -------------------------------------------------------------------------------------


def edit(**changes):
    """Return a function that replaces entries of a checkpoint, or removes those that are None."""
    def edited(path, _):
        content = torch.load(path) | changes
        torch.save({name: value for name, value in content.items() if value is not None}, path)
    return edited


WRONG = {
    "pickle of a call": (lambda path, marker: path.write_bytes(pickle.dumps(runs.trap(marker))), "damaged or not a"),
    "archive with a call": (
        lambda path, marker: runs.repack(path, lambda _: pickle.dumps(runs.trap(marker), 2)), "Unpick"),
    "truncated": (lambda path, _: os.truncate(path, 20_000), "damaged or not a"),
    "tensor": (lambda path, _: torch.save(torch.zeros(3), path), "damaged or not a"),
    "a class": (edit(config=argparse.Namespace(lr=0.1)), "it holds argparse.Namespace; only tensors and plain values"),
    "no settings": (edit(args=None), "it lacks args"),
    "old format": (lambda path, _: torch.save(torch.load(path), path, _use_new_zipfile_serialization=False),
                   "by torch before 1.6"),
    "other version": (edit(version=1), "version 1, expected 2"),
    "other step": (edit(step=1), "does not fit 4 steps an epoch; has the training set changed?"),
    "other network": (edit(model={"linear.bias": torch.zeros(10)}), "architecture: conv1.weight is missing there")}


@pytest.mark.parametrize("name", WRONG)
def test_a_checkpoint_that_cannot_be_resumed_costs_one_line(name, run, refused, stopped, tmp_path):
    damage, reason = WRONG[name]
    (stopped / "previous.pt").unlink()
    damage(stopped / "last.pt", tmp_path / "marker")
    error = refused(run, "--resume")
    assert str(stopped) in error and reason in error and "\x1b" not in error and not (tmp_path / "marker").exists()


@pytest.mark.filterwarnings("error")
def test_initial_weights_that_are_not_finite_replace_no_run(run, refused, unbroken, tmp_path):
    content = checkpoint.load_checkpoint(unbroken / "best.pt")
    content["model"] = {f"_orig_mod.module.{name}": value / (name != "linear.bias")  # as DataParallel and compile save
                        for name, value in content["model"].items()}
    torch.save(content, tmp_path / "weights.pt")
    shutil.copytree(unbroken, tmp_path / "run")
    before = runs.read(tmp_path / "run")
    error = refused(run, "--overwrite", "--init-from", str(tmp_path / "weights.pt"))
    assert "weights.pt holds weights that are not finite" in error
    assert runs.difference(runs.read(tmp_path / "run"), before) is None


def test_flipped_and_cut_bytes_are_found_or_do_no_harm(unbroken, tmp_path):
    content, expected = (unbroken / "best.pt").read_bytes(), checkpoint.load_checkpoint(unbroken / "best.pt")
    path, rng, found = tmp_path / "best.pt", random.Random(0), 0
    for count in range(200):
        changed = bytearray(content)
        first = content.index(b"PK\x01\x02") if count % 2 else 0  # half of them in the list of records
        for _ in range(count % 3):
            changed[rng.randrange(first, len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(changed if count % 3 else changed[:rng.randrange(len(content))])
        try:
            assert runs.difference(checkpoint.load_checkpoint(path), expected) is None
        except UserError as error:
            found += 1
            assert "\n" not in str(error) and str(path) in str(error)
    assert found > 100
