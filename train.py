"""Train the SE-ResNet on CIFAR-10 (`train.py --help`): main, train, train_one_epoch, train_step, then helpers."""

import options
from process import Signals, program, set_up_process

if __name__ == "__main__":  # before torch is imported, which takes seconds
    set_up_process()
    options.parse_args()  # answers --help and mistakes

import contextlib
import functools
import json
import math
import shlex
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import augment
import data
import distributed
import evaluate
import hardware
import models
import plots
from checkpoint import COLUMNS, RunFolder, TrainState, describe_results, find_run, load_weights, print_if_finished
from distributed import World, on_every_rank, on_main_rank
from gradient_check import check_gradients
from optim import schedule_lrs, update_ema
from utils import RunError, duration, plural, print_line, reason, warn, write_text


@dataclass
class Run:
    """The fixed parts of a run; `TrainState` holds what training changes."""

    args: Namespace
    world: World
    device: torch.device
    precision: str
    folder: RunFolder
    loader: data.Loader
    eval_split: data.Split  # evaluated every epoch; its accuracy selects best.pt
    test_split: data.Split
    forward: Callable[..., tuple[Tensor, Tensor]]
    compiled_forward: Callable[..., tuple[Tensor, Tensor]] | None = None  # for full batches
    environment: dict[str, Any] | None = None  # what exact continuation depends on
    logits: Tensor | None = None  # of the last evaluation in this process
    drawn_at: float = -math.inf  # when the last pictures were drawn
    printed_at: float = 0.0  # when the last line of progress was printed

    @property
    def selected_on(self) -> str:
        """The images that select the best epoch, in words."""
        return "validation" if self.args.val_size else "test"


@program("train.py")
def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return 0, 1 for a failed run, 2 for a user's mistake, 130 or 143 for an interrupted run."""
    args, given = options.parse_args(argv)
    if args.summary:
        print_line(models.summarize(options.build_model(args)))
        return 0
    status = train(args, given)
    distributed.stop()
    return status


def train(args: Namespace, given: dict[str, Any]) -> int:
    """Train a new run, or resume one, to its end or to a signal; return the exit status."""
    world, folder = distributed.start(), find_run(args)
    with contextlib.closing(folder):
        args, checkpoint, weights = folder.open(args, given)
        if checkpoint is not None and print_if_finished(folder, checkpoint, args):
            return 0
        device, precision = hardware.select(args, world, checkpoint and checkpoint["environment"])
        model = build_model(args, weights).to(device, memory_format=hardware.memory_format(device))
        train_split, val_split, test_split = data.load_data(args, world)
        loader = data.build_loader(train_split, args, device, world)
        state = TrainState(args, model, len(loader), precision)
        run = Run(args, world, device, precision, folder, loader, val_split or test_split, test_split,
                  build_forward(args, model, device, precision))
        if hardware.should_compile(args.compile, device):
            compile_forward(run, state)
        run.environment = hardware.environment(device, precision, run.compiled_forward is not None, world.size)
        torch.manual_seed(args.seed + world.rank)  # dropout differs between ranks
        if checkpoint is not None:
            resume(run, state, checkpoint)
        if (device.type, precision) != ("cpu", "fp32"):  # with which they are compared
            check_gradients(model, functools.partial(build_forward, args), device, precision)
        if checkpoint is None:
            folder.create(args)
            save(run, state)
        if world.is_main:
            print_line(describe(run, state))
        with Signals(quiet=not world.is_main) as signals, contextlib.closing(loader):
            while state.epoch < args.epochs:
                if status := train_one_epoch(run, state, signals) or finish_epoch(run, state, signals):
                    return print_stopped(run, state, status)
            save(run, state, must_succeed=True)
            if status := finish_run(run, state, signals):
                return print_stopped(run, state, status)
    return 0


@on_every_rank
def build_model(args: Namespace, weights: dict[str, Tensor] | None) -> nn.Module:
    """Build the network, with the weights of `--init-from` or random ones."""
    torch.manual_seed(args.seed)
    model = options.build_model(args)
    if weights is not None:
        load_weights(model, weights, args.init_from)
    return model


