"""Downloads from local servers that are slow, broken or wrong: each is left for the next, and nothing is lost."""

import hashlib
import http.client
import http.server
import io
import os
import re
import subprocess
import sys
import tarfile
import threading
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest

import cifar10
import download
from utils import UserError

PART = f"{download.ARCHIVE}.part"
FILES = {name: np.random.default_rng(seed).bytes(100_000)
         for seed, name in enumerate((*cifar10.TRAIN_FILES, *cifar10.TEST_FILES, "batches.meta"))}
with tarfile.open(fileobj=(archive := io.BytesIO()), mode="w:gz") as tar:
    for name, content in FILES.items():
        info = tarfile.TarInfo(f"{cifar10.FOLDER}/{name}")
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
CONTENT = archive.getvalue()
WRONG = b"x" + CONTENT[1:]
MD5, WRONG_MD5 = (hashlib.md5(content).hexdigest() for content in (CONTENT, WRONG))
HALF = len(CONTENT) // 2


class Server(http.server.ThreadingHTTPServer):
    """Serves `content`. Each item of `script` changes a request: HTTP status, bytes/s, "break" or "stall" half way."""

    def __init__(self, *script, speed: float = 1e9, has_ranges: bool = True, content: bytes = CONTENT):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.speed, self.has_ranges, self.content = list(script), speed, has_ranges, content
        self.log, self.before_answer, self.stopped = [], lambda: None, threading.Event()
        self.host = f"127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self):
        self.stopped.set()
        self.shutdown()
        self.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        wanted = int(self.headers.get("Range", "bytes=0-")[6:-1])
        server.log.append((server, wanted))
        server.before_answer()
        action, start = server.script.pop(0) if server.script else None, wanted if server.has_ranges else 0
        speed = action if isinstance(action, float) else server.speed
        if isinstance(action, int) or start >= len(server.content) > 0:
            return self.send_error(action or 416)
        rest = server.content[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(rest)))
        self.send_header("Speed", str(speed))
        self.end_headers()
        self.wfile.write(rest[:len(rest) // 2] if action in ("break", "stall") else rest)
        if action == "stall":
            server.stopped.wait()

    def log_message(self, *_):
        pass


@pytest.fixture
def serve(monkeypatch):
    """A function that starts servers to download from, and returns them and their log of (server, first byte).

    Time passes only while bytes are read, at the speed of their server.
    """
    servers, now, read1 = [], 0.0, http.client.HTTPResponse.read1

    def timed_read1(response: http.client.HTTPResponse, size: int) -> bytes:
        nonlocal now
        piece = read1(response, size)
        now += len(piece) / float(response.headers["Speed"])
        return piece

    def serve(*makers) -> tuple[list[Server], list[tuple[Server, int]]]:
        new, log = [make() for make in makers], []
        for server in new:
            server.log = log
        servers.extend(new)
        monkeypatch.setattr(download, "URLS", tuple(f"http://{server.host}/{download.ARCHIVE}?a=1" for server in new))
        return new, log
    monkeypatch.setattr(http.client.HTTPResponse, "read1", timed_read1)
    monkeypatch.setattr(download, "time", SimpleNamespace(monotonic=lambda: now, sleep=lambda _: None))
    monkeypatch.setattr(download, "MD5", MD5)
    monkeypatch.setattr(download, "SPEED_SECONDS", 1)
    monkeypatch.setenv("no_proxy", "*")
    yield serve
    for server in servers:
        server.stop()


@pytest.fixture
def data_dir(tmp_path):
    return tmp_path / "new" / "data"


def assert_unpacked(data_dir: Path, folder: Path, *others: str) -> None:
    assert folder == data_dir / cifar10.FOLDER
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == FILES
    assert {path.name for path in data_dir.iterdir()} == {cifar10.FOLDER, *others}


def refused(data_dir: Path) -> str:
    with pytest.raises(UserError) as caught:
        download.get_folder(data_dir)
    message = str(caught.value)
    assert message.isprintable() and "--synthetic" not in message and "interrupted" not in message
    return message


S = partial(partial, Server)
NOT_FOUND, ERROR = "HTTP Error 404: Not Found", "HTTP Error 500: Internal Server Error"
CLOSED, FOUND = f"connection closed after {HALF:,} bytes", f"found MD5 {WRONG_MD5}, expected {MD5}"
ONE, TWO, THREE = (f"only {speed} kB/s" for speed in (1, 2, 3))


@pytest.mark.parametrize("makers, requests, reasons", [  # requests: server and first byte, None for more than before
    ([S(speed=1000)], [(0, 0)], []),  # slow, and yet the only one
    ([S(500, 500)], [(0, 0)] * 3, [ERROR] * 2),
    ([S(404), S(500), S()], [(0, 0), (1, 0), (2, 0)], [NOT_FOUND, ERROR]),
    ([S(500), S(404)], [(0, 0), (1, 0), (0, 0)], [ERROR, NOT_FOUND]),
    ([S("break"), S()], [(0, 0), (1, HALF)], [CLOSED]),
    ([S("stall"), S()], [(0, 0), (1, HALF)], ["timed out"]),
    ([S("break"), S(has_ranges=False)], [(0, 0), (1, HALF)], [CLOSED]),
    ([S("break"), S("break", has_ranges=False)], [(0, 0), (1, HALF), (0, HALF)], [CLOSED] * 2),  # nothing is lost
    ([S(speed=201_000), S()], [(0, 0)], []),
    ([S(speed=199_000), S()], [(0, 0), (1, None)], ["only 199 kB/s"]),
    ([S(speed=1000), S(speed=3000), S(speed=2000)], [(0, 0), (1, None), (2, None), (1, None)], [ONE, THREE, TWO]),
    ([S(speed=1000), S(speed=2000), S(speed=3000)], [(0, 0), (1, None), (2, None)], [ONE, TWO]),
    ([S(3000.0, 500.0), S(speed=1000)], [(0, 0), (1, None), (0, None)], [THREE, ONE]),  # carries on, slow as it is now
    ([S("break"), S(speed=1000)], [(0, 0), (1, HALF), (0, None)], [CLOSED, ONE]),  # fast and broken, rather than slow
    ([S(content=WRONG), S()], [(0, 0), (1, 0)], [FOUND]),
    ([S("break", content=WRONG), S()], [(0, 0), (1, HALF), (0, 0), (1, 0)], [CLOSED, FOUND, FOUND])])
def test_servers(serve, data_dir, capsys, monkeypatch, makers, requests, reasons):
    monkeypatch.setattr(download, "TIMEOUT", 1 if "timed out" in reasons else 60)
    servers, log = serve(*makers)
    assert_unpacked(data_dir, download.get_folder(data_dir))
    starts = [start for _, start in log]
    assert [(servers.index(server), None if expected is None else start)
            for (server, start), (_, expected) in zip(log, requests, strict=True)] == requests
    assert (0, 0) in requests[1:] or starts == sorted(starts)
    lines = re.findall("warning: (.*)\n", error := capsys.readouterr().err)
    assert lines == [f"{left.host}: {reason}; trying {tried.host}"
                     for (left, _), (tried, _), reason in zip(log, log[1:], reasons, strict=False)]
    assert "downloading cifar-10-python.tar.gz: 100%" in error


def test_broken_connections_are_resumed(serve, data_dir):
    _, log = serve(S(*["break"] * 6))  # more than the failed attempts in a row
    assert_unpacked(data_dir, download.get_folder(data_dir))
    offsets = [offset for _, offset in log]
    assert len(offsets) == 7 and offsets[:2] == [0, HALF] and offsets == sorted({*offsets})


@pytest.mark.parametrize("makers, found, pauses", [
    ([S(*[503] * 9), S(*[500] * 9)], ERROR, [1, 2, 3]),
    ([S(403), S(404)], NOT_FOUND, [1]),  # they would say the same again
    ([S(content=b""), S(content=WRONG)], FOUND, [1]),
    ([S(*["break"] * 9, has_ranges=False)], CLOSED, [0, 1, 2, 3])])  # none gets further than the first
def test_without_a_server_one_line_says_what_to_do(serve, data_dir, makers, found, pauses):
    servers, log = serve(*makers)
    download.time.sleep = (slept := []).append
    message = refused(data_dir)
    assert message.startswith(f"no CIFAR-10 in {data_dir}, and it could not be downloaded ({servers[-1].host}: {found}")
    assert "; --data-dir takes" in message and cifar10.FOLDER in message and download.ARCHIVE in message
    assert slept == pauses and len(log) == len(pauses) + 1


def test_without_a_network_or_a_folder(serve, data_dir):
    [server], _ = serve(S())
    server.stop()
    assert f"{server.host}: urlopen error" in refused(data_dir)
    (data_dir / "file").touch()
    assert "--data-dir takes" in refused(data_dir / "file" / "below")


@pytest.mark.parametrize("has_ranges", [True, False])
@pytest.mark.parametrize("start", [b"other", CONTENT + b"more", CONTENT[:1000] + b"x", CONTENT[:1000]])
def test_a_partial_file_is_continued_or_replaced(serve, data_dir, start, has_ranges):
    serve(S(has_ranges=has_ranges))
    data_dir.mkdir(parents=True)
    (data_dir / PART).write_bytes(start)
    assert_unpacked(data_dir, download.get_folder(data_dir))


@pytest.mark.parametrize("place, requests", [("tqdm.update", 2), ("os.replace", 1)])  # the latter: unpacking
def test_an_interrupted_download_is_resumed(serve, data_dir, monkeypatch, place, requests):
    def interrupt(*_):
        raise KeyboardInterrupt
    _, log = serve(S())
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(f"download.{place}", interrupt)
        download.get_folder(data_dir)
    [part] = data_dir.iterdir()
    assert part.name == PART and (size := part.stat().st_size) > 0
    assert_unpacked(data_dir, download.get_folder(data_dir))
    assert [start for _, start in log] == [0, size][:requests]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc to see which files a process has open")
def test_two_processes_download_once(serve, data_dir):
    [server], log = serve(S())
    code = (f"import download; download.URLS, download.MD5 = {download.URLS}, {MD5!r}; download.TIMEOUT = None; "
            f"download.get_folder({str(data_dir)!r})")
    processes = [subprocess.Popen([sys.executable, "-c", code], cwd=Path(download.__file__).parent) for _ in range(2)]

    def wait_for_both():
        for process in processes:
            while process.poll() is None and not any(
                    os.path.realpath(link).endswith(PART) for link in Path(f"/proc/{process.pid}/fd").iterdir()):
                time.sleep(0.01)
    server.before_answer = wait_for_both
    assert [process.wait() for process in processes] == [0, 0]
    assert_unpacked(data_dir, data_dir / cifar10.FOLDER)
    assert len(log) == 1


@pytest.mark.parametrize("name", [download.ARCHIVE, "copy.tgz"])
def test_an_archive_is_unpacked(data_dir, monkeypatch, name):
    monkeypatch.setattr(download, "URLS", ())
    monkeypatch.setattr(download, "MD5", MD5)
    data_dir.mkdir(parents=True)
    archive = data_dir / name
    archive.write_bytes(WRONG)
    place = data_dir if name == download.ARCHIVE else archive  # --data-dir can name the archive itself
    assert refused(place) == (f"{archive} is not the official {download.ARCHIVE}: found MD5 {WRONG_MD5}, expected "
                              f"{MD5}; delete it, and --data-dir {data_dir} downloads it again")
    assert archive.read_bytes() == WRONG
    archive.write_bytes(CONTENT)
    with monkeypatch.context() as patch:
        patch.setattr(download.tempfile, "TemporaryDirectory", Mock(side_effect=OSError("Read-only file system")))
        assert "could not be unpacked there (Read-only file system); " in refused(place)
    for _ in range(2):
        assert_unpacked(data_dir, download.get_folder(place), name)
    assert cifar10.find_folder(place) == data_dir / cifar10.FOLDER
