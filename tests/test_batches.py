"""Batch files: every age of them is read, every bad one gets its line, and nothing that a file says is run."""

import json
import os
import pickle
import pickletools
import subprocess
import sys
import zlib
from pathlib import Path

import hostile
import numpy as np
import pytest
from hostile import IDS, LABELS, two_images

import batches
from utils import UserError

PLANES = two_images()
IMAGES = PLANES.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
ARRAYS = {"planes": PLANES, "Fortran planes": np.asfortranarray(PLANES), "strided": np.repeat(PLANES, 2, 1)[:, ::2],
          "images": np.ascontiguousarray(IMAGES), "Fortran images": np.asfortranarray(IMAGES), "a view": IMAGES}
INTEGERS = [LABELS, np.array(LABELS), np.array(LABELS, ">i4"), np.array(LABELS, "u1"), list(np.array(LABELS)),
            list(np.array(LABELS, "u1"))]
OTHERS = {"none": None, "yes": True, "no": False, "half": 0.5, "large": 2**40, "negative": -3, "empty": [],
          "no bytes": b"", "shape": (2, 32, 32, 3), "sides": (), "long": "x" * 300, "accents": "\xe4\u20ac\n\\",
          "long bytes": b"\xff\n'\\" * 300, "floats": np.ones((2, 3), np.float32), "scalar": np.float32(0.5),
          "flags": np.array([True, False])}
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def file(tmp_path):
    """Give a function that writes bytes, or the pickle of a value, and returns the path."""
    def write(content, protocol: int = 4) -> Path:
        path = tmp_path / "batch"
        path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
        return path
    return write


def assert_read(path: Path, labels=LABELS) -> None:
    """Assert that a file gives `IMAGES` as C-contiguous arrays that may be written to, and its labels."""
    images, found = batches.read_labelled(path)
    assert images.dtype == np.uint8 and images.flags.c_contiguous and images.flags.writeable
    assert np.array_equal(images, IMAGES)
    assert found.dtype == np.int64 and found.tolist() == labels


