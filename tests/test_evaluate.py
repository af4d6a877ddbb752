"""Scores: against plain computations, of every kind of checkpoint, and as the program prints them."""

import errno
import io
import itertools
import re
import sys
import zipfile
from unittest.mock import Mock

import numpy as np
import pytest
import runs
import torch
from conftest import one_by_one, six_views

import cifar10
import evaluate
import models
import plots
import train
from distributed import World

CPU_FLAGS = ["--device", "cpu", "--precision", "fp32", "--limit-test", "50"]


@pytest.fixture
def scores(run_evaluate, capsys):
    """A function that runs evaluate.py and returns the accuracy and the loss that it prints."""
    def run(*flags, program=run_evaluate, **where):
        assert program(*flags, **where) == 0
        return re.search(r"test accuracy (\d+\.\d\d)%, loss (\d+\.\d{4}),", capsys.readouterr().out).groups()
    return run


def plain_scores(probabilities, targets):
    """Compute accuracy and loss image by image, in the form that evaluate.py prints."""
    rows = list(zip(probabilities.double().tolist(), targets.tolist(), strict=True))
    accuracy = 100 * sum(row.index(max(row)) == target for row, target in rows) / len(rows)
    return f"{accuracy:.2f}", f"{-np.mean([np.log(row[target]) for row, target in rows]):.4f}"


@pytest.mark.parametrize("scale", [0.2, 1, 5, 1000])  # at 1000 every confidence is 1
def test_calibration_against_a_loop(scale):
    generator = torch.Generator().manual_seed(0)
    logits, targets = scale * torch.randn(500, 10, generator=generator), torch.randint(10, (500,), generator=generator)
    bins = [[0, 0.0, 0] for _ in range(15)]  # images, confidence, correct
    for row, target in zip(logits.double().softmax(1).tolist(), targets.tolist(), strict=True):
        edge = next(i for i in range(1, 16) if max(row) <= i / 15 or i == 15)
        for i, value in enumerate((1, max(row), row.index(max(row)) == target)):
            bins[edge - 1][i] += value
    found = evaluate.calibration_bins(logits, targets)
    torch.testing.assert_close(found, torch.tensor(bins, dtype=torch.float64).T)
    error = 100 * sum(abs(confidence - correct) for _, confidence, correct in bins) / 500
    assert evaluate.calibration_error(logits, targets) == pytest.approx(error, abs=1e-6)


def test_the_program_prints_what_a_loop_finds(run_evaluate, expected, test_set, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "CPU_BATCH_SIZE", 3)
    assert run_evaluate("--limit-test", "8") == 0
    first, header, *rows, last = capsys.readouterr().out.splitlines()
    scores = plain_scores(expected[:8], test_set.targets[:8])
    assert first.endswith("last.pt: test accuracy {}%, loss {}, 8 images".format(*scores))
    assert header.split() == ["class", "images", "precision", "recall"]
    predictions, targets = expected[:8].argmax(1).tolist(), test_set.targets[:8].tolist()
    for label, (name, row) in enumerate(zip(test_set.classes, rows, strict=True)):
        correct = sum(pair == (label, label) for pair in zip(predictions, targets, strict=True))
        counts = predictions.count(label), targets.count(label)  # of which precision and recall are fractions
        cells = [f"{100 * correct / count:.2f}" if count else "-" for count in counts]
        assert row.split() == [name, str(counts[1]), *cells]
    assert re.fullmatch(r"expected calibration error \d+\.\d\d%", last)


def test_tta_averages_the_probabilities_of_six_views(scores, trained, test_set):
    expected = six_views(evaluate.load_checkpoint_model(trained)[0], test_set.images)
    assert scores("--tta") == plain_scores(expected, test_set.targets)
    assert scores("--tta") != scores()


def test_a_slow_evaluation_shows_a_bar_on_a_terminal_and_removes_it(trained, test_set, monkeypatch):
    model = evaluate.load_checkpoint_model(trained)[0]
    monkeypatch.setattr(evaluate, "CPU_BATCH_SIZE", 5)

    def printed(seconds=1.0, terminal=True, **settings) -> str:
        """Evaluate with a clock that moves on by so many seconds with each look at it."""
        monkeypatch.setattr("tqdm.std.time", itertools.count(0, seconds).__next__)
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        sys.stderr.isatty = lambda: terminal
        evaluate.predict_logits(model, test_set.images, "cpu", **settings)
        return sys.stderr.getvalue()
    assert re.fullmatch(r"(\revaluating +\d+%\|[# ]+\| 00:\d\d left)+\r +\r", printed())
    assert "labeling" in printed(title="labeling")
    assert [printed(0.01), printed(terminal=False), printed(title=None), printed(world=World(rank=1))] == [""] * 4
    monkeypatch.setattr(sys, "stderr", None)  # closed
    evaluate.predict_logits(model, test_set.images, "cpu")


def test_precision_reaches_the_network(run_evaluate, monkeypatch):
    found, predict_logits = [], evaluate.predict_logits  # the printed scores may be equal
    monkeypatch.setattr(evaluate, "predict_logits", lambda *args: found.append(predict_logits(*args)) or found[-1])
    assert run_evaluate() == 0 and run_evaluate("--precision", "bf16") == 0
    fp32, bf16 = found
    assert not torch.equal(fp32, bf16)
    torch.testing.assert_close(fp32, bf16, rtol=0.1, atol=0.1)


