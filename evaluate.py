"""What a trained network is worth: its logits, their scores, a report per class, and pictures of its mistakes."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import batches
import data
import device as devices
import models
import options
import plots
from augment import to_input
from utils import Processes, UserError, check_weights, load_checkpoint, say

BATCH_SIZE = 1000
CPU_BATCH_SIZE = 125  # a third faster there: what a layer leaves stays in the caches for the next one
CALIBRATION_BINS = 15


@torch.inference_mode()
def predict_logits(model: nn.Module, images: Tensor, device: torch.device, precision: str = "fp32",
                   normalize: bool = True, tta: bool = False, processes: Processes | None = None) -> Tensor:
    """Run a network over images, in evaluation mode; every process of several takes its share of the batches.

    Args:
        model: On `device`; left in the mode that it was in.
        images: (N, 32, 32, 3) uint8, anywhere.
        device: Where to compute.
        precision: fp32, bf16 or fp16.
        normalize: As the network was trained.
        tta: Average the probabilities over each image and its mirror image.
        processes: Those that share the work; all of them get the whole result.

    Returns:
        (N, 10) float32 on `device`; with `tta` log-probabilities, which softmax leaves as they are.
    """
    processes = processes or Processes()
    training = model.training
    model.eval()
    outputs = torch.zeros(len(images), 10, device=device)
    size = min(BATCH_SIZE, CPU_BATCH_SIZE) if device.type == "cpu" else BATCH_SIZE
    for start in range(processes.rank * size, len(images), processes.size * size):
        inputs = to_input(images[start:start + size].to(device), normalize)
        with devices.autocast(device, precision):
            logits = model(inputs).float()
            if tta:
                mirrored = model(inputs.flip(3)).float()
                probabilities = (logits.softmax(1) + mirrored.softmax(1)) / 2
                logits = probabilities.clamp_min(1e-30).log()
        outputs[start:start + size] = logits
    model.train(training)
    return processes.sum(outputs)


def score(logits: Tensor, targets: Tensor) -> dict[str, float]:
    """Return the mean loss and the accuracy in percent of logits (N, 10) against targets (N,)."""
    targets = targets.to(logits.device)
    return {"loss": F.cross_entropy(logits, targets).item(),
            "accuracy": 100 * (logits.argmax(1) == targets).sum().item() / len(targets)}


def confusion_matrix(logits: Tensor, targets: Tensor) -> Tensor:
    """Count (10, 10) int64 on the CPU: rows are the true classes, columns the predicted ones."""
    pairs = targets.to(logits.device) * 10 + logits.argmax(1)
    return torch.bincount(pairs, minlength=100).view(10, 10).cpu()


def per_class(confusion: Tensor, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Return count, precision, recall and one-against-rest accuracy of each class, in percent.

    A precision or recall of no image at all is None.
    """
    total, rows = int(confusion.sum()), []
    for i, name in enumerate(classes):
        hits, count, guesses = int(confusion[i, i]), int(confusion[i].sum()), int(confusion[:, i].sum())
        rows.append({"class": name, "count": count,
                     "precision": 100 * hits / guesses if guesses else None,
                     "recall": 100 * hits / count if count else None,
                     "accuracy": 100 * (total - count - guesses + 2 * hits) / total})
    return rows


def calibration_error(logits: Tensor, targets: Tensor) -> float:
    """Return the expected calibration error in percent, over 15 bins of confidence (arXiv 1706.04599)."""
    confidence, guess = logits.float().softmax(1).max(1)
    hits = (guess == targets.to(logits.device)).float()
    bins = (confidence * CALIBRATION_BINS).ceil().long().clamp(1, CALIBRATION_BINS) - 1
    gaps = torch.zeros(CALIBRATION_BINS, device=logits.device).index_add_(0, bins, confidence - hits)
    return 100 * gaps.abs().sum().item() / len(targets)