def error_of(reader, path: Path) -> str:
    """Return the message with which a reader refuses a file: one line that begins with the file."""
    with pytest.raises(UserError) as caught:
        reader(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 600 + len(str(path))
    return message


# --- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", hostile.valid())
def test_files_of_every_age(file, name):
    path = file(hostile.valid()[name])
    assert_read(path)
    images, ids = batches.read_unlabelled(path)
    assert np.array_equal(images, IMAGES) and ids.dtype == np.int64 and ids.tolist() == IDS


def test_both_numpys_are_among_them():
    written = b"".join(hostile.valid().values())
    assert all(name in written for name in (b"numpy.core.multiarray", b"numpy.core.numeric"))
    assert int(np.__version__[0]) < 2 or all(b"numpy._core." + name in written for name in (b"multiarray", b"numeric"))


@pytest.mark.parametrize("protocol", range(6))
def test_every_form(file, protocol):
    for key in (str, str.encode):
        for array in ARRAYS.values():
            assert_read(file({key("labels"): LABELS, key("data"): array}, protocol))
        for labels in INTEGERS:
            assert_read(file({key("labels"): labels, key("data"): PLANES}, protocol))
        others = {key(name): value for name, value in OTHERS.items()}
        assert_read(file({**others, key("labels"): LABELS, key("data"): PLANES}, protocol))


@pytest.mark.parametrize("protocol", range(4))
def test_names_of_the_other_numpy(file, protocol):
    content = pickle.dumps({"labels": np.array(LABELS), "data": PLANES}, protocol)
    old, new = (b"numpy._core", b"numpy.core") if b"numpy._core" in content else (b"numpy.core", b"numpy._core")
    assert_read(file(content.replace(old, new)))


def test_protocol_0_of_python_2_is_not_ascii():
    # Such strings are what pickletools cannot give as bytes; the sample must have some.
    content = hostile.valid()["Python 2.7, NumPy 1.16, protocol 0"]
    assert b"\\xc8" in content and b"\\xff" in content


def test_forty_thousand_images(file):
    # A large file stays within the bound on opcodes, also where each label is a NumPy scalar. It needs no images here.
    names = [b"%06d.png" % index for index in range(40_000)]
    message = error_of(batches.read_labelled, file({b"labels": list(np.zeros(40_000, int)), b"filenames": names}))
    assert "no data among the keys" in message


@pytest.mark.parametrize("array", ARRAYS)
def test_unlabelled_files(file, array):
    for ids in (np.array(IDS), IDS, np.array(IDS, np.uint64)):
        images, found = batches.read_unlabelled(file({b"data": ARRAYS[array], b"ids": ids}, 5))
        assert np.array_equal(images, IMAGES) and images.flags.c_contiguous and images.flags.writeable
        assert found.dtype == np.int64 and found.tolist() == IDS
    assert batches.read_unlabelled(file({b"data": ARRAYS[array]}))[1] is None
    assert batches.read_unlabelled(file({"data": ARRAYS[array], "labels": "anything"}))[1] is None


@pytest.mark.parametrize("names", [list(batches.CLASSES), [name.encode() for name in batches.CLASSES]])
def test_label_names(file, names):
    for protocol in range(6):
        assert batches.read_label_names(file({b"label_names": names}, protocol)) == list(batches.CLASSES)


# --- what is written -------------------------------------------------------------------------------------------------


def test_written_batch_is_official(tmp_path):
    path = tmp_path / "data_batch_1"
    batches.write_batch(path, np.ascontiguousarray(IMAGES), np.array(LABELS), "training batch 1 of 5")
    assert_read(path)
    content = path.read_bytes()
    as_bytes, as_text = pickle.loads(content, encoding="bytes"), pickle.loads(content, encoding="latin1")
    assert list(as_bytes) == [b"batch_label", b"labels", b"data", b"filenames"]
    assert list(as_text) == ["batch_label", "labels", "data", "filenames"]
    for batch, key, text in ((as_bytes, str.encode, bytes), (as_text, str, str)):
        assert batch[key("batch_label")] == key("training batch 1 of 5")
        assert batch[key("labels")] == LABELS and {type(label) for label in batch[key("labels")]} == {int}
        assert batch[key("data")].dtype == np.uint8 and np.array_equal(batch[key("data")], PLANES)
        assert len(batch[key("filenames")]) == 2 and {type(name) for name in batch[key("filenames")]} == {text}


def test_written_opcodes_are_of_python_2(tmp_path):
    batches.write_batch(tmp_path / "batch", IMAGES, np.array(LABELS), "one")
    batches.write_label_names(tmp_path / "meta", batches.CLASSES)
    for path in (tmp_path / "batch", tmp_path / "meta"):
        found = list(pickletools.genops(path.read_bytes()))
        assert {opcode.proto for opcode, _, _ in found} <= {0, 1, 2} and found[0][1] == 2
        assert not {opcode.name for opcode, _, _ in found} & {"UNICODE", "BINUNICODE"}
        assert {name for opcode, name, _ in found if opcode.name == "GLOBAL"} <= {
            "numpy.core.multiarray _reconstruct", "numpy ndarray", "numpy dtype"}


def test_written_label_names(tmp_path):
    path = tmp_path / "batches.meta"
    batches.write_label_names(path, batches.CLASSES)
    assert batches.read_label_names(path) == list(batches.CLASSES)
    content = pickle.loads(path.read_bytes(), encoding="bytes")
    assert content[b"label_names"] == [name.encode() for name in batches.CLASSES] and content[b"num_vis"] == 3072
    assert pickle.loads(path.read_bytes(), encoding="latin1")["label_names"] == list(batches.CLASSES)


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "batch"
    batches.write_batch(path, IMAGES, np.array(LABELS), "old")

    def write_half(path, content):
        path.write_text("half")
        raise OSError("no space left")

    monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises(OSError, match="no space"):
        batches.write_batch(path, IMAGES[:1], np.array([1]), "new")
    assert_read(path)
    assert list(tmp_path.iterdir()) == [path]


# --- what is refused -------------------------------------------------------------------------------------------------


GOOD = {b"labels": LABELS, b"data": PLANES}


@pytest.mark.parametrize("change, found", [
    ({b"labels": [3, 10]}, "the labels 10, not 0 to 9"),
    ({b"labels": [-1, 3]}, "the labels -1, not 0 to 9"),
    ({b"labels": np.array([255, 254], "u1")}, "the labels 255, 254, not 0 to 9"),
    ({b"labels": [3]}, "labels int64 (1,), not 2 integers"),
    ({b"labels": []}, "labels float64 (0,), not 2 integers"),
    ({b"labels": [3, 9, 1]}, "labels int64 (3,), not 2 integers"),
    ({b"labels": [True, False]}, "labels a list of 2 bool, not 2 integers"),
    ({b"labels": [3, 9.0]}, "labels a list of 2 float/int, not 2 integers"),
    ({b"labels": ["cat", "dog"]}, "labels a list of 2 str, not 2 integers"),
    ({b"labels": [3, 2**70]}, "labels object (2,), not 2 integers"),
    ({b"labels": np.array([True, False])}, "labels bool (2,), not 2 integers"),
    ({b"labels": np.array([3.0, 9.0])}, "labels float64 (2,), not 2 integers"),
    ({b"labels": np.array([[3], [9]])}, "labels int64 (2, 1), not 2 integers"),
    ({b"labels": np.int64(3)}, "labels 3, not 2 integers"),
    ({b"labels": (3, 9)}, "labels a tuple, not 2 integers"),
    ({b"labels": b"\x03\x09"}, "labels b'\\x03\\t', not 2 integers"),
    ({b"labels": None}, "labels None, not 2 integers"),
    ({b"data": PLANES.astype(np.float32)}, "data float32 (2, 3072), not uint8 (N, 3072) or (N, 32, 32, 3)"),
    ({b"data": PLANES.astype(np.int8)}, "data int8 (2, 3072), not uint8"),
    ({b"data": PLANES > 1}, "data bool (2, 3072), not uint8"),
    ({b"data": PLANES[0]}, "data uint8 (3072,), not uint8"),
    ({b"data": PLANES[:, :3071]}, "data uint8 (2, 3071), not uint8"),
    ({b"data": PLANES.reshape(2, 3, 32, 32)}, "data uint8 (2, 3, 32, 32), not uint8"),
    ({b"data": PLANES[:0], b"labels": []}, "data uint8 (0, 3072), not uint8"),
    ({b"data": PLANES.tobytes()}, "data b'\\x01\\x02"),
    ({b"data": PLANES[0].tolist()}, "data a list of 3072 int, not uint8"),
    ({b"data": None}, "data None, not uint8"),
    ({b"data": np.array([{}, []], object)}, "found dtype('O8', False, True), which"),
    ({b"data": np.array(["cat", "dog"])}, "found dtype('U3', False, True), which"),
    ({b"data": np.ma.masked_array(PLANES)}, "the foreign global numpy.ma"),
    ({b"more": {"a": 1}}, "a dict within a dict"),
    ({b"more": [[1]]}, "a list of other things than values"),
    ({b"more": ((((1,),),),)}, "a tuple of other things than values"),
    ({5: 1}, "a key that is no text"),
])
def test_bad_content(file, change, found):
    message = error_of(batches.read_labelled, file({**GOOD, **change}))
    assert found in message
    assert "expected a whole CIFAR-10 batch file" in message


@pytest.mark.parametrize("content, found", [
    ({b"data": PLANES}, "found no labels among the keys 'data'"),
    ({b"labels": LABELS}, "found no data among the keys 'labels'"),
    ({b"data": PLANES, b"fine_labels": LABELS}, "found no labels among the keys 'data', 'fine_labels'"),
    ({}, "found no data and no labels among the keys"),
    ([GOOD[b"labels"]], "found a list of other things than values"),
    (LABELS, "found something else than one dict"),
    (None, "found something else than one dict"),
    (b"", "found the end of the file after 0 bytes"),
    (b"label,image\n3,cat.png\n", "found a truncated or damaged pickle"),
    (b"<!DOCTYPE html>", "found the opcode b'<', which"),
    (b"\x89PNG\r\n\x1a\n", "found the opcode"),
    (zlib.compress(b"CIFAR"), "found"),
    (pickle.dumps(GOOD) + b"\n", "found something else than one dict"),
    (pickle.dumps(GOOD) * 2, "found something else than one dict"),
    (b"(}.", "found something else than one dict"),
    (b"}}.", "found something else than one dict"),
    (b".", "found something else than one dict"),
    (b"t.", "found a truncated or damaged pickle (IndexError"),
    (b"}h\x07.", "found a truncated or damaged pickle (KeyError: 7)"),
    (b"}(Na.", "found"),
    (b"}(U\x01au.", "found a truncated or damaged pickle (ValueError"),
    (b"]U\x01aNs.", "found"),
    (b"])b.", "found a truncated or damaged pickle (AttributeError"),
])
def test_bad_files(file, content, found):
    assert found in error_of(batches.read_labelled, file(content))


@pytest.mark.parametrize("ids, found", [
    ([7], "ids int64 (1,), not 2 integers"),
    ([7, "8"], "ids a list of 2 int/str, not 2 integers"),
    (np.array([0.5, 1]), "ids float64 (2,), not 2 integers"),
    (np.array([1, 2**64 - 1], np.uint64), "ids uint64 (2,), not 2 integers below 2**63"),
])
def test_bad_ids(file, ids, found):
    assert found in error_of(batches.read_unlabelled, file({b"data": PLANES, b"ids": ids}))
    assert "found no data among the keys 'ids'" in error_of(batches.read_unlabelled, file({b"ids": IDS}))


@pytest.mark.parametrize("content, found", [
    ({b"labels": LABELS}, "found no label_names among the keys 'labels'"),
    ({b"label_names": ["cat"] * 9}, "label_names a list of 9 str, not 10 names"),
    ({b"label_names": [*range(10)]}, "label_names a list of 10 int, not 10 names"),
    ({b"label_names": "abcdefghij"}, "label_names 'abcdefghij', not 10 names"),
    ({b"label_names": [b"\xff"] * 10}, "truncated or damaged"),
])
def test_bad_label_names(file, content, found):
    assert found in error_of(batches.read_label_names, file(content))


@pytest.mark.parametrize("name", hostile.valid())
def test_every_cut_and_every_addition(file, name):
    content = hostile.valid()[name]
    for end in [*range(0, len(content), max(1, len(content) // 200)), len(content) - 1]:
        error_of(batches.read_labelled, file(content[:end]))
    for more in (b"\0", b".", content):
        assert "something else than one dict" in error_of(batches.read_labelled, file(content + more))


def test_paths_that_are_no_files(tmp_path):
    large, pipe = tmp_path / "large", tmp_path / "pipe"
    with open(large, "wb") as file:
        file.truncate(batches.MAX_BYTES + 1)  # a hole, no disk space
    os.mkfifo(pipe)
    for path, found in ((tmp_path / "none", "No such file"), (tmp_path, "no regular file"), (pipe, "no regular file"),
                        (large, "no regular file of up to 134217728 bytes"), (large / "below", "Not a directory")):
        for reader in (batches.read_labelled, batches.read_unlabelled, batches.read_label_names):
            assert found in error_of(reader, path)


# --- what is not run -------------------------------------------------------------------------------------------------


def run_child(folder: Path, examples: int) -> dict:
    """Let the child of hostile.py read the files of a folder and fuzz; a fault in it is a fault here.

    Its numbers have no limit on their digits, as before Python 3.10.7.
    """
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests" / "hostile.py"), str(folder), str(examples)]
    child = subprocess.run(command, capture_output=True, text=True, timeout=300 + examples,
                           env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONINTMAXSTRDIGITS": "0"})
    assert child.returncode == 0, child.stderr[-4000:]
    return json.loads(child.stdout)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Read all hostile files and 300 fuzzed ones in one child: its report, the sentinel, and the files by number."""
    folder, sentinel = tmp_path_factory.mktemp("hostile"), tmp_path_factory.mktemp("sentinel") / "ran"
    files = hostile.payloads(sentinel)
    for index, (content, _) in enumerate(files.values()):
        (folder / f"{index:03d}").write_bytes(content)
    return run_child(folder, 300), sentinel, files


def test_hostile_files_are_refused_by_name(report):
    # That nothing but reading was done, in bounded time and memory, the child asserts for each file.
    found, sentinel, files = report
    wrong = {}
    for index, (name, (content, wanted)) in enumerate(files.items()):
        errors = [error for key, error in found["errors"].items() if key.startswith(f"{index:03d} ")]
        assert len(errors) == (3 if len(content) < 10_000 else 1)
        wrong |= {f"{name}: {error}": wanted for error in errors if wanted not in error}
    assert not wrong
    assert not sentinel.exists()


def test_the_payloads_are_live(tmp_path):
    # Python's own unpickler runs each: a payload that does nothing would prove nothing.
    for index, (name, content) in enumerate(hostile.calls(tmp_path / "ran").items()):
        sentinel = tmp_path / f"ran{index}"
        content = hostile.calls(sentinel)[name]
        try:
            pickle.loads(content)
        except (TypeError, AttributeError, ValueError):
            pass  # what comes after the call
        assert sentinel.exists(), name


def test_fuzzed_files_load_right_or_are_refused(report):
    counts = report[0]["counts"]
    assert counts["read"] > 20 and counts["refused"] > 100


@pytest.mark.slow
def test_many_fuzzed_files_load_right_or_are_refused(tmp_path):
    counts = run_child(tmp_path, 100_000)["counts"]
    assert counts["read"] > 5_000 and counts["refused"] > 50_000
