"""Checkpoints that are none: damaged, foreign, hostile or forged. Each is refused in one line, and none runs."""

import contextlib
import io
import os
import pickle
import shutil
import sys
import zipfile
import zlib
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import SMALL, Child, difference, no_picture, read, stop_at, write_data

import evaluate
import options
import plots
import train
import utils

REMOVED = object()


@pytest.fixture(scope="module")
def small_data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def good(tmp_path_factory, small_data):
    """Give the folder of a run that was stopped after the second step of its second epoch."""
    folder = tmp_path_factory.mktemp("good")
    places = ["--data-dir", str(small_data), "--checkpoint-dir", str(folder), "--name", "run"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "safely", no_picture)
        stop_at(patch, "later")
        assert train.main([*SMALL, *places, "--num-blocks", "1", "--precision", "fp16"]) == 143
    return folder / "run"


@pytest.fixture
def run(small_data, capsys, monkeypatch, tmp_path):
    """Give a function that runs the program in this process; it returns the status and what went to stderr."""
    def run(*flags):
        status = train.main(["--data-dir", str(small_data), "--checkpoint-dir", str(tmp_path), "--no-download", *flags])
        return status, capsys.readouterr().err
    monkeypatch.setattr(plots, "safely", no_picture)
    return run


def edited(checkpoint, path, value):
    """Replace or remove an entry of a checkpoint, named as in `args/lr`."""
    *parents, last = path.split("/")
    inner = checkpoint
    for name in parents:
        inner = inner[int(name) if name.isdigit() else name]
    if value is REMOVED:
        del inner[last]
    else:
        inner[last] = value(inner[last]) if callable(value) else value
    return checkpoint


def saved(value):
    """Give the bytes that `torch.save` makes of a value."""
    target = io.BytesIO()
    torch.save(value, target)
    return target.getvalue()


def packed(path, content, compression=zipfile.ZIP_STORED):
    """Give the bytes of a checkpoint with another pickle, or None for its own; all checksums are right."""
    target = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w", compression) as new:
        for entry in old.infolist():
            is_pickle = content is not None and entry.filename.endswith("data.pkl")
            new.writestr(entry.filename, content if is_pickle else old.read(entry))
    return target.getvalue()


def marked_as_folders(path):
    """Give the bytes of a checkpoint whose list has the one bit of each record that makes it a folder.

    No checksum covers it, and of a folder torch reads nothing: the memory stays as it was.
    """
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        position = archive.start_dir
    while (position := content.find(b"PK\x01\x02", position)) >= 0:
        content[position + 38] |= 0x10
        position += 46
    return bytes(content)


def overlapping():
    """Give an archive of a thousand records, each of which contains all those after it: 60 MB in 140 kB."""
    body, entries = b"x" * 1000, []
    for i in range(1000):
        entry = zipfile.ZipInfo(f"archive/data/{i}")
        entry.file_size = entry.compress_size = len(body)
        entry.CRC = zlib.crc32(body)
        body = entry.FileHeader() + body
        entries.append((entry, len(body)))
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, 2))
        for entry, length in entries:
            entry.header_offset = target.tell() + len(body) - length
            archive.filelist.append(entry)
        target.write(body)
        archive.start_dir = target.tell()
    return target.getvalue()


def assert_one_line(status, text, path=None):
    """Assert that a mistake was told as one should be, and names the file, or at least its folder."""
    assert status == 2, text
    assert text.startswith("train.py: error: ") and text.count("\n") == 1, text
    assert path is None or str(path) in text or str(path.parent) in text


# --- files that are no checkpoint ------------------------------------------------------------------------------------