def report(logits: Tensor, targets: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """Collect what results.json says of a set of images: per class, and calibration."""
    return {"per_class": per_class(confusion_matrix(logits, targets), classes),
            "calibration_error": calibration_error(logits, targets)}


def format_report(found: dict[str, Any]) -> str:
    """Lay a report out as a table for the terminal; in percent."""
    lines = [f"{'class':<12}{'images':>8}{'precision':>11}{'recall':>9}{'one-vs-rest':>13}"]
    for row in found["per_class"]:
        cells = ("-" if row[key] is None else f"{row[key]:.2f}" for key in ("precision", "recall", "accuracy"))
        lines.append("{:<12}{:>8}{:>11}{:>9}{:>13}".format(row["class"], row["count"], *cells))
    return "\n".join([*lines, f"expected calibration error {found['calibration_error']:.2f} %"])


# --- a checkpoint on the test set ------------------------------------------------------------------------------------


def load_model(path: str | Path, device: torch.device, given: dict[str, Any] | None = None
               ) -> tuple[nn.Module, dict[str, Any]]:
    """Build the network that a checkpoint was trained with, and load it; a published checkpoint is the default one.

    Args:
        path: A best.pt or last.pt, or a checkpoint of the published code.
        device: Where the network is wanted.
        given: Flags from the command line; they may say what the checkpoint does not, and must not contradict it.

    Returns:
        The network in evaluation mode, and `classes`, `normalize` and `args` of its training.

    Raises:
        UserError: The file is no such checkpoint.
    """
    checkpoint, given = load_checkpoint(path), given or {}
    saved = checkpoint["args"]
    options.check_saved(saved, path)
    options.refuse_changes(given, saved, (*options.MODEL_FLAGS, "normalize"), "leave it out")
    weights = checkpoint.get("ema") or checkpoint["model"]  # the former of a last.pt
    try:
        with torch.device("meta"):  # where a network takes no memory, however large the file says that it is
            model = models.SEResNet(**options.model_args({**given, **saved}))
    except (TypeError, ValueError, RuntimeError) as error:  # the last is torch's, for sizes beyond its integers
        raise UserError(f"checkpoint {path} does not say what network it is of ({error})") from error
    check_weights(model, weights, path)
    model.to_empty(device=device).load_state_dict(weights)
    info = {"classes": checkpoint.get("classes", list(batches.CLASSES)),
            "normalize": saved.get("normalize", given.get("normalize", True)), "args": saved}
    return model.to(device, memory_format=torch.channels_last).eval(), info


def check_classes(path: str | Path, classes: Sequence[str], shown: Sequence[str]) -> None:
    """Refuse images of other classes than a checkpoint was trained on.

    Raises:
        UserError: With both.
    """
    if list(classes) != list(shown):
        raise UserError(f"checkpoint {path} knows the classes {', '.join(map(ascii, classes)):.200}, but the images "
                        f"show {', '.join(map(ascii, shown)):.200}; give --synthetic as in training, or leave it out")


def run_evaluate(args: Namespace, given: dict[str, Any]) -> None:
    """Print accuracy, loss and the per-class report of `--checkpoint` on the test set; draw pictures if asked to."""
    device = devices.pick_device(args.device)
    devices.set_up_backend(device, args.deterministic)
    model, info = load_model(args.checkpoint, device, given)
    test = data.load_split(args.data_dir, data.TEST_FILES, args.synthetic, args.download, args.limit_test)
    check_classes(args.checkpoint, info["classes"], test.classes)
    logits = predict_logits(model, test.images, device, devices.pick_precision(args.precision, device),
                            info["normalize"], args.tta)
    found = score(logits, test.targets)
    say(f"{args.checkpoint}: test accuracy {found['accuracy']:.2f} %, loss {found['loss']:.4f}, "
        f"{len(test.targets):,} images" + (", with mirror images" if args.tta else ""))
    say(format_report(report(logits, test.targets, test.classes)))
    if args.output:
        draw_pictures(Path(args.output), logits, test)
        say(f"pictures in {args.output}")


def draw_pictures(folder: Path, logits: Tensor, split: data.Split) -> None:
    """Draw confusion.png, and the most confident errors as mistakes.png.

    Raises:
        UserError: The folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"folder {folder} cannot be made ({error.strerror})") from error
    split = split._replace(images=split.images.cpu(), targets=split.targets.cpu())
    plots.safely(plots.draw_confusion, confusion_matrix(logits, split.targets).numpy(), split.classes,
                 folder / "confusion.png")
    confidence, guess = (tensor.cpu() for tensor in logits.softmax(1).max(1))
    wrong = (guess != split.targets).nonzero()[:, 0]
    worst = wrong[confidence[wrong].argsort(descending=True)][:36]
    plots.safely(plots.draw_mistakes, split.images[worst].numpy(), split.targets[worst].numpy(),
                 guess[worst].numpy(), confidence[worst].numpy(), split.classes, folder / "mistakes.png")
