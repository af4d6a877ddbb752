"""Measure accuracy under the common corruptions of CIFAR-10-C, made on the fly (arXiv 1903.12261).

python tools/corruptions.py --checkpoint checkpoints/se-resnet/best.pt --output corruptions.json
python tools/corruptions.py --checkpoint checkpoints/se-resnet/best.pt --test-dir CIFAR-10-C
"""

import csv
import io
import json
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
import device as devices
import evaluate
from options import Parser, at_least
from tools.corruption_ops import EXTRA, MAIN, corrupt
from utils import UserError, say, write_text

SEVERITIES = range(1, 6)
MAIN_NAMES = ("frost", *(operation.__name__ for operation in MAIN))
EXTRA_NAMES = tuple(operation.__name__ for operation in EXTRA)
PLAIN_FILES = {f"cifar10.1_{v}": (f"cifar10.1_{v}_data.npy", f"cifar10.1_{v}_labels.npy") for v in ("v4", "v6")}
Predict = Callable[[Tensor], Tensor]  # images (N, 32, 32, 3) uint8 -> logits (N, 10)


class TestSet(NamedTuple):
    """Images under one name, read or made only when they are asked for."""

    name: str
    kind: str  # "main", "extra", or "other": of no severity, in no mean
    targets: Tensor  # (N,) int64
    versions: list[Callable[[], Tensor]]  # one for each severity, giving (N, 32, 32, 3) uint8


# --- where images come from ------------------------------------------------------------------------------------------


def make_sets(split: data.Split, seed: int, device: torch.device) -> list[TestSet]:
    """List the clean test set and all corruptions of it, to be made on the device."""
    images = split.images.to(device)
    sets = [TestSet("clean", "other", split.targets, [lambda: images])]
    for kind, operations in (("main", MAIN), ("extra", EXTRA)):
        sets += [TestSet(operation.__name__, kind, split.targets,
                         [partial(corrupt, images, operation, severity, seed) for severity in SEVERITIES])
                 for operation in operations]
    return sets


def find_sets(folder: Path, limit: int | None) -> list[TestSet]:
    """List what a folder holds of CIFAR-10-C (NAME.npy and labels.npy) and of CIFAR-10.1.

    Raises:
        UserError: It holds nothing of them, or a file is not what it should be.
    """
    found = []
    for kind, names in (("main", MAIN_NAMES), ("extra", EXTRA_NAMES)):
        found += [read_set(name, kind, folder / f"{name}.npy", folder / "labels.npy", limit)
                  for name in names if (folder / f"{name}.npy").exists()]
    found += [read_set(name, "other", folder / images, folder / labels, limit)
              for name, (images, labels) in PLAIN_FILES.items() if (folder / images).exists()]
    if not found:
        raise UserError(f"--test-dir {folder} holds neither a file of CIFAR-10-C, such as {MAIN_NAMES[1]}.npy, nor "
                        "cifar10.1_v6_data.npy; give the folder into which one of them was unpacked")
    return found


def read_set(name: str, kind: str, images_path: Path, labels_path: Path, limit: int | None) -> TestSet:
    """Map a file of images, in five equal parts if they are corruptions, and read its labels.

    Raises:
        UserError: Shapes, types or labels are wrong.
    """
    images, labels = read_array(images_path), read_array(labels_path)
    parts = 1 if kind == "other" else len(SEVERITIES)
    if images.dtype != np.uint8 or images.shape != (labels.size, 32, 32, 3) or labels.size % parts or labels.ndim != 1:
        raise UserError(f"{images_path} has {images.dtype} {images.shape} beside labels of {labels.shape}, expected "
                        f"uint8 (N, 32, 32, 3) and N labels" + f", {parts} severities of the same size" * (parts > 1))
    count = labels.size // parts
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() > 9:
        raise UserError(f"{labels_path} has {labels.dtype} values, expected whole numbers from 0 to 9")
    if (labels.reshape(parts, count) != labels[:count]).any():
        raise UserError(f"{labels_path} does not repeat its first {count} labels for each of the {parts} severities")
    if limit and limit > count:
        raise UserError(f"{images_path} holds {count} images of each severity, fewer than --limit-test {limit}")
    kept = limit or count
    return TestSet(name, kind, torch.from_numpy(labels[:kept].astype(np.int64)),
                   [partial(copy_rows, images, part * count, kept) for part in range(parts)])


