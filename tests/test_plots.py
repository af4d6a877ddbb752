"""Pictures: what the returned figures show."""

import itertools

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

import plots

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
# Such as that of a layout that leaves the axes no room; those of resources are from the garbage of other tests.
pytestmark = pytest.mark.filterwarnings("error", "ignore::ResourceWarning")


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
    figure = plots.draw_curves(history, np.linspace(0.1, 0, steps), {}, tmp_path / "curves.png")
    axes = {axes.get_title(loc="left").split(",")[0]: axes for axes in figure.axes}
    return axes["Accuracy (%)"], axes["Cross-entropy loss"], axes["Learning rate"]


def make_images(count):
    images = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    captions = [CLASSES[i % 10] for i in range(count)]
    return images, captions, [CLASSES[(i + 3) % 10] for i in range(count)], np.linspace(0.999, 0.4, count), "A title"


@pytest.mark.parametrize("evaluated, title", [("test", "test"), ("val", "validation")])
def test_curves_show_the_columns_of_the_history_and_their_last_values(tmp_path, evaluated, title):
    history = make_history(4, evaluated)
    accuracy, loss, lr = draw_curves(tmp_path, history)
    for axes, name, labels in ((accuracy, "accuracy", ["training 85.00%", f"{title} 78.75%"]),
                               (loss, "loss", ["training 1.000", f"{title} 1.100"])):
        assert [line.get_label() for line in axes.lines] == ["training", title]
        for line, text, split, label in zip(axes.lines, axes.get_legend().get_texts(), ("train", evaluated), labels,
                                            strict=True):
            assert line.get_xdata().tolist() == [1, 2, 3, 4]
            assert line.get_ydata().tolist() == [row[f"{split}_{name}"] for row in history]
            assert (text.get_text(), text.get_color()) == (label, line.get_color())
    assert [tuple(point) for point in lr.lines[0].get_xydata()] == [  # a learning rate per step
        (step / 10, rate) for step, rate in enumerate(np.linspace(0.1, 0, 40), 1)] and lr.get_legend() is None
    assert imread(tmp_path / "curves.png").shape[:2] == (720, 1500) and len([*tmp_path.iterdir()]) == 1


def test_short_runs_have_markers_long_ones_a_last_one_and_a_single_epoch_has_no_curves(tmp_path):
    assert plots.draw_curves(make_history(1), np.ones(10), {}, tmp_path / "curves.png") is None
    assert not list(tmp_path.iterdir())
    for epochs, markers in ((2, 1), (12, 1), (13, [-1]), (200, [-1])):
        accuracy, loss, _ = draw_curves(tmp_path, make_history(epochs))
        assert all(line.get_markevery() == markers for line in (*accuracy.lines, *loss.lines))
        ticks = [tick for tick in accuracy.get_xticks() if 0 <= tick <= epochs]
        assert len(ticks) <= 7 and all(tick == int(tick) for tick in ticks)


@pytest.mark.parametrize("last_loss, scale", [(0.5, "linear"), (0.3, "log"), (1e-6, "log"), (0.0, "linear")])
def test_loss_axis_is_logarithmic_only_for_a_wide_range_and_says_so(tmp_path, last_loss, scale):
    accuracy, loss, _ = draw_curves(tmp_path, make_history(3, train_loss=last_loss))
    assert loss.get_yscale() == scale and accuracy.get_yscale() == "linear"
    assert loss.get_title(loc="left") == "Cross-entropy loss" + ", log scale" * (scale == "log")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
def test_curves_skip_values_that_are_not_finite(tmp_path, bad):
    accuracy, loss, _ = draw_curves(tmp_path, make_history(2, train_loss=bad, test_loss=bad))
    assert [line.get_xdata().tolist() for line in loss.lines] == [[1], [1]]
    assert [line.get_xdata().tolist() for line in accuracy.lines] == [[1, 2], [1, 2]]
    assert not draw_curves(tmp_path, [row | {"train_loss": bad, "test_loss": bad} for row in make_history(2)])[1].lines


@pytest.mark.parametrize("losses, top, marks", [
    ([[2.0, 1.0], [3.0, 676.0, 500.0], [1.0, 14.0]], 2.2, [(2, "676"), (2, "14")]),
    ([[2.0, 1.0], [3.0, 9.9]], 12, []),  # as high as the first epoch of a healthy run can be
    ([[2.0, 20.0], [3.0, 676.0]], 1000, [])])  # no other run
