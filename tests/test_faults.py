"""Faults: damaged files, kills at any moment, full disks, vanished folders, two runs in one folder, divergence."""

import errno
import json
import os
import random
import shutil
import signal
import stat
import sys
import time
import zipfile

import pytest
from runs import (
    SMALL,
    Child,
    assert_same_run,
    break_loss,
    difference,
    fill_disk,
    kill_at_call,
    no_picture,
    pause_after,
    read,
    record_memory,
    remove_folder,
    stop_at,
    wait_for,
    write_data,
)

import plots
import train
import utils
from trainer import Trainer

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs the start method forkserver")


@pytest.fixture(scope="module")
def small_data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, small_data):
    """Give the folder of a run that nothing happened to."""
    folder = tmp_path_factory.mktemp("unbroken")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "safely", no_picture)
        places = ["--data-dir", str(small_data), "--checkpoint-dir", str(folder), "--name", "run"]
        assert train.main([*SMALL, *places]) == 0
    return folder / "run"


@pytest.fixture
def places(tmp_path, small_data):
    """Give the flags of the folders of a test; its run is in `tmp_path / "run"`."""
    return ["--data-dir", str(small_data), "--checkpoint-dir", str(tmp_path), "--name", "run"]


@pytest.fixture
def run(places, monkeypatch):
    """Give a function that runs the program in this process."""
    monkeypatch.setattr(plots, "safely", no_picture)
    return lambda *flags: train.main([*places, *([] if "--resume" in flags else SMALL), *flags])


@pytest.fixture
def start(places, tmp_path):
    """Give a function that starts the program in a process of its own."""
    def start(*flags, prepare=None, args=(), log="log"):
        flags = [*flags] if "--resume" in flags else [*SMALL, *flags]
        return Child([*places, *flags], tmp_path / log, prepare, args)
    return start


def stop(run, place="middle", *flags):
    """Run until the place, stop by a signal."""
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, place)
        assert run(*flags) == 143


def flip(path, record="data/0"):
    """Turn over one bit in the middle of a record of a checkpoint, or of the archive's list of records."""
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        if record == "the list":
            position = (archive.start_dir + len(content)) // 2
        else:
            entry = archive.getinfo(f"archive/{record}")
            data = archive.read(entry)
            position = content.index(data, entry.header_offset) + len(data) // 2
    content[position] ^= 16
    path.write_bytes(content)


def one_error(text):
    """Give the one line of error, and check that it is one, without a traceback."""
    lines = [line for line in text.splitlines() if "error" in line.lower() or "Traceback" in line]
    assert len(lines) == 1 and lines[0].startswith("train.py: error: "), text
    return lines[0]


