"""How a program starts, stops on a signal, and ends: one line and an exit status.

Imports no torch, so that a program can use it from its first line.
"""

import contextlib
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from utils import RunError, UserError, one_line, print_line, reason

STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM]
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
    STOP_SIGNALS.append(signal.SIGHUP)
EXIT_STATUS = dict.fromkeys(STOP_SIGNALS, 143) | {signal.SIGINT: 130}
_exit_statuses: list[int] = []  # of signals that ask to exit: code that runs in an import may swallow the SystemExit

# Failures that torch raises as RuntimeError: where the reason begins in their text, and a hint.
HINTS = {
    "out of memory": "choose a smaller --batch-size, or another --device",
    "DefaultCPUAllocator": "choose a smaller --batch-size",
    "DataLoader worker (pid": "load without worker processes (--workers 0); --resume continues a saved run",
    "unable to allocate shared memory": "load without worker processes (--workers 0), or make /dev/shm larger (in "
                                        "Docker: --shm-size)",
}


def set_up_process() -> None:
    """Set up a program before it imports torch: what signals do, how threads wait, and closed streams."""
    def leave(number: int, _: object) -> NoReturn:
        if number == signal.SIGINT:
            print_line("interrupted", sys.stderr)
        _exit_statuses.append(EXIT_STATUS[number])
        sys.exit(EXIT_STATUS[number])

    _exit_statuses.clear()  # a notebook keeps this module from one %run to the next
    for number in STOP_SIGNALS:
        signal.signal(number, leave)
    # Let torch's threads sleep while they wait: if they spin, they take the cores from each other on a busy machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))
    with contextlib.suppress(OSError, ValueError):
        if os.get_terminal_size(2).columns == 0:  # a terminal of unknown size, where tqdm would print nothing
            os.environ.setdefault("TQDM_NCOLS", "80")
            os.environ.setdefault("TQDM_NROWS", "24")


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
                for start, hint in HINTS.items():
                    if start in str(error):
                        cause = reason(error).rpartition(start)[2].partition("\n")[0].rstrip(" .")
                        print_line(f"{name}: error: {start}{cause}; {hint}", sys.stderr)
                        return 1
                raise
            except (UserError, RunError, OSError) as error:
                print_line(f"{name}: error: {one_line(reason(error))}", sys.stderr)
                return 2 if isinstance(error, UserError) else 1
        return run
    return decorate


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
                text = b"\nSaving, then stopping. Press Ctrl-C again to quit without saving.\n"
                with contextlib.suppress(OSError):  # the terminal may be gone
                    os.write(2, text)
        elif time.monotonic() - self._time > 0.5:  # a terminal and torchrun may both deliver the same Ctrl-C
            signal.signal(number, signal.SIG_DFL)  # files are written atomically, so this is safe
            signal.raise_signal(number)
