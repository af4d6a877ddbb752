"""Batch files of every version are read, bad ones are refused and run nothing; downloads resume and are checked."""

import hashlib
import http.server
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import malformed
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from malformed import IDS, LABELS, two_images

import cifar10
import utils
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


# --- download --------------------------------------------------------------------------------------------------------


NAMES = (*cifar10.TRAIN_FILES, *cifar10.TEST_FILES, "batches.meta")


def pack(members) -> bytes:
    """Make an archive of a folder and (name, content) pairs."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        folder = tarfile.TarInfo(cifar10.FOLDER)
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


MEMBERS = [(f"{cifar10.FOLDER}/{name}", np.random.default_rng(seed).bytes(30_000)) for seed, name in enumerate(NAMES)]
CONTENT = pack(MEMBERS)
MD5 = hashlib.md5(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves `content`; each item of `script` spoils one request: an HTTP status, or "break" for half of the rest."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.script, self.has_ranges, self.requests = CONTENT, [], True, []
        self.before_answer = lambda: None
        self.url = f"http://127.0.0.1:{self.server_port}/{cifar10.ARCHIVE}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        server.requests.append(wanted)
        server.before_answer()
        action = server.script.pop(0) if server.script else None
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and server.has_ranges else 0
        if isinstance(action, int) or start >= len(server.content) > 0:
            return self.send_error(action or 416)
        rest = server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        self.wfile.write(rest[:len(rest) // 2] if action == "break" else rest)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(cifar10, "PAUSES", (0, 0, 0))
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def data_dir(tmp_path):
    return tmp_path / "new" / "data"


def assert_unpacked(data_dir: Path, folder: Path, *others: str) -> None:
    assert folder == data_dir / cifar10.FOLDER
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        name.split("/")[1]: content for name, content in MEMBERS}
    assert {path.name for path in data_dir.iterdir()} == {cifar10.FOLDER, *others}


def refused(data_dir: Path, *args: str) -> str:
    with pytest.raises(UserError) as caught:
        cifar10.download(data_dir, *args)
    message = str(caught.value)
    assert message.isprintable() and "--synthetic" in message
    return message


def test_download(server, data_dir, capsys):
    assert_unpacked(data_dir, cifar10.download(data_dir, server.url, MD5))
    assert server.requests == [None]
    assert "downloading cifar-10-python.tar.gz: 100%" in capsys.readouterr().err
    assert cifar10.find_folder(data_dir) == cifar10.find_folder(data_dir / cifar10.FOLDER) == data_dir / cifar10.FOLDER
    assert cifar10.find_folder(data_dir.parent) is None


def test_download_resumes_after_broken_connections(server, data_dir, capsys):
    server.script = ["break"] * 6  # more than the retries without progress
    assert_unpacked(data_dir, cifar10.download(data_dir, server.url, MD5))
    offsets = [int(wanted[6:-1]) for wanted in server.requests[1:]]
    assert len(offsets) == 6 and offsets[0] == len(CONTENT) // 2 and offsets == sorted({*offsets})
    assert capsys.readouterr().err.count("download interrupted (connection closed") == 6


def test_download_starts_over_where_the_server_has_no_ranges(server, data_dir):
    server.script, server.has_ranges = ["break"], False
    assert_unpacked(data_dir, cifar10.download(data_dir, server.url, MD5))
    assert server.requests == [None, f"bytes={len(CONTENT) // 2}-"]
    server.script = ["break"] * 9
    assert "connection closed" in refused(data_dir.parent, server.url, MD5)
    assert len(server.requests) == 2 + 1 + len(cifar10.PAUSES)  # no attempt gets further than the first


def test_download_retries_after_server_errors(server, data_dir):
    server.script = [503, 500]
    assert_unpacked(data_dir, cifar10.download(data_dir, server.url, MD5))
    server.script = [503] * 9
    assert "503" in refused(data_dir.parent, server.url, MD5)
    assert len(server.requests) == 3 + 4


def test_download_does_not_retry_missing_files(server, data_dir):
    server.script = [404]
    message = refused(data_dir, server.url, MD5)
    assert "404" in message and f"put {cifar10.ARCHIVE} into {data_dir}" in message
    assert len(server.requests) == 1 and list(data_dir.iterdir()) == []


def test_unreachable_servers_are_one_clear_error(server, data_dir):
    server.server_close()
    assert f"put {cifar10.ARCHIVE} into {data_dir}" in refused(data_dir, server.url, MD5)
    assert list(data_dir.iterdir()) == []


@pytest.mark.parametrize("partial", [b"", b"other", CONTENT + b"more"])
def test_a_wrong_checksum_is_refused_and_the_partial_file_removed(server, data_dir, partial):
    data_dir.mkdir(parents=True)
    (data_dir / f"{cifar10.ARCHIVE}.part").write_bytes(partial)
    assert ".part: found MD5 " in refused(data_dir, server.url, MD5 if partial else "0" * 32)
    assert list(data_dir.iterdir()) == []


def test_an_interrupted_download_is_resumed(server, data_dir, monkeypatch):
    def interrupt(source, target):
        target.write(source.read(1000))
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cifar10.shutil, "copyfileobj", interrupt)
        cifar10.download(data_dir, server.url, MD5)
    [partial] = data_dir.iterdir()
    assert partial.name == f"{cifar10.ARCHIVE}.part" and partial.read_bytes() == CONTENT[:1000]
    assert_unpacked(data_dir, cifar10.download(data_dir, server.url, MD5))
    assert server.requests == [None, "bytes=1000-"]


def test_sigterm_while_unpacking_leaves_the_partial_file(server, data_dir, monkeypatch):
    before = {number: signal.getsignal(number) for number in utils.STOP_SIGNALS}
    utils.exit_on_signals()  # as the programs do
    try:
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
            patch.setattr(cifar10.os, "replace", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
            cifar10.download(data_dir, server.url, MD5)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert caught.value.code == 143
    assert [path.name for path in data_dir.iterdir()] == [f"{cifar10.ARCHIVE}.part"]
    server.shutdown()  # the second attempt needs no network
    assert_unpacked(data_dir, cifar10.download(data_dir, server.url, MD5))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to see which files a process has open")
def test_two_processes_download_once(server, data_dir):
    code = f"import cifar10; cifar10.TIMEOUT = None; cifar10.download({str(data_dir)!r}, {server.url!r}, {MD5!r})"
    processes = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) for _ in range(2)]

    def wait_for_both():
        for process in processes:
            while process.poll() is None and not any(
                    os.path.realpath(link).endswith(".part") for link in Path(f"/proc/{process.pid}/fd").iterdir()):
                time.sleep(0.01)
    server.before_answer = wait_for_both
    assert [process.wait() for process in processes] == [0, 0]
    assert_unpacked(data_dir, data_dir / cifar10.FOLDER)
    assert server.requests == [None]


@pytest.mark.parametrize("own", [(), (cifar10.ARCHIVE,)])
def test_the_faster_of_two_processes_wins(server, data_dir, monkeypatch, own):
    unpack = cifar10._unpack
    data_dir.mkdir(parents=True)
    for name in own:
        (data_dir / name).write_bytes(CONTENT)

    def unpack_late(*args):
        monkeypatch.setattr(cifar10, "_unpack", unpack)
        cifar10.download(data_dir, server.url, MD5)
        unpack(*args)
    monkeypatch.setattr(cifar10, "_unpack", unpack_late)
    assert_unpacked(data_dir, cifar10.download(data_dir, server.url, MD5), *own)


def test_two_processes_unpack_at_the_same_moment(server, data_dir, monkeypatch):
    replace = os.replace

    def replace_late(source, target):
        monkeypatch.setattr(cifar10.os, "replace", replace)
        cifar10._unpack(data_dir / f"{cifar10.ARCHIVE}.part", MD5, data_dir)
        replace(source, target)
    monkeypatch.setattr(cifar10.os, "replace", replace_late)
    assert_unpacked(data_dir, cifar10.download(data_dir, server.url, MD5))


def test_an_archive_in_the_folder_is_unpacked(data_dir):
    data_dir.mkdir(parents=True)
    (data_dir / cifar10.ARCHIVE).write_bytes(CONTENT[:-1])
    message = refused(data_dir, "http://127.0.0.1:9", MD5)
    assert message.startswith(f"{data_dir / cifar10.ARCHIVE}: found MD5 ") and f"expected {MD5}" in message
    assert (data_dir / cifar10.ARCHIVE).read_bytes() == CONTENT[:-1]
    (data_dir / cifar10.ARCHIVE).write_bytes(CONTENT)
    assert_unpacked(data_dir, cifar10.download(data_dir, "http://127.0.0.1:9", MD5), cifar10.ARCHIVE)
