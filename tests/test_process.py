"""How programs start and end: signals, streams, and errors in one line with an exit status."""

import contextlib
import errno
import os
import signal
import subprocess
import sys

import pytest
import torch
from runs import ROOT

import process
import utils

needs_posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and pipes")

# As sitecustomize.py, Python runs it at its start.
INTERRUPT = """
import os, sys, threading, time

def interrupt():
    while 'torch' not in sys.modules:
        time.sleep(0.001)
    os.kill(os.getpid(), {number})

threading.Thread(target=interrupt, daemon=True).start()
"""


@needs_posix
@pytest.mark.parametrize("number, line, status", [(signal.SIGINT, "interrupted\n", 130), (signal.SIGTERM, "", 143)])
def test_a_signal_while_the_program_starts(number, line, status, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(INTERRUPT.format(number=int(number)))
    done = subprocess.run([sys.executable, "train.py", "--synthetic", "--data-dir", tmp_path, "--output-dir",
                           tmp_path / "run"], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(tmp_path)},
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert (done.stdout, done.returncode) == (line, status)
    assert not (tmp_path / "run").exists()


@needs_posix
@pytest.mark.parametrize(("given", "expected"), [({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")])
def test_nohup_and_the_waiting_of_threads_are_left_to_the_user(given, expected):
    code = "import os, signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); import process; process.set_up_process(); "
    code += "signal.raise_signal(signal.SIGHUP); print(os.environ['OMP_WAIT_POLICY'])"
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | given
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout == f"{expected}\n"


@needs_posix
def test_the_same_ctrl_c_delivered_twice_counts_once(monkeypatch):
    """As a terminal and torchrun may do."""
    times, ended = iter([100.0, 100.4, 100.6]), []
    monkeypatch.setattr(process.time, "monotonic", lambda: next(times))
    monkeypatch.setattr(signal, "raise_signal", lambda number: ended.append((number, signal.getsignal(number))))
    with process.Signals(quiet=True) as signals:
        for _ in range(3):
            assert not ended
            os.kill(os.getpid(), signal.SIGINT)
    assert signals.stop == 130 and ended == [(signal.SIGINT, signal.SIG_DFL)]


@pytest.mark.parametrize("error, line, status", [
    (utils.UserError("\x1b[1mtwo\x1b[0m\nlines\x07 \x9b2J"), "name: error: two lines 2J\n", 2),
    (utils.RunError("failed"), "name: error: failed\n", 1),
    (OSError(errno.ENOSPC, "No space", "args.json"), "name: error: args.json: No space\n", 1),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0"),
     "name: error: out of memory; choose a smaller --batch-size, or another --device\n", 1),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
     "name: error: DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes; choose a smaller "
     "--batch-size\n", 1),
    (KeyboardInterrupt(), "interrupted\n", 130)], ids=lambda value: type(value).__name__)
def test_an_error_is_one_line_and_a_status(error, line, status, capsys):
    def body():
        raise error
    assert process.program("name")(body)() == status
    assert capsys.readouterr().err == line


@needs_posix
def test_a_swallowed_exit_ends_the_program_before_it_begins():
    """Code that runs while a module is imported may swallow the SystemExit of a signal."""
    code = ("import contextlib, process, signal, sys; process.set_up_process()\n"
            "with contextlib.suppress(SystemExit): signal.raise_signal(signal.SIGINT)\n"
            "status = process.program('x')(lambda: print('ran'))(); process.set_up_process()\n"
            "process.program('x')(lambda: print('again'))(); sys.exit(status)")  # as by %run in a notebook
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "again\n", "interrupted\n")


@needs_posix
def test_closed_streams_are_not_taken_by_a_file(tmp_path):
    code = "import process, sys, utils; process.set_up_process(); file = open(sys.argv[1], 'w'); utils.warn('no'); " \
           "print(file.fileno())"
    done = subprocess.run(f'"{sys.executable}" -c "{code}" {tmp_path}/file 2>&-', shell=True, cwd=ROOT, text=True,
                          stdout=subprocess.PIPE)
    assert int(done.stdout) > 2 and (tmp_path / "file").read_bytes() == b""


@needs_posix
def test_a_terminal_of_unknown_size_shows_progress():
    import pty
    pid, terminal = pty.fork()
    if pid == 0:
        code = "import process; process.set_up_process(); from tqdm import tqdm; list(tqdm(range(3), disable=None))"
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, "-c", code])
    shown = b""
    with contextlib.suppress(OSError):  # at its end
        while part := os.read(terminal, 1000):
            shown += part
    os.close(terminal)
    assert os.waitpid(pid, 0)[1] == 0 and b"3/3" in shown
