"""Label images: a pickled test set without labels, or image files. From Python: `load_model`."""

from utils import exit_on_signals, program

if __name__ == "__main__":
    exit_on_signals()  # before torch is imported, which takes seconds

import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import nn

import cifar10
import hardware
import options
from augment import SIZE
from evaluate import load_checkpoint_model, predict_logits
from models import Normalized
from utils import UserError, check_output, print_line, warn, write_text

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")


def load_model(path: str | Path, device: torch.device | str = "cpu") -> tuple[nn.Module, list[str]]:
    """Load the network of a checkpoint, in evaluation mode and with its normalization.

    Returns:
        The network, from (N, 3, 32, 32) float32 in [0, 1] to logits (N, 10), and the class names.
    """
    model, info = load_checkpoint_model(path, device)
    return Normalized(model, info.normalize).to(device).eval(), info.classes


def read_image(path: str | Path) -> np.ndarray:
    """Read a PNG or JPEG file as (32, 32, 3) uint8, upright and resized."""
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            if image.mode.startswith("I"):  # 16-bit gray, which convert would clip at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            image = ImageOps.exif_transpose(image)  # phones store photos sideways, with the rotation as a tag
            return np.array(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    except Exception as error:  # damaged files raise OSError, SyntaxError, ValueError, struct.error, ...
        raise UserError(f"{path} is not a readable PNG or JPEG image ({error})") from error


def find_images(paths: Sequence[str]) -> list[Path]:
    """List the PNG and JPEG files among paths and in folders; empty if the paths are pickles."""
    images, others = [], []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
            if not found:
                raise UserError(f"{path}: the folder has no {', '.join(IMAGE_SUFFIXES)} file")
            images += found
        else:
            with open(path, "rb") as file:
                is_pickle = path.suffix.lower() not in IMAGE_SUFFIXES and file.read(1) == b"\x80"
            (others if is_pickle else images).append(path)  # GIF, WebP and others will be refused as images
    if images and others:
        raise UserError(f"{others[0]} is a pickle and {images[0]} an image file; their output differs, so label one "
                        "kind at a time")
    return images


def label_images(paths: list[Path], model: nn.Module, classes: list[str], **settings) -> tuple[list[tuple], int]:
    """Label image files; return the rows of the CSV file, and how many files could not be read."""
    images, readable = [], []
    for path in paths:
        try:
            images.append(read_image(path))
            readable.append(path)
        except UserError as error:
            if len(paths) == 1:
                raise
            warn(f"skipped: {error}")
    rows = [("path", "class", "probability")]
    if images:
        logits = predict_logits(model, torch.from_numpy(np.stack(images)), **settings)
        for path, confidence, label in zip(readable, *(t.tolist() for t in logits.softmax(1).max(1)), strict=True):
            rows.append((str(path), classes[label], f"{confidence:.4f}"))
    return rows, len(paths) - len(readable)


def label_pickles(paths: Sequence[str], model: nn.Module, **settings) -> list[tuple]:
    """Label pickled images; return the rows of the CSV file. Files without ids are numbered from 0."""
    images, ids, count = [], [], 0
    for path in paths:
        found, found_ids = cifar10.read_unlabeled(path)
        images.append(found)
        ids.append(np.arange(count, count + len(found)) if found_ids is None else found_ids)
        count += len(found)
    logits = predict_logits(model, torch.from_numpy(np.concatenate(images)), **settings)
    return [("ID", "Labels"), *zip(np.concatenate(ids).tolist(), logits.argmax(1).tolist(), strict=True)]


def build_parser() -> options.Parser:
    """Build the parser of predict.py."""
    parser = options.Parser("predict.py", "CHECKPOINT IMAGES... [flags]", "Label images.",
                            ["python predict.py checkpoints/pretrained.pt photo.png folder/",
                             "python predict.py checkpoints/run/best.pt cifar_test_nolabel.pkl --output labels.csv"])
    parser.add_argument("checkpoint", metavar="CHECKPOINT",
                        help="best.pt or last.pt of a run, or a checkpoint of the published code")
    parser.add_argument("images", metavar="IMAGES", nargs="+", help="PNG or JPEG files, folders of them, or a pickled "
                        "test set without labels")
    flag = parser.group("output")
    flag("--output", "-", "CSV file to write; - prints it", metavar="CSV")
    flag("--tta", False, "average the predictions of each image and its horizontal flip")
    options.add_hardware_flags(parser, ("device", "precision"))
    return parser


@program("predict.py")
def main(argv: Sequence[str] | None = None) -> int:
    """Label the images that a command line names; return the exit status."""
    args, _ = build_parser().parse(argv)
    device = hardware.select_device(args.device)
    hardware.set_up_backend(device)
    if args.output != "-":
        check_output(args.output)
    paths = find_images(args.images)
    model, info = load_checkpoint_model(args.checkpoint, device)
    settings = {"device": device, "precision": hardware.select_precision(args.precision, device),
                "normalize": info.normalize, "tta": args.tta}
    rows, failed = label_images(paths, model, info.classes, **settings) if paths else (
        label_pickles(args.images, model, **settings), 0)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    if args.output == "-":
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")  # like the file: names may be any bytes
        print_line(text.getvalue().rstrip("\n"))
    else:
        write_text(args.output, text.getvalue())
        print_line(f"{len(rows) - 1:,} labels in {args.output}", sys.stderr)  # stdout may be the output
    if failed:
        raise UserError(f"{failed} of {len(paths)} images could not be read")
    return 0


if __name__ == "__main__":
    sys.exit(main())