class Caller:
    """Pickles as a call of `os.system`, which would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


FILES = {
    "text": lambda good, marker: b"no checkpoint\n",
    "nothing": lambda good, marker: b"",
    "half a file": lambda good, marker: good.read_bytes()[:20_000],
    "pickle of a call": lambda good, marker: pickle.dumps(Caller(marker)),
    "archive with a call": lambda good, marker: packed(good, pickle.dumps(Caller(marker), 2)),
    "compressed": lambda good, marker: packed(good, None, zipfile.ZIP_DEFLATED),
    "archive without a pickle": lambda good, marker: packed(good, b""),
    "records marked as folders": lambda good, marker: marked_as_folders(good),
    "overlapping records": lambda good, marker: overlapping(),
    "list": lambda good, marker: saved([1, 2]),
    "tensor": lambda good, marker: saved(torch.zeros(3)),
    "other program": lambda good, marker: saved({"weights": {"a": torch.zeros(3)}}),
    "other version": lambda good, marker: saved(read(good.parent) | {"version": 99}),
    "version of text": lambda good, marker: saved(read(good.parent) | {"version": "line\nline"}),
    "model of text": lambda good, marker: saved(read(good.parent) | {"model": "weights"}),
    "model of numbers": lambda good, marker: saved(read(good.parent) | {"model": {"linear.bias": 1}}),
    "one key more": lambda good, marker: saved(edited(read(good.parent), "model/more", torch.zeros(3))),
    "one key less": lambda good, marker: saved(edited(read(good.parent), "model/linear.bias", REMOVED)),
    "other shape": lambda good, marker: saved(edited(read(good.parent), "model/linear.bias", torch.zeros(9))),
    "sparse": lambda good, marker: saved(edited(read(good.parent), "model/linear.bias", torch.Tensor.to_sparse)),
    "no values": lambda good, marker: saved(edited(read(good.parent), "model/linear.bias", lambda t: t.to("meta"))),
    "terabytes": lambda good, marker: saved(edited(read(good.parent), "model/linear.bias",
                                                   torch.zeros(1).expand(1_000_000, 1_000_000))),
    "other network": lambda good, marker: saved(edited(read(good.parent), "args/num_blocks", [2])),
    "args of text": lambda good, marker: saved(read(good.parent) | {"args": "channels"}),
}


@pytest.mark.parametrize("name", FILES)
def test_no_checkpoint_is_told_in_one_line_and_nothing_runs(name, good, run, tmp_path):
    path, marker = tmp_path / "folder" / "last.pt", tmp_path / "marker"
    shutil.copytree(good, path.parent, ignore=shutil.ignore_patterns("previous.pt"))
    path.write_bytes(FILES[name](good / "last.pt", marker))
    modes = [["--resume", str(path)], ["--evaluate", "--checkpoint", str(path)]]
    if name not in ("other network", "args of text"):  # of which --init reads nothing
        modes.append([*SMALL, "--num-blocks", "1", "--init", str(path)])
    for mode in modes:
        assert_one_line(*run(*mode), path if name != "other network" else None)
    assert not marker.exists() and not (tmp_path / "se-resnet").exists()


def test_a_missing_file_and_a_folder(run, tmp_path):
    for path in (tmp_path / "none.pt", tmp_path):
        for mode in (["--evaluate", "--checkpoint"], [*SMALL, "--init"]):
            assert_one_line(*run(*mode, str(path)), path)
    assert_one_line(*run("--resume", str(tmp_path / "none.pt")), tmp_path / "none.pt")
    assert not list(tmp_path.iterdir())  # not even a lock


def test_best_weights_cannot_be_resumed(good, run):
    status, text = run("--resume", str(good / "best.pt"))
    assert_one_line(status, text, good / "best.pt")
    assert "for the weights of another file use --init" in text


# --- files that would take all memory or time ------------------------------------------------------------------------


def doubled(start, end):
    """Give a pickle with a tuple that holds itself twice, 40 times over: short, but no loop gets through it."""
    return b"\x80\x02" + start + b")" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(40)) + end


BOMBS = {
    "bytes": b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
    "tensor": b"\x80\x02ctorch\nFloatTensor\nJ\xff\xff\xff\x7f\x85R.",
    "hash": doubled(b"}", b"Ns."),
    "message": doubled(b"}X\x05\0\0\0model}sX\x04\0\0\0args}sX\x07\0\0\0version", b"s."),
    "persistent": doubled(b"(X\x07\0\0\0storagectorch\nFloatStorage\n", b"X\x03\0\0\0cpuK\x01tQ."),
}
ENORMOUS = [("args/num_blocks", [10**7]), ("args/num_blocks", [1] * 99), ("args/channels", 10**7),
            ("args/channels", 10**30), ("args/kernel_sizes", [10001])]


def limit_memory():
    """Let this process take 1 GiB more than it has."""
    import resource
    with open("/proc/self/statm") as file:
        limit = int(file.read().split()[0]) * resource.getpagesize() + 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def limit_memory_and_time():
    """Let it also take 20 seconds of processor time, and no more."""
    import resource
    limit_memory()
    resource.setrlimit(resource.RLIMIT_CPU, (20, 20))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
@pytest.mark.parametrize("bomb", [*BOMBS, *ENORMOUS], ids=str)
def test_bombs_are_refused_before_they_take_memory_or_time(bomb, good, small_data, tmp_path):
    path = tmp_path / "last.pt"
    shutil.copy(good / "best.pt", tmp_path)
    path.write_bytes(packed(good / "last.pt", BOMBS[bomb]) if isinstance(bomb, str)
                     else saved(edited(read(good), *bomb)))
    children = [Child([*flags, str(path), "--data-dir", str(small_data), "--no-download"], tmp_path / f"{i}.log",
                      limit_memory_and_time) for i, flags in enumerate((["--evaluate", "--checkpoint"], ["--resume"]))]
    for child in children:
        assert_one_line(child.wait(), child.output(), path if isinstance(bomb, str) else None)
        assert "memory" not in child.output().lower()  # refused by a look, not by luck


# --- checkpoints that hold something else ----------------------------------------------------------------------------

FORGED = {
    "epoch": ["1", -1, 3, 1.0, True, None, [1], 10**30, REMOVED],
    "step": ["1", -1, 5, 1.0, None, REMOVED],
    "history": ["", [], [1], [{}], [{"epoch": 1}], None, lambda rows: rows * 2, REMOVED],
    "history/0/train_loss": ["low", [0.5]],
    "best_accuracy": ["high", [1]],
    "totals": [None, [], {}, {"sums": []}, REMOVED],
    "totals/seconds": ["long", None, REMOVED],
    "totals/lr": ["0.1", None, REMOVED],
    "totals/sums": [None, [], [1.0], [torch.zeros(3)], torch.zeros(1, 2)],
    "rng": [None, [], [{}], [{"cpu": torch.zeros(3)}], [{"cpu": "state"}], REMOVED],
    "scheduler": [None, {}, REMOVED],
    "scheduler/last_epoch": ["1", 3, REMOVED],
    "scheduler/base_lrs": ["0.1", [], ["0.1"], [0.5]],
    "scaler": ["1", {"scale": 1.0}, REMOVED],
    "scaler/scale": ["1", None, [1.0]],
    "optimizer": [None, {}, [], REMOVED],
    "optimizer/state": [None, [], {0: {"momentum_buffer": torch.zeros(3)}}, {0: {"momentum_buffer": "fast"}}],
    "optimizer/param_groups": [None, [], [{}], lambda groups: groups * 2],
    "optimizer/param_groups/0/lr": ["0.1", None, REMOVED],
    "optimizer/param_groups/0/momentum": ["0.9", [0.9]],
    "optimizer/param_groups/0/params": [None, [], [0]],
    "environment": [None, {}, {"device": []}, REMOVED],
    "args": [None, [], {}, REMOVED],
    "args/epochs": ["2", 0, 2.5, None, [2]],
    "args/batch_size": ["8", 0, -8, 10**30],
    "args/optimizer": ["sga", 1, None],
    "args/lr": ["0.1", -1.0, float("nan"), [0.1]],
    "args/scheduler": ["cos", ["cosine"], None],
    "args/warmup_epochs": ["1", 5.0, None],
    "args/grad_clip": ["0.1", None],
    "args/num_blocks": ["1", 1, [0], ["1"], [], None, [[1]]],
    "args/dropout": ["0.5", 2.0, None],
    "args/augment": ["no", 1, None],
    "args/seed": ["0", -1, None, 10**30],
    "args/precision": ["fp8", None, 16],
    "args/loader": ["fast", None],
    "args/workers": ["2", -1],
    "args/val_size": ["0", 29, None],
    "args/limit_train": ["30", 0, 10**9],
    "args/data_dir": [1, None],
    "args/save_minutes": ["1", -1.0, None],
}


@pytest.mark.parametrize("entry", FORGED)
def test_an_entry_that_cannot_be_is_told_in_one_line(entry, good, run, tmp_path):
    path = tmp_path / "last.pt"
    shutil.copy(good / "best.pt", tmp_path)
    for value in FORGED[entry]:
        path.write_bytes(saved(edited(read(good), entry, value)))
        assert_one_line(*run("--resume", str(path)))


@pytest.mark.parametrize("entry, value", [("args", "text"), ("args/normalize", "no"), ("args/num_blocks", 1),
                                          ("args/block", "other"), ("args/channels", "4")])
def test_settings_that_cannot_be_are_told_by_evaluate(entry, value, good, run, tmp_path):
    path = tmp_path / "best.pt"
    path.write_bytes(saved(edited(read(good, "best.pt"), entry, value)))
    assert_one_line(*run("--evaluate", "--checkpoint", str(path)), path)


@pytest.mark.parametrize("classes", [None, "names", [], list(range(10)), ["a"] * 9, REMOVED])
def test_classes_that_are_none(classes, good, tmp_path):
    path = tmp_path / "best.pt"
    path.write_bytes(saved(edited(read(good, "best.pt"), "classes", classes)))
    try:
        names = evaluate.load_model(path, torch.device("cpu"))[1]["classes"]
    except utils.UserError as error:
        assert str(path) in str(error)
    else:
        assert len(names) == 10 and all(isinstance(name, str) for name in names)


@pytest.mark.slow
def test_every_single_flipped_bit_is_found_or_does_no_harm(good, tmp_path):
    content, expected = (good / "best.pt").read_bytes(), utils.load_checkpoint(good / "best.pt")
    path, found = tmp_path / "best.pt", 0
    for position in range(8 * len(content)):
        changed = bytearray(content)
        changed[position // 8] ^= 1 << position % 8
        path.write_bytes(changed)
        try:
            assert difference(utils.load_checkpoint(path), expected) is None, position
        except utils.UserError as error:
            found += "\n" not in str(error)
    print(f"{8 * len(content):,} bits, {found:,} found, the others without effect")
    assert found > 4 * len(content)


def test_the_name_of_a_damaged_record_is_shown_in_ascii(good, tmp_path):
    path, content = tmp_path / "last.pt", bytearray((good / "last.pt").read_bytes())
    content[content.rindex(b"serialization_id") + 3] = 10  # in the archive's list: a line end
    path.write_bytes(content)
    with pytest.raises(utils.UserError, match=r"ser\\nalization_id' fails its checksum") as raised:
        utils.load_checkpoint(path)
    assert "\n" not in str(raised.value)


# --- fuzz ------------------------------------------------------------------------------------------------------------


def mutations(size):
    """Draw some changes of bytes: (kind, position, other position, value)."""
    position = st.integers(0, size - 1)
    kinds = st.sampled_from(["set", "set", "flip", "cut", "insert", "copy", "truncate"])
    return st.lists(st.tuples(kinds, position, position, st.integers(0, 255)), min_size=1, max_size=4)


def mutated(content, changes):
    """Carry out such changes."""
    content = bytearray(content)
    for kind, here, there, value in changes:
        here, there = min(here, len(content)), min(there, len(content))
        if kind in ("set", "flip") and here < len(content):
            content[here] = value if kind == "set" else content[here] ^ (1 << value % 8)
        elif kind == "cut":
            del content[here:here + 1 + value]
        elif kind == "insert":
            content[here:here] = bytes([value]) * (1 + value % 9)
        elif kind == "copy":
            content[here:here + value] = content[there:there + value]
        elif kind == "truncate":
            del content[max(here, there):]
    return bytes(content)


def fuzz(path, examples, argv):
    """Mutate a checkpoint's bytes and, with right checksums, those of its pickle; in a process of its own.

    Whatever is read must be what was written; whatever is refused must be in one line, within 1 GiB.
    """
    limit_memory()
    content, expected = path.read_bytes(), utils.load_checkpoint(path)
    with zipfile.ZipFile(path) as archive:
        program, edge = archive.read("archive/data.pkl"), len(content) - archive.start_dir
    checked = settings(max_examples=examples, deadline=None, database=None, derandomize=True,
                       suppress_health_check=list(HealthCheck))

    @checked
    @given(st.booleans(), mutations(len(content)))
    def bytes_of_the_file(at_its_end, changes):
        if at_its_end:  # where the archive's list of records is
            changes = [(kind, len(content) - 1 - here % edge, there, value) for kind, here, there, value in changes]
        path.write_bytes(mutated(content, changes))
        try:
            found = utils.load_checkpoint(path)
        except utils.UserError as error:
            assert "\n" not in str(error) and str(path) in str(error)
        else:
            assert difference(found, expected) is None

    @checked
    @given(mutations(len(program)))
    def bytes_of_the_pickle(changes):
        path.write_bytes(packed(path.parent / "copy.pt", mutated(program, changes)))
        for use in (partial(resume_a_step, argv), partial(evaluate.load_model, path, torch.device("cpu"))):
            with contextlib.suppress(utils.UserError):
                use()

    (path.parent / "copy.pt").write_bytes(content)
    bytes_of_the_file()
    bytes_of_the_pickle()
    os._exit(0)


def resume_a_step(argv):
    """Set a run up and make one step."""
    args, settings_given = options.parse_args(argv)
    trainer, _ = train.set_up(args, settings_given, utils.Processes())
    signals = utils.Signals()
    signals.stop = 15
    trainer.save = lambda: None
    trainer.train_epoch(signals)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
@pytest.mark.parametrize("examples", [300, pytest.param(20_000, marks=pytest.mark.slow)])
def test_mutated_checkpoints(examples, good, small_data, tmp_path):
    path = tmp_path / "last.pt"
    path.write_bytes((good / "last.pt").read_bytes())
    argv = ["--resume", str(path), "--data-dir", str(small_data), "--no-download"]
    child = Child([], tmp_path / "log", fuzz, (path, examples, argv))
    assert child.wait(60 + examples) == 0, child.output()[-3000:]