def test_a_run_draws_its_pictures_and_says_how_training_is_measured(small_data, tmp_path, monkeypatch):
    drawn, draw_curves = [], plots.draw_curves
    monkeypatch.setattr(plots, "draw_curves", lambda *args: drawn.append(draw_curves(*args)))
    assert train.main(runs.command_line(small_data, tmp_path / "run", "--label-smoothing", "0.1")) == 0
    assert drawn[-1].get_supxlabel() == "Training is measured with label smoothing; evaluation without."
    assert {path.stem for path in tmp_path.glob("run/*.png")} == {"confusion", "curves", "mistakes", "reliability"}


def test_both_checkpoints_of_a_run_have_the_scores_of_its_metrics(run, scores, tmp_path):
    assert run("--epochs", "3", "--ema", "0.7", "--no-normalize") == 0
    history = runs.read(tmp_path / "run")["history"]
    rows = [(f"{row['test_accuracy']:.2f}", f"{row['test_loss']:.4f}") for row in history]
    for name, expected in {"last": rows[-1], "best": max(rows, key=lambda row: float(row[0]))}.items():
        assert scores("--limit-test", "20", checkpoint=tmp_path / f"run/{name}.pt") == expected


@pytest.mark.parametrize(("prefix", "numpy"), [("module.", b"numpy.core."), ("", b"numpy._core.")])  # 1 and 2
def test_a_published_checkpoint(prefix, numpy, run_evaluate, scores, refused, test_set, tmp_path):
    torch.manual_seed(3)
    model = models.SEResNet().eval()
    path = tmp_path / "ckpt.pth"
    config = {"num_blocks": [4, 4, 3], "channels": None, "lr": np.float64(0.1), "total_params": np.int64(5342)}
    torch.save({"net": {prefix + name: value for name, value in model.state_dict().items()}, "acc": 93.21,
                "epoch": 187, "config": config}, path)
    runs.repack(path, lambda content: re.sub(rb"numpy\._?core\.", numpy, content))
    with zipfile.ZipFile(path) as archive:
        assert numpy + b"multiarray\nscalar" in archive.read("ckpt/data.pkl")
    runs.write_batch(tmp_path / "test_batch", test_set.images[:10].numpy(), test_set.targets[:10].numpy())
    plain = plain_scores(one_by_one(model, test_set.images[:10]).softmax(1), test_set.targets[:10])
    assert scores("--data-dir", tmp_path, "--limit-test", "10", checkpoint=path) == plain
    line = refused(run_evaluate, "--synthetic", checkpoint=path)
    assert "was trained on the classes airplane" in line and test_set.classes[0] in line and "--data-dir" in line


def test_the_checkpoint_names_the_images(trained, scores, test_set, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # without a folder of data
    assert scores([str(trained), *CPU_FLAGS], program=evaluate.main) == scores()
    checkpoint = torch.load(trained)
    checkpoint["args"] |= {"synthetic": False, "data_dir": "elsewhere"}
    torch.save({**checkpoint, "classes": list(cifar10.CLASSES)}, "moved.pt")
    (tmp_path / "elsewhere").mkdir()
    runs.write_batch(tmp_path / "elsewhere/test_batch", test_set.images.numpy(), test_set.targets.numpy())
    assert scores(["moved.pt", *CPU_FLAGS], program=evaluate.main) == scores()


def test_pictures(run_evaluate, scores, refused, tmp_path, monkeypatch, capsys, expected, test_set):
    drawn, draw_images = [], plots.draw_images
    monkeypatch.setattr(plots, "draw_images", lambda *args: drawn.append(args) or draw_images(*args))
    assert scores("--output-dir", tmp_path / "new/pictures")
    (images, truths, predictions, probabilities, *_), = drawn
    confidence, prediction = expected.max(1)
    wrong = [i for i in confidence.argsort(descending=True).tolist() if prediction[i] != test_set.targets[i]]
    assert len(wrong) > 1 and np.array_equal(images, test_set.images[wrong])
    assert probabilities == pytest.approx(confidence[wrong].tolist(), rel=1e-4)
    assert (truths, predictions) == tuple([test_set.classes[i] for i in labels[wrong]]
                                          for labels in (test_set.targets, prediction))
    first, *others = sorted((tmp_path / "new/pictures").iterdir())
    assert [path.name for path in (first, *others)] == ["confusion.png", "mistakes.png", "reliability.png"]
    assert str(first) in refused(run_evaluate, "--output-dir", first)  # before scores are printed
    monkeypatch.setattr(plots, "draw_images", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    assert run_evaluate("--output-dir", tmp_path) == 1
    printed = capsys.readouterr()
    assert printed.err == "evaluate.py: error: [Errno 28] No space left on device\n"
    assert "test accuracy" in printed.out and "are in" not in printed.out


@pytest.mark.parametrize("args, reason", [({"channels": 32}, "a different architecture"), ({"block": "other"}, "block"),
                                          ({"num_blocks": None}, "does not describe a network")])
def test_a_checkpoint_that_claims_another_network_than_it_holds(run_evaluate, refused, trained, tmp_path, args, reason):
    message = refused(run_evaluate, checkpoint=tmp_path)
    assert f"{tmp_path} not found; expected one such as {tmp_path / 'best.pt'}" in message
    checkpoint = torch.load(trained)
    checkpoint["args"].update(args)
    torch.save(checkpoint, tmp_path / "other.pt")
    line = refused(run_evaluate, checkpoint=tmp_path / "other.pt")
    assert "other.pt" in line and reason in line