def train_one_epoch(run: Run, state: TrainState, signals: Signals) -> int | None:
    """Train to the end of the current epoch, saving when it is due; return an exit status if a signal stops the run."""
    args, steps = run.args, len(run.loader)
    every = 1 if run.device.type == "cpu" else args.log_interval  # reading the sums synchronizes with a GPU
    start, run.printed_at = time.perf_counter() - state.seconds, time.perf_counter()
    state.model.train()
    with tqdm(total=steps, initial=state.step, desc=f"epoch {state.epoch + 1}/{args.epochs}", leave=False,
              bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}",
              disable=None if run.world.is_main and sys.stderr else True) as bar:
        for batch in run.loader.epoch(state.epoch, state.step):
            train_step(run, state, *batch)
            status, save_due = check_signals(run, state, signals)
            if status or save_due or state.step % every == 0 or state.step == steps:
                log_progress(run, state, bar, start)
            if status or save_due:
                save(run, state, must_succeed=bool(status))
                start = time.perf_counter() - state.seconds  # saving is not training
            if status:
                return status


def train_step(run: Run, state: TrainState, inputs: Tensor, targets: Tensor, *mix: Tensor) -> None:
    """Take one optimizer step on what the loader yields, without synchronizing with the device."""
    is_full = len(targets) == len(run.loader.shard(0))  # the last batch of an epoch is not worth compiling for
    forward = run.compiled_forward if run.compiled_forward and is_full else run.forward
    forward_backward(state, forward, run.loader.batch_size(state.step), inputs, targets, *mix)
    if run.world.size > 1:
        distributed.sum_gradients(state.parameters, run.world)
    if run.args.grad_clip:
        state.scaler.unscale_(state.optimizer)
        nn.utils.clip_grad_value_(state.parameters, run.args.grad_clip)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.lr = state.scheduler.get_last_lr()[0]
    state.scheduler.step()
    if state.ema_model:
        update_ema(state.ema_weights, state.weights, run.args.ema, state.epoch * len(run.loader) + state.step)
    state.step += 1


def forward_backward(state: TrainState, forward: Callable[..., tuple[Tensor, Tensor]], batch_size: int,
                     inputs: Tensor, targets: Tensor, *mix: Tensor) -> None:
    """Compute the gradients of a shard; add its loss and correct predictions to the running sums."""
    state.optimizer.zero_grad(set_to_none=True)
    if len(targets):
        loss, correct = forward(inputs, targets, *mix)
        # divided by the images of all ranks: the sum of all gradients is then the gradient of the mean loss
        state.scaler.scale(loss / batch_size).backward()
        state.totals += torch.stack((loss.detach(), correct))


