"""Generated images: reproducible, balanced, learned by the network."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from runs import ROOT

import synthetic


def test_images_depend_on_the_name_only():
    images, labels = synthetic.make_batch("data_batch_1", 100)
    assert images.shape == (100, 32, 32, 3) and images.dtype == np.uint8 and images.flags.c_contiguous
    assert labels.shape == (100,) and labels.dtype == np.int64
    again = synthetic.make_batch("data_batch_1", 100)
    assert np.array_equal(images, again[0]) and np.array_equal(labels, again[1])
    for name in ("test_batch", "data_batch_2", "data_batch_5"):
        assert not np.array_equal(labels, synthetic.make_batch(name, 100)[1])
    batches = [synthetic.make_batch(name)[0] for name in ("test_batch", "data_batch_1")]
    assert len(np.unique(np.concatenate(batches).reshape(4_000, -1), axis=0)) == 4_000  # no image occurs twice


def test_classes_are_balanced_and_shuffled():
    labels = synthetic.make_batch("data_batch_1", 1_003)[1]
    counts = np.bincount(labels, minlength=10)
    assert len(synthetic.NAMES) == 10 and counts.max() - counts.min() <= 1
    assert np.bincount(labels[:300], minlength=10).min() >= 10  # so that --limit-train keeps every class
    assert abs(np.corrcoef(labels[:-1], labels[1:])[0, 1]) < 0.1


@pytest.mark.slow
def test_the_demo_reaches_90_percent(tmp_path):
    """Run the command of `make demo` in a folder of its own."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.search(r"^demo:.*\n\t\$\(BIN\)/python train\.py @recipes/demo\.txt", makefile, re.M)
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), f"@{ROOT / 'recipes' / 'demo.txt'}"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "4,697,742 parameters" in done.stdout  # the full network
    results = json.loads((tmp_path / "checkpoints" / "demo" / "results.json").read_text())
    assert results["last_accuracy"] >= 90