def test_diverged_runs_do_not_flatten_the_others_and_are_marked(losses, top, marks):
    axes, other = plots.new_figure(6, 4).subplots(1, 2, sharey=True)
    for color, values in zip(plots.PALETTE, losses, strict=False):
        plots.draw_line(axes, [{"epoch": i, "loss": loss} for i, loss in enumerate(values, 1)], "loss", color)
    for panel in (axes, other):
        plots.style_curves(panel, "Loss", loss=True)
        assert panel.get_ylim()[0] < 2 and 0.7 * top < panel.get_ylim()[1] <= top
    assert [(text.xy[0], text.get_text()[2:]) for text in axes.texts] == marks and not other.texts
    cut = [line for line in axes.lines if line.get_clip_on()]
    assert [line.get_color() for line in cut] == [text.get_color() for text in axes.texts]
    assert len({text.xyann[1] for text in axes.texts}) == len(marks)  # one below the other


@pytest.mark.parametrize("settings, note", [
    ({"label_smoothing": 0.0, "ema": 0.0, "mixup": 0.0, "optimizer": "sgd"}, ""),
    ({"small_epochs": 1, "plain_epochs": 1, "mixup": 0.2}, "Training is measured with MixUp (not at the end), "
     "small images at first; evaluation without."),
    ({"trivial_augment": True, "cutmix": 1.0, "ema": 0.99},
     "Training is measured with TrivialAugment, CutMix; evaluation without. Evaluation uses the averaged weights."),
    ({"label_smoothing": 0.1, "trivial_augment": True, "plain_epochs": 3, "small_epochs": 10, "ema": 0.9},
     "Training is measured with label smoothing, TrivialAugment (not at the end), small images at first; evaluation "
     "without. Evaluation uses the\naveraged weights.")])
def test_curves_say_what_sets_training_apart(tmp_path, settings, note):
    assert plots.draw_curves(make_history(2), np.ones(20), settings, tmp_path / "c.png").get_supxlabel() == note


def test_confusion_shows_percent_of_the_true_class_in_rows_and_darker_for_more(tmp_path):
    confusion = np.diag(np.full(10, 950))
    confusion[3, 5], confusion[3, 3], confusion[6, 6:8], confusion[8, 9] = 1250, 3750, 475, 50
    confusion[0, 0], classes = 0, ["$\\frac$", *CLASSES[1:]]  # no image of it; its name looks like math
    (axes,) = plots.draw_confusion(confusion, classes, tmp_path / "confusion.png").axes
    cells = {(round(text.get_position()[1]), round(text.get_position()[0])): text for text in axes.texts}
    assert len(cells) == 100
    for place, shown in {(3, 5): "25.0", (3, 3): "75.0", (5, 3): "0", (6, 7): "50.0", (8, 9): "5.0"}.items():
        assert cells[place].get_text() == shown
    colors = axes.images[0].to_rgba(axes.images[0].get_array())[..., :3].mean(2)
    for place, text in cells.items():
        assert abs(np.mean(to_rgb(text.get_color())) - colors[place]) > 0.25  # so that it is readable
    assert colors[5, 3] - 0.05 > colors[8, 9] > colors[6, 7] + 0.2 > colors[8, 8] + 0.3
    assert axes.get_title() == "85.97% accuracy on 12,650 images"
    assert axes.get_ylabel() == "true class" and axes.get_xlabel().startswith("predicted class")
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text().replace("\\$", "$") for label in labels] == classes


def test_reliability_shows_accuracy_and_number_of_images_of_each_bin(tmp_path):
    counts, correct = np.array([0, 10, 1000, 0, 5]), np.array([0, 4, 750, 0, 5])
    axes, = plots.draw_reliability(counts, np.array([0, 3.0, 500, 0, 4.5]), correct, tmp_path / "reliability.png").axes
    assert [(bar.get_x(), round(bar.get_height(), 6)) for bar in axes.patches] == [(20, 40), (40, 75), (80, 100)]
    assert [text.get_text() for text in axes.texts] == ["10", "1,000", "5"]
    assert axes.get_title(loc="left") == "Expected calibration error 24.78%"  # (1 + 250 + 0.5) / 1015
    assert " 50.00 on average;" in axes.get_xlabel() and " 74.78 on average;" in axes.get_ylabel()


def test_the_first_36_images_are_shown_with_caption_prediction_and_probability(tmp_path):
    images, captions, predictions, probabilities, title = make_images(40)
    captions[:3] = ["holidays/2024.png", "\u732b\n\udce9.png", "$\\frac$"]
    figure = plots.draw_images(images, captions, predictions, probabilities, title, tmp_path / "images.png")
    assert len(figure.axes) == 36 and figure.texts[0].get_text() == "A title"
    texts = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert texts[0] == ["\u2026days/2024.png", "cat 99.9%"] and texts[1][0] == "???.png"
    boxes = [axes.get_position() for axes in figure.axes]
    assert all(0 <= box.x0 < box.x1 <= 1 and 0 <= box.y0 < box.y1 <= 1 for box in boxes)
    assert not any(first.overlaps(second) for first, second in itertools.combinations(boxes, 2))
    assert not plots.draw_images(*make_images(0), tmp_path / "images.png").axes
