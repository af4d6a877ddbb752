"""Train, resume, evaluate, predict with and summarise the SE-ResNet on CIFAR-10: `python train.py --help`."""

import contextlib
import io
import json
import os
import shlex
import signal
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import data
import device as devices
import evaluate
import models
import options
import predict
from trainer import SPLIT_NAMES, RunError, Trainer, saved_args
from utils import (
    Processes,
    RunFolder,
    Signals,
    UserError,
    check_weights,
    load_checkpoint,
    load_run,
    load_weights,
    say,
    start_processes,
    warn,
    write_text,
)


def open_run(args: Namespace) -> tuple[RunFolder, Path | None]:
    """Turn `--name` and `--resume` into a run folder, and the one file of it that is asked for, if any.

    Raises:
        UserError: `--resume PATH` is none of a run.
    """
    if args.resume in (None, "auto", "last"):
        return RunFolder(Path(args.checkpoint_dir) / args.name), None
    path = Path(args.resume)
    if path.is_dir():
        return RunFolder(path), None
    if not path.exists() or path.name not in ("last.pt", "previous.pt"):
        raise UserError(f"--resume {path}: there is no such run folder, or last.pt or previous.pt of one; for the "
                        "weights of another file use --init")
    return RunFolder(path.parent), path


def find_checkpoint(args: Namespace, folder: RunFolder, file: Path | None) -> dict[str, Any] | None:
    """Read the checkpoint to go on from, and take its folder; None is a new run. Only on the first process.

    Raises:
        UserError: The folder holds a run, or none, or a damaged one, or is in use.
    """
    if args.resume is None or (args.resume == "auto" and not folder.holds_checkpoint()):
        refuse_overwriting(args, folder)
        return None
    if not folder.holds_checkpoint():
        load_run(folder, file)  # says so, before the lock leaves a file in a folder that is no run's
    folder.open()
    checkpoint, path, errors = load_run(folder, file)
    if errors:
        warn(f"{errors[0]}; going on from {path}")
    folder.last_is_good = path.name == folder.last.name
    if checkpoint["best_accuracy"] is not None:
        try:
            if not {"epoch", "accuracy"} <= load_checkpoint(folder.best).keys():
                raise UserError(f"{folder.best} is of no run")
        except UserError as error:
            warn(f"{error}; the best epoch is looked for from here on")
            checkpoint["best_accuracy"] = None
    return checkpoint


def load_data(args: Namespace, processes: Processes) -> tuple[data.Split, data.Split | None, data.Split]:
    """Read training, validation (or None) and test images; the first process of each machine goes ahead.

    Raises:
        UserError: The data are not there, damaged, or too few.
    """
    for is_turn in (processes.local_rank == 0, processes.local_rank != 0):  # so that one downloads or draws
        if is_turn:
            train = data.load_split(args.data_dir, data.TRAIN_FILES, args.synthetic, args.download, args.limit_train)
            test = data.load_split(args.data_dir, data.TEST_FILES, args.synthetic, args.download, args.limit_test)
        processes.gather(None)
    train, val = data.hold_out(train, args.val_size) if args.val_size else (train, None)
    if args.batch_size > len(train.targets):
        raise UserError(f"--batch-size {args.batch_size} is larger than the training set of {len(train.targets)} "
                        "images; choose a smaller one")
    last_batch = (len(train.targets) - 1) % args.batch_size + 1
    if len(args.num_blocks) > 5 and last_batch < 2 * processes.size:
        raise UserError(f"--batch-size {args.batch_size} leaves a process one image of {len(train.targets)}, and after "
                        f"{len(args.num_blocks)} layers it has one pixel: too few for batch norm; choose another")
    return train, val, test


def build_loader(args: Namespace, split: data.Split, device: torch.device, processes: Processes) -> data.Loader:
    """Make the loader that `--loader` names."""
    settings = (split, args.batch_size, device, args.seed, args.augment, args.normalize, args.trivial_augment,
                args.mixup, args.cutmix, processes)
    if args.loader == "workers":
        return data.WorkersLoader(*settings, workers=args.workers)
    return data.DeviceLoader(*settings)


