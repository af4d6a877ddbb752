"""Batch files of every version are read; others are refused in one line, and nothing in them is run."""

import codecs
import os
import pickle
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from runs import Call

import cifar10
from utils import UserError

PLANES = np.zeros((2, 3072), np.uint8)  # two images: black with a few bright pixels
PLANES[[0, 0, 0, 1], [0, 3, 1024 + 33, 3071]] = 1, 4, 200, 255
IMAGES = PLANES.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
LABELS, IDS = [3, 9], [7, 5]
GOOD = {b"labels": LABELS, b"data": PLANES, b"ids": np.array(IDS)}
ARRAYS = [PLANES, np.asfortranarray(PLANES), np.repeat(PLANES, 2, 1)[:, ::2], np.ascontiguousarray(IMAGES),
          np.asfortranarray(IMAGES), IMAGES]
INTEGERS = [LABELS, np.array(LABELS), np.array(LABELS, ">i4"), np.array(LABELS, "u1"), list(np.array(LABELS))]
OTHERS = {"none": None, "yes": True, "half": 0.5, "large": 2**40, "negative": -3, "no bytes": b"", "long": "x" * 300,
          "accents": "\xe4\u20ac\n", "long bytes": b"\xff\n'" * 300, "shape": (2, 3), "floats": np.ones((2, 3), "f4"),
          "scalar": np.float32(0.5), "dict": {"list": [[1], [2]]}}
