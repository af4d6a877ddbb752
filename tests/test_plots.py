"""Pictures: what is drawn, in figures rather than pixels, and that no drawing can end a run."""

import struct
import subprocess
import sys
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread

import plots

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.fixture(autouse=True)
def no_warnings():
    """Turn warnings, such as a layout that matplotlib gives up on, into failures."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", ResourceWarning)  # of files that other tests left to the garbage collector
        yield


def make_history(epochs, held_out="test"):
    rows = []
    for epoch in range(1, epochs + 1):
        row = {"epoch": epoch, "step": 10 * epoch, "lr": 0.1 * (1 - epoch / (epochs + 1)),
               "train_loss": 2 / epoch**2, "train_accuracy": 100 - 60 / epoch, "val_loss": None, "val_accuracy": None,
               "test_loss": None, "test_accuracy": None, "seconds": 1.5, "images_per_second": 80.0}
        rows.append(row | {f"{held_out}_loss": 2.2 / epoch, f"{held_out}_accuracy": 95 - 65 / epoch})
    return rows


def read_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


def lines_by_label(axes):
    return {line.get_label().split(",")[0]: line for line in axes.lines}


def make_mistakes(count):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    targets = np.arange(count) % 10
    return images, targets, (targets + 3) % 10, np.linspace(0.999, 0.4, count)


def test_curves_show_each_column_with_its_unit(tmp_path):
    history = make_history(5)
    figure = plots.draw_curves(history, tmp_path / "curves.png")
    accuracy, loss, lr = figure.axes
    assert [axes.get_ylabel() for axes in figure.axes] == ["accuracy (%)", "cross-entropy loss (nats)", "learning rate"]
    assert lr.get_xlabel() == "epoch" and loss.get_yscale() == "log"
    assert not len(loss.yaxis.get_minorticklocs())  # their labels would run into those of 1, 2, 5
    for axes, name in ((accuracy, "accuracy"), (loss, "loss")):
        lines = lines_by_label(axes)
        assert set(lines) == {"training", "test"}
        for label, split in (("training", "train"), ("test", "test")):
            assert lines[label].get_xdata().tolist() == [1, 2, 3, 4, 5]
            assert lines[label].get_ydata().tolist() == [row[f"{split}_{name}"] for row in history]
    assert lr.lines[0].get_ydata().tolist() == [row["lr"] for row in history]
    texts = [text.get_text() for text in accuracy.get_legend().get_texts()]
    assert texts == ["training, last 88.00 %", "test, last 82.00 %"]
    assert read_size(tmp_path / "curves.png") == (1200, 1200)
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_curves_of_a_validation_run_mark_the_single_test_value(tmp_path):
    history = make_history(4, "val")
    history[-1] |= {"test_loss": 0.5, "test_accuracy": 77.0}
    accuracy, loss, _ = plots.draw_curves(history, tmp_path / "curves.png").axes
    for axes in (accuracy, loss):
        lines = lines_by_label(axes)
        assert set(lines) == {"training", "validation", "test"}
        assert lines["test"].get_marker() == "o" and lines["test"].get_markevery() == [False, False, False, True]
        assert lines["validation"].get_marker() == ""
    assert len({line.get_color() for line in accuracy.lines}) == 3


def test_curves_of_one_epoch_are_dots_at_a_whole_epoch(tmp_path):
    figure = plots.draw_curves(make_history(1), tmp_path / "curves.png")
    for axes in figure.axes:
        assert all(line.get_marker() == "o" and line.get_markevery() == [True] for line in axes.lines)
        low, high = axes.get_xlim()
        assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
@pytest.mark.parametrize("epochs", [1, 4])
def test_curves_skip_values_that_are_not_finite(tmp_path, bad, epochs):
    history = make_history(epochs)
    history[0] |= {"train_loss": bad, "test_loss": bad, "train_accuracy": bad}
    accuracy, loss, _ = plots.draw_curves(history, tmp_path / "curves.png").axes
    assert read_size(tmp_path / "curves.png") == (1200, 1200)
    assert lines_by_label(accuracy)["test"].get_ydata()[0] == history[0]["test_accuracy"]
    assert len(loss.lines) == (0 if epochs == 1 else 2)
    for line in loss.lines:
        assert np.isnan(line.get_ydata()[0]) and np.isfinite(line.get_ydata()[1:]).all()


def test_long_curves_with_a_steep_end_leave_the_axes_their_room(tmp_path):
    history = make_history(200)
    history[-1]["train_loss"] = 1e-6
    figure = plots.draw_curves(history, tmp_path / "curves.png")
    heights = [axes.get_position().height for axes in figure.axes]
    assert min(heights) > 0.08 and sum(heights) > 0.7


def test_curves_are_the_same_bytes_each_time_and_opaque_in_every_corner(tmp_path):
    for name in ("a.png", "b.png"):
        plots.draw_curves(make_history(3), tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    pixels = imread(tmp_path / "a.png")
    for corner in (pixels[0, 0], pixels[0, -1], pixels[-1, 0], pixels[-1, -1]):
        assert corner.tolist() == [1, 1, 1, 1]


def test_confusion_has_true_classes_in_rows_with_counts_and_percentages(tmp_path):
    confusion = np.diag(np.full(10, 950))
    confusion[3, 5], confusion[3, 3] = 1250, 3750
    figure = plots.draw_confusion(confusion, CLASSES, tmp_path / "confusion.png")
    (axes,) = figure.axes
    cells = {}
    for text in axes.texts:
        x, y = text.get_position()
        cells.setdefault((round(y), round(x)), []).append(text.get_text())
    assert cells[3, 5] == ["1,250", "25.0 %"] and cells[3, 3] == ["3,750", "75.0 %"]
    assert cells[0, 0] == ["950", "100.0 %"]
    assert len(cells) == 11  # no text where there is nothing
    assert axes.get_ylabel() == "true class" and axes.get_xlabel() == "predicted class"
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == list(CLASSES)
    assert axes.get_title().startswith("12,300 of 13,550 images right")
    red, _, blue, _ = axes.images[0].get_array()[3, 5]
    assert red > blue  # a mistake is orange, a hit blue
    red, _, blue, _ = axes.images[0].get_array()[3, 3]
    assert blue > red
    assert read_size(tmp_path / "confusion.png") == (1350, 1350)


@pytest.mark.parametrize("confusion", [np.zeros((10, 10), int), np.eye(10, dtype=int), np.ones((10, 10), int)])
def test_confusion_of_few_images_is_drawn(tmp_path, confusion):
    figure = plots.draw_confusion(confusion, CLASSES, tmp_path / "confusion.png")
    assert len(figure.axes[0].texts) == 2 * np.count_nonzero(confusion)


def test_mistakes_show_label_guess_and_probability_of_the_first_36(tmp_path):
    images, targets, predictions, probabilities = make_mistakes(40)
    figure = plots.draw_mistakes(images, targets, predictions, probabilities, CLASSES, tmp_path / "mistakes.png")
    assert len(figure.axes) == 36
    for axes, image in zip(figure.axes, images, strict=False):
        assert np.array_equal(axes.images[0].get_array(), image)
    assert [text.get_text() for text in figure.axes[0].texts] == ["airplane", "cat 99.9 %"]
    assert [text.get_text() for text in figure.axes[17].texts] == ["horse", f"airplane {100 * probabilities[17]:.1f} %"]
    places = [axes.get_position(original=True) for axes in figure.axes]  # as asked for, before squares are made of it
    assert all(0 <= place.x0 < place.x1 <= 1 and 0 <= place.y0 < place.y1 <= 1 for place in places)
    assert len({(round(place.x0, 3), round(place.y0, 3)) for place in places}) == 36
    assert places[0].y0 == places[5].y0 > places[6].y0  # rows of six, from the top
    assert read_size(tmp_path / "mistakes.png") == (1350, 1800)


def test_mistakes_of_a_perfect_network_say_so(tmp_path):
    figure = plots.draw_mistakes(*make_mistakes(0), CLASSES, tmp_path / "mistakes.png")
    assert not figure.axes and figure.texts[0].get_text() == "No mistakes"
    assert read_size(tmp_path / "mistakes.png") == (1350, 90)


def test_class_names_are_no_formulas(tmp_path):
    classes = ["$\\frac$", "a_b", "x" * 40, *CLASSES[3:]]
    plots.draw_confusion(np.ones((10, 10), int), classes, tmp_path / "confusion.png")
    figure = plots.draw_mistakes(*make_mistakes(4), classes, tmp_path / "mistakes.png")
    assert figure.axes[2].texts[0].get_text() == "x" * 14


@pytest.mark.parametrize("draw, arguments", [
    (plots.draw_curves, ([],)),
    (plots.draw_curves, ([{"epoch": "many\nlines"}],)),
    (plots.draw_confusion, (np.zeros((3, 4), int), CLASSES)),
    (plots.draw_mistakes, (*make_mistakes(3)[:3], [0.5], CLASSES)),
])
def test_safely_turns_a_broken_drawing_into_one_line(tmp_path, capsys, draw, arguments):
    plots.safely(draw, *arguments, tmp_path / "picture.png")
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"warning: {draw.__name__} drew no picture (") and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_safely_survives_a_missing_folder_and_draws_otherwise(tmp_path, capsys):
    plots.safely(plots.draw_curves, make_history(2), tmp_path / "missing" / "curves.png")
    assert "FileNotFoundError" in capsys.readouterr().err
    plots.safely(plots.draw_curves, make_history(2), tmp_path / "curves.png")
    assert capsys.readouterr().err == "" and (tmp_path / "curves.png").exists()


def test_safely_lets_an_interrupt_through():
    def interrupted():
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        plots.safely(interrupted)


def test_drawing_leaves_global_settings_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    plots.draw_curves(make_history(2), tmp_path / "curves.png")
    plots.draw_confusion(np.eye(10, dtype=int), CLASSES, tmp_path / "confusion.png")
    assert dict(matplotlib.rcParams) == before


def test_matplotlib_is_loaded_with_the_first_picture_and_pyplot_never():
    code = ("import sys, types; sys.modules['utils'] = types.ModuleType('utils'); import plots; "
            "assert 'matplotlib' not in sys.modules; plots.new_figure(1, 1); "
            "assert 'matplotlib.figure' in sys.modules and 'matplotlib.pyplot' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(plots.__file__).parent)