def set_up(args: Namespace, given: dict[str, Any], processes: Processes) -> tuple[Trainer, data.Split]:
    """Check everything that can be checked, read the data, and build the run, new or resumed.

    Raises:
        UserError: Something is not as it must be.
    """
    folder, file = open_run(args)
    checkpoint = processes.first_do(lambda: find_checkpoint(args, folder, file))
    if checkpoint is None:
        options.check_training(args, given)
        build_model(args)  # before any file is touched
    else:
        args = options.merge_resumed(args, given, checkpoint["args"])
    device = devices.pick_device(args.device, processes.local_rank)
    devices.set_up_backend(device, args.deterministic)
    torch.manual_seed(args.seed)
    if checkpoint is not None:  # without memory first, as in evaluate.load_model
        with torch.device("meta"):
            check_weights(build_model(args), checkpoint["model"], folder.path)
    model = build_model(args).to(device, memory_format=torch.channels_last)
    if args.init and checkpoint is None:
        load_weights(model, processes.first_do(lambda: load_checkpoint(args.init)["model"]), args.init)
    train, val, test = load_data(args, processes)
    val, test = (split and split._replace(images=split.images.to(device), targets=split.targets.to(device))
                 for split in (val, test))
    if checkpoint is None:
        processes.first_do(lambda: start_folder(args, folder))
    torch.manual_seed(args.seed + processes.rank)  # dropout differs between processes
    trainer = Trainer(args, model, build_loader(args, train, device, processes), val or test,
                      "test" if val is None else "val", folder, device, processes)
    if args.compile if args.compile is not None else devices.can_compile(device):
        trainer.compile()
    if checkpoint is not None:
        try:
            trainer.load_state(checkpoint)
        except (ArithmeticError, LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise UserError(f"the checkpoint in {folder.path} does not fit together ({error!r:.200})") from error
    return trainer, test


def refuse_overwriting(args: Namespace, folder: RunFolder) -> None:
    """Refuse to start a new run where one lies.

    Raises:
        UserError: There is one, and no `--overwrite`.
    """
    if args.overwrite:
        return
    if folder.holds_checkpoint():
        raise UserError(f"{folder.path} holds a run; go on with it by --resume, replace it by --overwrite, "
                        "or choose another --name")
    # a run that was killed in its first save leaves best.pt alone: what starts by --resume auto starts again
    if folder.holds_run() or (args.resume is None and folder.best.exists()):
        raise UserError(f"{folder.path} holds what is left of a run, and no checkpoint to go on from; replace it by "
                        "--overwrite, or choose another --name")


def start_folder(args: Namespace, folder: RunFolder) -> None:
    """Take the folder of a new run, now that all else is right, and remove what `--overwrite` replaces.

    Raises:
        UserError: It cannot be written, or is in use.
    """
    folder.open()
    refuse_overwriting(args, folder)  # again: one may have begun, and stopped, while the data were read
    folder.clear()
    write_text(folder.path / "args.json", json.dumps(saved_args(args), indent=2) + "\n")


def build_model(args: Namespace) -> models.SEResNet:
    """Build the network of the model flags.

    Raises:
        UserError: They make none, or one of more than `--max-params`.
    """
    try:
        return models.build_model(**options.model_args(args), max_params=args.max_params)
    except (ValueError, RuntimeError) as error:  # the latter is torch's, for sizes beyond its integers
        raise UserError(str(error)) from error


def train(args: Namespace, given: dict[str, Any]) -> int:
    """Train a run, new or resumed, to its end or to a signal; return the exit status."""
    if hasattr(signal, "SIGUSR1"):  # outside the loop there is nothing to save, and nothing to die of
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # a half download is cleaned up
    trainer, test = set_up(args, given, start_processes())
    with contextlib.closing(trainer.folder):
        return train_to_end(trainer, test)


def train_to_end(trainer: Trainer, test: data.Split) -> int:
    """Train what `set_up` has built, and leave its results; return the exit status."""
    processes = trainer.processes
    if processes.is_first:
        say(describe(trainer))
    with Signals(quiet=not processes.is_first) as signals, contextlib.closing(trainer.loader):
        while trainer.epoch < trainer.args.epochs:
            if stop := trainer.train_epoch(signals):
                return say_stopped(trainer, stop)
            trainer.finish_epoch()
        trainer.save()
        if stop := int(processes.max(torch.tensor(signals.stop or 0))):  # it came in the last evaluation
            return say_stopped(trainer, stop)
        results = trainer.finish(test)
        if processes.is_first:
            evaluate.draw_pictures(trainer.folder.path, trainer.logits, test)
            write_text(trainer.folder.path / "results.json", json.dumps(results, indent=2) + "\n")
            say(describe_results(results, trainer.folder))
    return 0


def say_stopped(trainer: Trainer, stop: int) -> int:
    """Say where a signal has stopped the run, and how to go on; return the exit status."""
    if trainer.processes.is_first:
        place = f"in epoch {trainer.epoch + 1} after step {trainer.step}"
        say(f"stopped {place if trainer.epoch < trainer.args.epochs else 'after the last epoch'}, all saved; "
            f"go on with: {resume_command(trainer.folder, trainer.processes)}")
    return 128 + stop


def describe(trainer: Trainer) -> str:
    """Say in a few lines what is about to run."""
    args, loader, environment = trainer.args, trainer.loader, trainer.environment()
    compiled = ", compiled" if environment["compile"] else ""
    several = f", {trainer.processes.size} processes" if trainer.processes.size > 1 else ""
    begin = f"from epoch {trainer.epoch + 1}, step {trainer.step}" if trainer.epoch or trainer.step else "new"
    return (f"device  {devices.describe(trainer.device)}, {trainer.precision}{compiled}{several}\n"
            f"model   SE-ResNet {args.num_blocks}, {models.count_parameters(trainer.model):,} parameters\n"
            f"data    {len(loader.targets):,} training and {len(trainer.held_out.targets):,} "
            f"{SPLIT_NAMES[trainer.kind]} images"
            f"{' (generated)' if args.synthetic else ''}, --loader {args.loader}\n"
            f"recipe  {args.epochs} epochs of {len(loader)} steps, batch {args.batch_size}, {args.optimizer}, "
            f"lr {args.lr:g}, {args.scheduler}\n"
            f"run     {trainer.folder.path} ({begin})")


def describe_results(results: dict[str, Any], folder: RunFolder) -> str:
    """Say how a run ended, and how its best epoch was picked."""
    last, best, test = (results[f"{name}_accuracy"] for name in ("last", "best", "test"))
    note = ("the test set picked the best epoch, as in the paper, and so flatters it; --val-size picks without it"
            if results["picked_by"] == "test" else
            f"test accuracy of best.pt {test:.2f} %; the test set was looked at this once")
    return (f"last {results['picked_by']} accuracy {last:.2f} %, best {best:.2f} % (epoch {results['best_epoch']})\n"
            f"{note}\n{results['seconds'] / 60:.1f} minutes, {results['images_per_second']:.0f} images/s; "
            f"weights, metrics and pictures in {folder.path}")


def resume_command(folder: RunFolder, processes: Processes) -> str:
    """Return the command that goes on with a run; on several machines, torchrun's own flags come to it."""
    alone = processes.size == 1
    launcher = "python" if alone else f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}"
    return f"{launcher} train.py --resume {shlex.quote(str(folder.path))}"


