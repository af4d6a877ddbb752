"""Batch files of every version are read, bad ones are refused and run nothing."""

import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import malformed
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from malformed import IDS, LABELS, two_images

import cifar10
from utils import UserError

ROOT = Path(__file__).resolve().parent.parent
PLANES = two_images()
IMAGES = PLANES.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
ARRAYS = [PLANES, np.asfortranarray(PLANES), np.repeat(PLANES, 2, 1)[:, ::2], np.ascontiguousarray(IMAGES),
          np.asfortranarray(IMAGES), IMAGES]
INTEGERS = [LABELS, np.array(LABELS), np.array(LABELS, ">i4"), np.array(LABELS, "u1"), list(np.array(LABELS))]
OTHERS = {"none": None, "yes": True, "half": 0.5, "large": 2**40, "negative": -3, "no bytes": b"", "long": "x" * 300,
          "accents": "\xe4\u20ac\n", "long bytes": b"\xff\n'" * 300, "shape": (2, 3), "floats": np.ones((2, 3), "f4"),
          "scalar": np.float32(0.5), "dict": {"list": [[1], [2]]}}
GOOD = {b"labels": LABELS, b"data": PLANES}


@pytest.fixture
def file(tmp_path):
    """Give a function that writes bytes, or the pickle of a value, and returns the path."""
    def write(content, protocol: int = 4) -> Path:
        path = tmp_path / "batch"
        path.write_bytes(content if isinstance(content, bytes) else pickle.dumps(content, protocol))
        return path
    return write


def assert_read(path: Path) -> None:
    images, labels = cifar10.read_labeled(path)
    assert images.dtype == np.uint8 and images.flags.c_contiguous and images.flags.writeable
    assert np.array_equal(images, IMAGES)
    assert labels.dtype == np.int64 and labels.tolist() == LABELS


