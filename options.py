"""The flags: groups that the programs share, defaults, and which flags exclude each other.

Imports no torch, which takes seconds, so that a program answers `--help` or a mistake at once.
"""

import argparse
import os
import re
import shlex
import sys
from argparse import Namespace
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NoReturn

from utils import UserError, one_line

# Each with its class in torch.optim and its default learning rate.
OPTIMIZERS = {
    "sgd": ("SGD", 0.1),
    "adam": ("Adam", 1e-3),
    "adamw": ("AdamW", 1e-3),
    "rmsprop": ("RMSprop", 1e-4),  # with momentum 0.9 a step is ten times as long
    "adagrad": ("Adagrad", 1e-2),
    "adadelta": ("Adadelta", 1.0),
    "muon": ("Muon", 0.05),  # in optim.py
}
USES_MOMENTUM = ("sgd", "rmsprop", "muon")
SCHEDULERS = ("cosine", "onecycle", "constant")
# What `--resume` takes from the new command line: it changes at most the last bits of the result.
FREE_ON_RESUME = {"data_dir", "device", "precision", "workers", "compile", "deterministic", "output_dir",
                  "save_minutes", "log_interval", "max_params", "resume"}
MODEL_FLAGS = ("num_blocks", "channels", "kernel_sizes", "shortcut_kernel_sizes", "dropout", "block", "se",
               "se_reduction")
COMMANDS = {"resume", "overwrite", "summary"}  # belong to one command line, not to the run


class Parser(argparse.ArgumentParser):
    """An argument parser with one-line errors, `@FILE` arguments, and defaults shown as a user would type them."""

    def __init__(self, prog: str, usage: str, description: str, examples: Sequence[str] = ()):
        epilog = "examples:\n" + "\n".join(f"  {example}" for example in examples) if examples else None
        super().__init__(prog, f"{prog} {usage}", description, epilog, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)
        self.defaults: dict[str, Any] = {}

    def group(self, title: str, only: Collection[str] | None = None) -> Callable[..., None]:
        """Add a group of flags; return a function that adds a flag to it, if its name is in `only`.

        A boolean default makes a `--x/--no-x` pair; the help text explains the default None.
        """
        group = self.add_argument_group(title)

        def flag(name: str, default: Any, text: str, **kwargs: Any) -> None:
            dest = name.removeprefix("--").replace("-", "_")
            if only is not None and dest not in only:
                return
            self.defaults[dest] = default
            if isinstance(default, bool):
                kwargs["action"] = argparse.BooleanOptionalAction
            elif "action" not in kwargs:
                kwargs.setdefault("metavar", "NAME" if isinstance(default, str) else "N")
            shown = "" if default is None else f" (default: {typed(default)})"
            group.add_argument(name, help=text + shown, **kwargs)
        return flag

    def parse(self, argv: Sequence[str] | None = None) -> tuple[Namespace, dict[str, Any]]:
        """Parse a command line; return all settings, and those among them that were given."""
        given = vars(self.parse_args(self.expand(sys.argv[1:] if argv is None else argv)))
        return Namespace(**{**self.defaults, **given}), given

    def expand(self, argv: Sequence[str], folder: Path = Path()) -> list[str]:
        """Replace each `@FILE`, relative to `folder` or to the program, by the flags in it, and each `~`."""
        found = []
        for word in argv:
            if not word.startswith("@"):
                flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
                if not value and (equals or not flag):
                    self.error(f"{flag or 'an argument'} is empty; is a shell variable not set?")
                found.append(flag + equals + os.path.expanduser(value))
                continue
            name, own = os.path.expanduser(word[1:]), Path(__file__).parent
            path = own / name if os.path.exists(own / name) and not os.path.exists(folder / name) else folder / name
            try:
                words = shlex.split(path.read_text(encoding="utf-8-sig"), comments=True)
                found += self.expand(words, path.parent)
            except (OSError, ValueError) as error:
                self.error(f"{word} is not an argument file ({path}: {getattr(error, 'strerror', None) or error}); the "
                           "recipes are @recipes/paper.txt and the other files there")
        return found

    def error(self, message: str) -> NoReturn:
        """Print one line instead of the usage, and exit with status 2."""
        if message.startswith("unrecognized"):
            message += f"; see {self.prog} --help"
        # torchrun starts every rank with the same mistake
        first = os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1"
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n" if first else None)


