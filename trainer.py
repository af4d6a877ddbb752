"""A training run in progress: its steps, its epochs, and what it leaves on the disk."""

import copy
import platform
import statistics
import time
from argparse import Namespace
from collections.abc import Callable
from types import NoneType
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

import data
import device as devices
import evaluate
import options
import plots
from models import count_parameters
from optim import build_optimizer, build_scheduler
from utils import (
    Processes,
    RunFolder,
    Signals,
    all_finite,
    get_random_state,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    say,
    set_random_state,
    warn,
    write_text,
)

COLUMNS = ("epoch", "step", "lr", "train_loss", "train_accuracy", "val_loss", "val_accuracy", "test_loss",
           "test_accuracy", "seconds", "images_per_second")

COUNTERS = {"last_epoch", "_step_count", "_last_lr"}  # all that changes in a scheduler's state

SPLIT_NAMES = {"val": "validation", "test": "test"}


class RunError(Exception):
    """A run that cannot go on: told in one line, exit status 1."""


class Trainer:
    """A run in progress: what a checkpoint holds, and how to go a step, an epoch, or to the end.

    Args:
        args: The settings.
        model: On `device`.
        loader: Of the training set.
        held_out: What is evaluated each epoch and picks the best: validation or test images.
        kind: "val" or "test", what `held_out` is.
        folder: Where the first process writes.
        device: Where everything is computed.
        processes: Those that train together.
    """

    def __init__(self, args: Namespace, model: nn.Module, loader: data.Loader, held_out: data.Split, kind: str,
                 folder: RunFolder, device: torch.device, processes: Processes):
        self.args, self.model, self.loader, self.held_out, self.kind = args, model, loader, held_out, kind
        self.folder, self.device, self.processes = folder, device, processes
        self.precision = devices.pick_precision(args.precision, device)
        self.parameters = list(model.parameters())
        self.optimizer = build_optimizer(args.optimizer, self.parameters, args.lr, args.momentum, args.nesterov,
                                         args.weight_decay)
        self.scheduler = build_scheduler(self.optimizer, args.scheduler, len(loader), args.epochs, args.warmup_epochs)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")
        self.scaler.scale(torch.zeros((), device=device))  # makes its tensors: a resumed step may have no image here
        self.epoch = self.step = 0  # epochs completed, and steps completed in the running one
        self.totals = self.no_totals()
        self.seconds = 0.0  # of training, in the running epoch
        self.lr = self.scheduler.get_last_lr()[0]  # of the last step
        self.history: list[dict[str, Any]] = []
        self.best_accuracy: float | None = None
        self.best: dict[str, Any] | None = None  # to be written with the next save
        self.logits: Tensor | None = None  # of the last evaluation
        self.drawn: dict[str, Any] | None = None  # the last row that the pictures show
        self.ended_in: dict[str, Any] | None = None  # the environment of a run that was loaded after its last epoch
        self.criterion = nn.CrossEntropyLoss(reduction="sum", label_smoothing=args.label_smoothing)
        self.eval_model = copy.deepcopy(model) if args.ema else model  # what is evaluated, and best.pt
        # by this part of swa_utils alone: its AveragedModel would wait for a GPU twice a step, to hand it a counter
        self.average = get_ema_multi_avg_fn(args.ema)
        self.averaged = [[tensor for tensor in (*network.parameters(), *network.buffers())
                          if tensor.is_floating_point()] for network in (self.eval_model, model)]
        self.forward = self.forward_loss
        self.saved_at = time.monotonic()

    def no_totals(self) -> Tensor:
        """Make the running sums of loss and hits of this process's images; float64, where the device has it."""
        return torch.zeros(2, device=self.device,
                           dtype=torch.float32 if self.device.type == "mps" else torch.float64)

    # --- a step ------------------------------------------------------------------------------------------------------

    def forward_loss(self, inputs: Tensor, targets: Tensor, partners: Tensor | None = None,
                     share: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the summed loss and the number of hits of a batch, both on the device.

        In a mixed batch the loss is shared between two labels, and the one with the larger share counts as a hit.
        """
        with devices.autocast(self.device, self.precision):
            logits = self.model(inputs)
            loss = self.criterion(logits, targets)
            if partners is not None:
                loss = share * loss + (1 - share) * self.criterion(logits, partners)
                targets = torch.where(share >= 0.5, targets, partners)
        return loss, (logits.argmax(1) == targets).sum()

    def compile(self) -> None:
        """Compile forward and loss, and try them on zeros, of a batch's size and of the last one's; no trace stays."""
        def probe(function: Callable) -> None:
            buffers = [buffer.clone() for buffer in self.model.buffers()]
            state = get_random_state(self.device)
            sizes = {len(self.loader.part(step)) for step in (0, len(self.loader) - 1)} - {0}
            try:
                for size in sorted(sizes, reverse=True):
                    inputs = torch.zeros(size, 3, 32, 32, device=self.device)
                    targets = torch.zeros(size, dtype=torch.int64, device=self.device)
                    # a copy as the partners' targets: the same tensor twice would be compiled as just that
                    mixed = (targets.clone(), targets.new_ones((), dtype=torch.float32))
                    function(inputs.contiguous(memory_format=torch.channels_last), targets,
                             *(mixed if self.args.mixup or self.args.cutmix else ()))[0].backward()
            finally:
                set_random_state(state, self.device)
                self.optimizer.zero_grad()
                for buffer, value in zip(self.model.buffers(), buffers, strict=True):
                    buffer.copy_(value)
        self.forward = devices.compile_or_warn(self.forward_loss, self.device, probe)

    def train_step(self, inputs: Tensor, targets: Tensor, *mixed: Tensor) -> None:
        """Make one optimiser step on what the loader yields; no wait for the device."""
        self.optimizer.zero_grad(set_to_none=True)
        if len(targets):  # where there are more processes than images left, one has none
            loss, hits = self.forward(inputs, targets, *mixed)
            # over the images of all processes: so the sum of all gradients is that of the mean loss
            self.scaler.scale(loss / self.loader.count(self.step)).backward()
            self.totals += torch.stack((loss.detach(), hits))
        if self.processes.size > 1:
            self.sum_gradients()
        if self.args.grad_clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_value_(self.parameters, self.args.grad_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.lr = self.scheduler.get_last_lr()[0]
        self.scheduler.step()
        if self.args.ema:
            self.average(*self.averaged, None)
        self.step += 1

    def sum_gradients(self) -> None:
        """Add the gradients of all processes up, in one message.

        DistributedDataParallel averages, and every process needs a forward pass to take part; the last batch of an
        epoch may have no image for one.
        """
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        message = self.processes.sum(torch.cat([gradient.reshape(-1) for gradient in gradients]))
        parts = message.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient

    # --- an epoch ----------------------------------------------------------------------------------------------------

    def train_epoch(self, signals: Signals) -> int | None:
        """Train to the end of the running epoch, saving when it is time; return the signal that stops the run."""
        steps, start = len(self.loader), time.perf_counter() - self.seconds
        self.model.train()
        with tqdm(total=steps, initial=self.step, desc=f"epoch {self.epoch + 1}/{self.args.epochs}", leave=False,
                  disable=None if self.processes.is_first else True) as bar:
            for batch in self.loader.epoch(self.epoch, self.step):
                self.train_step(*batch)
                stop, save = self.agree(signals)
                if (stop or save or self.step % self.args.log_interval == 0 or self.step == steps
                        or self.device.type == "cpu"):
                    self.show_progress(bar, start)
                if save or stop:
                    self.save()
                    start = time.perf_counter() - self.seconds  # saving is no training
                if stop:
                    return stop
        return None

    def show_progress(self, bar: tqdm, start: float) -> None:
        """Read the running sums, and the time since the start; show them, and stop a run that has diverged.

        Raises:
            RunError: The loss is no longer finite.
        """
        count = min(self.step * self.loader.batch_size, len(self.loader.targets))
        loss, hits = (self.totals * self.processes.size / count).tolist()  # waits for the device
        self.seconds = time.perf_counter() - start  # now that all steps are done, and not only begun
        bar.set_postfix(loss=f"{loss:.4f}", accuracy=f"{100 * hits:.2f}%", lr=f"{self.lr:.4g}",
                        images_s=f"{count / self.seconds:.0f}", refresh=False)
        bar.update(self.step - bar.n)
        if not np.isfinite(loss):
            self.fail_non_finite("loss")

    def fail_non_finite(self, what: str) -> None:
        """Stop a run that has diverged, without saving it.

        Raises:
            RunError: Always.
        """
        good = f"the last good checkpoint is {self.folder.last}" if self.folder.last.exists() else "nothing was saved"
        raise RunError(f"{what} is not finite in epoch {self.epoch + 1}, step {self.step}, at lr {self.lr:.4g}; "
                       f"{good}; try a smaller --lr, or --precision fp32")

    def agree(self, signals: Signals) -> tuple[int | None, bool]:
        """Agree with all processes, at the same step, whether to stop and whether to save.

        Alone, and on CPUs, where nothing is gained by waiting longer, that is after every step; several GPUs look up
        from their work only at the log interval and at an epoch's end.
        """
        often = self.processes.size == 1 or self.device.type == "cpu" or self.args.save_minutes == 0
        if not often and self.step % self.args.log_interval and self.step < len(self.loader):
            return None, False
        due = time.monotonic() - self.saved_at >= 60 * self.args.save_minutes
        asked, signals.save = signals.save, False  # before the others are waited for, or a signal meanwhile is lost
        stop, save = self.processes.max(
            torch.tensor([signals.stop or 0, asked or (due and self.processes.is_first)])).tolist()
        return stop or None, bool(save)

    def finish_epoch(self) -> None:
        """Evaluate, add the row of the epoch to the history, and note the best weights so far."""
        self.processes.copy_from_first(list(self.eval_model.buffers()))  # one process's batch norm, for all
        loss, hits = (self.processes.sum(self.totals.clone()) / len(self.loader.targets)).tolist()
        start = time.perf_counter()
        self.logits = self.predict(self.held_out)
        found = evaluate.score(self.logits, self.held_out.targets)
        row = dict.fromkeys(COLUMNS) | {
            "epoch": self.epoch + 1, "step": (self.epoch + 1) * len(self.loader), "lr": self.lr,
            "train_loss": loss, "train_accuracy": 100 * hits, f"{self.kind}_loss": found["loss"],
            f"{self.kind}_accuracy": found["accuracy"], "seconds": self.seconds + time.perf_counter() - start,
            "images_per_second": len(self.loader.targets) / self.seconds}
        self.history.append(row)
        self.epoch, self.step, self.seconds, self.totals = self.epoch + 1, 0, 0.0, self.no_totals()
        if self.best_accuracy is None or found["accuracy"] > self.best_accuracy:
            self.keep_best(found["accuracy"])
        if self.processes.is_first:
            name = SPLIT_NAMES[self.kind]
            say(f"epoch {self.epoch}/{self.args.epochs}  loss {loss:.4f}  accuracy {100 * hits:.2f} %  "
                f"{name} loss {found['loss']:.4f}  {name} accuracy {found['accuracy']:.2f} %  "
                f"lr {row['lr']:.4g}  {row['images_per_second']:.0f} images/s")

    def keep_best(self, accuracy: float) -> None:
        """Note the weights at the end of an epoch as the best so far."""
        weights = {name: value.clone() for name, value in self.eval_model.state_dict().items()}
        self.best_accuracy = accuracy
        self.best = {"model": weights, "epoch": self.epoch, "accuracy": accuracy, "picked_by": self.kind,
                     "args": saved_args(self.args), "classes": self.held_out.classes}

    def predict(self, split: data.Split) -> Tensor:
        """Return the logits of a split, on all processes together."""
        return evaluate.predict_logits(self.eval_model, split.images, self.device, self.precision, self.args.normalize,
                                       processes=self.processes)

    # --- what stays --------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Collect what a checkpoint holds; every process must call it."""
        return {"model": self.model.state_dict(), "ema": self.eval_model.state_dict() if self.args.ema else None,
                "optimizer": self.optimizer.state_dict(), "scheduler": self.scheduler.state_dict(),
                "scaler": self.scaler.state_dict(), "epoch": self.epoch, "step": self.step,
                "best_accuracy": self.best_accuracy, "history": self.history,
                "totals": {"sums": self.processes.gather(self.totals.cpu()), "seconds": self.seconds, "lr": self.lr},
                "rng": self.processes.gather(get_random_state(self.device)), "args": saved_args(self.args),
                "classes": self.held_out.classes, "environment": self.environment()}

    def environment(self) -> dict[str, Any]:
        """Name what a continuation must share to be exact."""
        return self.ended_in or {"device": self.device.type, "precision": self.precision,
                "compile": self.forward != self.forward_loss, "processes": self.processes.size}

    def load_state(self, saved: dict[str, Any]) -> None:
        """Take up the state of a checkpoint; warn in one line where the continuation cannot be exact.

        Raises:
            ValueError, KeyError, TypeError, RuntimeError: It is not of this run.
        """
        self.check_progress(saved)
        load_weights(self.model, saved["model"], self.folder.path)
        schedule = self.scheduler.state_dict()
        for part, name in ((self.optimizer, "optimizer"), (self.scheduler, "scheduler")):
            expected = part.state_dict()
            part.load_state_dict(saved[name])
            if not has_form(part.state_dict(), expected):
                raise ValueError(f"its {name} is of another kind")
        if any(saved["scheduler"][name] != schedule[name] for name in schedule.keys() - COUNTERS):
            raise ValueError("its scheduler is of another run")
        for parameter, state in self.optimizer.state.items():
            if any(value.shape not in ((), parameter.shape) for value in state.values() if value is not None):
                raise ValueError("its optimizer is of other shapes")
        if self.args.ema:
            load_weights(self.eval_model, saved["ema"], self.folder.path)
        if saved["scaler"] != {} and not has_form(saved["scaler"], torch.amp.GradScaler("cpu").state_dict()):
            raise ValueError("its scaler is malformed")
        if saved["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(saved["scaler"])
        self.epoch, self.step, self.history = saved["epoch"], saved["step"], saved["history"]
        self.best_accuracy, totals = saved["best_accuracy"], saved["totals"]
        sums, self.seconds, self.lr = totals["sums"], totals["seconds"], totals["lr"]
        states, here = saved["rng"], self.environment()
        if len(sums) == self.processes.size:
            self.totals.copy_(sums[self.processes.rank])
        elif self.processes.is_first:
            self.totals.copy_(torch.stack(sums).sum(0))
        set_random_state(states[self.processes.rank % len(states)], self.device)
        if self.best_accuracy is None and self.history and self.step == 0:  # best.pt is damaged; this may be the end
            self.keep_best(self.history[-1][f"{self.kind}_accuracy"])
        before = {name: saved["environment"][name] for name in here}
        changed = [f"{name} {before[name]} -> {here[name]}" for name in here if before[name] != here[name]]
        if self.epoch == self.args.epochs:
            self.ended_in = before
        elif changed and self.processes.is_first:
            warn(f"the run goes on, but not to the bit: {', '.join(changed)}")

    def check_progress(self, saved: dict[str, Any]) -> None:
        """Refuse a checkpoint whose counters, rows and sums are not of one run of this length.

        Raises:
            ValueError: They are not.
        """
        epoch, step, history, accuracy = (saved[name] for name in ("epoch", "step", "history", "best_accuracy"))
        if not (type(epoch) is type(step) is int and 0 <= epoch <= self.args.epochs and 0 <= step <= len(self.loader)
                and saved["scheduler"]["last_epoch"] == epoch * len(self.loader) + step):
            raise ValueError(f"epoch {ascii(epoch)[:20]} and step {ascii(step)[:20]} of {self.args.epochs} epochs of "
                             f"{len(self.loader)} steps")
        numbers = [row[name] for row in history for name in COLUMNS]
        if len(history) != epoch or not all(type(n) in (int, float, NoneType) for n in [*numbers, accuracy]):
            raise ValueError("its history has other rows")
        totals, sums = saved["totals"], saved["totals"]["sums"]
        if not has_form(totals, {"seconds": 0.0, "lr": 0.0, "sums": [torch.zeros_like(sums[0])] * len(sums)}) \
                or sums[0].shape != (2,):
            raise ValueError("its totals are malformed")

    def save(self) -> None:
        """Write checkpoint, best weights, metrics and pictures; every process must call it.

        Raises:
            RunError: The weights are not finite, or the files cannot be written; the older ones are whole.
        """
        if not all_finite([*self.model.state_dict().values(), self.totals]):
            self.fail_non_finite("a weight or the loss")
        state = self.state()
        if self.processes.is_first:
            try:
                if self.best is not None:  # before last.pt, which says that it is there
                    save_checkpoint(self.best, self.folder.best)
                save_checkpoint(state, self.folder.last, self.folder.previous if self.folder.last_is_good else None)
                self.folder.last_is_good = True
                write_text(self.folder.path / "metrics.csv", format_metrics(self.history))
            except OSError as error:
                raise RunError(f"saving to {self.folder.path} failed ({error.strerror or error}); "
                               "the files saved before are whole") from error
            if self.history and self.history[-1] is not self.drawn:
                self.draw()
        self.best = None
        self.saved_at = time.monotonic()

    def draw(self) -> None:
        """Draw the curves, and the confusion of the last evaluation."""
        self.drawn = self.history[-1]
        plots.safely(plots.draw_curves, self.history, self.folder.path / "curves.png")
        if self.logits is not None:
            plots.safely(plots.draw_confusion, evaluate.confusion_matrix(self.logits, self.held_out.targets).numpy(),
                         self.held_out.classes, self.folder.path / "confusion.png")

    def finish(self, test: data.Split) -> dict[str, Any]:
        """Evaluate for the last time and collect results.json; with validation, the test set is touched only here."""
        best = self.processes.first_do(lambda: load_checkpoint(self.folder.best))
        if self.kind == "val":
            load_weights(self.eval_model, best["model"], self.folder.best)
            self.logits = None
        if self.logits is None:
            self.logits = self.predict(test)
        return {"last_accuracy": self.history[-1][f"{self.kind}_accuracy"], "best_accuracy": best["accuracy"],
                "best_epoch": best["epoch"], "picked_by": SPLIT_NAMES[self.kind],
                "test_accuracy": evaluate.score(self.logits, test.targets)["accuracy"],
                "test_weights": {"val": "best", "test": "last"}[self.kind], "epochs": self.epoch,
                "seconds": sum(row["seconds"] for row in self.history),
                "images_per_second": statistics.harmonic_mean(row["images_per_second"] for row in self.history),
                "parameters": count_parameters(self.model),
                **evaluate.report(self.logits, test.targets, test.classes),
                **self.environment(), "device": devices.describe(self.device),
                "versions": {"python": platform.python_version(), "torch": torch.__version__,
                             "torchvision": torchvision.__version__, "numpy": np.__version__}}


def has_form(found: Any, expected: Any) -> bool:
    """Return whether a value has all keys, and the types, lengths and shapes, of another."""
    if isinstance(expected, Tensor):
        return isinstance(found, Tensor) and (found.shape, found.dtype) == (expected.shape, expected.dtype)
    if isinstance(expected, dict):
        return isinstance(found, dict) and all(k in found and has_form(found[k], v) for k, v in expected.items())
    if isinstance(expected, list | tuple):
        return isinstance(found, list | tuple) and len(found) == len(expected) and all(map(has_form, found, expected))
    return type(found) is type(expected)


def saved_args(args: Namespace) -> dict[str, Any]:
    """Keep the settings of training; modes belong to one command only."""
    return {name: value for name, value in vars(args).items() if name not in options.MODES}


def format_metrics(history: list[dict[str, Any]]) -> str:
    """Write the rows of metrics.csv."""
    def cell(value: Any) -> str:
        return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
    rows = [COLUMNS, *([cell(row[name]) for name in COLUMNS] for row in history)]
    return "".join(",".join(row) + "\n" for row in rows)