def error_of(reader, path: Path) -> str:
    """Return the error of a reader: one line that begins with the path."""
    with pytest.raises(UserError) as caught:
        reader(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and message.isprintable() and len(message) < 400 + len(str(path))
    return message


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", malformed.valid())
def test_files_of_every_version_are_read(file, name):
    content = malformed.valid()[name]
    path = file(content)
    assert_read(path)
    images, ids = cifar10.read_unlabeled(path)
    assert np.array_equal(images, IMAGES) and ids.dtype == np.int64 and ids.tolist() == IDS
    for end in [*range(0, len(content), max(1, len(content) // 100)), len(content) - 1]:
        error_of(cifar10.read_labeled, file(content[:end]))
    assert "1 bytes after the end" in error_of(cifar10.read_labeled, file(content + b"."))


@pytest.mark.parametrize("protocol", range(2, 6))
def test_every_form_is_read(file, protocol):
    for key in (str, str.encode):
        for array in ARRAYS:
            assert_read(file({key("labels"): LABELS, key("data"): array}, protocol))
        for labels in INTEGERS:
            assert_read(file({key("labels"): labels, key("data"): PLANES}, protocol))
        others = {key(name): value for name, value in OTHERS.items()}
        assert_read(file({**others, key("labels"): LABELS, key("data"): PLANES}, protocol))


@pytest.mark.parametrize("protocol", range(2, 4))
def test_the_other_numpy_version_is_read(file, protocol):
    content = pickle.dumps({"labels": np.array(LABELS), "data": PLANES}, protocol)
    old, new = (b"numpy._core", b"numpy.core") if b"numpy._core" in content else (b"numpy.core", b"numpy._core")
    assert old in content
    assert_read(file(content.replace(old, new)))


def test_frames_of_any_length_are_read(file):
    content = pickle.dumps(GOOD, 4)
    assert content[2:3] == b"\x95"
    for length in range(0, 200, 7):
        assert_read(file(content[:3] + length.to_bytes(8, "little") + content[11:]))


def test_large_files_stay_within_the_limit_on_opcodes(file):
    names = [b"%06d.png" % index for index in range(10_000)]
    content = {b"data": PLANES, b"ids": list(np.zeros(10_000, int)), b"filenames": names}
    assert "ids int64 (10000,); expected 2 integers" in error_of(cifar10.read_unlabeled, file(content, 2))


def test_unlabeled_files_are_read(file):
    for ids in (np.array(IDS), IDS, np.array(IDS, np.uint64)):
        assert cifar10.read_unlabeled(file({b"data": PLANES, b"ids": ids}))[1].tolist() == IDS
    images, ids = cifar10.read_unlabeled(file({"data": ARRAYS[3], "labels": "anything"}))
    assert ids is None and np.array_equal(images, IMAGES) and images.flags.writeable


# --- bad files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change, found", [
    ({b"labels": [3, 10]}, "found the labels 10; expected 0 to 9"),
    ({b"labels": np.array([255, 254], "u1")}, "found the labels 255, 254; expected 0 to 9"),
    ({b"labels": [-1, 3]}, "found the labels -1; expected 0 to 9"),
    ({b"labels": [3]}, "found labels int64 (1,); expected 2 integers"),
    ({b"labels": []}, "found labels a list of 0 ; expected 2 integers"),
    ({b"labels": [True, False]}, "found labels a list of 2 bool; expected 2 integers"),
    ({b"labels": [3, 9.0]}, "found labels a list of 2 float/int; expected"),
    ({b"labels": [3, 2**70]}, "found labels object (2,); expected"),
    ({b"labels": np.array([3.0, 9.0])}, "found labels float64 (2,); expected"),
    ({b"labels": np.array([[3], [9]])}, "found labels int64 (2, 1); expected"),
    ({b"labels": (3, 9)}, "found labels a tuple; expected"),
    ({b"labels": None}, "found labels a NoneType; expected"),
    ({b"data": PLANES.astype("f4")}, "found data float32 (2, 3072); expected uint8 (N, 3072) or (N, 32, 32, 3)"),
    ({b"data": PLANES[0]}, "found data uint8 (3072,); expected"),
    ({b"data": PLANES[:, :3071]}, "found data uint8 (2, 3071); expected"),
    ({b"data": PLANES.reshape(2, 3, 32, 32)}, "found data uint8 (2, 3, 32, 32); expected"),
    ({b"data": PLANES[:0], b"labels": []}, "found data uint8 (0, 3072); expected"),
    ({b"data": PLANES.tobytes()}, "found data a bytes; expected"),
    ({b"data": PLANES[0].tolist()}, "found data a list of 3072 int; expected"),
    ({b"data": np.array([{}, []], object)}, "found arguments of dtype that batch files do not have"),
    ({b"data": np.array(["cat", "dog"])}, "found arguments of dtype that batch files do not have"),
    ({b"data": np.ma.masked_array(PLANES)}, "the global numpy.ma"),
])
def test_bad_values_are_refused(file, change, found):
    assert found in error_of(cifar10.read_labeled, file({**GOOD, **change}))


@pytest.mark.parametrize("content, found", [
    ({b"data": PLANES}, "found no labels among the keys data; expected a CIFAR-10 batch file"),
    ({}, "found no data and no labels among the keys"),
    ([LABELS], "found a list of 1 list; expected a CIFAR-10 batch file"),
    (None, "found a NoneType"),
    (b"", "pickle exhausted"),
    (b"label,image\n3,cat.png\n", "found an unexpected opcode LIST at byte 0"),
    (b"<!DOCTYPE html>", "damaged pickle"),
    (b"\x89PNG\r\n\x1a\n", "found"),
    (b"(dp0\n.", "found an unexpected opcode DICT at byte 1"),
    (b"}}.", "found no data"),
    (b".", "damaged pickle"),
    (b"t.", "damaged pickle"),
    (b"}h\x07.", "damaged pickle"),
    (b"])b.", "damaged pickle"),
])
def test_bad_files_are_refused(file, content, found):
    assert found in error_of(cifar10.read_labeled, file(content))


def test_bad_ids_are_refused(file):
    for ids, found in (([7], "ids int64 (1,); expected 2 integers"), ([7, "8"], "ids a list of 2 int/str; expected"),
                       (np.array([1, 2**64 - 1], np.uint64), "the ids 18446744073709551615; expected")):
        assert found in error_of(cifar10.read_unlabeled, file({b"data": PLANES, b"ids": ids}))


def test_paths_that_are_not_files_are_refused(tmp_path):
    large, pipe = tmp_path / "large", tmp_path / "pipe"
    with open(large, "wb") as file:
        file.truncate(cifar10.MAX_BYTES + 1)  # a hole, no disk space
    os.mkfifo(pipe)
    for path, found in ((tmp_path / "none", "No such file"), (tmp_path, "no regular file"), (pipe, "no regular file"),
                        (large, "no regular file of at most 134,217,728 bytes"), (large / "below", "Not a directory")):
        assert found in error_of(cifar10.read_labeled, path)


def test_malicious_files_are_refused_and_run_nothing(tmp_path):
    sentinel, folder = tmp_path / "sentinel", tmp_path / "files"
    folder.mkdir()
    files = malformed.payloads(sentinel)
    for index, (content, _) in enumerate(files.values()):
        (folder / f"{index:03d}").write_bytes(content)
    child = subprocess.run([sys.executable, str(ROOT / "tests" / "malformed.py"), str(folder)], capture_output=True,
                           text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert child.returncode == 0, child.stderr[-4000:]
    errors = json.loads(child.stdout)
    assert len(errors) == len(files)
    for (name, (_, expected)), error in zip(files.items(), errors.values(), strict=True):
        assert expected in error, name
    assert not sentinel.exists()


def test_the_payloads_are_live(tmp_path):
    for index, name in enumerate(malformed.calls(tmp_path / "sentinel")):
        sentinel = tmp_path / f"sentinel{index}"
        try:
            pickle.loads(malformed.calls(sentinel)[name])
        except TypeError:
            pass  # what follows the call
        assert sentinel.exists(), name


class KnownGlobals(pickle.Unpickler):
    """The standard unpickler, for files that were read."""

    def find_class(self, module, name):
        assert (module, name) in cifar10.GLOBALS
        return super().find_class(module, name)


def test_mutated_files_are_read_as_by_pickle_or_refused(tmp_path):
    path, counts = tmp_path / "mutated", {"read": 0, "refused": 0}
    tokens = [b"cos\nsystem\n", b"\x81", b"\x85", b"h\0", b"q\0", b"r\xff\xff\xff\x7f", b"R", b"b", b"(", b"0", b"."]
    bases = []
    for content in malformed.valid().values():  # most places in the files lie in black pixels
        bases.append((content, [at for at in range(len(content)) if len({*content[max(0, at - 8):at + 8]}) > 4]))
    edits = st.tuples(st.integers(0, 2**12), st.booleans(), st.binary(max_size=3) | st.sampled_from(tokens))

    @settings(max_examples=300, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(bases), st.lists(edits, min_size=1, max_size=2))
    def check(base, edits):
        content, places = base
        for where, insert, piece in edits:
            at = places[where % len(places)]
            content = content[:at] + piece + content[at + (0 if insert else max(1, len(piece))):]
        path.write_bytes(content)
        try:
            images, labels = cifar10.read_labeled(path)
        except UserError as error:
            counts["refused"] += 1
            assert str(error).startswith(f"{path}: ") and str(error).isprintable()
            return
        counts["read"] += 1
        try:
            batch = KnownGlobals(io.BytesIO(content), encoding="bytes").load()
        except (EOFError, ValueError, pickle.UnpicklingError):
            return  # a frame of another length
        batch = {key.decode("latin1") if isinstance(key, bytes) else key: value for key, value in batch.items()}
        assert np.array_equal(images.transpose(0, 3, 1, 2).reshape(-1, 3072), batch["data"])
        assert labels.tolist() == list(batch["labels"])

    check()
    assert counts["read"] > 10 and counts["refused"] > 100
