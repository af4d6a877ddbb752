"""Draw learning curves, confusion matrices, reliability diagrams and labeled images as PNG files.

matplotlib is imported inside the functions, since the import takes a second. Only its `Figure` is used, never pyplot:
no window opens and no global setting changes.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils import write_atomically

# Okabe and Ito's palette, safe for color-blind readers, without the yellow, which is too faint on white.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#333333")
SPLITS = {"train": ("training", PALETTE[0]), "val": ("validation", PALETTE[2]), "test": ("test", PALETTE[1])}
INK, MUTED, GRID, PAPER = "#24292f", "#656d76", "#e6e8eb", "#ffffff"
DIVERGED = 10  # nats; guessing among ten classes costs 2.3


def new_figure(width: float, height: float):
    """Create an empty figure, in inches, whose layout keeps its parts from overlapping."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor=PAPER, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12, wspace=0.04, hspace=0.04)
    return figure


def save(figure, path: str | Path, dpi: int = 150):
    """Write a figure as a PNG and return it."""
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=dpi))
    return figure


def draw_line(axes, history: Sequence[dict[str, Any]], name: str, color: str, **style: Any) -> None:
    """Draw a column of metrics.csv, if it has values, with markers for up to 12 of them, else for the last one."""
    values = np.array([row.get(name) for row in history], dtype=np.float64)  # None becomes NaN
    known = np.isfinite(values)
    if known.any():
        epochs, values = np.array([row["epoch"] for row in history])[known], values[known]
        axes.plot(epochs, values, color=color, linewidth=1.8, marker="o", markersize=5, clip_on=False,
                  markevery=1 if len(values) <= 12 else [-1], **style)


def style_curves(axes, title: str, loss: bool = False) -> None:
    """Set the title, a grid instead of the frame, and integer epochs; limit a loss, on a log axis if it is wide."""
    from matplotlib import ticker

    axes.spines[:].set_visible(False)
    axes.tick_params(colors=MUTED, length=0, pad=5)
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6, steps=(1, 2, 5, 10), integer=True, min_n_ticks=1))
    values = [line.get_ydata() for panel in axes.get_shared_y_axes().get_siblings(axes) for line in panel.lines]
    if loss and values:
        low, peaks = min(line.min() for line in values), [line.max() for line in values]
        top = max((peak for peak in peaks if peak < DIVERGED), default=max(peaks))
        if 0 < 5 * low < top:
            title += ", log scale"
            axes.set_yscale("log")
            axes.minorticks_off()
            axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
        for line in axes.lines:
            epoch, peak = max(line.get_xydata(), key=lambda point: point[1])
            if peak > top:  # it must not flatten the others
                axes.set_ylim(low / 1.1, top * 1.1)
                line.set_clip_on(True)
                axes.annotate(f"\N{BLACK UP-POINTING TRIANGLE} {peak:.3g}", (epoch, 1), (0, -13 * len(axes.texts)),
                              ("data", "axes fraction"), "offset points", color=line.get_color(), ha="center", va="top")
    axes.set_title(title, loc="left", color=INK, fontsize=11, fontweight="bold", pad=9)


def draw_curves(history: Sequence[dict[str, Any]], lrs: np.ndarray, settings: dict[str, Any], path: str | Path):
    """Draw the rows of metrics.csv (None for an empty cell) and the (S,) learning rates of all optimizer steps."""
    if len(history) < 2:  # dots, and no curves
        return None
    figure = new_figure(10, 4.8)
    axes = figure.subplot_mosaic([["accuracy", "loss"], ["accuracy", "lr"]], width_ratios=(1.25, 1),
                                 height_ratios=(1.9, 1))
    for split, (label, color) in SPLITS.items():
        for name in ("accuracy", "loss"):
            draw_line(axes[name], history, f"{split}_{name}", color, label=label)
    steps_per_epoch = history[0]["step"] / history[0]["epoch"]
    axes["lr"].plot(np.arange(1, len(lrs) + 1) / steps_per_epoch, lrs, color=INK, linewidth=1.8, clip_on=False)
    for name, title, form in (("accuracy", "Accuracy (%)", " {:.2f}%"), ("loss", "Cross-entropy loss", " {:.3f}"),
                              ("lr", "Learning rate", "")):
        style_curves(axes[name], title, loss=name == "loss")
        axes[name].set_xlim(0, history[-1]["epoch"])
        axes[name].set_xlabel("" if name == "loss" else "epoch", color=MUTED)
        if form:
            labels = [line.get_label() + form.format(line.get_ydata()[-1]) for line in axes[name].lines]
            axes[name].legend(axes[name].lines, labels, frameon=False, labelcolor="linecolor", handlelength=1.2)
    axes["loss"].tick_params(labelbottom=False)
    axes["lr"].set_ylim(0)
    axes["lr"].locator_params(axis="y", nbins=3)
    axes["lr"].yaxis.set_major_formatter("{x:g}")
    names = {"label_smoothing": "label smoothing", "trivial_augment": "TrivialAugment", "mixup": "MixUp",
             "cutmix": "CutMix", "dropout": "dropout", "small_epochs": "small images at first"}
    early = {"trivial_augment", "mixup", "cutmix"} if settings.get("plain_epochs") else ()
    used = ", ".join(label + " (not at the end)" * (name in early)
                     for name, label in names.items() if settings.get(name))
    notes = [f"Training is measured with {used}; evaluation without."] if used else []
    notes += ["Evaluation uses the averaged weights."] if settings.get("ema") else []
    text = textwrap.fill(" ".join(notes), 140)  # why training may look worse
    figure.supxlabel(text, x=0.0125, ha="left", color=MUTED, fontsize=9.5)
    return save(figure, path)