def print_summary(args: Namespace) -> None:
    """Print torchsummary's table of the network."""
    from torchsummary import summary  # here alone, so that machines which only train can do without

    with contextlib.redirect_stdout(io.StringIO()) as table:
        summary(build_model(args).eval(), (3, 32, 32), device="cpu")
    say(table.getvalue().rstrip())


def run(args: Namespace, given: dict[str, Any]) -> int:
    """Do what the command line asks for; return the exit status."""
    if args.summary:
        print_summary(args)
    elif args.evaluate:
        evaluate.run_evaluate(args, given)
    elif args.predict:
        predict.run_predict(args, given)
    else:
        return train(args, given)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return 0, 1 for a failed run, 2 for a user's mistake, or 128 and the signal that ended it."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started it, as with `2>&-`
            setattr(sys, name, open(os.devnull, "w"))
    args, given = options.parse_args(argv)
    try:
        status = run(args, given)
    except UserError as error:
        say(f"train.py: error: {' '.join(str(error).split())}", sys.stderr)
        return 2
    except (RunError, OSError, torch.OutOfMemoryError) as error:
        say(f"train.py: error: {str(error).splitlines()[0]}", sys.stderr)
        return 1
    except RuntimeError as error:
        if "gloo" not in str(error) and not isinstance(error, dist.DistError):  # gloo's have no type of their own
            raise
        say(f"train.py: error: another process of this run was lost ({str(error).splitlines()[0]:.200}); what was "
            "saved is whole, go on with --resume", sys.stderr)
        return 1
    except KeyboardInterrupt:
        say("interrupted", sys.stderr)
        return 130
    if dist.is_initialized():
        dist.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main())
