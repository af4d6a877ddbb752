"""Label images: a pickled test set without labels, or image files. From Python: `load_model`."""

from process import program, set_up_process

if __name__ == "__main__":
    set_up_process()  # before torch is imported, which takes seconds

import csv
import io
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

import cifar10
import hardware
import options
import plots
from augment import SIZE
from evaluate import TTA_HELP, load_checkpoint_model, predict_logits, progress
from models import Normalized
from utils import UserError, check_output, plural, print_line, reason, warn, write_text

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")


def load_model(path: str | Path, device: torch.device | str = "cpu") -> tuple[torch.nn.Module, list[str]]:
    """Load a network in evaluation mode, (N, 3, 32, 32) floats in [0, 1] to logits (N, 10), and its class names."""
    model, classes, settings = load_checkpoint_model(path, device)
    return Normalized(model, settings["normalize"]).to(device).eval(), classes


def read_image(path: str | Path) -> np.ndarray:
    """Read a PNG or JPEG file as (32, 32, 3) uint8: upright, resized, and white where it is transparent."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of large photos and of metadata
            with Image.open(path, formats=("PNG", "JPEG")) as image:
                if image.mode.startswith("I"):  # 16-bit gray, which convert would clip at 255
                    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
                image = ImageOps.exif_transpose(image)  # phones store photos sideways, with the rotation as a tag
                if image.mode.endswith("A") or "transparency" in image.info:
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
                return np.array(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    except Exception as error:  # damaged files raise OSError, SyntaxError, ValueError, struct.error, ...
        raise UserError(f"{path} is not a readable PNG or JPEG image ({reason(error)})") from error


def find_images(paths: Sequence[str]) -> list[Path]:
    """List the files among paths, and the PNG and JPEG files in folders; empty if the paths are pickles."""
    images, pickles = [], []
    for path in map(Path, paths):
        if path.is_dir():
            images += search_folder(path)
        else:
            is_pickle = path.suffix.lower() not in IMAGE_SUFFIXES and path.is_file()
            is_pickle = is_pickle and path.read_bytes()[:1] in (b"\x80", b"(", b"}")  # protocols 2 and later, 0, 1
            (pickles if is_pickle else images).append(path)  # what is neither will be refused as an image
    if images and pickles:
        raise UserError(f"{pickles[0]} is a pickle and {images[0]} an image file; their output differs, so label one "
                        "kind at a time")
    return images


def search_folder(folder: Path) -> list[Path]:
    """List the PNG and JPEG files in a folder and in its subfolders, linked ones included; each is read once."""
    files, seen, queue = [], set(), [folder]
    while queue:
        place = queue.pop(0)
        if place.resolve() in seen:
            continue
        seen.add(place.resolve())
        # names that begin with a dot, and __MACOSX, are what editors and archivers leave
        found = [path for path in sorted(place.iterdir()) if path.name[0] != "." and path.name != "__MACOSX"]
        files += [path for path in found if not path.is_dir() and not path.is_fifo()]
        folders = [path for path in found if path.is_dir()]
        queue = sorted(folders + queue, key=Path.is_symlink)  # links last, so that files go by their own paths
    images = sorted(path for path in files if path.suffix.lower() in IMAGE_SUFFIXES)
    if others := {path.suffix.lower() or path.name for path in files} - {*IMAGE_SUFFIXES}:
        warn(f"{folder}: other files left out: {len(files) - len(images)} ({', '.join(sorted(others))})")
    if not images:
        raise UserError(f"{folder}: the folder has no {', '.join(IMAGE_SUFFIXES)} file")
    return images


def read_images(paths: Sequence[Path]) -> tuple[np.ndarray, list[str]]:
    """Read image files as (N, 32, 32, 3) uint8, and their paths; warn about those that cannot be read."""
    images, names, errors = [], [], []
    for path in progress(paths, "reading"):
        try:
            images.append(read_image(path))
            names.append(str(path))
        except UserError as error:
            errors.append(error)
    if not images:
        raise errors[0]
    for error in errors:
        warn(f"skipped: {error}")
    return np.stack(images), names


def read_pickles(paths: Sequence[str]) -> tuple[np.ndarray, list[int]]:
    """Read pickled images as (N, 32, 32, 3) uint8, and their ids; files without ids are numbered from 0."""
    images, ids = [], []
    for path in paths:
        found, found_ids = cifar10.read_unlabeled(path)
        images.append(found)
        ids += range(len(ids), len(ids) + len(found)) if found_ids is None else found_ids.tolist()
    return np.concatenate(images), ids


def build_parser() -> options.Parser:
    """Build the parser of predict.py."""
    parser = options.Parser("predict.py", "CHECKPOINT IMAGES... [flags]", "Label images.",
                            ["python predict.py checkpoints/pretrained.pt photo.png folder/ --picture labels.png",
                             "python predict.py checkpoints/run/best.pt cifar_test_nolabel.pkl --output labels.csv"])
    parser.add_argument("checkpoint", metavar="CHECKPOINT",
                        help="best.pt or last.pt of a run, or a checkpoint of the published code")
    parser.add_argument("images", metavar="IMAGES", nargs="+", help="PNG or JPEG files, folders, or a pickled test set")
    flag = parser.group("output")
    flag("--output", "-", "CSV file to write; - prints it", metavar="CSV")
    flag("--picture", None, "also draw the first 36 images with class and probability", metavar="FILE.png")
    flag("--tta", False, TTA_HELP)
    options.add_hardware_flags(parser, ("device", "precision"))
    return parser


@program("predict.py")
def main(argv: Sequence[str] | None = None) -> int:
    """Label the images that a command line names; return the exit status."""
    args, _ = build_parser().parse(argv)
    device, precision = hardware.select(args)
    files = find_images(args.images)
    inputs = [args.checkpoint, *args.images, *files]
    for path in (args.output, args.picture):
        if path not in ("-", None):
            check_output(path, inputs)
            inputs.append(path)  # the picture must not replace the labels
    model, classes, settings = load_checkpoint_model(args.checkpoint, device)
    images, names = read_images(files) if files else read_pickles(args.images)
    logits = predict_logits(model, torch.from_numpy(images), device, precision, settings["normalize"], args.tta,
                            title="labeling")
    probabilities, labels = (values.tolist() for values in logits.softmax(1).max(1))
    predictions = [classes[label] for label in labels]
    if files:
        columns = ("path", *names), ("class", *predictions), ("probability", *(f"{p:.4f}" for p in probabilities))
    else:
        columns = ("ID", *names), ("Labels", *labels)
    rows = io.StringIO()
    csv.writer(rows, lineterminator="\n").writerows(zip(*columns, strict=True))
    if args.output == "-":
        if hasattr(sys.stdout, "reconfigure"):  # not in a notebook, and not if stdout is closed
            sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")  # like the file: names may be any bytes
        print_line(rows.getvalue().rstrip("\n"), must_succeed=True)
    else:
        write_text(args.output, rows.getvalue())
        print_line(f"{plural(len(names), 'label')} in {args.output}", sys.stderr)  # stdout may be the output
    if args.picture:
        captions = [Path(name).name if files else f"ID {name}" for name in names]
        plots.draw_images(images, captions, predictions, probabilities, "Predicted class and probability", args.picture)
    if len(files) > len(names):
        raise UserError(f"{len(files) - len(names)} of {len(files)} images could not be read")
    return 0


if __name__ == "__main__":
    sys.exit(main())
