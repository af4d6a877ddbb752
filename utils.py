"""Checkpoints, run folder, random state, processes and signals: what keeps a run safe. It knows no images."""

import contextlib
import errno
import io
import os
import pickletools
import signal
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
import torch.distributed as dist
from torch import Tensor, nn

CHECKPOINT_VERSION = 1
CHECKPOINT_KEYS = {"version", "model", "optimizer", "scheduler", "scaler", "epoch", "step", "totals", "best_accuracy",
                   "history", "args", "rng", "classes", "environment"}
# What a run writes. Removed in this order, so that a kill meanwhile leaves a run that can go on, or none.
RUN_FILES = ("args.json", "results.json", "curves.png", "confusion.png", "mistakes.png", "metrics.csv", "best.pt",
             "previous.pt", "last.pt")
MAX_PICKLE_BYTES = 16 * 2**20  # of a checkpoint without its tensors; 200 epochs have 0.1 MB
PICKLE_NAMES = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter",
                *(f"torch {kind}Storage" for kind in "Float Double Half BFloat16 Long Int Byte Bool".split())}
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1")
           if hasattr(signal, name)]  # Windows has no SIGUSR1


class UserError(ValueError):
    """A mistake of the user's: told in one line, without a traceback, exit status 2."""


def say(text: str, stream: TextIO | None = None) -> None:
    """Print, by default to stdout, and flush; a reader that has gone away, as with `| head`, makes no run fail."""
    stream = stream or sys.stdout
    try:
        print(text, file=stream, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def warn(text: str) -> None:
    """Say on stderr what is not as expected, in one line."""
    say(f"warning: {text}", sys.stderr)


# --- files -----------------------------------------------------------------------------------------------------------


def write_atomically(path: str | Path, write: Callable[[Path], Any], backup: Path | None = None) -> None:
    """Write a file so that a reader, or a kill at any moment, finds the old or the new one whole.

    Args:
        path: The file.
        write: Writes the new content to the path that it is given, in the same folder.
        backup: Takes the old file, if there is one. Between the two renamings only the backup exists.

    Raises:
        OSError: Nothing has changed, and nothing is left behind.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if backup is not None and path.exists():
            os.replace(path, backup)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the renaming itself reaches the disk with the folder; Windows cannot open one
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # some network file systems have no fsync of folders
                os.fsync(folder)
        finally:
            os.close(folder)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically, in UTF-8; what is no plain file, such as a pipe, is written to as it is."""
    path = Path(os.path.realpath(path))  # a link stays one
    content = text.encode(errors="surrogateescape")  # a file's name may be no UTF-8
    if path.exists() and not path.is_file():
        path.write_bytes(content)
    else:
        write_atomically(path, lambda temporary: temporary.write_bytes(content))


class RunFolder:
    """`checkpoints/NAME/`: the files of one run, and a lock that dies with its process."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.last, self.previous, self.best = (self.path / f"{name}.pt" for name in ("last", "previous", "best"))
        self.last_is_good = True  # or the next save does not make it the previous one
        self._lock = None

    def holds_checkpoint(self) -> bool:
        """Return whether there is something to go on from."""
        return any(os.path.exists(path) for path in (self.last, self.previous))  # False also for impossible names

    def holds_run(self) -> bool:
        """Return whether there is something that a new run would write over."""
        return self.holds_checkpoint() or any(
            os.path.exists(self.path / name) for name in ("metrics.csv", "results.json"))

    def open(self) -> None:
        """Make the folder, take its lock, and clean up after a killed run.

        Raises:
            UserError: It cannot be written, or another process trains in it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "a")
        except OSError as error:
            raise UserError(f"run folder {self.path} cannot be written ({error.strerror}); "
                            "choose another with --checkpoint-dir or --name") from error
        try:
            _lock_file(self._lock.fileno())
        except OSError as error:
            self.close()
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise UserError(f"run folder {self.path} cannot be locked ({error.strerror}); choose another "
                                "--checkpoint-dir") from error
            raise UserError(f"run folder {self.path} is in use by another process; wait for it, or choose "
                            "another --name") from error
        for name in RUN_FILES:
            for temporary in self.path.glob(f".{name}.*.tmp"):
                temporary.unlink()

    def close(self) -> None:
        """Give the lock back; it is also given back when the process ends, however it ends."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def clear(self) -> None:
        """Remove the run that lies here (`--overwrite`), and nothing but the files that a run writes."""
        for name in RUN_FILES:
            (self.path / name).unlink(missing_ok=True)


def _lock_file(descriptor: int) -> None:
    # Record locks, not flock: a forked loader worker must not hold on to the lock of its killed parent.
    if os.name == "nt":
        import msvcrt
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def save_checkpoint(state: dict[str, Any], path: Path, backup: Path | None = None) -> None:
    """Write a checkpoint atomically, keeping the one before as `backup`.

    Raises:
        OSError: The disk is full, or the folder gone; the older files are whole.
    """
    buffer = io.BytesIO()  # so that a full disk is an OSError, and never an error of torch's own writer
    torch.save({"version": CHECKPOINT_VERSION, **state}, buffer)
    write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()), backup)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of this program, or of the published code (`{"net": …}`), without running what it says.

    Every byte is checked against the archive's CRC first, since `torch.load` takes flipped ones without a word.

    Returns:
        The dict, on the CPU; "model" has plain keys, never `module.` or `_orig_mod.`.

    Raises:
        UserError: The file is missing, damaged, or no checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {path} is not there, or no file; give one such as checkpoints/NAME/best.pt")
    try:
        with open(path, "rb") as file:
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
                # of a folder torch reads nothing; and overlapping records can be many times the file
                if any(entry.compress_type != zipfile.ZIP_STORED or entry.external_attr & 0x10 for entry in entries) \
                        or sum(entry.file_size for entry in entries) > path.stat().st_size:
                    raise UserError(f"checkpoint {path} is compressed or forged, expected a file written by torch.save")
                if (broken := archive.testzip()) is not None:
                    raise UserError(f"checkpoint {path} is damaged ({broken!a:.60} fails its checksum); use another")
                for entry in archive.infolist():
                    if entry.filename.lower().endswith("data.pkl"):  # as torch finds it
                        _check_pickle(archive.read(entry))
            file.seek(0)
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # zipfile and torch raise a dozen types at damaged bytes; all mean the same to a user
        reason = str(error).strip().splitlines() or [""]
        raise UserError(f"checkpoint {path} is damaged or not a checkpoint ({type(error).__name__}: {reason[0]!a:.100})"
                        ) from error
    if isinstance(checkpoint, dict) and "net" in checkpoint and "model" not in checkpoint:
        checkpoint = {"model": checkpoint["net"], "args": {}}  # published code: always the default network
    if not isinstance(checkpoint, dict) or not {"model", "args"} <= checkpoint.keys():
        raise UserError(f"checkpoint {path} is of another program (no model and args in it)")
    if checkpoint.get("version", CHECKPOINT_VERSION) != CHECKPOINT_VERSION:
        raise UserError(f"checkpoint {path} has version {checkpoint['version']!r}, expected {CHECKPOINT_VERSION}; "
                        "it is of another version of this program")
    classes = checkpoint.get("classes", [""] * 10)
    if not isinstance(checkpoint["args"], dict) or not isinstance(classes, list) or len(classes) != 10 \
            or not all(isinstance(name, str) for name in classes):
        raise UserError(f"checkpoint {path} is of another program (its args or classes are malformed)")
    for name in ("model", "ema"):
        if checkpoint.get(name) is not None:
            checkpoint[name] = _plain_weights(checkpoint[name], path)
    return checkpoint


def _check_pickle(content: bytes) -> None:
    """Refuse what `torch.load` would do for minutes, or in gigabytes: a few of its functions, and nested containers.

    A container that is fetched again can hold itself twice, and that 30 times over.

    Raises:
        ValueError: The pickle does more than those of this program, or of the published code.
    """
    if len(content) > MAX_PICKLE_BYTES:
        raise ValueError(f"a pickle of {len(content):,} bytes")
    before, plain = "", set()
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name == "GLOBAL" and argument not in PICKLE_NAMES:
            raise ValueError(f"it names {argument}")
        if opcode.name in ("BINPUT", "LONG_BINPUT"):
            (plain.add if before in ("BINUNICODE", "GLOBAL") else plain.discard)(argument)
        if opcode.name in ("BINGET", "LONG_BINGET") and argument not in plain:
            raise ValueError("it holds something twice")
        before = opcode.name


def _plain_weights(weights: Any, path: Path) -> dict[str, Tensor]:
    if not isinstance(weights, dict) or not all(isinstance(item, Tensor) for item in weights.values()):
        raise UserError(f"checkpoint {path}: its model is not a dict of tensors")
    for name, value in weights.items():  # strides of 0 make a small file claim terabytes
        if value.layout != torch.strided or value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise UserError(f"checkpoint {path}: tensor {name!a:.60} claims more than the file holds")
    return {str(k).removeprefix("module.").removeprefix("_orig_mod."): v for k, v in weights.items()}


def check_weights(model: nn.Module, weights: dict[str, Tensor], path: str | Path) -> None:
    """Refuse weights that are not of exactly this architecture; the model may lie on the meta device.

    Raises:
        UserError: A key or shape differs; the message names the first one.
    """
    expected = model.state_dict()
    for name in [*expected, *weights]:
        found, wanted = (tuple(d[name].shape) if name in d else "nothing" for d in (weights, expected))
        if found != wanted:
            raise UserError(f"checkpoint {path} is of another architecture: {name!a:.60} has {found}, expected "
                            f"{wanted}; give the model flags that it was trained with")


def load_weights(model: nn.Module, weights: dict[str, Tensor], path: str | Path) -> None:
    """Load weights, after `check_weights`."""
    check_weights(model, weights, path)
    model.load_state_dict(weights)


def load_run(folder: RunFolder, file: Path | None = None) -> tuple[dict[str, Any], Path, list[str]]:
    """Read the newest whole checkpoint of a run: `last.pt`, or if that is damaged `previous.pt`.

    Args:
        folder: The run.
        file: Read this one of its files, and no other.

    Returns:
        The checkpoint, its file, and what was wrong with a newer one.

    Raises:
        UserError: There is no run, or no whole checkpoint; the message names each file tried.
    """
    paths = [file] if file is not None else [p for p in (folder.last, folder.previous) if p.exists()]
    if not paths:
        raise UserError(f"--resume: there is no run in {folder.path}; leave it out for a new run, "
                        "or use --resume auto to start one where there is none")
    errors = []
    for path in paths:
        try:
            checkpoint = load_checkpoint(path)
            if missing := CHECKPOINT_KEYS - checkpoint.keys():
                raise UserError(f"checkpoint {path} cannot be resumed, it holds no {', '.join(sorted(missing))}; "
                                "use --init for its weights alone")
            return checkpoint, path, errors
        except UserError as error:
            errors.append(str(error))
    raise UserError("; ".join(errors))


def all_finite(tensors: list[Tensor]) -> bool:
    """Return whether no tensor holds an infinity or NaN; one wait for the device."""
    return bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())


# --- random state ----------------------------------------------------------------------------------------------------


def get_random_state(device: torch.device) -> dict[str, Tensor]:
    """Take the state of torch's generators; dropout draws from them, and nothing else does."""
    state = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state()
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Put back what `get_random_state` took; another device type's state is left alone."""
    torch.set_rng_state(state["cpu"])
    if device.type != "cpu" and device.type in state:
        torch.get_device_module(device).set_rng_state(state[device.type])


