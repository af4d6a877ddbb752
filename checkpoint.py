"""Checkpoints and the run folder."""

import copy
import errno
import io
import json
import os
import re
import shlex
import time
import warnings
import zipfile
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distributed import World, on_every_rank, on_main_rank
from hardware import describe, rng_module
from optim import averaged_tensors, build_optimizer, build_scheduler
from options import merge_saved, saved_args
from utils import UserError, duration, print_line, warn, write_atomically, write_text

VERSION = 2
COLUMNS = ("epoch", "step", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "test_loss",
           "test_accuracy", "seconds", "images_per_second")
# What a run writes. Removed in this order, so that a kill in between leaves a run that can continue, or none.
RUN_FILES = ("args.json", "results.json", "curves.png", "confusion.png", "reliability.png", "mistakes.png",
             "metrics.csv", "best.pt", "previous.pt", "last.pt")
# For the numpy.int64 in checkpoints of the published code; NumPy 1 writes the first of these names, NumPy 2 the other.
NUMPY_SCALARS = [(np.float64().__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
NUMPY_SCALARS += [np.dtype, *(type(np.dtype(name)) for name in "b1 i4 i8 f4 f8".split())]


def save_checkpoint(content: dict[str, Any], path: Path, backup: Path | None = None) -> None:
    """Write a checkpoint atomically, keeping the one before as `backup`; OSError leaves the older files intact."""
    buffer = io.BytesIO()  # so that a full disk is an OSError, not an error of torch's own writer
    torch.save({"version": VERSION, **content}, buffer)
    write_atomically(path, lambda temporary: temporary.write_bytes(buffer.getbuffer()), backup)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint of this program or of the published code, onto the CPU, without running code from it.

    Returns:
        At least "model" (weights with plain keys, never `module.` or `_orig_mod.`) and "args" (settings).
    """
    path = Path(path)
    if not path.is_file():
        example = path / "best.pt" if path.is_dir() else "checkpoints/se-resnet/best.pt"
        raise UserError(f"checkpoint file {path} not found; expected one such as {example}")
    try:
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:  # torch.load does not compare the checksums
                raise ValueError(f"the checksum of {damaged} is wrong")
        with torch.serialization.safe_globals(NUMPY_SCALARS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if all(isinstance(value, Tensor) for value in checkpoint.values()):  # a plain state_dict
            checkpoint = {"model": checkpoint, "args": {}}
        elif "net" in checkpoint and "model" not in checkpoint:
            checkpoint = {"model": checkpoint["net"], "args": {}}  # published code: always the default network
        if missing := [name for name in ("model", "args") if name not in checkpoint]:
            raise ValueError(f"it lacks {' and '.join(missing)}; expected these, or a plain state_dict")
        checkpoint["model"] = {re.sub(r"^((module|_orig_mod)\.)+", "", key): value
                               for key, value in checkpoint["model"].items()}
    except Exception as error:  # zipfile and torch raise a dozen types for damaged files
        text = str(error).strip()
        if refused := re.search(r"GLOBAL (\S+)", text):
            text = f"it holds {refused[1]}; only tensors and plain values are loaded, such as vars(args)"
        elif isinstance(error, zipfile.BadZipFile):
            text = "it is truncated, or was written by torch before 1.6; then save it again with a newer torch"
        text = text.rpartition("WeightsUnpickler error: ")[2]
        raise UserError(f"{path} is damaged or not a checkpoint of this program ({type(error).__name__}: "
                        f"{text.partition(chr(10))[0]:.150})") from error
    if (version := checkpoint.get("version", VERSION)) != VERSION:
        raise UserError(f"checkpoint {path} has version {version}, expected {VERSION}; use the release that wrote it")
    return checkpoint


def load_weights(model: nn.Module, weights: dict[str, Tensor], path: str | Path) -> None:
    """Load weights into a network; a different architecture is an error that names the first difference."""
    expected = model.state_dict()
    for name in [*expected, *weights]:
        found, wanted = (tuple(d[name].shape) if name in d else "missing" for d in (weights, expected))
        if found != wanted:
            raise UserError(f"{path} has a different architecture: {name} is {found} there and {wanted} in the network "
                            "that its settings or your model flags describe")
    model.load_state_dict(weights)
    if not all(value.isfinite().all() for value in model.state_dict().values()):
        raise UserError(f"{path} holds weights that are not finite")


class TrainState:
    """Everything that changes during a run, which is what a checkpoint holds."""

    def __init__(self, args: Namespace, model: nn.Module, steps_per_epoch: int, precision: str):
        self.steps_per_epoch, self.device = steps_per_epoch, next(model.parameters()).device
        self.model = model
        self.ema_model = copy.deepcopy(model) if args.ema else None
        self.eval_model = self.ema_model or model  # is evaluated, and goes into best.pt
        # walking the modules for these takes longer than using them
        self.parameters, self.weights = list(model.parameters()), averaged_tensors(model)
        self.ema_weights = averaged_tensors(self.ema_model) if self.ema_model else []
        self.optimizer = build_optimizer(args.optimizer, model, args.lr, args.momentum, args.nesterov,
                                         args.weight_decay, precision, args.bias_lr)
        self.scheduler = build_scheduler(self.optimizer, args.scheduler, steps_per_epoch, args.epochs,
                                         args.warmup_epochs)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.scaler.scale(torch.zeros((), device=self.device))  # creates its tensors; the first step may have no image
        self.epoch = self.step = 0  # finished epochs, and finished steps of the current one
        kind = torch.float32 if self.device.type == "mps" else torch.float64  # which MPS lacks
        self.totals = torch.zeros(2, device=self.device, dtype=kind)  # sums of loss and correct predictions
        self.seconds = 0.0  # of training in the current epoch
        self.lr = self.scheduler.get_last_lr()[0]  # of the last step
        self.history: list[dict[str, Any]] = []  # rows of metrics.csv
        self.best: dict[str, Any] | None = None  # weights, epoch and accuracy of the best epoch, on the CPU
        self.machines: list[str] = []  # the devices that the run has used

    def state_dict(self, world: World) -> dict[str, Any]:
        """Return the content of a checkpoint; every rank must call it."""
        self.machines = list(dict.fromkeys([*self.machines, *world.gather(describe(self.device))]))
        return {"model": self.model.state_dict(), "ema": self.ema_model and self.ema_model.state_dict(),
                "optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict(),
                "scaler": self.scaler.state_dict(), "epoch": self.epoch, "step": self.step, "best": self.best,
                "history": self.history, "machines": self.machines, "seconds": self.seconds, "lr": self.lr,
                "totals": world.gather(self.totals.cpu()),
                "rng": world.gather({self.device.type: rng_module(self.device).get_rng_state()})}

    def load_state_dict(self, saved: dict[str, Any], world: World, path: Path) -> None:
        """Continue from the content of a checkpoint."""
        load_weights(self.model, saved["model"], path)
        if self.ema_model:
            load_weights(self.ema_model, saved["ema"], path)
        self.optimizer.load_state_dict(saved["optimizer"])
        for parameter, state in self.optimizer.state.items():  # fused kernels assume the strides of the parameter
            state |= {name: torch.empty_like(parameter).copy_(value) for name, value in state.items()
                      if getattr(value, "shape", None) == parameter.shape}
        self.scheduler.load_state_dict(saved["scheduler"])
        if saved["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(saved["scaler"])
        self.epoch, self.step, self.history = saved["epoch"], saved["step"], list(saved["history"])
        self.best, self.seconds, self.lr, self.machines = (saved[key] for key in ("best", "seconds", "lr", "machines"))
        if len(saved["totals"]) == world.size:
            self.totals.copy_(saved["totals"][world.rank])
        elif world.is_main:
            self.totals.copy_(torch.stack(saved["totals"]).sum(0))
        rng = saved["rng"][world.rank] if world.rank < len(saved["rng"]) else {}
        if self.device.type in rng:  # other ranks keep their own seed, or their dropout would be the same
            rng_module(self.device).set_rng_state(rng[self.device.type])
        if self.scheduler.last_epoch != self.epoch * self.steps_per_epoch + self.step:
            raise UserError(f"{path} does not fit {self.steps_per_epoch} steps an epoch; has the training set changed?")


class RunFolder:
    """The files of one run, and a lock that ends with its process. Only rank 0 reads and writes them."""

    def __init__(self, path: str | Path, file: Path | None = None):
        self.path, self.file = Path(path), file  # file: the checkpoint that --resume names, if it names one
        self.last, self.previous, self.best = (self.path / f"{name}.pt" for name in ("last", "previous", "best"))
        self.best_epoch: int | None = None  # of the best.pt that this process has written
        self.saved_at = time.monotonic()
        self._last_is_intact = True  # otherwise the next save must not turn it into previous.pt
        self._lock = None

    @on_main_rank
    def open(self, args: Namespace, given: dict[str, Any]) -> tuple[Namespace, dict | None, dict | None]:
        """Return the settings, and the checkpoint of a run to resume, which is now locked, or initial weights."""
        if args.resume is None or (args.resume == "auto" and not self.holds_checkpoint()):
            self.refuse_overwriting(args)
            if not args.init_from:
                return args, None, None
            source = load_checkpoint(args.init_from)
            return merge_saved(args, given, source["args"], False), None, source.get("ema") or source["model"]
        if not self.holds_checkpoint():
            raise UserError(f"--resume: no run in {self.path}; use --resume auto to start one")
        self.lock()
        checkpoint = self.load()
        if "output_dir" in given and os.path.realpath(args.output_dir) != os.path.realpath(self.path):
            warn(f"--output-dir {args.output_dir} is not used; the run continues in {self.path}")
            args.output_dir = str(self.path)
        return merge_saved(args, given, checkpoint["args"], True), checkpoint, None

    @on_main_rank
    def create(self, args: Namespace) -> None:
        """Lock the folder for a new run and remove the files that `--overwrite` replaces, and only those."""
        self.lock()
        self.refuse_overwriting(args)  # again: another run may have started while the data were read
        for name in RUN_FILES:
            (self.path / name).unlink(missing_ok=True)
        write_text(self.path / "args.json", json.dumps(saved_args(args), indent=2) + "\n")

    def holds_checkpoint(self) -> bool:
        """Return whether there is a checkpoint to resume from."""
        return any(os.path.exists(path) for path in (self.last, self.previous))  # False also for impossible names

    def refuse_overwriting(self, args: Namespace) -> None:
        """Refuse to start a new run where there is one, unless `--overwrite` is given."""
        names = ("last.pt", "previous.pt", "best.pt", "metrics.csv", "results.json")
        if not args.overwrite and any(os.path.exists(self.path / name) for name in names):
            raise UserError(f"{self.path} holds a run; continue it with --resume, replace it with --overwrite, or "
                            "choose another --output-dir")

    def lock(self) -> None:
        """Create the folder and lock it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "a")
        except OSError as error:
            raise UserError(f"cannot write to the run folder {self.path} ({error.strerror}); choose another "
                            "--output-dir") from error
        try:
            _lock_file(self._lock.fileno())
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise UserError(f"the run folder {self.path} is in use by another process; wait for it, or choose "
                                "another --output-dir") from error
            warn(f"{self.path} is on a file system without locks ({error.strerror}); do not start a second run in it")

    def close(self) -> None:
        """Release the lock; the end of the process, whatever its reason, releases it too."""
        if self._lock is not None:
            self._lock.close()

    def load(self) -> dict[str, Any]:
        """Read the newest intact checkpoint: the one named, or last.pt, or if that is damaged previous.pt."""
        paths = [self.file] if self.file else [path for path in (self.last, self.previous) if path.exists()]
        errors = []
        for path in paths:
            try:
                checkpoint = load_checkpoint(path)
            except UserError as error:
                errors.append(str(error))
                continue
            if errors:
                warn(f"{errors[0]}; continuing from {path}")
            self._last_is_intact = path.name == self.last.name
            return checkpoint
        raise UserError("; ".join(errors))

    def save(self, content: dict[str, Any]) -> None:
        """Write last.pt, best.pt if there is a new one, and metrics.csv; OSError leaves the older files intact."""
        self.saved_at = time.monotonic()
        save_checkpoint(content, self.last, self.previous if self._last_is_intact else None)
        self._last_is_intact, best = True, content["best"]
        if best is not None and best["epoch"] != self.best_epoch:  # also the first one after a kill between the two
            save_checkpoint({**best, "args": content["args"], "classes": content["classes"]}, self.best)
            self.best_epoch = best["epoch"]
        write_text(self.path / "metrics.csv", format_metrics(content["history"]))


def _lock_file(descriptor: int) -> None:
    # Record locks, not flock: a forked loader worker must not inherit the lock of its killed parent.
    if os.name == "nt":
        import msvcrt
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def format_metrics(history: list[dict[str, Any]]) -> str:
    """Write the rows of metrics.csv."""
    def cell(value: Any) -> str:
        return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
    rows = [COLUMNS, *([cell(row[name]) for name in COLUMNS] for row in history)]
    return "".join(",".join(row) + "\n" for row in rows)


@on_every_rank
def find_run(args: Namespace) -> RunFolder:
    """Find the run folder that `--output-dir` and `--resume` name."""
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        # torchrun has started the ranks again: continue what they have saved, and do not remove it with --overwrite
        args.resume = args.resume or "auto"
    if args.resume in (None, "auto", "last"):
        return RunFolder(args.output_dir)
    path = Path(args.resume)
    if path.is_dir():
        return RunFolder(path)
    if not path.exists() or path.name not in ("last.pt", "previous.pt"):
        raise UserError(f"--resume {path}: not a run folder, nor last.pt or previous.pt in one; to start from the "
                        "weights of another file use --init-from")
    return RunFolder(path.parent, path)


def describe_results(results: dict[str, Any], path: Path) -> str:
    """Return the last lines of a run, from its results.json and its folder."""
    note = (f"test accuracy of best.pt {results['test_accuracy']:.2f}%; the test set was evaluated only once"
            if results["test_weights"] == "best" else
            "the best epoch was selected on the test set, so its accuracy is optimistic; --val-size avoids that")
    return (f"{results['selected_on']} accuracy: last epoch {results['last_accuracy']:.2f}%, best "
            f"{results['best_accuracy']:.2f}% (epoch {results['best_epoch']})\n{note}\n{duration(results['seconds'])}, "
            f"{results['images_per_second']:.0f} images/s; weights, metrics and pictures are in {path}")


@on_main_rank
def print_if_finished(folder: RunFolder, checkpoint: dict[str, Any], args: Namespace) -> bool:
    """Print the results of a run that is finished, and how to train longer; return whether it is."""
    file = folder.path / "results.json"
    if checkpoint["epoch"] < args.epochs or not file.exists():
        return False
    text = describe_results(json.loads(file.read_text()), folder.path)
    print_line(f"this run is finished: {file}\n{text}\nto train longer, start a new run with --init-from "
               f"{shlex.quote(folder.best.as_posix())} --output-dir NEW")
    return True