def files(folder):
    """Read all files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- damaged files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("record", ["data.pkl", "data/0", "data/7", "data/20", "byteorder", "the list"])
def test_a_flipped_bit_is_found_and_the_file_before_is_taken(record, run, tmp_path, unbroken, capsys):
    stop(run, "middle", "--save-minutes", "0")
    flip(tmp_path / "run" / "last.pt", record)
    assert run("--resume") == 0
    assert f"warning: checkpoint {tmp_path / 'run' / 'last.pt'} is damaged" in (told := capsys.readouterr()).err
    assert f"going on from {tmp_path / 'run' / 'previous.pt'}" in told.err and "(from epoch 1, step 1)" in told.out
    assert_same_run(tmp_path / "run", unbroken)


def test_a_damaged_file_never_replaces_the_good_one_before_it(run, tmp_path, unbroken):
    """Neither when a resumed run saves: then the only good file would be gone, were it killed just then."""
    stop(run, "middle", "--save-minutes", "0")
    flip(tmp_path / "run" / "last.pt")
    with pytest.MonkeyPatch.context() as patch:
        moves = []
        replace = os.replace
        patch.setattr(os, "replace", lambda a, b: (moves.append((a.name, b.name)), replace(a, b)))
        assert run("--resume", str(tmp_path / "run" / "previous.pt")) == 0
    saved = [b for a, b in moves if b in ("last.pt", "previous.pt")]
    assert saved[:2] == ["last.pt", "previous.pt"]  # written, and only with the next save moved
    assert_same_run(tmp_path / "run", unbroken)


def test_a_refused_resume_changes_no_file(run, tmp_path, capsys):
    stop(run, "middle", "--save-minutes", "0")
    before = files(tmp_path / "run")
    assert run("--resume", str(tmp_path / "run" / "previous.pt"), "--epochs", "9") == 2
    assert "--epochs 9" in one_error(capsys.readouterr().err)
    assert files(tmp_path / "run") == before


def test_a_lost_best_is_looked_for_anew_and_named_as_what_it_is(run, tmp_path, capsys):
    assert run("--epochs", "3", "--lr", "0.1") == 0
    rows = read(tmp_path / "run")["history"]
    (tmp_path / "run" / "best.pt").unlink()
    assert run("--resume") == 0
    found, best = json.loads((tmp_path / "run" / "results.json").read_text()), read(tmp_path / "run", "best.pt")
    assert (found["best_epoch"], found["best_accuracy"]) == (best["epoch"], best["accuracy"])
    assert (best["epoch"], best["accuracy"]) == (3, rows[-1]["test_accuracy"])
    assert "the best epoch is looked for from here on" in capsys.readouterr().err


def test_a_finished_run_keeps_the_environment_of_its_steps(run, tmp_path, capsys):
    assert run() == 0
    before = json.loads((tmp_path / "run" / "results.json").read_text())
    assert run("--resume", "--precision", "bf16") == 0 and run("--resume", "--precision", "bf16") == 0
    assert before["precision"] == json.loads((tmp_path / "run" / "results.json").read_text())["precision"] == "fp32"
    assert "not to the bit" not in capsys.readouterr().err


def test_two_damaged_files_are_both_named(run, tmp_path, capsys):
    stop(run, "middle", "--save-minutes", "0")
    for name in ("last.pt", "previous.pt"):
        flip(tmp_path / "run" / name)
    before = files(tmp_path / "run")
    assert run("--resume") == 2
    error = one_error(capsys.readouterr().err)
    assert str(tmp_path / "run" / "last.pt") in error and str(tmp_path / "run" / "previous.pt") in error
    assert files(tmp_path / "run") == before


def test_without_last_previous_is_taken(run, tmp_path, unbroken):
    stop(run, "middle", "--save-minutes", "0")
    (tmp_path / "run" / "last.pt").unlink()
    assert run("--resume") == 0
    assert_same_run(tmp_path / "run", unbroken)


def test_damaged_best_weights_are_told_and_looked_for_anew(run, tmp_path, capsys):
    stop(run, "later")
    flip(tmp_path / "run" / "best.pt")
    assert run("--resume") == 0
    assert f"warning: checkpoint {tmp_path / 'run' / 'best.pt'} is damaged" in capsys.readouterr().err
    assert read(tmp_path / "run", "best.pt")["epoch"] == 2


@pytest.mark.parametrize("flags", [[], ["--val-size", "10"]])
def test_damaged_best_weights_of_a_finished_run(flags, run, tmp_path, capsys):
    assert run(*flags) == 0
    flip(tmp_path / "run" / "best.pt")
    assert run("--resume") == 0
    assert "best.pt is damaged" in capsys.readouterr().err
    utils.load_checkpoint(tmp_path / "run" / "best.pt")


@pytest.mark.parametrize("damage", [
    lambda text: text + text.splitlines()[-1] + "\n" + "7,99,0,0,0,,,0,0,0,0\n", lambda text: text[:-20],
    lambda text: "\0" * 5000, lambda text: ""])
def test_metrics_are_written_anew_and_no_row_is_doubled(damage, run, tmp_path, unbroken):
    stop(run, "later")
    path = tmp_path / "run" / "metrics.csv"
    path.write_text(damage(path.read_text()))
    assert run("--resume") == 0
    assert_same_run(tmp_path / "run", unbroken)


def test_files_of_a_killed_run_are_cleaned_up_and_no_others(run, tmp_path):
    stop(run)
    left = [tmp_path / "run" / f".{name}.4711.tmp" for name in ("last.pt", "best.pt", "metrics.csv", "curves.png")]
    own = [tmp_path / "run" / name for name in (".notes.tmp", "notes.txt")]
    for path in left + own:
        path.write_text("half a file")
    assert run("--resume") == 0
    assert not any(path.exists() for path in left) and all(path.exists() for path in own)


def test_a_run_that_began_while_another_was_starting_is_not_removed(run, tmp_path, unbroken, monkeypatch, capsys):
    """Reading data can take minutes, in which a run of the same name may begin, save, and be stopped."""
    load_data = train.load_data
    monkeypatch.setattr(train, "load_data", lambda *args: (
        shutil.copytree(unbroken, tmp_path / "run", dirs_exist_ok=True), load_data(*args))[1])
    assert run() == 2
    assert "holds a run" in one_error(capsys.readouterr().err)
    assert files(tmp_path / "run") == files(unbroken)


@pytest.mark.parametrize("left, automatic", [(["best.pt"], 0), (["best.pt", "metrics.csv"], 2), (["results.json"], 2)])
def test_what_is_left_of_a_run_is_not_written_over(left, automatic, run, tmp_path, unbroken, capsys):
    (tmp_path / "run").mkdir()
    for name in left:
        shutil.copy(unbroken / name, tmp_path / "run")
    assert run() == 2
    assert "what is left of a run" in one_error(capsys.readouterr().err)
    assert sorted(files(tmp_path / "run")) == sorted(left)
    assert run(*SMALL, "--resume", "auto") == automatic  # it may be a queue's run that was killed in its first save


def test_overwrite_removes_the_run_and_no_other_files(run, tmp_path):
    assert run() == 0
    notes = [tmp_path / "run" / name for name in ("notes.txt", "my-weights.pt", "me.png")]
    for path in notes:
        path.write_text("mine")
    assert run() == 2
    assert run("--overwrite", "--epochs", "1") == 0
    assert all(path.exists() for path in notes) and read(tmp_path / "run")["epoch"] == 1


# --- kills -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epoch, step, calls", [(0, 0, 4), (0, 1, 8), (1, 1, 13)])
def test_killed_at_each_call_that_changes_a_file(epoch, step, calls, start, run, tmp_path, unbroken):
    """Kill a run at each write, flush and renaming: at its start, in its first save, and in one with best.pt."""
    for number in range(1, 100):
        child = start("--save-minutes", "0", prepare=kill_at_call, args=(number, epoch, step))
        if child.wait() == 99:
            break
        assert child.wait() == -signal.SIGKILL, child.output()
        assert run(*SMALL, "--resume", "auto") == 0
        assert not list((tmp_path / "run").glob(".*.tmp"))
        assert_same_run(tmp_path / "run", unbroken)
        shutil.rmtree(tmp_path / "run")
    assert number > calls


def test_killed_while_an_old_run_is_removed(start, run, tmp_path, unbroken):
    for number in range(1, 100):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(unbroken, tmp_path / "run")
        child = start("--overwrite", prepare=kill_at_call, args=(number, 0, 0))
        if child.wait() == 99:
            break
        assert run(*SMALL, "--resume", "auto") == 0  # goes on with the old one, or starts the new one
        assert difference(read(tmp_path / "run")["model"], read(unbroken)["model"]) is None
    assert number > 8


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_moments(kills, start, tmp_path, unbroken):
    draw, done, took, finished = random.Random(kills), (0, 0), 0.5, 0
    while kills:
        began = time.monotonic()
        child = start(*SMALL, "--resume", "auto", "--save-minutes", "0")
        child.process.join(draw.uniform(0, 1.1 * took))
        if child.process.exitcode is None:
            child.signal(signal.SIGKILL)
            child.process.join()
        if child.process.exitcode == 0:
            assert_same_run(tmp_path / "run", unbroken)
            shutil.rmtree(tmp_path / "run")
            done, took, finished = (0, 0), time.monotonic() - began, finished + 1
            continue
        assert child.process.exitcode == -signal.SIGKILL, child.output()
        kills -= 1
        if any((tmp_path / "run" / name).exists() for name in ("last.pt", "previous.pt")):
            newest, *_ = utils.load_run(utils.RunFolder(tmp_path / "run"))
            assert (newest["epoch"], newest["step"]) >= done  # what was saved stays saved
            done = newest["epoch"], newest["step"]
        else:
            assert done == (0, 0)
    assert start(*SMALL, "--resume", "auto").wait() == 0
    assert_same_run(tmp_path / "run", unbroken)


# --- disks and folders -----------------------------------------------------------------------------------------------


def test_full_disk(start, tmp_path, unbroken):
    child = start("--save-minutes", "0", prepare=fill_disk, args=(0, 3))
    assert child.wait() == 1
    error = one_error(child.output())
    assert str(tmp_path / "run") in error and "File too large" in error
    assert read(tmp_path / "run")["step"] == 2 and read(tmp_path / "run", "previous.pt")["step"] == 1
    assert not list((tmp_path / "run").glob(".*.tmp"))
    assert start("--resume").wait() == 0
    assert_same_run(tmp_path / "run", unbroken)


def test_vanished_folder(start, tmp_path):
    child = start(prepare=remove_folder, args=(0, 3))
    assert child.wait() == 1
    error = one_error(child.output())
    assert str(tmp_path / "run") in error and "No such file" in error


def test_folder_below_a_regular_file(tmp_path, small_data, capsys):
    (tmp_path / "file").write_text("")
    places = ["--data-dir", str(small_data), "--checkpoint-dir", str(tmp_path / "file" / "runs")]
    assert train.main([*SMALL, *places]) == 2
    assert "cannot be written (Not a directory)" in one_error(capsys.readouterr().err)
    assert train.main([*places, "--resume"]) == 2
    assert "there is no run in" in one_error(capsys.readouterr().err)


# --- two runs in one folder ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [["--resume"], ["--overwrite"], ["--resume", "auto"], []])
def test_the_second_run_in_a_folder_is_refused(flags, start, tmp_path, unbroken):
    first = start("--save-minutes", "0", prepare=pause_after, args=(0, 2, tmp_path / "marker"))
    wait_for((tmp_path / "marker").exists)
    before = files(tmp_path / "run")
    second = start(*flags, log="second.log")
    assert second.wait() == 2
    assert ("is in use by another process" if flags else "holds a run") in one_error(second.output())
    assert files(tmp_path / "run") == before
    (tmp_path / "marker").unlink()
    assert first.wait() == 0
    assert_same_run(tmp_path / "run", unbroken)


@pytest.mark.parametrize("loader", [["--loader", "device"], ["--loader", "workers", "--workers", "2"]])
def test_the_lock_dies_with_its_process(loader, start, tmp_path, unbroken):
    """Also while its orphaned worker processes live on: for some seconds, and here stopped, so that they surely do."""
    child = start(*loader, "--save-minutes", "0", prepare=pause_after, args=(0, 2, tmp_path / "marker"))
    wait_for((tmp_path / "marker").exists)
    workers = [int(word) for word in (tmp_path / "marker").read_text().split()]
    assert bool(workers) == ("workers" in loader)
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    try:
        child.signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        child = start("--resume")
        assert child.wait() == 0, child.output()
    finally:
        for worker in workers:
            os.kill(worker, signal.SIGKILL)  # fails if it was not alive all the time
    assert_same_run(tmp_path / "run", unbroken)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named_as_that(number, run, capsys, monkeypatch):
    def refuse(_):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(utils, "_lock_file", refuse)
    assert run() == 2
    error = one_error(capsys.readouterr().err)
    assert os.strerror(number) in error and "in use" not in error


def test_a_file_system_without_fsync_of_folders(run, tmp_path, unbroken, monkeypatch):
    fsync = os.fsync

    def refuse(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    assert run() == 0
    assert_same_run(tmp_path / "run", unbroken)


# --- divergence ------------------------------------------------------------------------------------------------------


def test_non_finite_loss_stops_and_spoils_nothing(run, tmp_path, unbroken, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", Trainer.train_step)  # what break_loss replaces
        break_loss(1, 1)
        assert run("--save-minutes", "0") == 1
    error = one_error(capsys.readouterr().err)
    for part in ("loss is not finite in epoch 2, step 2, at lr 0.003087", f"good checkpoint is {tmp_path / 'run'}"):
        assert part in error
    assert (read(tmp_path / "run")["epoch"], read(tmp_path / "run")["step"]) == (1, 1)
    assert read(tmp_path / "run", "previous.pt")["step"] == 4
    assert run("--resume") == 0
    assert_same_run(tmp_path / "run", unbroken)


def test_a_huge_lr_stops_before_anything_is_saved(run, tmp_path, capsys):
    assert run("--lr", "1e30", "--grad-clip", "0") == 1
    error = one_error(capsys.readouterr().err)
    assert "not finite in epoch 1, step 2, at lr" in error and "nothing was saved" in error
    assert not list((tmp_path / "run").glob("*.pt"))


@pytest.mark.parametrize("spoil", [
    lambda t: next(t.model.parameters()).data.fill_(float("nan")), lambda t: t.totals.fill_(float("inf")),
    lambda t: t.model.bn1.running_var.fill_(float("inf"))])
def test_a_state_that_is_not_finite_is_never_saved(spoil, run, tmp_path, capsys, monkeypatch):
    """Where the loss is looked at only at the log interval, a bad state could come before it."""
    stop(run, "first")
    train_step = Trainer.train_step

    def spoiled_step(self, *batch):
        train_step(self, *batch)
        spoil(self)

    monkeypatch.setattr(Trainer, "train_step", spoiled_step)
    monkeypatch.setattr(Trainer, "show_progress", lambda *_: None)
    before = read(tmp_path / "run")
    assert run("--resume", "--save-minutes", "0") == 1
    assert "not finite in epoch 1, step 2" in one_error(capsys.readouterr().err)
    assert read(tmp_path / "run")["step"] == before["step"] == 1


# --- long runs -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("loader", [["--loader", "device"], ["--loader", "workers", "--workers", "1"]])
def test_memory_of_2000_steps_is_flat(loader, start, tmp_path):
    child = start("--epochs", "500", "--save-minutes", "0.02", "--ema", "0.9", "--mixup", "0.2", *loader,
                  prepare=record_memory, args=(tmp_path / "memory", 200, 2000))
    assert child.wait(600) == 0, child.output()
    after_200, after_2000 = map(int, (tmp_path / "memory").read_text().split())
    print(f"{loader[1]}: {after_200:,} bytes after 200 steps, {after_2000:,} after 2,000")
    assert after_2000 <= 1.05 * after_200
