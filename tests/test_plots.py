"""Pictures: what the returned figures show."""

import itertools
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from matplotlib.text import Text

import plots

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.fixture(autouse=True)
def fail_on_warnings():
    """Turn warnings, such as a layout that leaves the axes no room, into failures."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ResourceWarning)  # from the garbage of other tests
        yield


def make_history(epochs, eval_split="test", **last_row):
    """Make rows of metrics.csv with 10 steps per epoch."""
    rows = []
    for epoch in range(1, epochs + 1):
        row = {"epoch": epoch, "step": 10 * epoch, "lr": 0.1, "train_loss": 2 / epoch**0.5,
               "train_accuracy": 100 - 60 / epoch, "val_loss": None, "val_accuracy": None, "test_loss": None,
               "test_accuracy": None, "seconds": 1.5, "images_per_second": 80.0}
        rows.append(row | {f"{eval_split}_loss": 2.2 / epoch**0.5, f"{eval_split}_accuracy": 95 - 65 / epoch})
    rows[-1] |= last_row
    return rows


def draw_curves(tmp_path, history):
    steps = int(history[-1]["step"])
    figure = plots.draw_curves(history, np.linspace(0.1, 0, steps), tmp_path / "curves.png")
    axes = {axes.get_title(loc="left"): axes for axes in figure.axes}
    return axes["Accuracy (%)"], axes["Cross-entropy loss"], axes["Learning rate"]


def make_mistakes(count):
    images = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    targets = np.arange(count) % 10
    return images, targets, (targets + 3) % 10, np.linspace(0.999, 0.4, count)


def test_curves_show_the_columns_of_the_history(tmp_path):
    history = make_history(5)
    accuracy, loss, _ = draw_curves(tmp_path, history)
    for axes, name in ((accuracy, "accuracy"), (loss, "loss")):
        lines = {line.get_label(): line for line in axes.lines}
        assert set(lines) == {"training", "test"}
        for label, split in (("training", "train"), ("test", "test")):
            assert lines[label].get_xdata().tolist() == [1, 2, 3, 4, 5]
            assert lines[label].get_ydata().tolist() == [row[f"{split}_{name}"] for row in history]
    assert imread(tmp_path / "curves.png").shape[:2] == (720, 1500)
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_learning_rate_is_drawn_per_step(tmp_path):
    lrs = np.array([0.1, 0.4, 0.3, 0.2, 0.1, 0.0])
    history = [{"epoch": epoch, "step": 2 * epoch, "train_accuracy": 50.0} for epoch in (1, 2, 3)]
    line = plots.draw_curves(history, lrs, tmp_path / "curves.png").axes[2].lines[0]
    assert line.get_xdata().tolist() == [0.5, 1, 1.5, 2, 2.5, 3] and line.get_ydata().tolist() == lrs.tolist()


def test_lines_are_labeled_at_their_ends_with_the_last_value(tmp_path):
    accuracy, loss, lr = draw_curves(tmp_path, make_history(4))
    assert {text.get_text(): text.xy[1] for text in accuracy.texts} == {"training 85.00%": 85, "test 78.75%": 78.75}
    assert {text.get_text() for text in loss.texts} == {"training 1.000", "test 1.100"}
    for axes in (accuracy, loss):
        colors = {line.get_label(): line.get_color() for line in axes.lines}
        assert all(colors[text.get_text().split()[0]] == text.get_color() for text in axes.texts)
    assert not lr.texts


def test_end_labels_do_not_overlap_and_keep_the_order_of_the_lines(tmp_path):
    figure = plots.new_figure(5, 3)
    axes = figure.subplots()
    lasts = [50, 50.1, 50.2, 90, 90.1, 90, 10, 10.1]
    for index, last in enumerate(lasts):
        history = [{"epoch": 1, "loss": 0.0}, {"epoch": 2, "loss": last}]
        plots.draw_line(axes, history, "loss", plots.PALETTE[0], label=f"$\\frac${index}")  # not parsed as math
    plots.draw_line(axes, history, "loss", plots.PALETTE[0])  # without a label
    plots.label_ends(axes)
    plots.save(figure, tmp_path / "lines.png")
    labels = sorted(axes.texts, key=lambda text: text.get_position()[1])
    boxes = [Text.get_window_extent(text) for text in labels]  # without the line that leads to the label
    assert len(labels) == len(lasts)
    assert all(low.y1 <= high.y0 for low, high in itertools.pairwise(boxes))
    assert [lasts[int(text.get_text()[-1])] for text in labels] == sorted(lasts)
    assert 0 <= labels[0].get_position()[1] < labels[-1].get_position()[1] <= 1


def test_short_runs_have_markers_and_long_ones_none(tmp_path):
    for epochs, marker in ((1, "o"), (3, "o"), (200, "")):
        accuracy, loss, _ = draw_curves(tmp_path, make_history(epochs))
        assert {line.get_marker() for line in (*accuracy.lines, *loss.lines)} == {marker}
        ticks = [tick for tick in accuracy.get_xticks() if 0 <= tick <= epochs]
        assert len(ticks) <= 7 and all(tick == int(tick) for tick in ticks)


def test_single_test_value_of_a_validation_run_is_a_marker(tmp_path):
    for axes in draw_curves(tmp_path, make_history(50, "val", test_loss=0.5, test_accuracy=77.0))[:2]:
        lines = {line.get_label(): line for line in axes.lines}
        assert set(lines) == {"training", "validation", "test"}
        assert lines["test"].get_marker() == "o" and lines["test"].get_xdata().tolist() == [50]
        assert len({line.get_color() for line in axes.lines}) == 3


@pytest.mark.parametrize("last_loss, scale", [(0.5, "linear"), (0.3, "log"), (1e-6, "log"), (0.0, "linear")])
def test_loss_axis_is_logarithmic_only_for_a_wide_range(tmp_path, last_loss, scale):
    _, loss, _ = draw_curves(tmp_path, make_history(3, train_loss=last_loss))
    assert loss.get_yscale() == scale


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
def test_curves_skip_values_that_are_not_finite(tmp_path, bad):
    accuracy, loss, _ = draw_curves(tmp_path, make_history(2, train_loss=bad, test_loss=bad))
    assert [line.get_xdata().tolist() for line in loss.lines] == [[1], [1]]
    assert [line.get_xdata().tolist() for line in accuracy.lines] == [[1, 2], [1, 2]]
    assert not draw_curves(tmp_path, make_history(1, train_loss=bad, test_loss=bad))[1].lines


def read_cells(axes):
    return {(round(text.get_position()[1]), round(text.get_position()[0])): text for text in axes.texts}


def test_confusion_shows_percent_of_the_true_class_in_rows(tmp_path):
    confusion = np.diag(np.full(10, 950))
    confusion[3, 5], confusion[3, 3] = 1250, 3750
    (axes,) = plots.draw_confusion(confusion, CLASSES, tmp_path / "confusion.png").axes
    cells = {place: text.get_text() for place, text in read_cells(axes).items()}
    assert len(cells) == 100 and cells[3, 5] == "25.0" and cells[3, 3] == "75.0" and cells[5, 3] == "0"
    assert axes.get_title() == "90.77% accuracy on 13,550 images"
    assert axes.get_ylabel() == "true class" and axes.get_xlabel().startswith("predicted class")
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == list(CLASSES)


def test_confusion_has_one_color_scale_for_all_runs_and_readable_cells(tmp_path):
    colors = {}
    for accuracy in (50, 95):
        confusion = np.eye(10, dtype=int) * accuracy
        confusion += np.roll(np.eye(10, dtype=int), 3, axis=1) * (100 - accuracy)
        confusion[1] = [5, 90, 5] + 7 * [0]  # a row that both matrices share
        (axes,) = plots.draw_confusion(confusion, CLASSES, tmp_path / "confusion.png").axes
        image = axes.images[0]
        colors[accuracy] = image.to_rgba(image.get_array())[..., :3]
        for place, text in read_cells(axes).items():  # contrast of brightness between text and cell
            assert abs(np.mean(to_rgb(text.get_color())) - colors[accuracy][place].mean()) > 0.25
    assert np.array_equal(colors[50][1], colors[95][1])
    zero, five, fifty, most = (colors[run][place].mean() for run, place in (
        (95, (1, 3)), (95, (1, 0)), (50, (0, 0)), (95, (0, 0))))
    assert zero - 0.05 > five > fifty + 0.2 > most + 0.3  # larger is darker, and 5% is visible beside 0%


@pytest.mark.parametrize("count, title", [(0, "0.00% accuracy on 0 images"), (1, "10.00% accuracy on 100 images")])
def test_confusion_of_few_images(tmp_path, count, title):
    figure = plots.draw_confusion(np.full((10, 10), count), CLASSES, tmp_path / "confusion.png")
    assert figure.axes[0].get_title() == title


def test_mistakes_show_the_first_36_with_true_class_and_prediction(tmp_path):
    images, targets, predictions, probabilities = make_mistakes(40)
    figure = plots.draw_mistakes(images, targets, predictions, probabilities, CLASSES, tmp_path / "mistakes.png")
    assert len(figure.axes) == 36
    assert all(np.array_equal(axes.images[0].get_array(), image)
               for axes, image in zip(figure.axes, images, strict=False))
    assert [text.get_text() for text in figure.axes[0].texts] == ["airplane", "cat 99.9%"]
    assert [text.get_text() for text in figure.axes[17].texts] == ["horse", f"airplane {100 * probabilities[17]:.1f}%"]
    boxes = [axes.get_position() for axes in figure.axes]
    assert all(0 <= box.x0 < box.x1 <= 1 and 0 <= box.y0 < box.y1 <= 1 for box in boxes)
    assert not any(first.overlaps(second) for first, second in itertools.combinations(boxes, 2))


def test_mistakes_of_a_perfect_model(tmp_path):
    figure = plots.draw_mistakes(*make_mistakes(0), CLASSES, tmp_path / "mistakes.png")
    assert not figure.axes and figure.texts[0].get_text() == "No mistakes"


def test_names_are_not_parsed_as_math(tmp_path):
    classes = ["$\\frac$", "a_b", "x" * 40, *CLASSES[3:]]
    plots.draw_confusion(np.ones((10, 10), int), classes, tmp_path / "confusion.png")
    plots.draw_mistakes(*make_mistakes(4), classes, tmp_path / "mistakes.png")


@pytest.mark.parametrize("draw, arguments", [
    (plots.draw_curves, (make_history(2), np.ones(20))),
    (plots.draw_confusion, (np.eye(10, dtype=int), CLASSES)),
    (plots.draw_mistakes, (*make_mistakes(2), CLASSES)),
])
def test_unwritable_path_raises_oserror(tmp_path, draw, arguments):
    with pytest.raises(OSError):
        draw(*arguments, tmp_path / "missing" / "picture.png")


def test_matplotlib_is_imported_with_the_first_picture_and_pyplot_never():
    code = ("import sys, types; sys.modules['utils'] = types.SimpleNamespace(write_atomically=None); "  # imports torch
            "import plots; assert 'matplotlib' not in sys.modules; plots.new_figure(1, 1); "
            "assert 'matplotlib.figure' in sys.modules and 'matplotlib.pyplot' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(plots.__file__).parent)