# --- processes -------------------------------------------------------------------------------------------------------


class Processes(NamedTuple):
    """This process's place among those that torchrun started; alone it is the first of one."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Add a tensor up over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """Take the largest of each element over all processes, in place; for a tensor on the CPU."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Collect one picklable value of every process, on each of them."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def copy_from_first(self, tensors: list[Tensor]) -> None:
        """Overwrite tensors by those of the first process."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def first_do(self, action: Callable[[], Any]) -> Any:
        """Run an action on the first process while the others wait; a user's mistake there ends all of them.

        Returns:
            What the action returned on the first process, on every process.

        Raises:
            UserError, on the others SystemExit: The action made a UserError.
        """
        outcome = [None, None]  # value, error
        if self.is_first:
            try:
                outcome[0] = action()
            except UserError as error:
                outcome[1] = str(error)
        if self.size > 1:
            dist.broadcast_object_list(outcome, src=0)
        value, error = outcome
        if error is not None:
            raise UserError(error) if self.is_first else SystemExit(2)  # one of them tells it
        return value


def start_processes() -> Processes:
    """Join the processes that torchrun started, if it did: NCCL for GPU tensors, gloo for the rest."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Processes()
    store, rank, size = next(dist.rendezvous("env://"))
    # torchrun's store outlives a restart, and in it the addresses of killed processes: each life needs its own names
    store = dist.PrefixStore(f"life {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", store=store, rank=rank,
                            world_size=size)
    return Processes(dist.get_rank(), int(os.environ["LOCAL_RANK"]), dist.get_world_size())


# --- signals ---------------------------------------------------------------------------------------------------------


class Signals:
    """Note SIGINT, SIGTERM and SIGUSR1 instead of dying of them, while the `with` block runs.

    A second SIGINT or SIGTERM ends the process at once: every file is written atomically, so that does no harm.

    Args:
        quiet: Do not say that the signal has come; one of several processes says it.
    """

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self.stop: int | None = None  # the signal that asked to stop
        self.save = False
        self._time = 0.0

    def __enter__(self) -> "Signals":
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        if number not in (signal.SIGINT, signal.SIGTERM):
            self.save = True
        elif self.stop is None:
            self.stop, self._time = number, time.monotonic()
            if self.quiet:
                return
            # not print: the signal may have come in the middle of one, and a stream cannot be entered twice
            with contextlib.suppress(OSError):  # whom it is for may have gone: Ctrl-C ends `| tee`, too
                os.write(2, b"\nstopping after this step, once saved; again ends at once\n")
        elif time.monotonic() - self._time > 0.5:  # a terminal and torchrun may both pass on the same Ctrl-C
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
