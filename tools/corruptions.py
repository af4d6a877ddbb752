"""Measure accuracy under the common corruptions of CIFAR-10-C (arXiv 1903.12261).

python tools/corruptions.py checkpoints/se-resnet/best.pt --output corruptions.json
python tools/corruptions.py checkpoints/se-resnet/best.pt --test-dir CIFAR-10-C
"""

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from process import program, set_up_process
from utils import UserError, check_output, print_line, write_text

if __name__ == "__main__":
    set_up_process()  # before torch is imported

import numpy as np
import torch
from torch import Tensor

import cifar10
import data
import hardware
from evaluate import check_classes, load_checkpoint_model, load_test_split, predict_logits, score
from options import Parser, add_data_flags, add_hardware_flags, at_least
from tools.corruption_ops import CORRUPTIONS, corrupt

NAMES = ["frost", *(operation.__name__ for operation in CORRUPTIONS)]


class TestSet(NamedTuple):
    """A test set with one version per severity; each call of a version returns images (N, 32, 32, 3) uint8."""

    name: str
    targets: Tensor  # (N,) int64
    versions: list[Callable[[], Tensor]]


def generate_sets(split: data.Split, seed: int, device: torch.device) -> list[TestSet]:
    """List the clean test set and its corruptions, generated on the device."""
    images = split.images.to(device)
    return [TestSet("clean", split.targets, [lambda: images])] + [
        TestSet(operation.__name__, split.targets, [partial(corrupt, images, operation, i, seed) for i in range(1, 6)])
        for operation in CORRUPTIONS]


def find_sets(folder: Path, limit: int | None) -> list[TestSet]:
    """List the published sets in a folder: CIFAR-10-C (NAME.npy and labels.npy) and CIFAR-10.1."""
    files = [(name, f"{name}.npy", "labels.npy", 5) for name in NAMES]
    files += [(f"cifar10.1_{v}", f"cifar10.1_{v}_data.npy", f"cifar10.1_{v}_labels.npy", 1) for v in ("v4", "v6")]
    sets = [read_set(name, folder / images, folder / labels, parts, limit)
            for name, images, labels, parts in files if (folder / images).exists()]
    if not sets:
        raise UserError(f"--test-dir {folder}: expected files of CIFAR-10-C, such as fog.npy, or of CIFAR-10.1, such "
                        "as cifar10.1_v6_data.npy")
    return sets


def read_set(name: str, images_path: Path, labels_path: Path, parts: int, limit: int | None) -> TestSet:
    """Map a file of images, one part after the other for each severity, and read its labels."""
    images, labels = read_array(images_path), read_array(labels_path)
    if images.dtype != np.uint8 or images.shape != (labels.size, 32, 32, 3) or labels.size % parts or labels.ndim != 1:
        raise UserError(f"{images_path} has {images.dtype} {images.shape} with labels {labels.shape}; expected uint8 "
                        f"(N, 32, 32, 3) and N labels, N a multiple of {parts}")
    count = labels.size // parts
    if not np.isin(labels, range(10)).all() or (labels.reshape(parts, count) != labels[:count]).any():
        raise UserError(f"{labels_path}: expected labels from 0 to 9, the same ones for each severity")
    if limit and limit > count:
        raise UserError(f"--limit-test {limit}: {images_path} has only {count} images per severity")
    kept = limit or count
    return TestSet(name, torch.tensor(labels[:kept], dtype=torch.int64),
                   [partial(torch.tensor, images[start:start + kept]) for start in range(0, labels.size, count)])


def read_array(path: Path) -> np.ndarray:
    """Map a .npy file; it is never unpickled."""
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} is not a valid .npy array ({reason}); unpack the archive again") from error


def read_results(path: Path | None, settings: dict[str, Any]) -> dict[str, list[float]]:
    """Return the accuracies that an interrupted measurement with the same settings has saved."""
    if path is None or not path.is_file():
        return {}
    with suppress(ValueError, TypeError, LookupError):  # of another kind of file
        saved = json.loads(path.read_text())
        if saved["settings"] == settings:
            return saved["accuracy"]
    raise UserError(f"--output {path} exists, with other settings or weights; choose another file, or delete it")