def at_least(minimum: float, kind: type = int, below: float = float("inf")) -> Callable[[str], float]:
    """Return an argparse type for numbers from `minimum` to below `below`; NaN is refused."""
    def convert(text: str) -> float:
        value = kind(text)
        if not minimum <= value < below:
            limit = f" and below {below}" if below < float("inf") else ""
            raise argparse.ArgumentTypeError(f"{text} is out of range; expected at least {minimum:g}{limit}")
        return value
    convert.__name__ = kind.__name__
    return convert


number, fraction, positive = at_least(0, float), at_least(0, float, below=1), at_least(1)


def add_data_flags(parser: Parser, only: Collection[str] | None = None) -> None:
    """Add the flags that select images."""
    flag = parser.group("data", only)
    flag("--data-dir", "data", "folder that holds cifar-10-batches-py or cifar-10-python.tar.gz, or one of them; "
         "CIFAR-10 is downloaded to it if it is not there", metavar="DIR")
    flag("--synthetic", False, "use generated images instead of CIFAR-10, without a download")
    flag("--val-size", 0, "training images held out to select best.pt; 0 selects it on the test set", type=at_least(0))
    flag("--limit-train", None, "use the first N training images, validation included (default: all)", type=positive)
    flag("--limit-test", None, "use the first N test images (default: all)", type=positive)


def add_hardware_flags(parser: Parser, only: Collection[str] | None = None) -> None:
    """Add the flags that select the hardware and how it is used."""
    flag = parser.group("hardware", only)
    flag("--device", "auto", "auto, cuda, mps or cpu", choices=("auto", "cuda", "mps", "cpu"))
    flag("--precision", "auto", "auto, fp32, bf16 or fp16; auto is bf16 on CPUs and CUDA devices that compute it "
         "natively, fp16 on older CUDA devices, else fp32", choices=("auto", "fp32", "bf16", "fp16"))
    flag("--workers", 0, "0: the data set lives on the device and batches are made there; N: torchvision transforms "
         "in N worker processes, like the published code", type=at_least(0))
    flag("--compile", None, "torch.compile (default: on for CUDA with Triton)", action=argparse.BooleanOptionalAction)
    flag("--deterministic", False, "deterministic algorithms on CUDA (slower); CPU runs are always deterministic")


def build_parser() -> Parser:
    """Build the parser of train.py."""
    parser = Parser("train.py", "[@FILE] [flags]",
                    "Train the SE-ResNet [4, 4, 3] on CIFAR-10. @FILE reads flags from a file.",
                    ["python train.py @recipes/fast.txt", "python train.py --val-size 5000 --output-dir checkpoints/v",
                     "python train.py --resume checkpoints/v"])
    flag = parser.group("run")
    flag("--output-dir", "checkpoints/se-resnet", "run folder", metavar="DIR")
    flag("--resume", None, "continue the run in --output-dir; auto: start it if there is none yet; PATH: continue this "
         "run folder, or last.pt or previous.pt in one", nargs="?", const="last", metavar="auto|PATH")
    flag("--init-from", None, "start a new run from the weights of this checkpoint", metavar="FILE")
    flag("--overwrite", False, "replace an existing run in --output-dir")
    flag("--save-minutes", 1.0, "minutes between checkpoints; 0 saves after every step", type=number)
    flag("--log-interval", 50, "steps between updates of loss and accuracy on a GPU", type=positive)
    flag("--summary", False, "print the torchsummary table and exit")
    add_data_flags(parser)
    flag = parser.group("model")
    flag("--num-blocks", [4, 4, 3], "residual blocks of each stage", type=int, nargs="+")
    flag("--channels", 64, "channels of the first stage, doubled in each further one", type=int)
    flag("--kernel-sizes", [3], "kernel size of the blocks, one for all stages or one each", type=int, nargs="+")
    flag("--shortcut-kernel-sizes", [1], "kernel size of the shortcuts, likewise", type=int, nargs="+")
    flag("--dropout", 0.0, "dropout probability after each block and before the linear layer", type=float)
    flag("--block", "basic", "basic, or preact (arXiv 1603.05027)")
    flag("--se", "stem", "where to place squeeze-and-excitation: stem, block (every residual block) or none")
    flag("--se-reduction", 16, "reduction ratio of squeeze-and-excitation, at most --channels", type=int)
    flag("--max-params", 5_000_000, "refuse a network with more parameters; 0 is no limit", type=at_least(0))
    add_optimization_flags(parser)
    flag = parser.group("augmentation")
    flag("--augment", True, "random crop with reflect padding, and random horizontal flip")
    flag("--normalize", True, "subtract the published mean and divide by the published std")
    flag("--trivial-augment", False, "also apply one random operation to each image, TrivialAugment (arXiv 2103.10158)")
    flag("--mixup", 0.0, "MixUp: blend pairs of images with weights from Beta(N, N); 0 is off", type=number)
    flag("--cutmix", 0.0, "CutMix: paste boxes between pairs of images, with areas from Beta(N, N); 0 is off; "
         "with --mixup, each batch uses one of the two", type=number)
    flag("--plain-epochs", 0, "epochs at the end without TrivialAugment, MixUp and CutMix (arXiv 1909.09148)",
         type=at_least(0))
    flag("--alternating-flip", False, "flip each image in every other epoch instead of at random (arXiv 2404.00498)")
    flag("--small-epochs", 0, "epochs at the start with images of 24x24 pixels, which need 0.56 of the computation "
         "(progressive resizing, arXiv 2104.00298)", type=at_least(0))
    add_hardware_flags(parser)
    return parser