# As written by Python 2.7 and NumPy 1.16, like the official files.
OFFICIAL = (
    b"\x80\x02}q\x01(U\x06labelsq\x02]q\x03(K\x03K\teU\x04dataq\x04cnumpy.core.multiarray\n_reconstruct\nq\x05"
    b"cnumpy\nndarray\nq\x06K\x00\x85U\x01b\x87Rq\x07(K\x01K\x02M\x00\x0c\x86cnumpy\ndtype\nq\x08U\x02u1K\x00K\x01\x87R"
    b"q\t(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T\x00\x18\x00\x00" + PLANES.tobytes() +
    b"tbU\x03idsq\nh\x05h\x06K\x00\x85U\x01b\x87Rq\x0b(K\x01K\x02\x85h\x08U\x02i8K\x00K\x01\x87Rq\x0c(K\x03U\x01<NNN"
    b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x10\x07\0\0\0\0\0\0\0\x05\0\0\0\0\0\0\0tbu.")
pytestmark = pytest.mark.filterwarnings("error")  # NumPy 2.4 warns about the dtypes in the official files


@pytest.fixture
def file(tmp_path):
    """A function that writes bytes, or the pickle of a value, and returns the path."""
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
    assert message.startswith(str(path)) and message.isprintable() and len(message) < 400 + len(str(path))
    return message


@pytest.mark.parametrize("protocol", range(6))
def test_every_form_is_read(file, protocol):
    for key in (str, str.encode):
        for array in ARRAYS:
            assert_read(file({key("labels"): LABELS, key("data"): array}, protocol))
        for labels in INTEGERS:
            assert_read(file({key("labels"): labels, key("data"): PLANES}, protocol))
        others = {key(name): value for name, value in OTHERS.items()}
        assert_read(file({**others, key("labels"): LABELS, key("data"): PLANES}, protocol))


@pytest.mark.parametrize("protocol", range(6))
def test_files_of_other_versions_are_read(file, protocol):
    written = pickle.dumps({**GOOD, b"labels": list(np.array(LABELS))}, protocol)
    other_numpy = written.replace(b"numpy._core", b"numpy.core") if protocol < 4 else written  # later ones hold lengths
    for content in (OFFICIAL, written, other_numpy):
        path = file(content)
        assert_read(path)
        images, ids = cifar10.read_unlabeled(path)
        assert np.array_equal(images, IMAGES) and ids.dtype == np.int64 and ids.tolist() == IDS


@pytest.mark.parametrize("change, found", [
    ({b"labels": [3, 10]}, "found labels from 3 to 10; expected 0 to 9"),
    ({b"labels": np.array([255, 254], "u1")}, "found labels from 254 to 255; expected"),
    ({b"labels": [-1, 3]}, "found labels from -1 to 3; expected"),
    ({b"labels": [True, False]}, "found labels a list; expected"),
    ({b"labels": np.array([3.0, 9.0])}, "found labels float64 (2,); expected"),
    ({b"ids": [7]}, "found ids int64 (1,); expected 2 integers"),
    ({b"data": PLANES.astype("f4")}, "found data float32 (2, 3072); expected uint8 (N, 3072) or (N, 32, 32, 3)"),
    ({b"data": PLANES[:, :3071]}, "found data uint8 (2, 3071); expected"),
    ({b"data": PLANES[:0], b"labels": []}, "found data uint8 (0, 3072); expected"),
    ({b"data": PLANES.tobytes()}, "found data a bytes; expected"),
    ({b"data": np.array(["cat", "dog"])}, "no CIFAR-10 batch file of the Python version (UnpicklingError: the dtype")])
def test_bad_values_are_refused(file, change, found):
    reader = cifar10.read_unlabeled if b"ids" in change else cifar10.read_labeled
    assert found in error_of(reader, file({**GOOD, **change}))


@pytest.mark.parametrize("content, found", [
    ({b"data": PLANES, b"fine_labels": [], "\n": 1}, r"found the keys ['data', 'fine_labels', '\n']; expected labels"),
    ({}, "found the keys []; expected data and labels"), ([LABELS], "(UnpicklingError: a list"),
    (pickle.dumps(GOOD) + b"\n", "(UnpicklingError: a dict, or more than that"),
    (b"", "no CIFAR-10 batch file of the Python version (EOFError: Ran out of input)"),
    (b"<!DOCTYPE html>", "no CIFAR-10"),
])
def test_bad_files_are_refused(file, tmp_path, content, found):
    assert found in error_of(cifar10.read_labeled, file(content))
    assert "No such file or directory" in error_of(cifar10.read_labeled, tmp_path / "none")
    error_of(cifar10.read_labeled, tmp_path)  # a folder


def test_damaged_files_are_refused(file):
    rng, refused = random.Random(0), 0
    for base in (OFFICIAL, *(pickle.dumps(GOOD, protocol) for protocol in (0, 4))):
        for end in (*range(0, len(base), len(base) // 30), len(base) - 1):
            error_of(cifar10.read_labeled, file(base[:end]))
        places = [at for at in range(len(base)) if len({*base[max(0, at - 8):at + 8]}) > 4]  # most are in black pixels
        for at in rng.choices(places, k=100):
            path = file(base[:at] + rng.randbytes(rng.randrange(3)) + base[at + rng.randrange(2):])
            try:
                cifar10.read_labeled(path)
            except UserError as error:
                assert str(error).startswith(str(path)) and str(error).isprintable()
                refused += 1
    assert refused > 100


# --- malicious files -------------------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def dtype(code: str) -> bytes:
    return b"cnumpy\ndtype\n(" + text(code) + b"\x89\x88tR"


@pytest.mark.parametrize("protocol", range(6))
def test_calls_are_not_run(file, tmp_path, protocol):
    sentinel = tmp_path / "sentinel"
    system, python = Call(os.system, f"echo > {sentinel}"), Call(eval, f"open({str(sentinel)!r}, 'w').close()")
    for value in (system, python, {"data": system, "labels": [1]}, {"labels": 1, system: 1},
                  Call(codecs.encode, system, "latin1")):
        content = pickle.dumps(value, protocol)
        assert "; nothing was run" in error_of(cifar10.read_labeled, file(content))
        assert not sentinel.exists()
        try:
            pickle.loads(content)
        except TypeError:
            pass  # what follows the call
        assert sentinel.exists()  # so the file could have done it
        sentinel.unlink()


@pytest.mark.parametrize("module, name", [
    ("os", "system"), ("__builtin__", "getattr"), ("_codecs", "decode"), ("cifar10", "pickle.loads"),
    ("numpy", "ndarray.tofile"), ("numpy", "f2py.os.system"), ("numpy.core", "multiarray._reconstruct"),
    ("numpy._core.multiarray", "fromfile"), ("numpy.core.multiarray", "_reconstruct.__globals__")])
def test_other_names_are_refused(file, module, name):
    before = {*sys.modules}
    lines = f"{module}\n{name}\n".encode()
    for content in (b"c" + lines + b")R.", text(module) + text(name) + b"\x93)R.", b"(i" + lines + b".",
                    b"(c" + lines + b"o.", b"c" + lines + b")\x81.", b"c" + lines + b")}\x92."):
        assert f"the file names {module}.{name}; nothing was run" in error_of(cifar10.read_labeled, file(content))
    assert {*sys.modules} == before


BUFFER = b"cnumpy.core.numeric\n_frombuffer\n(C\x08AAAAAAAA%bK\x01\x85" + text("C") + b"tR"
FIELDS = b"(K\x03" + text("|") + b"N(" + text("a") + b"t}" + text("a") + b"(%bK\0tsK\x08K\x01K\0tb"


@pytest.mark.parametrize("content, found", [
    # NumPy's own functions would take AAAAAAAA for a pointer in the first two, and crash.
    (b"cnumpy\nndarray\n(K\x01\x85" + dtype("O") + b"C\x08AAAAAAAAtRK\0K\x01s.", "the dtype O"),
    (BUFFER % (dtype("V8") + FIELDS % dtype("O")) + text("a") + b"K\x01s.", "the dtype V8"),
    (b"}c_codecs\nencode\nN}" + text("__defaults__") + b")s\x86bs.", "no CIFAR-10")])
def test_crafted_arguments_are_refused(file, content, found):
    before = {*sys.modules}
    assert found in error_of(cifar10.read_labeled, file(content))
    assert {*sys.modules} == before
    assert_read(file(GOOD))  # and nothing has changed for the next file