def measure(sets: Sequence[TestSet], predict: Callable[..., Tensor], accuracy: dict[str, list[float]],
            save: Callable[[], None]) -> None:
    """Add the accuracy in percent of each version of each set that `accuracy` lacks; save after each set."""
    print_line(f"{'accuracy (%)':<24}{'severity 1':>12}" + "".join(f"{cell:>12}" for cell in (2, 3, 4, 5, "mean")))
    for each in sets:
        if each.name not in accuracy:
            accuracy[each.name] = [score(predict(version(), title=each.name), each.targets)[1]
                                   for version in each.versions]
            save()
        values = accuracy[each.name]
        row = "".join(f"{value:>12.2f}" for value in (*(values if len(values) > 1 else ()), np.mean(values)))
        print_line(f"{each.name:<24}{row:>72}")


def summarize(accuracy: dict[str, list[float]], published: bool) -> dict[str, Any]:
    """Average over the corruptions; print what the mean covers."""
    found = [accuracy[name] for name in NAMES if name in accuracy]
    missing = [name for name in NAMES if name not in accuracy] if found else []
    if found:
        print_line(f"mean accuracy {np.mean(found):.2f}% over {len(found)} of the {len(NAMES)} corruptions")
    if missing:
        print_line(f"missing from the mean: {', '.join(missing)}" + ", which needs photographs" * (not published))
    if not published:
        print_line("the random numbers differ from CIFAR-10-C's; use --test-dir to compare with published results")
    return {"mean": float(np.mean(found)) if found else None, "left_out": missing}


@program("corruptions.py")
def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and save what a command line asks for."""
    parser = Parser("corruptions.py", "CHECKPOINT [flags]", "Measure accuracy under common corruptions of the images.")
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a trained network, such as RUN/best.pt")
    flag = parser.group("corruptions")
    flag("--output", None, "save the results here; an interrupted measurement continues from this file", type=Path,
         metavar="FILE.json")
    flag("--test-dir", None, "folder of the published CIFAR-10-C or CIFAR-10.1, read instead of generating corruptions",
         type=Path, metavar="DIR")
    flag("--seed", 0, "seed of the generated corruptions", type=at_least(0), metavar="N")
    add_data_flags(parser, ("data_dir", "synthetic", "limit_test"))
    add_hardware_flags(parser, ("device", "precision"))
    args, given = parser.parse(argv)
    if args.test_dir and args.synthetic:
        raise UserError("--test-dir and --synthetic cannot be combined")
    device, precision = hardware.select(args)
    model, trained, run_args = load_checkpoint_model(args.checkpoint, device)
    if args.output:
        check_output(args.output)
    if args.test_dir:
        sets, classes = find_sets(args.test_dir, args.limit_test), cifar10.CLASSES
    else:
        split = load_test_split(args, given, run_args)
        sets, classes = generate_sets(split, args.seed, device), split.classes
    check_classes(args.checkpoint, trained, classes)
    settings = {"checkpoint": args.checkpoint, "sha256": hashlib.sha256(Path(args.checkpoint).read_bytes()).hexdigest(),
                "precision": precision, "images": {each.name: len(each.targets) for each in sets},
                "source": str(args.test_dir) if args.test_dir else f"generated, seed {args.seed}"}
    accuracy = read_results(args.output, settings)
    print_line(f"{args.checkpoint} on {device} in {precision}, "
               f"{' or '.join(f'{count:,}' for count in sorted({*settings['images'].values()}))} images per severity")

    def save(**summary: Any) -> None:
        if args.output:
            content = {"settings": settings, "accuracy": accuracy, **summary}
            write_text(args.output, json.dumps(content, indent=2) + "\n")
    measure(sets, partial(predict_logits, model, device=device, precision=precision, normalize=run_args["normalize"]),
            accuracy, save)
    save(**summarize(accuracy, published=bool(args.test_dir)))
    if args.output:
        print_line(f"saved {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
