"""Labels for images that have none: hidden test sets, as pickles or as pictures, and the CSV file of the answers."""

import csv
import io
import warnings
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import batches
import device as devices
from augment import SIZE
from evaluate import load_model, predict_logits
from utils import UserError, say, write_text

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
MAX_PIXELS = 50_000_000  # of one image file: a small file can claim to be a huge picture


def run_predict(args: Namespace, given: dict[str, Any]) -> None:
    """Label the images of `--predict` and write them as a CSV file."""
    device = devices.pick_device(args.device)
    devices.set_up_backend(device, args.deterministic)
    model, info = load_model(args.checkpoint, device, given)
    pictures = find_pictures(args.predict)
    if pictures:
        images, ids = np.stack([read_picture(path) for path in pictures]), None
    else:
        images, ids = read_pickles(args.predict)
    logits = predict_logits(model, torch.from_numpy(images), device, devices.pick_precision(args.precision, device),
                            info["normalize"], args.tta)
    confidence, guess = (tensor.tolist() for tensor in logits.softmax(1).max(1))
    if pictures:
        rows = [("path", "class", "probability"), *((str(path), info["classes"][label], f"{probability:.4f}")
                for path, label, probability in zip(pictures, guess, confidence, strict=True))]
    else:
        rows = [("ID", "Labels"), *zip(ids.tolist(), guess, strict=True)]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    try:
        write_text(args.output, text.getvalue())
    except OSError as error:
        raise UserError(f"--output {args.output} cannot be written ({error.strerror})") from error
    say(f"{len(guess):,} labels in {args.output}")


def find_pictures(paths: Sequence[str]) -> list[Path]:
    """List the PNG and JPEG files among paths and in folders; none if the paths are pickles.

    Raises:
        UserError: Nothing is there, a folder holds no picture, or pictures and pickles are mixed.
    """
    pictures, others = [], []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"--predict {path}: no such file or folder")
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
            if not found:
                raise UserError(f"--predict {path}: the folder holds no {', '.join(IMAGE_SUFFIXES)} file")
            pictures += found
        else:
            (pictures if path.suffix.lower() in IMAGE_SUFFIXES else others).append(path)
    if pictures and others:
        raise UserError(f"--predict {others[0]} is a pickle and {pictures[0]} a picture, which are labelled in two "
                        "forms; give one kind at a time")
    return pictures


def read_picture(path: Path) -> np.ndarray:
    """Read a PNG or JPEG file as (32, 32, 3) uint8, resized if need be.

    Raises:
        UserError: It is no such file, is damaged, or claims too many pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is lower
            image = Image.open(path, formats=("PNG", "JPEG"))
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(f"{path} has {image.width}x{image.height} pixels, at most {MAX_PIXELS:,} are read")
            if image.mode.startswith("I"):  # 16 bits of grey, which convert would cut off at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.size != (SIZE, SIZE):
                image = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
            return np.asarray(image.convert("RGB"))
    except UserError:
        raise
    except Exception as error:  # damaged files raise OSError, SyntaxError, ValueError, struct.error, …
        raise UserError(f"{path} cannot be read as a PNG or JPEG picture ({error})") from error


def read_pickles(paths: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Read pickled images and their ids; where a file has none they are counted on from 0."""
    images, ids, count = [], [], 0
    for path in paths:
        found, found_ids = batches.read_unlabelled(path)
        images.append(found)
        ids.append(np.arange(count, count + len(found)) if found_ids is None else found_ids)
        count += len(found)
    return np.concatenate(images), np.concatenate(ids)