def add_optimization_flags(parser: Parser) -> None:
    """Add the flags of optimizer, schedule and loss."""
    flag = parser.group("optimization")
    flag("--epochs", 200, "passes over the training set", type=positive)
    flag("--batch-size", 128, "images per step, summed over all ranks", type=positive)
    flag("--optimizer", "sgd", ", ".join(OPTIMIZERS), choices=tuple(OPTIMIZERS))
    flag("--lr", None, "highest learning rate; for muon that of blocks' convolutions, doubled for all others (default: "
         + ", ".join(f"{lr:g} for {name}" for name, (_, lr) in OPTIMIZERS.items()) + ")", type=number)
    flag("--momentum", 0.9, f"momentum of {', '.join(USES_MOMENTUM)}", type=number)
    flag("--nesterov", False, "Nesterov momentum, for sgd")
    flag("--weight-decay", 5e-4, "weight decay of all parameters; for muon, not of blocks' convolutions", type=number)
    flag("--bias-lr", 1.0, "learning rate of the biases of batch norm, as a multiple of the others' (arXiv 2404.00498)",
         type=at_least(1, float))
    flag("--scheduler", "cosine", "cosine, onecycle (also cycles the momentum) or constant", choices=SCHEDULERS)
    flag("--warmup-epochs", 0.0, "epochs of linear warm-up before the schedule", type=number)
    flag("--grad-clip", 0.1, "clip gradients to this absolute value; 0 is off", type=number)
    flag("--label-smoothing", 0.0, "fraction of the target spread over all classes", type=fraction)
    flag("--ema", 0.0, "evaluate and save a moving average of the weights with this decay; 0 is off", type=fraction)
    flag("--seed", 0, "seed of the initial weights and of all random parameters", type=at_least(0, below=2**62))


