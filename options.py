"""The flags of train.py: their meaning, their defaults, and which of them go together."""

import argparse
import shlex
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import models
from device import PRECISIONS
from optim import OPTIMIZERS, SCHEDULERS, USES_MOMENTUM
from utils import UserError

# What `--resume` takes from the new command: where and how the run goes on. Device, precision and compiling may change
# the last bits; then `Trainer.load_state` warns.
FREE_ON_RESUME = {"data_dir", "download", "device", "precision", "loader", "workers", "compile", "deterministic",
                  "checkpoint_dir", "name", "save_minutes", "log_interval", "max_params", "resume"}
MODEL_FLAGS = ("num_blocks", "channels", "kernel_sizes", "shortcut_kernel_sizes", "pool_size", "dropout", "block",
               "se", "se_reduction")
MODES = {"resume", "overwrite", "summary", "evaluate", "predict", "checkpoint", "output", "tta"}
_NOT_GIVEN = object()


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Show the default of every flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser that tells a mistake in one line and reads `@FILE` with comments."""

    def error(self, message: str) -> NoReturn:
        """Print one line, and no usage of fifty flags before it."""
        self.exit(2, f"{self.prog}: error: {message}\n")

    def convert_arg_line_to_args(self, arg_line: str) -> list[str]:
        """Split a line of an argument file as a shell would."""
        return shlex.split(arg_line, comments=True)


def at_least(minimum: float, kind: type = int) -> Any:
    """Make a converter for argparse that refuses smaller numbers, and NaN."""
    def convert(text: str) -> float:
        value = kind(text)
        if not minimum <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is out of range, at least {minimum} is needed")
        return value
    convert.__name__ = kind.__name__
    return convert


def get_parser() -> Parser:
    """Make the parser; nothing is parsed, so that others can look at it."""
    parser = Parser(
        prog="train.py", allow_abbrev=False, fromfile_prefix_chars="@",
        formatter_class=HelpFormatter,
        description="Train, resume, evaluate, predict with and summarise the SE-ResNet on CIFAR-10. "
                    "@FILE reads flags from a file, as in: python train.py @recipes/paper.txt")
    add_recipe_flags(parser)
    add_program_flags(parser)
    return parser


def add_recipe_flags(parser: Parser) -> None:
    """Add the flags of what is computed: the images, the keyword arguments of `models.build_model`, the recipe."""
    flag = parser.add_argument_group("data").add_argument
    flag("--data-dir", default="data", help="folder that holds cifar-10-batches-py, or that folder itself")
    on_off(flag, "--download", True, "fetch CIFAR-10 where the folder does not hold it")
    on_off(flag, "--synthetic", False, "train on generated images; no download")
    flag("--val-size", type=at_least(0), default=0, help="training images held out to pick best.pt; 0 is none")
    flag("--limit-train", type=at_least(1), metavar="N", help="use the first N training images (default: all)")
    flag("--limit-test", type=at_least(1), metavar="N", help="use the first N test images (default: all)")

    flag = parser.add_argument_group("model").add_argument
    flag("--num-blocks", type=int, nargs="+", default=[4, 4, 3], help="residual blocks of each layer")
    flag("--channels", type=int, default=64, help="channels of the first layer, doubled in each further one")
    flag("--kernel-sizes", type=int, nargs="+", default=[3], help="of the blocks, one for all layers or one each")
    flag("--shortcut-kernel-sizes", type=int, nargs="+", default=[1], help="of the shortcuts, likewise")
    flag("--pool-size", type=int, help="window of the last average pooling (default: the whole map)")
    flag("--dropout", type=float, default=0.0, help="probability after each block and before the linear layer")
    flag("--block", choices=tuple(models.BLOCKS), default="basic", help="preact: arXiv 1603.05027")
    flag("--se", choices=models.SE_PLACES, default="stem", help="squeeze and excitation: once, in each block, none")
    flag("--se-reduction", type=int, default=16, help="factor by which SE reduces the channels")
    flag("--max-params", type=at_least(0), default=5_000_000, help="refuse a larger model; 0 is no limit")

    flag = parser.add_argument_group("optimisation").add_argument
    flag("--epochs", type=at_least(1), default=200, help="passes over the training set")
    flag("--batch-size", type=at_least(1), default=128, help="images per step, of all processes together")
    flag("--optimizer", choices=tuple(OPTIMIZERS), default="sgd", help="optimiser")
    flag("--lr", type=at_least(0, float), help="highest learning rate (default: "
         + ", ".join(f"{lr:g} for {name}" for name, (_, lr) in OPTIMIZERS.items()) + ")")
    flag("--momentum", type=at_least(0, float), default=0.9, help="momentum of sgd and rmsprop")
    on_off(flag, "--nesterov", False, "Nesterov's momentum, for sgd")
    flag("--weight-decay", type=at_least(0, float), default=5e-4, help="of all parameters")
    flag("--scheduler", choices=SCHEDULERS, default="cosine", help="of the lr; onecycle also cycles the momentum")
    flag("--warmup-epochs", type=at_least(0, float), default=0.0, help="epochs of linear warm-up before the schedule")
    flag("--grad-clip", type=at_least(0, float), default=0.1, help="largest absolute gradient value; 0 is off")
    flag("--label-smoothing", type=at_least(0, float), default=0.0, help="share of the target given to all classes")
    flag("--ema", type=at_least(0, float), default=0.0, metavar="DECAY",
         help="evaluate and keep weights averaged over the steps; 0 is off")
    flag("--seed", type=at_least(0), default=0, help="seed of the initial weights and of every draw")

    flag = parser.add_argument_group("augmentation").add_argument
    on_off(flag, "--augment", True, "random crop with reflect padding, and random mirroring")
    on_off(flag, "--normalize", True, "subtract the published mean and divide by the published std")
    on_off(flag, "--trivial-augment", False, "one more random operation on each image (arXiv 2103.10158)")
    flag("--mixup", type=at_least(0, float), default=0.0, metavar="A", help="blend pairs by Beta(A, A); 0 is off")
    flag("--cutmix", type=at_least(0, float), default=0.0, metavar="A",
         help="paste areas between pairs by Beta(A, A); 0 is off; beside --mixup, one of them per batch")


def add_program_flags(parser: Parser) -> None:
    """Add the flags of how it is computed, where results go, and what else than a new training run can be done."""
    flag = parser.add_argument_group("speed").add_argument
    flag("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="auto: cuda, else mps, else cpu")
    flag("--precision", choices=("auto", *PRECISIONS), default="auto", help="auto: bf16 where the hardware has it")
    flag("--loader", choices=("device", "workers"), default="device",
         help="device: whole batches on the device; workers: image by image in processes, as published")
    flag("--workers", type=at_least(0), default=16, help="processes of --loader workers; never more than the cores")
    flag("--compile", action=argparse.BooleanOptionalAction, help="torch.compile (default: on CUDA with Triton)")
    on_off(flag, "--deterministic", False, "the same bits on every run on one CUDA device, more slowly")

    flag = parser.add_argument_group("output").add_argument
    flag("--checkpoint-dir", default="checkpoints", help="folder of the run folders")
    flag("--name", default="se-resnet", help="name of the run and of its folder")
    on_off(flag, "--overwrite", False, "replace a run that lies in the folder")
    flag("--save-minutes", type=at_least(0, float), default=1.0, help="minutes between saves; 0 saves after every step")
    flag("--log-interval", type=at_least(1), default=50, metavar="STEPS", help="steps between looks at the loss")

    flag = parser.add_argument_group("modes").add_argument
    flag("--resume", nargs="?", const="last", metavar="auto|PATH",
         help="go on with the run of that --name; auto: or start it; PATH: a run folder or its checkpoint")
    flag("--init", metavar="FILE", help="start a new run from these weights")
    flag("--summary", action="store_true", help="print the table of layers and parameters")
    flag("--evaluate", action="store_true", help="print accuracy on the test set; with --output DIR, draw pictures")
    flag("--predict", nargs="+", metavar="FILE", help="label pickled images, or PNG/JPEG files or folders of them")
    flag("--checkpoint", metavar="FILE", help="weights for --evaluate and --predict")
    flag("--output", metavar="PATH", help="CSV file of --predict, or folder of --evaluate's pictures")
    on_off(flag, "--tta", False, "average over the mirror image, for --evaluate and --predict")


def on_off(flag: Callable[..., Any], name: str, default: bool, text: str) -> None:
    """Add `--x/--no-x`."""
    flag(name, action=argparse.BooleanOptionalAction, default=default, help=text)


def parse_args(argv: Sequence[str] | None = None) -> tuple[Namespace, dict[str, Any]]:
    """Parse and check a command line; a mistake ends the program with one line and status 2.

    Returns:
        All settings, and those that were given rather than left at their default.
    """
    parser = get_parser()
    defaults = vars(parser.parse_args([]))
    try:
        found = parser.parse_args(argv, Namespace(**dict.fromkeys(defaults, _NOT_GIVEN)))
    except (ValueError, RecursionError) as error:  # argparse's own mistakes end the program before
        parser.error(f"a file given as @FILE holds no flags ({error})")
    given = {name: value for name, value in vars(found).items() if value is not _NOT_GIVEN}
    args = Namespace(**{**defaults, **given})
    try:
        check_modes(args, given)
        if args.resume is None:  # or there may be a checkpoint that says more
            check_training(args, given)
    except UserError as error:
        parser.error(str(error))
    return args, given


def check_modes(args: Namespace, given: dict[str, Any]) -> None:
    """Refuse modes that contradict each other, or lack what they need.

    Raises:
        UserError: With the flags' names.
    """
    modes = [name for name in ("summary", "evaluate", "predict") if getattr(args, name)]
    if len(modes) > 1:
        raise UserError(f"--{modes[0]} and --{modes[1]} exclude each other; give one of them")
    for name in modes:
        for other in ("resume", "init", "overwrite"):
            if given.get(other):
                raise UserError(f"--{other} belongs to training, not to --{name}; leave one of them out")
    if (args.evaluate or args.predict) and not args.checkpoint:
        raise UserError(f"--{modes[0]} needs --checkpoint FILE, such as checkpoints/{args.name}/best.pt")
    if args.predict and not args.output:
        raise UserError("--predict needs --output FILE, the CSV to write")
    for name in ("checkpoint", "output", "tta"):
        if given.get(name) and not (args.evaluate or args.predict):
            raise UserError(f"--{name} belongs to --evaluate and --predict"
                            + ("; to start from weights use --init FILE" if name == "checkpoint" else ""))
    if args.resume and args.overwrite:
        raise UserError("--resume goes on with a run and --overwrite replaces it; give one of them")
    if not args.name or args.name in (".", "..") or any(c in args.name for c in "/\\\0"):
        raise UserError(f"--name {args.name!r}: a plain folder name is needed; the path goes into --checkpoint-dir")


def check_training(args: Namespace, given: dict[str, Any]) -> None:
    """Refuse settings that contradict each other; fill in the lr that depends on the optimiser.

    Raises:
        UserError: With the flags' names.
    """
    if args.lr is None:
        args.lr = OPTIMIZERS[args.optimizer][1]
    if args.nesterov and (args.optimizer != "sgd" or args.momentum == 0):
        raise UserError("--nesterov needs --optimizer sgd with a --momentum above 0")
    if "momentum" in given and args.optimizer not in USES_MOMENTUM:
        raise UserError(f"--momentum applies to {' and '.join(USES_MOMENTUM)}; --optimizer {args.optimizer} has none")
    if args.warmup_epochs and args.scheduler == "onecycle":
        raise UserError("--scheduler onecycle rises by itself; leave out --warmup-epochs")
    if "momentum" in given and args.scheduler == "onecycle":
        raise UserError("--scheduler onecycle moves the momentum between 0.85 and 0.95; leave out --momentum")
    if args.warmup_epochs >= args.epochs:
        raise UserError(f"--warmup-epochs {args.warmup_epochs:g} leaves nothing of --epochs {args.epochs}")
    if args.label_smoothing >= 1:
        raise UserError(f"--label-smoothing {args.label_smoothing:g}: a share below 1 is needed")
    if args.seed >= 2**62:  # some processes' seeds are a little larger, and torch's have 64 bits
        raise UserError(f"--seed {args.seed} is out of range, at most {2**62 - 1} is taken")
    if args.ema >= 1:
        raise UserError(f"--ema {args.ema:g}: a decay below 1 is needed, such as 0.999")
    if "workers" in given and args.loader != "workers":
        raise UserError("--workers needs --loader workers; the device loader has none")


def model_args(args: Namespace | dict[str, Any]) -> dict[str, Any]:
    """Pick the arguments of `models.build_model` out of settings; absent ones stay at its defaults."""
    values = args if isinstance(args, dict) else vars(args)
    return {name: values[name] for name in MODEL_FLAGS if name in values}


def refuse_changes(given: dict[str, Any], saved: dict[str, Any], names: Sequence[str], way_out: str) -> None:
    """Refuse a given flag that differs from what a checkpoint was made with.

    Raises:
        UserError: With the flag's name, both values, and the way out.
    """
    for name in names:
        if name in given and name in saved and given[name] != saved[name]:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} {given[name]} differs from the checkpoint's {saved[name]}; {way_out}")


def merge_resumed(args: Namespace, given: dict[str, Any], saved: dict[str, Any]) -> Namespace:
    """Take a resumed run's settings from its checkpoint, and where and how it runs from the command line.

    Raises:
        UserError: A flag is given whose value would change the result.
    """
    check_saved(saved, args.resume)
    refuse_changes(given, saved, [name for name in vars(args) if name not in FREE_ON_RESUME],
                   "leave it out; other settings, and longer training, are a new run with --init FILE")
    free = {name: value for name, value in given.items() if name in FREE_ON_RESUME}
    merged = Namespace(**{**vars(args), **saved, **free, "resume": args.resume})
    check_training(merged, {})
    return merged


def check_saved(saved: dict[str, Any], path: Any) -> None:
    """Refuse settings of a checkpoint that no command line gives.

    Raises:
        UserError: With the name of the first one.
    """
    for action in get_parser()._actions:
        if action.dest in saved and not _is_possible(action, saved[action.dest]):
            raise UserError(f"checkpoint {path}: its args have an impossible {action.dest}; it is of another program")


def _is_possible(action: argparse.Action, value: Any) -> bool:
    if (action.nargs == "+") != isinstance(value, list) and value is not None:
        return False
    values = value if isinstance(value, list) else [value]
    if value is None or isinstance(action, argparse.BooleanOptionalAction):
        return value is action.default or isinstance(value, bool)
    if isinstance(action, argparse._StoreTrueAction) or not all(type(v) in (int, float, str) for v in values):
        return False
    try:
        return all((action.type or str)(str(v)) == v and v in (action.choices or [v]) for v in values)
    except (ValueError, argparse.ArgumentTypeError):
        return False
