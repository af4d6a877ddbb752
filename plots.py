"""Draw what a run wrote, as PNG files: its curves, its confusion matrix and its most confident mistakes.

matplotlib is imported inside the functions: it takes a second, which must not slow the start of a run. Only its
`Figure` is used, never pyplot, so that no window, backend or global setting is touched.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import utils

# Okabe and Ito's colours, which colour-blind readers can tell apart, without the yellow that is lost on white.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#333333")
SPLITS = {"train": ("training", PALETTE[0]), "val": ("validation", PALETTE[2]), "test": ("test", PALETTE[1])}
INK, MUTED, GRID, PAPER = "#24292f", "#656d76", "#e6e8eb", "#ffffff"  # opaque paper: the same in a dark viewer


def safely(draw: Callable[..., Any], *args: Any) -> None:
    """Call `draw(*args)`; on an exception print one warning line, for a picture is no reason for a run to fail."""
    try:
        draw(*args)
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        utils.warn(f"{draw.__name__} drew no picture ({reason})")


def new_figure(width: float, height: float):
    """Make an empty figure, in inches, that keeps its parts from overlapping."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor=PAPER, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12, hspace=0.12)  # inches; share of the height
    return figure


def save(figure, path: str | Path):
    """Write a figure as a PNG of 150 dots per inch, and return it."""
    utils.write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))
    return figure


def style_curves(axes, ylabel: str = "", log: bool = False) -> None:
    """Give axes over epochs their label, a faint grid instead of the frame, and whole epochs as ticks."""
    from matplotlib import ticker

    axes.set_ylabel(ylabel, color=INK)
    axes.spines[:].set_visible(False)
    axes.tick_params(colors=MUTED, length=0)
    axes.grid(axis="y", color=GRID)
    axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True, min_n_ticks=1))
    if log:
        axes.set_yscale("log")
        axes.minorticks_off()
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")


def column(history: Sequence[dict[str, Any]], name: str) -> np.ndarray:
    """Return a column as float64, NaN where it is empty or not finite."""
    values = np.array([row.get(name) for row in history], dtype=np.float64)  # numpy makes NaN of None
    return np.where(np.isfinite(values), values, np.nan)


def draw_line(axes, epochs: np.ndarray, values: np.ndarray, color: str, **style: Any) -> None:
    """Draw a line, with a dot for each value that has no neighbour: a line alone would not show it."""
    known = np.pad(np.isfinite(values), 1)
    alone = known[1:-1] & ~known[:-2] & ~known[2:]
    marker = "o" if alone.any() else ""
    axes.plot(epochs, values, color=color, marker=marker, markevery=alone.tolist(), markersize=5, **style)


def draw_curves(history: Sequence[dict[str, Any]], path: str | Path):
    """Draw accuracy, loss and lr over the epochs; `history` holds the rows of metrics.csv, with None for empty."""
    figure = new_figure(8, 8)
    accuracy, loss, lr = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 1))
    epochs, rates = column(history, "epoch"), column(history, "lr")
    for axes, name, form in ((accuracy, "accuracy", "{:.2f} %"), (loss, "loss", "{:.3f}")):
        for split, (label, color) in SPLITS.items():
            values = column(history, f"{split}_{name}")
            if len(known := values[np.isfinite(values)]):
                draw_line(axes, epochs, values, color, label=f"{label}, last {form.format(known[-1])}")
        axes.legend(*axes.get_legend_handles_labels(), loc="lower left", bbox_to_anchor=(0, 1),  # where no line is
                    ncols=3, frameon=False, labelcolor=INK)
    draw_line(lr, epochs, rates, INK)
    style_curves(accuracy, "accuracy (%)")
    style_curves(loss, "cross-entropy loss (nats)", log=True)
    style_curves(lr, "learning rate")
    lr.set_ylim(0, 1.15 * np.nan_to_num(rates).max() or 1)
    lr.set_xlabel("epoch", color=INK)
    figure.align_ylabels()
    return save(figure, path)


def draw_confusion(confusion: np.ndarray, classes: Sequence[str], path: str | Path):
    """Draw a matrix of counts, (C, C) integers, a row per true class and a column per prediction; hits are blue."""
    from matplotlib import colormaps

    confusion = np.asarray(confusion)
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    hit = np.eye(len(share), dtype=bool)
    worst = max(share[~hit].max(), 1e-9)  # mistakes have a scale of their own: 5 % looks like nothing beside 95 %
    colors = np.where(hit[..., None], colormaps["Blues"](0.8 * share), colormaps["Oranges"](0.6 * share / worst))
    colors[confusion == 0] = (0.97, 0.97, 0.97, 1)
    figure = new_figure(9, 9)
    axes = figure.subplots()
    axes.imshow(colors)
    for row, col in np.argwhere(confusion):
        style = {"color": PAPER if row == col and share[row, col] > 0.8 else INK, "ha": "center", "va": "center"}
        axes.text(col, row - 0.1, f"{confusion[row, col]:,}", fontsize=11, **style)
        axes.text(col, row + 0.22, f"{100 * share[row, col]:.1f} %", fontsize=7.5, **style)
    axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right", rotation_mode="anchor", parse_math=False)
    axes.set_yticks(range(len(classes)), classes, parse_math=False)
    axes.tick_params(length=0, labelcolor=INK, labelsize=11)
    axes.set(xlabel="predicted class", ylabel="true class", frame_on=False)
    axes.set_title(f"{np.trace(confusion):,} of {confusion.sum():,} images right; percent of the true class", color=INK)
    return save(figure, path)


def draw_mistakes(images, targets, predictions, probabilities, classes: Sequence[str], path: str | Path):
    """Draw the first 36 of (N, 32, 32, 3) uint8 images, with label, guess and the guess's probability (0 to 1)."""
    shown = list(zip(images, targets, predictions, probabilities, strict=True))[:36]
    height = round(0.6 + 1.9 * -(-len(shown) // 6), 1)  # inches, of rows of six; rounded, or a pixel may be lost
    figure = new_figure(9, height)
    figure.set_layout_engine("none")
    title = "Most confident mistakes: label, guess and its probability" if shown else "No mistakes"
    figure.text(0.5, 1 - 0.3 / height, title, color=INK, fontsize=12, ha="center", va="center")
    for place, (image, target, prediction, probability) in enumerate(shown):
        row, col = divmod(place, 6)
        axes = figure.add_axes((0.015 + 0.163 * col, 1 - (2 + 1.9 * row) / height, 0.155, 1.4 / height))
        axes.imshow(image, interpolation="bicubic")
        axes.set_axis_off()
        style = {"ha": "center", "va": "top", "fontsize": 9.5, "parse_math": False}
        axes.text(15.5, 32.5, classes[target][:14], color=INK, **style)
        axes.text(15.5, 36.5, f"{classes[prediction][:14]} {100 * probability:.1f} %", color=PALETTE[1], **style)
    return save(figure, path)
