"""Generated images: the same for a seed, in the official form, hard for a linear classifier, learnt by the network."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

import batches
import synthetic

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def train_set() -> tuple[np.ndarray, np.ndarray]:
    return synthetic.make_images(10_000, seed=0, index=1)


@pytest.fixture(scope="module")
def test_set() -> tuple[np.ndarray, np.ndarray]:
    return synthetic.make_images(2_000, seed=0, index=0)


def test_images_are_the_same_for_a_seed_and_index_and_differ_for_others():
    images, labels = synthetic.make_images(1_200, seed=3, index=1)
    assert images.shape == (1_200, 32, 32, 3) and images.dtype == np.uint8 and images.flags.c_contiguous
    assert labels.shape == (1_200,) and labels.dtype == np.int64
    again = synthetic.make_images(1_200, seed=3, index=1)
    assert np.array_equal(images, again[0]) and np.array_equal(labels, again[1])
    for seed, index in ((4, 1), (3, 2), (1, 3)):
        other, other_labels = synthetic.make_images(1_200, seed, index)
        assert not np.array_equal(labels, other_labels)
        assert not (other == images).all(axis=(1, 2, 3)).any()  # no image at its place
    assert len(np.unique(images.reshape(1_200, -1), axis=0)) == 1_200  # no image twice, across chunks too


@pytest.mark.parametrize("count", [1, 10, 1_003])
def test_classes_are_balanced_and_shuffled(count):
    labels = synthetic.make_images(count, seed=0, index=1)[1]
    counts = np.bincount(labels, minlength=10)
    assert len(synthetic.NAMES) == 10 and counts.max() - counts.min() <= 1
    if count > 1_000:
        assert np.bincount(labels[:300], minlength=10).min() >= 10  # the first images are a fair set, too
        assert abs(np.corrcoef(labels[:-1], labels[1:])[0, 1]) < 0.1


def test_files_read_back_in_the_official_form(tmp_path):
    synthetic.write(tmp_path / "new", ["data_batch_2", "test_batch"], seed=5, count=30)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"batches.meta", "data_batch_2", "test_batch"}
    assert batches.read_label_names(tmp_path / "new" / "batches.meta") == synthetic.NAMES
    images, labels = batches.read_labelled(tmp_path / "new" / "data_batch_2")
    expected_images, expected_labels = synthetic.make_images(30, seed=5, index=2)
    assert np.array_equal(images, expected_images) and np.array_equal(labels, expected_labels)
    assert not np.array_equal(images, batches.read_labelled(tmp_path / "new" / "test_batch")[0])


def test_only_missing_files_are_written(tmp_path):
    synthetic.write(tmp_path, ["data_batch_1"], count=10)
    before = (tmp_path / "data_batch_1").read_bytes()
    synthetic.write(tmp_path, ["data_batch_1", "data_batch_5"], seed=1, count=20)
    assert (tmp_path / "data_batch_1").read_bytes() == before
    assert len(batches.read_labelled(tmp_path / "data_batch_5")[1]) == 20
    assert not (tmp_path / "test_batch").exists()


def linear_accuracy(train: np.ndarray, train_labels: np.ndarray, test: np.ndarray, test_labels: np.ndarray) -> float:
    """Fit a softmax classifier to bytes of any shape, and return its accuracy in percent on the test images."""
    torch.manual_seed(0)
    train, test = (torch.from_numpy(values).flatten(1).float() / 127.5 - 1 for values in (train, test))
    train_labels, test_labels = torch.from_numpy(train_labels), torch.from_numpy(test_labels)
    layer = torch.nn.Linear(train.shape[1], 10)
    steps = 250
    optimizer = torch.optim.AdamW(layer.parameters(), weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.003, total_steps=steps)
    for _ in range(steps):
        rows = torch.randint(len(train), (256,))
        optimizer.zero_grad()
        functional.cross_entropy(layer(train[rows]), train_labels[rows]).backward()
        optimizer.step()
        scheduler.step()
    return 100 * (layer(test).argmax(1) == test_labels).float().mean().item()


def test_a_linear_classifier_on_the_pixels_stays_below_60_percent(train_set, test_set):
    assert linear_accuracy(*train_set, *test_set) <= 60
    # The attempt is a fair one: with a little help, one column that is brighter by class, it finds all.
    helped = [(images.copy(), labels) for images, labels in (train_set, test_set)]
    for images, labels in helped:
        images[np.arange(len(labels)), :, 3 * labels] = 255
    assert linear_accuracy(*helped[0], *helped[1]) > 95


def test_colours_do_not_tell_the_class(train_set, test_set):
    def colours(images: np.ndarray) -> np.ndarray:
        """Sort the values of each channel, so that their places are lost: (N, 32, 3)."""
        return np.sort(images.reshape(len(images), -1, 3), axis=1)[:, 16::32]
    accuracy = linear_accuracy(colours(train_set[0]), train_set[1], colours(test_set[0]), test_set[1])
    assert accuracy <= 40


def test_every_figure_stands_out(train_set):
    images, labels = train_set
    deviation = images.reshape(len(images), -1, 3).std(axis=1).max(axis=1)
    for label, name in enumerate(synthetic.NAMES):
        assert np.quantile(deviation[labels == label], 0.02) > 25, name  # of 255


def test_place_and_size_vary():
    squares = np.full(300, synthetic.NAMES.index("square"))
    cover = synthetic._cover(squares, np.random.default_rng(0))
    area = cover.sum(axis=(1, 2))
    assert np.quantile(area, 0.95) > 2 * np.quantile(area, 0.05)
    for axis in (1, 2):
        place = (cover.sum(axis=3 - axis) * np.arange(32)).sum(axis=1) / area
        assert place.min() < 12 and place.max() > 19


@pytest.mark.slow
def test_the_demo_reaches_90_percent(tmp_path):
    """Run what `make demo` runs, in a folder of its own."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), f"@{ROOT / 'recipes' / 'demo.txt'}"], cwd=tmp_path,
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "4,697,742 parameters" in done.stdout  # the full network
    (results,) = (tmp_path / "checkpoints").glob("*/results.json")
    assert json.loads(results.read_text())["last_accuracy"] >= 90
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^demo:.*\n\t\$\(BIN\)/python train\.py @recipes/demo\.txt$", makefile, re.M)
