"""What a trained network is worth: logits, scores, report, checkpoints of both kinds; and what is refused."""

import csv
import math
import re

import numpy as np
import pytest
import torch
from conftest import TINY, accuracy_of, one_by_one, publish, refused
from torch.nn import functional as F

import evaluate
import models
from synthetic import NAMES
from utils import Processes, UserError, load_checkpoint

CPU = torch.device("cpu")
MODEL = TINY[:TINY.index("--batch-size")]  # the flags of the network


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    network = models.build_model((1, 1), 8, se_reduction=4, dropout=0.5)
    for _ in range(30):
        network(torch.randn(16, 3, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3))  # for batch norm's averages
    network.linear.weight.data *= 30  # gives it opinions
    return network.eval()


@pytest.fixture(scope="module")
def images():
    tiles = np.random.default_rng(0).integers(0, 256, (23, 4, 4, 3), dtype=np.uint8)
    return torch.from_numpy(tiles.repeat(8, 1).repeat(8, 2))


@pytest.fixture(scope="module")
def answers():
    """Give logits and targets of 500 images; no one ever guesses class 7, and no image is of class 3."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(0, 10, (500,), generator=generator)
    targets[targets == 3] = 4
    logits = 2 * torch.randn(500, 10, generator=generator) + 3 * F.one_hot(targets, 10)
    logits[:, 7] = -20
    return logits, targets


# --- logits and figures ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("batch_size", [1, 7, 23, 1000])
def test_logits_do_not_depend_on_the_batch_size(monkeypatch, model, images, batch_size, normalize):
    monkeypatch.setattr(evaluate, "BATCH_SIZE", batch_size)
    found = evaluate.predict_logits(model, images, CPU, normalize=normalize)
    assert found.shape == (23, 10) and found.dtype == torch.float32
    torch.testing.assert_close(found, one_by_one(model, images, normalize), rtol=1e-4, atol=1e-5)


class Lonely(Processes):
    """One of several processes, without the others: its part is not added up."""

    def sum(self, tensor):
        return tensor


@pytest.mark.parametrize("size", [2, 3, 7])  # 6 batches: also one process too many
def test_logits_do_not_depend_on_the_number_of_processes(monkeypatch, model, images, size):
    monkeypatch.setattr(evaluate, "BATCH_SIZE", 4)
    parts = [evaluate.predict_logits(model, images, CPU, processes=Lonely(rank, rank, size)) for rank in range(size)]
    assert torch.equal(sum(parts), evaluate.predict_logits(model, images, CPU))
    assert all((part == 0).any() for part in parts)


def test_tta_averages_probabilities_with_the_mirror_image(model, images):
    found = evaluate.predict_logits(model, images, CPU, tta=True)
    pairs = [one_by_one(model, each).softmax(1) for each in (images, images.flip(2))]
    torch.testing.assert_close(found.softmax(1), sum(pairs) / 2, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.exp(), found.softmax(1))  # so a mean loss of them means something
    assert (pairs[0] - pairs[1]).abs().max() > 0.1


def test_tta_does_not_see_the_side(model, images):
    found, mirrored = (evaluate.predict_logits(model, each, CPU, tta=True) for each in (images, images.flip(2)))
    torch.testing.assert_close(found, mirrored)


@pytest.mark.parametrize("training", [True, False])
def test_predicting_leaves_the_model_as_it_was(model, images, training):
    expected = evaluate.predict_logits(model, images, CPU)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train(training)
    try:
        found = evaluate.predict_logits(model, images, CPU)
        assert model.training == training and all(module.training == training for module in model.modules())
    finally:
        model.eval()
    assert torch.equal(found, expected)  # without dropout, with batch norm's averages
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_half_precision_is_close(model, images):
    expected = evaluate.predict_logits(model, images, CPU).softmax(1)
    found = evaluate.predict_logits(model, images, CPU, "bf16").softmax(1)
    assert 0 < (found - expected).abs().max() < 0.02


def test_score_against_a_loop(answers):
    logits, targets = answers
    losses, hits = [], 0
    for row, target in zip(logits.tolist(), targets.tolist(), strict=True):
        losses.append(math.log(sum(math.exp(value) for value in row)) - row[target])
        hits += row.index(max(row)) == target
    found = evaluate.score(logits, targets)
    assert found["loss"] == pytest.approx(sum(losses) / 500, rel=1e-5)
    assert 200 < hits < 500 and found["accuracy"] == 100 * hits / 500  # to the bit, as it is printed and compared


def test_accuracy_is_exact_for_every_count():
    targets = torch.zeros(50, dtype=torch.int64)
    for hits in range(51):
        logits = F.one_hot((torch.arange(50) >= hits).long(), 10).float()
        assert evaluate.score(logits, targets)["accuracy"] == 100 * hits / 50


def test_confusion_and_per_class_against_a_loop(answers):
    logits, targets = answers
    pairs = [(target, row.index(max(row))) for row, target in zip(logits.tolist(), targets.tolist(), strict=True)]
    confusion = evaluate.confusion_matrix(logits, targets)
    assert confusion.dtype == torch.int64
    assert confusion.tolist() == [[pairs.count((i, j)) for j in range(10)] for i in range(10)]
    for label, row in enumerate(evaluate.per_class(confusion, "abcdefghij")):
        guessed = [target == label for target, guess in pairs if guess == label]
        there = [guess == label for target, guess in pairs if target == label]
        agreed = [(target == label) == (guess == label) for target, guess in pairs]
        expected = [100 * sum(cases) / len(cases) if cases else None for cases in (guessed, there, agreed)]
        assert (row["class"], row["count"]) == ("abcdefghij"[label], len(there))
        assert [row["precision"], row["recall"], row["accuracy"]] == pytest.approx(expected)
    rows = evaluate.per_class(confusion, "abcdefghij")
    assert rows[7]["precision"] is None and rows[3]["recall"] is None


@pytest.mark.parametrize("scale", [0.2, 1, 5, 1000])  # at 1000 every confidence is 1
def test_calibration_error_against_a_loop(answers, scale):
    logits, targets = answers[0] * scale, answers[1]
    bins = [[] for _ in range(15)]
    for row, target in zip(logits.double().softmax(1).tolist(), targets.tolist(), strict=True):
        confidence = max(row)
        edge = next(i for i in range(1, 16) if confidence <= i / 15 or i == 15)
        bins[edge - 1].append((confidence, row.index(confidence) == target))
    expected = sum(len(cases) / 500 * abs(sum(c for c, _ in cases) / len(cases) - sum(h for _, h in cases) / len(cases))
                   for cases in bins if cases)
    assert evaluate.calibration_error(logits, targets) == pytest.approx(100 * expected, abs=1e-3)


def test_calibration_error_of_known_cases():
    sure = torch.tensor([[50.0] + 9 * [0.0]] * 4)
    assert evaluate.calibration_error(sure, torch.zeros(4, dtype=torch.int64)) == pytest.approx(0, abs=1e-4)
    assert evaluate.calibration_error(sure, torch.tensor([0, 0, 1, 1])) == pytest.approx(50, abs=1e-4)


def test_the_report_has_a_line_for_each_class(answers):
    lines = evaluate.format_report(evaluate.report(*answers, list("abcdefghij"))).splitlines()
    assert [line.split()[0] for line in lines[1:11]] == list("abcdefghij")
    assert lines[4].split()[1:4:2] == ["0", "-"] and lines[8].split()[2] == "-"
    assert re.fullmatch(r"expected calibration error \d+\.\d\d %", lines[11]) and len(lines) == 12


# --- a checkpoint on the test set ------------------------------------------------------------------------------------


def test_load_model_says_how_it_was_trained(trained, test_set):
    model, info = evaluate.load_model(trained, CPU)
    assert not model.training and info["normalize"] and info["classes"] == test_set.classes
    assert info["args"]["channels"] == 16 and info["args"]["epochs"] == 8
    weights = load_checkpoint(trained)["model"]
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_evaluate_prints_what_a_loop_finds(run_mode, expected, test_set, capsys):
    assert run_mode("--evaluate") == 0
    printed = capsys.readouterr().out
    assert accuracy_of(printed) == f"{100 * int((expected.argmax(1) == test_set.targets).sum()) / 50:.2f}"
    loss = -expected[torch.arange(50), test_set.targets].log().mean()
    assert f"loss {loss:.4f}" in printed and all(name in printed for name in test_set.classes)


def test_deterministic_holds_for_evaluation_too(run_mode, monkeypatch):
    asked = []
    monkeypatch.setattr(evaluate.devices, "set_up_backend", lambda device, deterministic: asked.append(deterministic))
    assert run_mode("--evaluate", "--deterministic") == 0 and run_mode("--evaluate") == 0
    assert asked == [True, False]


def test_evaluate_with_mirror_images_and_pictures(run_mode, trained, test_set, tmp_path, capsys):
    assert run_mode("--evaluate", "--tta", "--output", tmp_path / "new" / "pictures") == 0
    assert {path.name for path in (tmp_path / "new" / "pictures").iterdir()} == {"confusion.png", "mistakes.png"}
    logits = evaluate.predict_logits(evaluate.load_model(trained, CPU)[0], test_set.images, CPU, tta=True)
    printed = capsys.readouterr().out
    assert accuracy_of(printed) == f"{evaluate.score(logits, test_set.targets)['accuracy']:.2f}"
    assert "mirror" in printed


def test_a_published_checkpoint_is_the_default_network(run_mode, tmp_path, monkeypatch, capsys):
    torch.manual_seed(3)
    network = models.build_model()
    published = publish(tmp_path / "ckpt.pth", network)
    loaded, info = evaluate.load_model(published, CPU)
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert info["classes"] == list(evaluate.batches.CLASSES) and info["normalize"]
    assert "knows the classes 'airplane'" in refused(run_mode, capsys, "--evaluate", checkpoint=published)
    monkeypatch.setattr(evaluate.batches, "CLASSES", tuple(NAMES))
    assert run_mode("--evaluate", "--limit-test", "10", checkpoint=published) == 0
    assert "10 images" in capsys.readouterr().out


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [["--channels", "32"], ["--num-blocks", "1", "1"], ["--block", "preact"],
                                   ["--se", "none"], ["--no-normalize"]])
def test_flags_that_contradict_the_checkpoint_are_refused_by_name(run_mode, capsys, flags):
    assert flags[0].replace("--no-", "--") in refused(run_mode, capsys, "--evaluate", *flags)
    assert run_mode("--evaluate", *MODEL, "--normalize") == 0  # equal ones are fine


def test_flags_that_do_not_fit_a_published_checkpoint_are_refused(run_mode, trained, tmp_path, capsys):
    published = publish(tmp_path / "ckpt.pth", evaluate.load_model(trained, CPU)[0])
    line = refused(run_mode, capsys, "--evaluate", checkpoint=published)
    assert "another architecture" in line and "ckpt.pth" in line
    with pytest.raises(UserError, match="another architecture"):
        evaluate.load_model(published, CPU, {"num_blocks": [1, 1, 1], "channels": 32})


def test_a_missing_checkpoint_is_refused(run_mode, tmp_path, capsys):
    assert "nowhere.pt" in refused(run_mode, capsys, "--evaluate", checkpoint=tmp_path / "nowhere.pt")


@pytest.mark.parametrize("args", [{"channels": 1_000_000}, {"num_blocks": [1, 1, 90]}, {"channels": "16"},
                                  {"block": "none such"}, {"num_blocks": None}, {"se_reduction": 0}, []])
def test_a_checkpoint_that_claims_another_network_than_it_holds(run_mode, trained, tmp_path, capsys, args):
    checkpoint = torch.load(trained)
    checkpoint["args"] = {**checkpoint["args"], **args} if args else args
    torch.save(checkpoint, tmp_path / "liar.pt")
    assert "liar.pt" in refused(run_mode, capsys, "--evaluate", checkpoint=tmp_path / "liar.pt")


def test_both_files_of_a_run_have_the_accuracy_of_its_metrics(run_mode, trained, capsys):
    rows = [float(row["test_accuracy"]) for row in csv.DictReader((trained.parent / "metrics.csv").open())]
    for name, accuracy in (("last.pt", rows[-1]), ("best.pt", max(rows))):
        assert run_mode("--evaluate", checkpoint=trained.parent / name) == 0
        assert float(accuracy_of(capsys.readouterr().out)) == accuracy