def build_forward(args: Namespace, model: nn.Module, device: torch.device, precision: str
                  ) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return a function from a batch to its summed loss and its number of correct predictions, both ()."""
    criterion = nn.CrossEntropyLoss(reduction="sum", label_smoothing=args.label_smoothing)

    def forward(inputs: Tensor, targets: Tensor, targets_b: Tensor | None = None, lam: Tensor | None = None
                ) -> tuple[Tensor, Tensor]:
        with hardware.autocast(device, precision):
            logits = model(inputs)
            loss = criterion(logits, targets)
            if targets_b is not None:
                loss = lam * loss + (1 - lam) * criterion(logits, targets_b)
                targets = torch.where(lam >= 0.5, targets, targets_b)  # the label with more weight is the correct one
        return loss, (logits.argmax(1) == targets).sum()
    return forward


def compile_forward(run: Run, state: TrainState) -> None:
    """Compile the forward function for full batches, and try it on black images; only random states change."""
    if run.world.is_main:
        print_line("compiling: this may take minutes (--no-compile skips it)")
    size = len(run.loader.shard(0))
    inputs = augment.to_input(torch.zeros(size, augment.SIZE, augment.SIZE, 3, dtype=torch.uint8, device=run.device))
    targets = torch.zeros(size, dtype=torch.int64, device=run.device)
    # targets_b must be a separate tensor, or the compiler assumes that both are always the same one
    mix = (targets.clone(), torch.ones((), device=run.device)) if run.loader.mixes else ()
    buffers = [buffer.clone() for buffer in state.model.buffers()]

    def probe(compiled: Callable[..., tuple[Tensor, Tensor]]) -> None:
        for images in [inputs, augment.shrink(inputs)] if run.args.small_epochs else [inputs]:
            forward_backward(state, compiled, size, images, targets, *mix)
    run.compiled_forward = hardware.compile_or_warn(run.forward, run.device, probe)
    state.totals.zero_()
    torch._foreach_copy_(list(state.model.buffers()), buffers)


def check_signals(run: Run, state: TrainState, signals: Signals) -> list[int]:
    """Agree with all ranks, at the same step, on the exit status to stop with (0: continue) and on saving (0 or 1)."""
    # several GPUs wait for each other only at the log interval
    often = run.world.size == 1 or run.device.type == "cpu" or run.args.save_minutes == 0
    if not often and state.step % run.args.log_interval and state.step < len(run.loader):
        return [0, 0]
    due = time.monotonic() - run.folder.saved_at >= 60 * run.args.save_minutes
    return run.world.max([signals.stop or 0, int(due and run.world.is_main)])


def log_progress(run: Run, state: TrainState, bar: tqdm, start: float) -> None:
    """Update `state.seconds` and the progress bar, or without a terminal print a line; stop a run that has diverged."""
    count = min(state.step * run.args.batch_size, len(run.loader.targets))
    loss, accuracy = train_metrics(run, state, count)
    now = time.perf_counter()
    state.seconds = now - start
    text = (f"{duration(seconds_left(run, state, count))} left: loss {loss:.3f}, accuracy {accuracy:.2f}%, "
            f"lr {state.lr:.3g}, {count / state.seconds:.0f} images/s")
    bar.set_postfix_str(text, refresh=False)
    bar.update(state.step - bar.n)
    if not math.isfinite(loss):
        raise_diverged(run, state, "the loss")
    if bar.disable and run.world.is_main and now - run.printed_at >= 60:
        print_line(f"epoch {state.epoch + 1}/{run.args.epochs}, step {state.step} of {len(run.loader)}, {text}")
        run.printed_at = now


def seconds_left(run: Run, state: TrainState, count: int) -> float:
    """Estimate the time to the end of the run, from the pace of this epoch and the last evaluation."""
    size, row = len(run.loader.targets), state.history[-1] if state.history else None
    costs = [augment.SMALL_COST if i < run.args.small_epochs else 1 for i in range(state.epoch, run.args.epochs)]
    pace = state.seconds / count / costs[0]  # of a full-size image; a forward pass takes a third of it
    evaluation = row["seconds"] - size / row["images_per_second"] if row else len(run.eval_split.targets) / 3 * pace
    return (sum(costs) * size - costs[0] * count) * pace + len(costs) * evaluation


def train_metrics(run: Run, state: TrainState, count: int) -> tuple[float, float]:
    """Return mean loss and accuracy (percent) of the epoch's first `count` images, over all ranks; synchronizes."""
    loss, correct = (run.world.sum(state.totals.clone()) / count).tolist()
    return loss, 100 * correct


@on_main_rank
def raise_diverged(run: Run, state: TrainState, what: str) -> None:
    """End a run that has diverged, without saving it."""
    raise RunError(f"{what} is not finite in epoch {state.epoch + 1}, step {state.step}, at lr {state.lr:.4g}; try a "
                   f"smaller --lr, or --precision fp32 (the last checkpoint is {run.folder.last})")


