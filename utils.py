"""Errors, messages, atomic writes and signals. Imports no torch, so that a program can use it from its first line."""

import contextlib
import errno
import functools
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn, TextIO

STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM]
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
    STOP_SIGNALS.append(signal.SIGHUP)
EXIT_STATUS = dict.fromkeys(STOP_SIGNALS, 143) | {signal.SIGINT: 130}
_exit_statuses: list[int] = []  # of signals that ask to exit: code that runs in an import may swallow the SystemExit


class UserError(ValueError):
    """A user's mistake. The programs print it in one line, without a traceback, and exit with status 2.

    Every function of this project may raise it for an invalid file, flag or folder.
    """


class RunError(Exception):
    """A failed run. The programs print it in one line and exit with status 1."""


# Failures that torch raises as RuntimeError: where the reason begins in their text, and the way out.
WAYS_OUT = {
    "out of memory": "choose a smaller --batch-size, or another --device",
    "DefaultCPUAllocator": "choose a smaller --batch-size",
    "DataLoader worker (pid": "load without worker processes (--workers 0); --resume continues a saved run",
    "unable to allocate shared memory": "load without worker processes (--workers 0), or make /dev/shm larger (in "
                                        "Docker: --shm-size)",
}


# --- messages --------------------------------------------------------------------------------------------------------


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


def program(name: str) -> Callable:
    """Decorate the main function of a program, so that it prints an error in one line and returns the exit status."""
    def decorate(main: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(main)
        def run(*args: Any) -> int:
            try:
                return _exit_statuses[0] if _exit_statuses else main(*args)
            except KeyboardInterrupt:
                print_line("interrupted", sys.stderr)
                return 130
            except RuntimeError as error:
                for start, way_out in WAYS_OUT.items():
                    if start in str(error):
                        cause = reason(error).rpartition(start)[2].partition("\n")[0].rstrip(" .")
                        print_line(f"{name}: error: {start}{cause}; {way_out}", sys.stderr)
                        return 1
                raise
            except (UserError, RunError, OSError) as error:
                print_line(f"{name}: error: {one_line(reason(error))}", sys.stderr)
                return 2 if isinstance(error, UserError) else 1
        return run
    return decorate


def set_up_process() -> None:
    """Prepare the process, before torch is imported: signals exit with one line, and torch's threads sleep in waits."""
    def leave(number: int, _: object) -> NoReturn:
        if number == signal.SIGINT:
            print_line("interrupted", sys.stderr)
        _exit_statuses.append(EXIT_STATUS[number])
        sys.exit(EXIT_STATUS[number])

    for number in STOP_SIGNALS:
        signal.signal(number, leave)
    # Let torch's threads sleep while they wait: if they spin, they take the cores from each other on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # closed: a file of the run would take its place
        pass
    os.close(descriptor)
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
    with contextlib.suppress(OSError, ValueError):
        if os.get_terminal_size(2).columns == 0:  # a terminal of unknown size, where tqdm would print nothing
            os.environ.setdefault("TQDM_NCOLS", "80")
            os.environ.setdefault("TQDM_NROWS", "24")


# --- files -----------------------------------------------------------------------------------------------------------


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


# --- signals ---------------------------------------------------------------------------------------------------------


def stop_signals() -> list[int]:
    """Return the signals that this thread may handle; Python leaves them to the main one."""
    return STOP_SIGNALS if threading.current_thread() is threading.main_thread() else []


class Signals:
    """Record a signal that asks the run to stop, inside a `with` block; a second signal ends the process."""

    def __init__(self, quiet: bool = False):
        self.quiet = quiet  # one of several ranks prints
        self.stop: int | None = None  # exit status asked for: 130 for SIGINT, 143 for SIGTERM and SIGHUP
        self._time = 0.0

    def __enter__(self) -> "Signals":
        self._before = {number: signal.signal(number, self._note) for number in stop_signals()}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        if self.stop is None:
            self.stop, self._time = EXIT_STATUS[number], time.monotonic()
            if not self.quiet:  # not by print, which the signal may have interrupted and which is not reentrant
                text = b"\nSaving after this step, then stopping. Press Ctrl-C again to quit without saving.\n"
                with contextlib.suppress(OSError):  # the terminal may be gone
                    os.write(2, text)
        elif time.monotonic() - self._time > 0.5:  # a terminal and torchrun may both deliver the same Ctrl-C
            signal.signal(number, signal.SIG_DFL)  # files are written atomically, so this is safe
            signal.raise_signal(number)