def draw_confusion(confusion: np.ndarray, classes: Sequence[str], path: str | Path):
    """Draw a (C, C) matrix of counts, true class by predicted class, as percentages of the true class."""
    total = confusion.sum()
    percent = 100 * confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    figure = new_figure(7.5, 7.5)
    axes = figure.subplots()
    axes.imshow(np.sqrt(percent), cmap="Blues", vmin=0, vmax=10)  # square root: differences of small values show
    for (row, col), value in np.ndenumerate(percent):
        color = PAPER if value > 35 else INK if value else MUTED
        axes.text(col, row, f"{value:.1f}" if value else "0", color=color, ha="center", va="center")
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right", rotation_mode="anchor", parse_math=False)
    axes.set_yticks(range(len(classes)), classes, parse_math=False)
    axes.tick_params(length=0, labelcolor=INK)
    axes.set(xlabel="predicted class (% of the true class)", ylabel="true class", frame_on=False)
    axes.set_title(f"{100 * np.trace(confusion) / max(total, 1):.2f}% accuracy on {total:,} images", color=INK,
                   fontweight="bold")
    return save(figure, path)


def draw_reliability(counts: np.ndarray, confidence: np.ndarray, correct: np.ndarray, path: str | Path):
    """Draw accuracy against confidence, from (B,) sums over bins of confidence (arXiv 1706.04599)."""
    used, width, total = counts > 0, 100 / len(counts), counts.sum()
    figure = new_figure(7.5, 6)
    axes = figure.subplots()
    bars = axes.bar(np.flatnonzero(used) * width, 100 * correct[used] / counts[used], 0.92 * width, align="edge",
                    color=PALETTE[5])
    axes.bar_label(bars, [f"{count:,.0f}" for count in counts[used]], color=INK, fontsize=8, padding=2)
    axes.plot((0, 100), (0, 100), color=MUTED, linewidth=0.8, linestyle=":")
    style_curves(axes, f"Expected calibration error {100 * np.abs(confidence - correct).sum() / total:.2f}%")
    axes.set(xlim=(0, 100), ylim=(0, 105))
    axes.set_xlabel(f"confidence (%), {100 * confidence.sum() / total:.2f} on average; dotted: perfect calibration",
                    color=MUTED)
    axes.set_ylabel(f"accuracy (%), {100 * correct.sum() / total:.2f} on average; numbers: images", color=MUTED)
    return save(figure, path)


def draw_images(images: np.ndarray, captions: Sequence[str], predictions: Sequence[str],
                probabilities: Sequence[float], title: str, path: str | Path):
    """Draw the first 36 of (N, 32, 32, 3) uint8 images, each over its caption, predicted class and probability."""
    shown = list(zip(images, captions, predictions, probabilities, strict=True))[:36]
    height = round(0.7 + 1.7 * -(-len(shown) // 9), 1)  # inches, in rows of nine
    figure = new_figure(12, height)
    figure.set_layout_engine("none")
    figure.text(0.0125, 1 - 0.33 / height, title, color=INK, fontsize=13, fontweight="bold", va="center")
    for place, (image, caption, prediction, probability) in enumerate(shown):
        row, col = divmod(place, 9)
        axes = figure.add_axes((0.0125 + 0.1093 * col, 1 - (1.8 + 1.7 * row) / height, 0.1, 1.2 / height))
        axes.imshow(image, interpolation="bicubic")
        axes.set_axis_off()
        caption = "".join(char if char.isprintable() and char < "\u0500" else "?" for char in caption)  # as fonts have
        caption = caption if len(caption) <= 14 else f"\N{HORIZONTAL ELLIPSIS}{caption[-13:]}"
        style = {"ha": "center", "va": "top", "fontsize": 9.5, "parse_math": False}
        axes.text(15.5, 32.8, caption, color=INK, **style)
        axes.text(15.5, 37, f"{prediction[:14]} {100 * probability:.1f}%", color=PALETTE[1], **style)
    return save(figure, path, dpi=100)
