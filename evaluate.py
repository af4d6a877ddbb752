"""Evaluate a network: logits, loss, accuracy, precision, recall, calibration. As a program: evaluate a checkpoint."""

from process import Signals, program, set_up_process

if __name__ == "__main__":
    set_up_process()  # before torch is imported, which takes seconds

import sys
from argparse import Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import cifar10
import data
import hardware
import models
import options
import plots
from augment import SIZE, to_input
from checkpoint import load_checkpoint, load_weights
from distributed import World
from utils import UserError, check_output, print_line

BATCH_SIZE = 1000
CPU_BATCH_SIZE = 125  # a third faster there: the activations of a layer stay in the cache for the next one
CALIBRATION_BINS = 15
TTA_HELP = "average over horizontal flips and shifts by one pixel (six times the work)"


def progress(items: Iterable, title: str | None) -> tqdm:
    """Iterate with a progress bar on a terminal, if it takes more than two seconds; None as the title shows none."""
    return tqdm(items, title, leave=False, delay=2, disable=None if title and sys.stderr else True,
                bar_format="{desc} {percentage:3.0f}%|{bar}| {remaining} left")


@torch.inference_mode()
def predict_logits(model: nn.Module, images: Tensor, device: torch.device | str, precision: str = "fp32",
                   normalize: bool = True, tta: bool = False, world: World | None = None,
                   title: str | None = "evaluating", signals: Signals | None = None) -> Tensor:
    """Run a network over images (N, 32, 32, 3) uint8 in evaluation mode: (N, 10) float32 on `device`.

    `tta` averages the probabilities over six views of each image, and returns their logarithms. The ranks of `world`
    share the batches, and all get the result; rank 0 shows a progress bar with this title. Once `signals` has recorded
    one, the rest of the rows stays 0.
    """
    world, device = world or World(), torch.device(device)
    training = model.training
    model.eval()
    outputs = torch.zeros(len(images), 10, device=device)
    size = CPU_BATCH_SIZE if device.type == "cpu" else BATCH_SIZE
    starts = range(world.rank * size, len(images), world.size * size)
    for start in progress(starts, title if world.is_main else None):
        if signals and signals.stop:
            break
        inputs = to_input(images[start:start + size].to(device), normalize)
        with hardware.autocast(device, precision):
            if tta:
                probabilities = [model(view).float().softmax(1) for view in tta_views(inputs)]
                outputs[start:start + size] = torch.stack(probabilities).mean(0).clamp_min(1e-30).log()
            else:
                outputs[start:start + size] = model(inputs).float()
    model.train(training)
    return world.sum(outputs)


def tta_views(inputs: Tensor) -> list[Tensor]:
    """Return images (N, 3, 32, 32) in place and shifted diagonally by a pixel, each with its horizontal flip.

    The views of test-time augmentation in arXiv 2404.00498; the shifts reflect the edge.
    """
    padded = F.pad(inputs, (1, 1, 1, 1), mode="reflect")
    shifted = [padded[:, :, start:start + SIZE, start:start + SIZE] for start in (0, 1, 2)]
    return [view for images in shifted for view in (images, images.flip(3))]


def score(logits: Tensor, targets: Tensor) -> tuple[float, float]:
    """Return mean loss (nats) and accuracy (percent) of logits (N, 10) and targets (N,)."""
    targets = targets.to(logits.device)
    correct = (logits.argmax(1) == targets).sum().item()
    return F.cross_entropy(logits, targets).item(), 100 * correct / len(targets)


def confusion_matrix(logits: Tensor, targets: Tensor) -> Tensor:
    """Count (10, 10) int64 on the CPU: rows are true classes, columns predicted ones."""
    pairs = targets.to(logits.device) * 10 + logits.argmax(1)
    return torch.bincount(pairs, minlength=100).view(10, 10).cpu()