def finish_epoch(run: Run, state: TrainState, signals: Signals) -> int | None:
    """Evaluate, append the epoch's row to the history, and keep the weights if they are the best so far.

    A signal ends the evaluation; then the state after the epoch's last step is saved, and an exit status returned.
    """
    run.world.broadcast(list(state.eval_model.buffers()))  # evaluate with the batch norm statistics of rank 0
    train_loss, train_accuracy = train_metrics(run, state, len(run.loader.targets))
    start = time.perf_counter()
    logits = predict_logits(run, state, run.eval_split, signals)
    if status := run.world.max([signals.stop or 0])[0]:
        save(run, state, must_succeed=True)
        return status
    run.logits = logits
    loss, accuracy = evaluate.score(run.logits, run.eval_split.targets)
    seconds, rate = state.seconds + time.perf_counter() - start, len(run.loader.targets) / state.seconds
    prefix = "val" if run.args.val_size else "test"
    state.epoch, state.step, state.seconds = state.epoch + 1, 0, 0.0
    state.totals.zero_()
    state.history.append(dict.fromkeys(COLUMNS) | {
        "epoch": state.epoch, "step": state.epoch * len(run.loader), "lr": state.lr, "train_loss": train_loss,
        "train_accuracy": train_accuracy, f"{prefix}_loss": loss, f"{prefix}_accuracy": accuracy,
        "seconds": seconds, "images_per_second": rate})
    if state.best is None or accuracy > state.best["accuracy"]:  # the next save writes best.pt
        weights = {name: value.to("cpu", copy=True) for name, value in state.eval_model.state_dict().items()}
        state.best = {"model": weights, "epoch": state.epoch, "accuracy": accuracy, "selected_on": run.selected_on}
    if run.world.is_main:
        print_line(f"epoch {state.epoch}/{run.args.epochs}  training loss {train_loss:.4f}, accuracy "
                   f"{train_accuracy:.2f}%  {run.selected_on} loss {loss:.4f}, accuracy {accuracy:.2f}%  "
                   f"lr {state.lr:.4g}  {rate:.0f} images/s")


def predict_logits(run: Run, state: TrainState, split: data.Split, signals: Signals) -> Tensor:
    """Evaluate the network on a split, or a part of it if a signal has come."""
    return evaluate.predict_logits(state.eval_model, split.images, run.device, run.precision, run.args.normalize,
                                   world=run.world, signals=signals)


def save(run: Run, state: TrainState, must_succeed: bool = False) -> None:
    """Write the run folder; every rank calls it. A failure is a warning, since the next save may succeed."""
    tensors = [*state.model.state_dict().values(), state.totals]
    is_finite = torch.stack([tensor.isfinite().all() for tensor in tensors]).all()
    if run.world.max([int(not is_finite)])[0]:
        raise_diverged(run, state, "a weight")
    write(run, state, state.state_dict(run.world), must_succeed)


@on_main_rank
def write(run: Run, state: TrainState, content: dict[str, Any], must_succeed: bool) -> None:
    """Write a checkpoint; pictures at the end, on a signal, and at most every five minutes, as they take a second."""
    content |= {"args": options.saved_args(run.args), "classes": run.eval_split.classes, "environment": run.environment}
    try:
        run.folder.save(content)
        if run.logits is not None and (must_succeed or time.monotonic() - run.drawn_at >= 300):
            draw_curves(run, state)
            run.drawn_at = time.monotonic()
    except Exception as error:  # OSError, and whatever a missing or broken matplotlib raises
        if must_succeed:
            raise RunError(f"cannot save ({reason(error)}); the files saved before are intact") from error
        warn(f"cannot save ({reason(error)}); training continues, the next save tries again")


def draw_curves(run: Run, state: TrainState) -> None:
    """Draw curves.png, and confusion.png of the last evaluation."""
    args, rows = run.args, state.history
    lrs = schedule_lrs(args.scheduler, args.lr, len(run.loader), args.epochs, args.warmup_epochs)[:rows[-1]["step"]]
    plots.draw_curves(rows, lrs, vars(args), run.folder.path / "curves.png")
    matrix = evaluate.confusion_matrix(run.logits, run.eval_split.targets).numpy()
    plots.draw_confusion(matrix, run.eval_split.classes, run.folder.path / "confusion.png")