def read_array(path: Path) -> np.ndarray:
    """Map a .npy file without running what it says.

    Raises:
        UserError: It is missing, or no array.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0][:100]
        raise UserError(f"{path} cannot be read as a .npy array ({reason}); unpack the published archive again"
                        ) from error
    if not isinstance(array, np.ndarray) or not array.size:
        raise UserError(f"{path} holds no array, or an empty one; unpack the published archive again")
    return array


def copy_rows(images: np.ndarray, start: int, count: int) -> Tensor:
    """Read some images of a mapped file into memory."""
    return torch.from_numpy(np.array(images[start:start + count]))


# --- measuring and telling -------------------------------------------------------------------------------------------


def measure(sets: list[TestSet], predict: Predict) -> dict[str, list[float]]:
    """Return the accuracy in percent on every version of every set; print each set's row as soon as it is known."""
    found = {}
    say(format_row("accuracy (%)", [f"severity {SEVERITIES[0]}", *SEVERITIES[1:], "mean"]))
    total = sum(len(each.versions) * len(each.targets) for each in sets)
    with tqdm(total=total, unit=" images", disable=None, leave=False) as bar:
        for each in sets:
            found[each.name] = []
            for version in each.versions:
                images, hits = version(), 0
                for rows in torch.arange(len(images)).split(evaluate.BATCH_SIZE):
                    hits += (predict(images[rows[0]:rows[-1] + 1]).argmax(1).cpu() == each.targets[rows]).sum().item()
                    bar.update(len(rows))
                found[each.name].append(100 * hits / len(images))
            alone = len(each.versions) == 1
            cells = [""] * 5 + found[each.name] if alone else [*found[each.name], float(np.mean(found[each.name]))]
            with bar.external_write_mode():
                say(format_row(each.name + " (extra)" * (each.kind == "extra"), cells))
    return found


def format_row(name: str, cells: Sequence[Any]) -> str:
    """Lay out a row of the table, numbers with two decimals."""
    return f"{name:<24}" + "".join(f"{c:>12.2f}" if isinstance(c, float) else f"{c:>12}" for c in cells)


def summarise(sets: list[TestSet], found: dict[str, list[float]]) -> dict[str, Any]:
    """Average over what is in the mean of CIFAR-10-C, and name what is not there; None without any of it."""
    means = {kind: [found[each.name] for each in sets if each.kind == kind] for kind in ("main", "extra")}
    return {"mean": float(np.mean(means["main"])) if means["main"] else None,
            "mean_of_extra": float(np.mean(means["extra"])) if means["extra"] else None,
            "left_out": [name for name in MAIN_NAMES if name not in found] if means["main"] else [],
            "accuracy": found}


def describe(summary: dict[str, Any], published: bool) -> str:
    """Say what the means are taken over, and what they may be compared with."""
    lines, missing = [], summary["left_out"]
    if "clean" in summary["accuracy"]:
        lines.append(f"clean accuracy {summary['accuracy']['clean'][0]:.2f} %")
    if summary["mean"] is not None:
        lines.append(f"mean accuracy {summary['mean']:.2f} % over {len(MAIN_NAMES) - len(missing)} of the "
                     f"{len(MAIN_NAMES)} corruptions of CIFAR-10-C's mean")
    if missing:
        why = "not in the folder" if published else "needs photographs, so it cannot be made here"
        lines.append(f"left out of the mean: {', '.join(missing)} ({why})")
    if summary["mean_of_extra"] is not None:
        lines.append(f"mean accuracy {summary['mean_of_extra']:.2f} % over the extra ones, which are in no mean")
    return "\n".join([*lines, "these are published images: their figures compare with published ones" if published
                      else "made here, with other random numbers: only figures of --test-dir compare with published "
                           "ones"])


