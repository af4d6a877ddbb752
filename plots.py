"""Draw learning curves, confusion matrices and misclassified images as PNG files.

matplotlib is imported inside the functions, since the import takes a second. Only its `Figure` is used, never pyplot:
no window opens and no global setting changes. The draw_* functions raise OSError if the file cannot be written.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils import write_atomically

# Okabe and Ito's palette, safe for color-blind readers, without the yellow, which is too faint on white.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#333333")
SPLITS = {"train": ("training", PALETTE[0]), "val": ("validation", PALETTE[2]), "test": ("test", PALETTE[1])}
INK, MUTED, GRID, PAPER = "#24292f", "#656d76", "#e6e8eb", "#ffffff"


def new_figure(width: float, height: float):
    """Create an empty figure, in inches, whose layout keeps its parts from overlapping."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor=PAPER, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12, wspace=0.04, hspace=0.04)
    return figure


def save(figure, path: str | Path):
    """Write a figure as a PNG at 150 dpi and return it."""
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))
    return figure


def draw_line(axes, history: Sequence[dict[str, Any]], name: str, color: str, **style: Any) -> None:
    """Draw a column of metrics.csv, if it has values, with markers for up to 12 of them."""
    values = np.array([row.get(name) for row in history], dtype=np.float64)  # None becomes NaN
    known = np.isfinite(values)
    if known.any():
        epochs, values = np.array([row["epoch"] for row in history])[known], values[known]
        axes.plot(epochs, values, color=color, linewidth=1.8, marker="o" if len(values) <= 12 else "", markersize=5,
                  clip_on=False, **style)


def style_curves(axes, title: str, loss: bool = False) -> None:
    """Set the title, a grid instead of the frame, integer epochs and, for a loss with a wide range, a log axis."""
    from matplotlib import ticker

    axes.set_title(title, loc="left", color=INK, fontsize=11, fontweight="bold", pad=9)
    axes.spines[:].set_visible(False)
    axes.tick_params(colors=MUTED, length=0, pad=5)
    axes.grid(axis="y", color=GRID)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6, steps=(1, 2, 5, 10), integer=True, min_n_ticks=1))
    panels = axes.get_shared_y_axes().get_siblings(axes)
    values = np.concatenate([[], *(line.get_ydata() for panel in panels for line in panel.lines)])
    if loss and len(values) and 0 < 5 * values.min() < values.max():
        axes.set_yscale("log")
        axes.minorticks_off()
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")


def label_ends(axes, form: str = "") -> None:
    """Write the label of each line beside its end, followed by its last value; overlapping labels move apart."""
    axes.autoscale_view()  # fixes the limits, which the transform below needs
    lines = [line for line in axes.lines if not line.get_label().startswith("_child")]  # not the default
    ends = np.reshape([line.get_xydata()[-1] for line in lines], (-1, 2))
    heights = (axes.transData - axes.transAxes).transform(ends)[:, 1]  # as fractions of the height of the axes
    order, gap = heights.argsort(), 13 / 72 * axes.figure.dpi / axes.get_window_extent().height  # 13 points apart
    free = heights[order] - gap * np.arange(len(order))
    for place, index in enumerate(order):  # least-squares heights at least a gap apart: isotonic regression
        height = gap * place + np.clip(max(min(free[first:last + 1].mean() for last in range(place, len(free)))
                                           for first in range(place + 1)), 0, 1 - gap * (len(free) - 1))
        text, color = lines[index].get_label() + form.format(ends[index, 1]), lines[index].get_color()
        axes.annotate(text, ends[index], (1.04, height), textcoords="axes fraction", color=color, fontsize=9.5,
                      va="center", parse_math=False, arrowprops={
                          "arrowstyle": "-", "color": color, "lw": 0.8, "alpha": 0.6, "relpos": (0, 0.5), "shrinkB": 4})


def draw_curves(history: Sequence[dict[str, Any]], lrs: np.ndarray, path: str | Path):
    """Draw the rows of metrics.csv (None for an empty cell) and the (S,) learning rates of all optimizer steps."""
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
        label_ends(axes[name], form)
    axes["loss"].tick_params(labelbottom=False)
    axes["lr"].set_ylim(0)
    axes["lr"].locator_params(axis="y", nbins=3)
    axes["lr"].yaxis.set_major_formatter("{x:g}")
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


def draw_mistakes(images, targets, predictions, probabilities, classes: Sequence[str], path: str | Path):
    """Draw the first 36 of (N, 32, 32, 3) uint8 images with true class, prediction and its probability (0 to 1)."""
    shown = list(zip(images, targets, predictions, probabilities, strict=True))[:36]
    height = round(0.7 + 1.7 * -(-len(shown) // 9), 1)  # inches, in rows of nine
    figure = new_figure(12, height)
    figure.set_layout_engine("none")
    title = "Most confident mistakes: true class, then prediction and its probability" if shown else "No mistakes"
    figure.text(0.0125, 1 - 0.33 / height, title, color=INK, fontsize=13, fontweight="bold", va="center")
    for place, (image, target, prediction, probability) in enumerate(shown):
        row, col = divmod(place, 9)
        axes = figure.add_axes((0.0125 + 0.1093 * col, 1 - (1.8 + 1.7 * row) / height, 0.1, 1.2 / height))
        axes.imshow(image, interpolation="bicubic")
        axes.set_axis_off()
        style = {"ha": "center", "va": "top", "fontsize": 9.5, "parse_math": False}
        axes.text(15.5, 32.8, classes[target][:14], color=INK, **style)
        axes.text(15.5, 37, f"{classes[prediction][:14]} {100 * probability:.1f}%", color=PALETTE[1], **style)
    return save(figure, path)