@on_every_rank
def resume(run: Run, state: TrainState, checkpoint: dict[str, Any]) -> None:
    """Continue from a checkpoint; warn where the continuation cannot be bitwise identical."""
    state.load_state_dict(checkpoint, run.world, run.folder.path)
    before, now = checkpoint["environment"], run.environment
    changed = [f"{name} {before.get(name)} -> {now[name]}" for name in now if before.get(name, now[name]) != now[name]]
    if state.epoch + state.step / state.steps_per_epoch == run.args.epochs:  # results.json describes the training
        run.environment = before
    elif changed and run.world.is_main:
        warn(f"resuming, but not bitwise-identically: {', '.join(changed)}")


def describe(run: Run, state: TrainState) -> str:
    """Return the start-up lines."""
    args, env, loader, count = run.args, run.environment, run.loader, models.count_parameters(state.model)
    units = plural(env["threads"], "thread") if env["threads"] and env["ranks"] == 1 else plural(env["ranks"], "rank")
    start = f"resumed {place(run, state)}" if state.epoch or state.step else "new run"
    return (f"device  {hardware.describe(run.device)}, {run.precision}, {units}, "
            f"{'compiled' if env['compile'] else 'not compiled'}\n"
            f"model   {'ResNet' if args.se == 'none' else 'SE-ResNet'} {args.num_blocks}, {count:,} parameters\n"
            f"data    {len(loader.targets):,} training and {len(run.eval_split.targets):,} {run.selected_on} images"
            f"{', generated' if args.synthetic else ''}\n"
            f"recipe  {plural(args.epochs, 'epoch')} of {plural(len(loader), 'step')}, batch {args.batch_size}, "
            f"{args.optimizer}, lr {args.lr:g}, {args.scheduler}\n"
            f"folder  {run.folder.path} ({start})")


def place(run: Run, state: TrainState) -> str:
    """Return where a run is, in words."""
    at_end = state.epoch == run.args.epochs
    return "after the last epoch" if at_end else f"in epoch {state.epoch + 1} after step {state.step}"


def print_stopped(run: Run, state: TrainState, status: int) -> int:
    """Print where a signal stopped the run, and the command that resumes it; return the exit status."""
    if run.world.is_main:
        launcher = "python" if run.world.size == 1 else f"torchrun --nproc-per-node {run.world.local_size}"
        command = f"{launcher} {shlex.quote(sys.argv[0])} --resume {shlex.quote(run.folder.path.as_posix())}"
        print_line(f"stopped {place(run, state)}, all saved; resume with: {command}")
    return status


def finish_run(run: Run, state: TrainState, signals: Signals) -> int | None:
    """Evaluate on the test set, draw, write results.json, print the outcome; return an exit status if a signal came."""
    best, test_split, logits, has_val = state.best, run.test_split, run.logits, run.args.val_size > 0
    if has_val:
        state.eval_model.load_state_dict(best["model"])
    if has_val or logits is None:  # otherwise the last evaluation was this one
        logits = predict_logits(run, state, test_split, signals)
    if (status := run.world.max([signals.stop or 0])[0]) or not run.world.is_main:
        return status
    results = {"last_accuracy": state.history[-1]["val_accuracy" if has_val else "test_accuracy"],
               "best_accuracy": best["accuracy"], "best_epoch": best["epoch"], "selected_on": run.selected_on,
               "test_accuracy": evaluate.score(logits, test_split.targets)[1],
               "test_weights": "best" if has_val else "last", "epochs": state.epoch,
               "seconds": sum(row["seconds"] for row in state.history),
               "images_per_second": statistics.harmonic_mean(row["images_per_second"] for row in state.history),
               "parameters": models.count_parameters(state.model),
               "per_class": evaluate.per_class(logits, test_split.targets, test_split.classes),
               "calibration_error": evaluate.calibration_error(logits, test_split.targets), **run.environment,
               "device": hardware.describe(run.device), "machines": state.machines, "versions": hardware.versions()}
    evaluate.draw_pictures(run.folder.path, logits, test_split)
    write_text(run.folder.path / "results.json", json.dumps(results, indent=2) + "\n")  # the run is finished now
    print_line(describe_results(results, run.folder.path))


if __name__ == "__main__":
    sys.exit(main())