def parse_args(argv: Sequence[str] | None = None) -> tuple[Namespace, dict[str, Any]]:
    """Parse and check the command line of train.py; return all settings, and those that were given.

    Settings that exclude each other are refused, and defaults set that depend on another setting.
    """
    parser = build_parser()
    args, given = parser.parse(argv)
    for name in ("overwrite", "init_from", "summary"):
        if args.resume is not None and given.get(name):
            parser.error(f"--resume continues a run; leave out {flag_of(name)}")
    if args.resume not in (None, "auto"):  # the settings come from the checkpoint
        return args, given
    if args.lr is None:
        args.lr = OPTIMIZERS[args.optimizer][1]
    if "se_reduction" not in given:
        args.se_reduction = min(args.se_reduction, args.channels)
    if args.nesterov and (args.optimizer != "sgd" or args.momentum == 0):
        parser.error("--nesterov needs --optimizer sgd with a --momentum above 0")
    if "momentum" in given and args.optimizer not in USES_MOMENTUM:
        parser.error(f"--momentum is for {', '.join(USES_MOMENTUM)}; --optimizer {args.optimizer} has none")
    if args.scheduler == "onecycle" and ("momentum" in given or args.warmup_epochs):
        parser.error("--scheduler onecycle sets momentum and warm-up itself; leave out --momentum and --warmup-epochs")
    if args.warmup_epochs >= args.epochs:
        parser.error(f"--warmup-epochs ({args.warmup_epochs:g}) must be less than --epochs ({args.epochs}); try "
                     f"--warmup-epochs {args.epochs / 10:g}")
    if args.plain_epochs and not (args.trivial_augment or args.mixup or args.cutmix):
        parser.error("--plain-epochs needs --trivial-augment, --mixup or --cutmix, which it leaves out at the end")
    if args.plain_epochs >= args.epochs:
        parser.error(f"--plain-epochs ({args.plain_epochs}) must be less than --epochs ({args.epochs})")
    if args.alternating_flip and not args.augment:
        parser.error("--alternating-flip needs --augment, which crops and flips")
    if args.small_epochs >= args.epochs:
        parser.error(f"--small-epochs ({args.small_epochs}) must be less than --epochs ({args.epochs}): the last ones "
                     "need images of full size")
    return args, given


def build_model(args: Namespace):
    """Build the network of the model flags, if it has at most `--max-params` parameters."""
    import torch

    import models

    if args.optimizer == "muon" and args.block == "preact":  # here, since --init-from may bring the block
        raise UserError("--optimizer muon fixes the length of weights, which --block preact needs; use another "
                        "optimizer, or --block basic")
    try:
        with torch.device("meta"):  # without memory, so that a typo does not fill the machine
            count = models.count_parameters(models.SEResNet(**model_args(vars(args))))
    except (ValueError, RuntimeError) as error:  # RuntimeError: sizes beyond torch's integers
        names = rf"\b({'|'.join(MODEL_FLAGS)})(?= \(| has|$)"  # its arguments' names
        raise UserError(re.sub(names, lambda match: flag_of(match[1]), str(error))) from error
    if args.max_params and count > args.max_params:
        raise UserError(f"the network has {count:,} parameters, above --max-params ({args.max_params:,}); make it "
                        "smaller, or raise the limit (0 is none)")
    return models.SEResNet(**model_args(vars(args)))


def model_args(values: dict[str, Any]) -> dict[str, Any]:
    """Select the arguments of `models.SEResNet` from settings."""
    return {name: values[name] for name in MODEL_FLAGS if name in values}


def flag_of(name: str) -> str:
    """Turn the name of a setting into its flag."""
    return "--" + name.replace("_", "-")


def typed(value: Any) -> str:
    """Write a setting as a user would type it, and a boolean as on or off."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value).removesuffix(".0")


def merge_saved(args: Namespace, given: dict[str, Any], saved: dict[str, Any], resumes: bool) -> Namespace:
    """Take the settings of a resumed run from its checkpoint, or the network of `--init-from`; refuse others."""
    if resumes:  # an older release may not have had a flag; it did what is now its default
        saved = {name: value for name, value in build_parser().defaults.items() if name not in COMMANDS} | saved
    fixed = [name for name in saved if (name not in FREE_ON_RESUME if resumes else name in (*MODEL_FLAGS, "normalize"))]
    for name, value in given.items():
        if name in fixed and value != saved[name]:
            raise UserError(f"{flag_of(name)} {typed(value)} differs from the checkpoint's {typed(saved[name])}; leave "
                            "it out (--resume keeps all settings; --init-from starts a new run of the same network)")
    taken = [name for name in saved if name in fixed or resumes and name not in given]
    return Namespace(**{**vars(args), **{name: saved[name] for name in taken}})


def saved_args(args: Namespace) -> dict[str, Any]:
    """Return the settings of a run, without what belongs to one command line."""
    return {name: value for name, value in vars(args).items() if name not in COMMANDS}
