"""Errors, messages and files. Imports no torch, so that a program can use it from its first line."""

import contextlib
import errno
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TextIO


class UserError(ValueError):
    """A user's mistake. The programs print it in one line, without a traceback, and exit with status 2.

    Every function of this project may raise it for an invalid file, flag or folder.
    """


class RunError(Exception):
    """A failed run. The programs print it in one line and exit with status 1."""


def print_line(text: str, stream: TextIO | None = None, must_succeed: bool = False) -> None:
    """Print to stdout (or `stream`) and flush; a closed pipe, as with `| head -1`, is not an error.

    Any other failure, such as a full disk, is an OSError with `must_succeed`, and else ignored.
    """
    stream = stream or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except UnicodeEncodeError:  # a terminal that cannot show a file's name
        print_line(text.encode("ascii", "backslashreplace").decode(), stream, must_succeed)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if must_succeed and error.errno not in (errno.EPIPE, errno.EINVAL):  # EINVAL: a closed pipe on Windows
            raise OSError(error.errno, error.strerror, "stdout") from error


def one_line(text: str) -> str:
    """Join the lines of a message, without control characters, which a library's message or a file's name may hold."""
    return " ".join(re.sub(r"\x1b\[[\d;]*m|[\x00-\x1f\x7f-\x9f]", " ", text).split())


def warn(text: str) -> None:
    """Print a warning of one line to stderr."""
    print_line(f"warning: {one_line(text)}", sys.stderr)


def reason(error: Exception) -> str:
    """Return the message of an error: of a failed file operation without the errno, of a full GPU without details."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error).split(". Tried to")[0]


def plural(count: int, noun: str) -> str:
    """Write a count and its noun: `1 epoch`, `2 epochs`."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def duration(seconds: float) -> str:
    """Write a time as `40 s`, `12 min` or `3 h 12 min`."""
    if seconds < 60:
        return f"{max(seconds, 1):.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def write_atomically(path: str | Path, write: Callable[[Path], Any], backup: Path | None = None) -> None:
    """Write a file so that a reader, or a kill at any moment, finds the old or the new one complete.

    `write` writes the new content to the temporary path that it is given. `backup` takes the old file; between the two
    renames only the backup exists. Without it, a link stays a link. A pipe or another special file is written directly.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        write(path)
        return
    path = path if backup else Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if backup is not None and path.exists():
            os.replace(path, backup)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error  # name the file, always
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def check_output(path: str | Path, inputs: Iterable[str | Path] = ()) -> None:
    """Before anything is computed, create the folder of an output file; refuse one that is in use, or not writable."""
    path = Path(path)
    if os.path.realpath(path) in map(os.path.realpath, inputs):
        raise UserError(f"{path} is an input or another output; choose a different file")
    with contextlib.suppress(OSError):  # then it is not writable, either
        path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() or not (path.parent.is_dir() and os.access(path if path.exists() else path.parent, os.W_OK)):
        raise UserError(f"cannot write to {path}; expected a file in a writable folder")


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    content = text.encode(errors="surrogateescape")  # file names in it need not be UTF-8
    write_atomically(path, lambda temporary: temporary.write_bytes(content))