def per_class(logits: Tensor, targets: Tensor, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Return count, precision and recall (percent) of each class; None where there is no image."""
    confusion = confusion_matrix(logits, targets)
    counts = zip(classes, confusion.diag().tolist(), confusion.sum(1).tolist(), confusion.sum(0).tolist(), strict=True)
    return [{"class": name, "count": count, "precision": 100 * correct / predicted if predicted else None,
             "recall": 100 * correct / count if count else None} for name, correct, count, predicted in counts]


def calibration_bins(logits: Tensor, targets: Tensor) -> Tensor:
    """Sum images, confidence and correct predictions in 15 equal bins of confidence: (3, 15) float64 on the CPU."""
    confidence, prediction = logits.cpu().double().softmax(1).max(1)
    bins = (confidence * CALIBRATION_BINS).ceil().long().clamp(1, CALIBRATION_BINS) - 1
    values = torch.stack((torch.ones_like(confidence), confidence, (prediction == targets.cpu()).double()))
    return torch.zeros(3, CALIBRATION_BINS, dtype=torch.float64).index_add_(1, bins, values)


def calibration_error(logits: Tensor, targets: Tensor) -> float:
    """Return the expected calibration error in percent (arXiv 1706.04599)."""
    count, confidence, correct = calibration_bins(logits, targets)
    return 100 * ((confidence - correct).abs().sum() / count.sum()).item()


def draw_pictures(folder: Path, logits: Tensor, split: data.Split) -> None:
    """Draw confusion.png, reliability.png, and the most confident mistakes as mistakes.png."""
    logits = logits.cpu()
    plots.draw_confusion(confusion_matrix(logits, split.targets).numpy(), split.classes, folder / "confusion.png")
    plots.draw_reliability(*calibration_bins(logits, split.targets).numpy(), folder / "reliability.png")
    confidence, prediction = logits.softmax(1).max(1)
    wrong = (prediction != split.targets).nonzero()[:, 0]
    worst = wrong[confidence[wrong].argsort(descending=True)]
    names, predictions = ([split.classes[i] for i in labels[worst]] for labels in (split.targets, prediction))
    title = "Most confident mistakes: true class, then prediction and its probability" if names else "No mistakes"
    plots.draw_images(split.images[worst].numpy(), names, predictions, confidence[worst].tolist(), title,
                      folder / "mistakes.png")


def load_checkpoint_model(path: str | Path, device: torch.device | str = "cpu"
                          ) -> tuple[nn.Module, list[str], dict[str, Any]]:
    """Build the network of a checkpoint, for `augment.to_input`'s images, with its averaged weights if it has them.

    Also returns its classes and the settings of its training; of a published checkpoint those are only "normalize".
    """
    checkpoint = load_checkpoint(path)
    try:
        settings = {"normalize": True} | checkpoint["args"]
        model = models.SEResNet(**options.model_args(settings))
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} does not describe a network ({error})") from error
    load_weights(model, checkpoint.get("ema") or checkpoint["model"], path)
    model = model.to(device, memory_format=hardware.memory_format(device)).eval()
    return model, checkpoint.get("classes", list(cifar10.CLASSES)), settings


def load_test_split(args: Namespace, given: dict[str, Any], settings: dict[str, Any]) -> data.Split:
    """Read the test set that the flags name, by default that of a checkpoint's training, from its settings."""
    is_synthetic = given.get("synthetic", settings.get("synthetic", False))
    folder = settings.get("data_dir", args.data_dir)  # relative to where the training ran
    if "data_dir" in given or not cifar10.find_folder(folder):
        folder = args.data_dir
    return data.load_split(folder, cifar10.TEST_FILES, is_synthetic, args.limit_test)


def check_classes(path: str, trained: Sequence[str], found: Sequence[str]) -> None:
    """Refuse images of other classes than a checkpoint was trained on."""
    if list(trained) != list(found):
        raise UserError(f"{path} was trained on the classes {', '.join(trained)}, but the images show "
                        f"{', '.join(found)}; check --synthetic and --data-dir")


def build_parser() -> options.Parser:
    """Build the parser of evaluate.py."""
    parser = options.Parser("evaluate.py", "CHECKPOINT [flags]", "Print the test accuracy of a checkpoint. "
                            "Without --data-dir and --synthetic, the data set is that of its training.",
                            ["python evaluate.py checkpoints/pretrained.pt --tta",
                             "python evaluate.py checkpoints/se-resnet/best.pt --output-dir report"])
    parser.add_argument("checkpoint", metavar="CHECKPOINT",
                        help="best.pt or last.pt of a run, or a checkpoint of the published code")
    flag = parser.group("output")
    flag("--output-dir", None, "also draw confusion.png, reliability.png and mistakes.png there", metavar="DIR")
    flag("--tta", False, TTA_HELP)
    options.add_data_flags(parser, ("data_dir", "synthetic", "limit_test"))
    options.add_hardware_flags(parser, ("device", "precision"))
    return parser


@program("evaluate.py")
def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate the checkpoint that a command line names; return the exit status."""
    args, given = build_parser().parse(argv)
    device, precision = hardware.select(args)
    model, classes, settings = load_checkpoint_model(args.checkpoint, device)
    if args.output_dir:
        check_output(Path(args.output_dir) / "confusion.png")
    test = load_test_split(args, given, settings)
    check_classes(args.checkpoint, classes, test.classes)
    logits = predict_logits(model, test.images, device, precision, settings["normalize"], args.tta)
    loss, accuracy = score(logits, test.targets)
    print_line(f"{args.checkpoint}: test accuracy {accuracy:.2f}%, loss {loss:.4f}, {len(test.targets):,} images"
               + (", averaged over flips and shifts" if args.tta else ""))
    print_line(f"{'class':<12}{'images':>8}{'precision':>11}{'recall':>9}")
    for row in per_class(logits, test.targets, test.classes):
        cells = ("-" if row[key] is None else f"{row[key]:.2f}" for key in ("precision", "recall"))
        print_line("{:<12}{:>8}{:>11}{:>9}".format(row["class"], row["count"], *cells))
    print_line(f"expected calibration error {calibration_error(logits, test.targets):.2f}%")
    if args.output_dir:
        draw_pictures(Path(args.output_dir), logits, test)
        print_line(f"confusion.png, reliability.png and mistakes.png are in {args.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
