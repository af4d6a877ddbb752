"""checkpoints/pretrained.pt: the right weights, and the numbers that the documents give for them."""

import csv
import hashlib
import json
import re

import torch
from runs import ROOT

import synthetic
from augment import to_input
from checkpoint import load_checkpoint
from evaluate import load_checkpoint_model

FILE, RUN = ROOT / "checkpoints/pretrained.pt", ROOT / "results/fast"
# Of the first three generated test images, in fp32.
LOGITS = [[2.157, -0.854, -0.983, -0.593, -0.711, -0.216, 3.624, -0.790, -1.211, -0.493],
          [2.361, 0.392, 1.946, 0.006, -0.846, -0.944, -1.500, -1.802, 1.345, -1.036],
          [-1.288, -1.038, 0.593, -0.127, 0.341, -1.456, 3.707, -0.962, -0.316, 0.326]]


def test_the_file_is_the_one_that_was_measured():
    corruptions = json.loads((RUN / "corruptions.json").read_text())
    assert hashlib.sha256(FILE.read_bytes()).hexdigest() == corruptions["settings"]["sha256"]


def test_its_logits_are_the_stored_ones():
    images = torch.from_numpy(synthetic.make_batch("test_batch", 10)[0][:3])
    with torch.no_grad():
        logits = load_checkpoint_model(FILE)[0](to_input(images))
    torch.testing.assert_close(logits, torch.tensor(LOGITS), rtol=0, atol=2e-3)


def test_it_is_the_last_epoch_of_the_run():
    shipped, settings = load_checkpoint(FILE), json.loads((RUN / "args.json").read_text())
    assert shipped["epoch"] == settings["epochs"]  # not an epoch that the test set has selected
    assert shipped["args"] == {name: settings[name] for name in shipped["args"]}


def test_the_documents_give_the_results_of_the_run():
    results = json.loads((RUN / "results.json").read_text())
    *_, last = csv.DictReader((RUN / "metrics.csv").open())
    assert float(last["test_accuracy"]) == results["last_accuracy"] == results["test_accuracy"]
    card, readme = ((ROOT / name).read_text(encoding="utf-8") for name in ("docs/model-card.md", "README.md"))
    tta, = re.findall(r"test accuracy ([\d.]+%)", (RUN / "tta.txt").read_text())
    assert f"| the run's `last.pt`, bf16 | {results['last_accuracy']:.2f}% | {tta} |" in card
    row = next(line for line in readme.splitlines() if line.startswith("| `@recipes/fast.txt`"))
    assert [cell.strip(" *") for cell in row.split("|")[2:5]] == [
        f"{results['last_accuracy']:.2f}%", tta, str(results["epochs"])]
    fp32 = json.loads((RUN / "tta.json").read_text())["accuracy"].values()
    assert "| `pretrained.pt`, fp32 | {0:.2f}% | {2:.2f}% |".format(*fp32) in card
    assert f"**{json.loads((RUN / 'corruptions.json').read_text())['mean']:.2f}%**" in card