def format_output(path: Path, summary: dict[str, Any]) -> str:
    """Write a result as JSON, or its table as CSV (a set without severities has its accuracy under the mean)."""
    if path.suffix == ".json":
        return json.dumps(summary, indent=2) + "\n"
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["name", *(f"severity_{severity}" for severity in SEVERITIES), "mean"])
    for name, values in summary["accuracy"].items():
        writer.writerow([name, *(values if len(values) > 1 else [""] * 5), float(np.mean(values))])
    return text.getvalue()


# --- the program -----------------------------------------------------------------------------------------------------


def get_parser() -> Parser:
    """Make the parser."""
    parser = Parser(prog="corruptions.py", description=__doc__.splitlines()[0])
    flag, source = parser.add_argument, parser.add_mutually_exclusive_group().add_argument
    flag("--checkpoint", required=True, metavar="FILE", help="weights, such as checkpoints/NAME/best.pt")
    flag("--data-dir", default="data", help="folder that holds cifar-10-batches-py, or that folder itself")
    flag("--no-download", dest="download", action="store_false", help="do not fetch CIFAR-10 where it is missing")
    source("--synthetic", action="store_true", help="corrupt generated images instead of CIFAR-10's")
    source("--test-dir", type=Path, metavar="DIR", help="read the published CIFAR-10-C or CIFAR-10.1 instead")
    flag("--limit-test", type=at_least(1), metavar="N", help="use the first N images (of each severity)")
    flag("--seed", type=at_least(0), default=0, help="of every draw (default: 0)")
    flag("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="auto: cuda, else mps, else cpu")
    flag("--precision", choices=("auto", *devices.PRECISIONS), default="auto", help="of the network, as in train.py")
    flag("--output", type=Path, metavar="FILE", help="write the result as .json, or its table as .csv")
    return parser


def run(args: Namespace) -> None:
    """Measure what the flags ask for."""
    if args.output and (args.output.suffix not in (".json", ".csv") or not args.output.parent.is_dir()):
        raise UserError(f"--output {args.output}: a .json or .csv file in a folder that exists is needed")
    device = devices.pick_device(args.device)
    devices.set_up_backend(device, deterministic=False)
    precision = devices.pick_precision(args.precision, device)
    model, info = evaluate.load_model(args.checkpoint, device)
    if args.test_dir:
        sets, classes = find_sets(args.test_dir, args.limit_test), list(data.batches.CLASSES)
    else:
        split = data.load_split(args.data_dir, data.TEST_FILES, args.synthetic, args.download, args.limit_test)
        sets, classes = make_sets(split, args.seed, device), list(split.classes)
    evaluate.check_classes(args.checkpoint, info["classes"], classes)
    counts = " or ".join(f"{count:,}" for count in sorted({len(each.targets) for each in sets}))
    say(f"{args.checkpoint} on {devices.describe(device)} in {precision}, {counts} images for each figure")
    summary = summarise(sets, measure(sets, partial(evaluate.predict_logits, model, device=device, precision=precision,
                                                    normalize=info["normalize"])))
    say(describe(summary, bool(args.test_dir)))
    if args.output:
        settings = {"checkpoint": str(args.checkpoint), "precision": precision,
                    "images": {each.name: len(each.targets) for each in sets},
                    "source": str(args.test_dir) if args.test_dir else f"made here, seed {args.seed}"}
        write_text(args.output, format_output(args.output, {**settings, **summary}))
        say(f"written to {args.output}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return 0, or 130 if interrupted; a mistake is one line and status 2."""
    parser = get_parser()
    try:
        run(parser.parse_args(argv))
    except (UserError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
