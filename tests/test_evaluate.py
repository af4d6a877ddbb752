"""What a trained network says: logits, report, the labels of hidden test sets, and what is refused."""

import csv
import math
import pickle
import re
import struct
import zlib

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image
from torch import nn
from torch.nn import functional as F

import data
import evaluate
import models
import plots
import train
from utils import Processes, UserError, load_checkpoint

CPU = torch.device("cpu")
MODEL = TINY[:TINY.index("--batch-size")]  # the flags of the network
# The published constants once more, so that a slip in augment.py shows.
MEAN, STD = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2023, 0.1994, 0.2010])


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


def one_by_one(model: nn.Module, images: torch.Tensor, normalize: bool = True) -> torch.Tensor:
    with torch.no_grad():
        inputs = [image.permute(2, 0, 1) / 255 for image in images]
        inputs = [(image - MEAN[:, None, None]) / STD[:, None, None] if normalize else image for image in inputs]
        return torch.cat([model(image[None]) for image in inputs])


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


# --- a trained run ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory):
    """Train a small network without pictures, and give its last.pt, which guesses several classes."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "safely", lambda *_: None)
        assert train.main([*TINY, "--data-dir", str(data_dir), "--checkpoint-dir", str(folder), "--epochs", "8",
                           "--batch-size", "16", "--no-augment"]) == 0
    return folder / "se-resnet" / "last.pt"


@pytest.fixture(scope="module")
def test_set(data_dir):
    return data.load_test(str(data_dir), synthetic=True, limit=50)


@pytest.fixture(scope="module")
def expected(trained, test_set):
    """Give the probabilities of the test images, computed one by one."""
    return one_by_one(evaluate.load_model(trained, CPU)[0], test_set.images).softmax(1)


@pytest.fixture
def run(trained, data_dir):
    """Give a function that runs --evaluate or --predict."""
    def run(*flags, checkpoint=trained):
        source = ["--data-dir", str(data_dir), "--synthetic", "--limit-test", "50"]
        return train.main([*source, *map(str, flags), "--checkpoint", str(checkpoint), "--device", "cpu",
                           "--precision", "fp32"])
    return run


def accuracy_of(text: str) -> str:
    return re.search(r"test accuracy (\d+\.\d\d) %", text)[1]


def test_load_model_says_how_it_was_trained(trained, test_set):
    model, info = evaluate.load_model(trained, CPU)
    assert not model.training and info["normalize"] and info["classes"] == test_set.classes
    assert info["args"]["channels"] == 16 and info["args"]["epochs"] == 8
    weights = load_checkpoint(trained)["model"]
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_evaluate_prints_what_a_loop_finds(run, expected, test_set, capsys):
    assert run("--evaluate") == 0
    printed = capsys.readouterr().out
    assert accuracy_of(printed) == f"{100 * int((expected.argmax(1) == test_set.targets).sum()) / 50:.2f}"
    loss = -expected[torch.arange(50), test_set.targets].log().mean()
    assert f"loss {loss:.4f}" in printed and all(name in printed for name in test_set.classes)


def test_deterministic_holds_for_evaluation_too(run, monkeypatch):
    asked = []
    monkeypatch.setattr(evaluate.devices, "set_up_backend", lambda device, deterministic: asked.append(deterministic))
    assert run("--evaluate", "--deterministic") == 0 and run("--evaluate") == 0
    assert asked == [True, False]


def test_evaluate_with_mirror_images_and_pictures(run, trained, test_set, tmp_path, capsys):
    assert run("--evaluate", "--tta", "--output", tmp_path / "new" / "pictures") == 0
    assert {path.name for path in (tmp_path / "new" / "pictures").iterdir()} == {"confusion.png", "mistakes.png"}
    logits = evaluate.predict_logits(evaluate.load_model(trained, CPU)[0], test_set.images, CPU, tta=True)
    printed = capsys.readouterr().out
    assert accuracy_of(printed) == f"{evaluate.score(logits, test_set.targets)['accuracy']:.2f}"
    assert "mirror" in printed


# --- labels for pickles ----------------------------------------------------------------------------------------------


def pickled(path, images, protocol, **arrays):
    """Write a hidden test set as a course hands it out: planar rows in protocol 5, or whole images in protocol 4."""
    images = images.numpy() if protocol == 4 else images.permute(0, 3, 1, 2).reshape(len(images), -1).numpy()
    batch = {b"data": images, **{name.encode(): value for name, value in arrays.items()}}
    path.write_bytes(pickle.dumps(batch, protocol))
    return path


def rows_of(path) -> list[list[str]]:
    return list(csv.reader(path.read_text().splitlines()))


@pytest.mark.parametrize("protocol", [4, 5])
def test_labels_of_a_hidden_test_set(run, expected, test_set, tmp_path, capsys, protocol):
    ids = np.random.default_rng(0).permutation(10_000)[:50]
    assert run("--predict", pickled(tmp_path / "hidden", test_set.images, protocol, ids=ids),
               "--output", tmp_path / "labels.csv") == 0
    assert "50 labels" in capsys.readouterr().out
    text = (tmp_path / "labels.csv").read_text()
    assert text.startswith("ID,Labels\n") and text.endswith("\n") and "\r" not in text
    rows = rows_of(tmp_path / "labels.csv")[1:]
    assert rows == [[str(i), str(label)] for i, label in zip(ids, expected.argmax(1).tolist(), strict=True)]
    hits = sum(int(label) == target for (_, label), target in zip(rows, test_set.targets.tolist(), strict=True))
    assert run("--evaluate") == 0
    assert accuracy_of(capsys.readouterr().out) == f"{100 * hits / 50:.2f}"
    assert len({label for _, label in rows}) > 2


def test_several_pickles_without_ids_are_counted_on(run, expected, test_set, tmp_path):
    files = [pickled(tmp_path / "b", test_set.images[:20], 5), pickled(tmp_path / "a", test_set.images[20:], 4)]
    assert run("--predict", *files, "--output", tmp_path / "labels.csv") == 0
    assert rows_of(tmp_path / "labels.csv")[1:] == [[str(i), str(label)]
                                                    for i, label in enumerate(expected.argmax(1).tolist())]


def test_tta_reaches_predict(run, trained, test_set, tmp_path):
    hidden = pickled(tmp_path / "hidden", test_set.images, 5)
    assert run("--predict", hidden, "--output", tmp_path / "labels.csv", "--tta") == 0
    logits = evaluate.predict_logits(evaluate.load_model(trained, CPU)[0], test_set.images, CPU, tta=True)
    assert [int(label) for _, label in rows_of(tmp_path / "labels.csv")[1:]] == logits.argmax(1).tolist()


def test_a_network_trained_without_normalisation_is_used_without(trained, run, test_set, tmp_path):
    checkpoint = torch.load(trained)
    checkpoint["args"]["normalize"] = False
    torch.save(checkpoint, tmp_path / "plain.pt")
    hidden = pickled(tmp_path / "hidden", test_set.images, 5)
    assert run("--predict", hidden, "--output", tmp_path / "labels.csv", checkpoint=tmp_path / "plain.pt") == 0
    plain = one_by_one(evaluate.load_model(trained, CPU)[0], test_set.images, normalize=False).argmax(1).tolist()
    assert [int(label) for _, label in rows_of(tmp_path / "labels.csv")[1:]] == plain


# --- labels for pictures ---------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(test_set, tmp_path):
    """Give a folder with the first 20 test images as PNG files, some deeper than others, and a text file."""
    folder = tmp_path / "pictures"
    (folder / "deeper").mkdir(parents=True)
    for i, image in enumerate(test_set.images[:20].numpy()):
        Image.fromarray(image).save(folder / ("deeper" if i % 3 else ".") / f"{i:02}{'.PNG' if i % 2 else '.png'}")
    (folder / "notes.txt").write_text("not a picture")
    return folder


def test_pictures_of_a_folder(run, expected, test_set, pictures, tmp_path):
    assert run("--predict", pictures, "--output", tmp_path / "labels.csv") == 0
    header, *rows = rows_of(tmp_path / "labels.csv")
    assert header == ["path", "class", "probability"]
    assert [row[0] for row in rows] == sorted(str(path) for path in pictures.rglob("*.[pP]*"))
    for path, name, probability in rows:
        row = expected[int(re.search(r"(\d\d)\.", path)[1])]
        assert name == test_set.classes[row.argmax()]
        assert float(probability) == pytest.approx(row.max().item(), abs=1e-4)


def test_jpeg_files_and_other_sizes_and_modes(run, test_set, tmp_path):
    image = Image.fromarray(test_set.images[0].numpy())
    image.save(tmp_path / "a.jpg", quality=95)
    image.resize((200, 150)).save(tmp_path / "b.JPEG")
    for mode in ("RGBA", "L", "P", "LA", "1"):
        image.convert(mode).save(tmp_path / f"{mode}.png")
    files = [tmp_path / name for name in ("b.JPEG", "a.jpg", "RGBA.png", "L.png", "P.png", "LA.png", "1.png")]
    assert run("--predict", *files, "--output", tmp_path / "labels.csv") == 0
    rows = rows_of(tmp_path / "labels.csv")[1:]
    assert [row[0] for row in rows] == [str(path) for path in files]  # in the order given
    assert all(row[1] in test_set.classes and 0.1 <= float(row[2]) <= 1 for row in rows)


def test_a_picture_is_resized_to_32_by_32(test_set, tmp_path):
    image = test_set.images[0].numpy()
    Image.fromarray(image).resize((96, 96), Image.Resampling.NEAREST).save(tmp_path / "large.png")
    Image.fromarray(image).save(tmp_path / "same.png")
    assert np.array_equal(evaluate.read_picture(tmp_path / "same.png"), image)
    found = evaluate.read_picture(tmp_path / "large.png")
    assert found.shape == (32, 32, 3) and found.dtype == np.uint8
    assert np.abs(found.astype(int) - image).mean() < 8
    board = np.indices((96, 64)).sum(0, dtype=np.uint8) % 2 * 255
    Image.fromarray(board).save(tmp_path / "board.png")
    assert np.abs(evaluate.read_picture(tmp_path / "board.png").astype(int) - 127).max() < 30  # no pixel is left out


def test_names_that_are_no_utf8(run, test_set, tmp_path):
    path = tmp_path / b"caf\xe9,\n.png".decode("utf-8", "surrogateescape")
    try:
        Image.fromarray(test_set.images[0].numpy()).save(path)
    except OSError:
        pytest.skip("the file system takes no such name")
    assert run("--predict", path, "--output", tmp_path / "labels.csv") == 0
    with open(tmp_path / "labels.csv", errors="surrogateescape", newline="") as file:
        assert list(csv.reader(file))[1][0] == str(path)


# --- published checkpoints -------------------------------------------------------------------------------------------


def publish(path, model: nn.Module):
    """Write weights as the published code does."""
    config = {"model": "SENet", "num_blocks": [1, 1, 1], "lr": 0.1, "optim": "sgd", "nothing": None}
    torch.save({"net": {f"module.{name}": value for name, value in model.state_dict().items()}, "acc": 93.21,
                "epoch": 187, "config": config}, path)
    return path


def test_a_published_checkpoint_is_the_default_network(run, tmp_path, capsys):
    torch.manual_seed(3)
    network = models.build_model()
    published = publish(tmp_path / "ckpt.pth", network)
    loaded, info = evaluate.load_model(published, CPU)
    assert all(torch.equal(value, network.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert info["classes"] == list(evaluate.batches.CLASSES) and info["normalize"]
    assert run("--evaluate", "--limit-test", "10", checkpoint=published) == 0
    assert "10 images" in capsys.readouterr().out


def test_a_published_checkpoint_predicts_and_begins_a_run(monkeypatch, run, run_train, trained, expected, test_set,
                                                          tmp_path):
    monkeypatch.setattr(plots, "safely", lambda *_: None)
    published = publish(tmp_path / "ckpt.pth", evaluate.load_model(trained, CPU)[0])
    hidden = pickled(tmp_path / "hidden", test_set.images, 5)
    assert run("--predict", hidden, "--output", tmp_path / "labels.csv", *MODEL, checkpoint=published) == 0
    labels = [int(label) for _, label in rows_of(tmp_path / "labels.csv")[1:]]
    assert labels == expected.argmax(1).tolist()
    flags = ["--init", str(published), "--epochs", "1", "--lr", "0", "--batch-size", "96"]  # nothing moves
    assert run_train(*flags) == 0
    begun = load_checkpoint(tmp_path / "runs" / "se-resnet" / "last.pt")["model"]
    weights = load_checkpoint(trained)["model"]
    assert all(torch.equal(begun[name], value) for name, value in weights.items() if "running" not in name
               and "num_batches" not in name)


# --- what is refused -------------------------------------------------------------------------------------------------


def png(width: int, height: int) -> bytes:
    """Make a PNG file of some sixty bytes that claims to be of any size."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def refused(run, capsys, *flags, **where) -> str:
    """Run what must fail with one line and status 2, and give that line."""
    assert run(*flags, **where) == 2
    line = capsys.readouterr().err
    assert line.startswith("train.py: error: ") and line.count("\n") == 1
    return line


BAD = {
    "none.png": None,
    "none.pickle": None,
    "text.png": b"this is a text file",
    "empty.png": b"",
    "bomb.png": png(60_000, 60_000),
    "large.png": png(10_000, 10_000),
    "smaller.png": png(8_000, 8_000),
    "short.png": png(32, 32),
    "text.pickle": b"this is a text file",
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_by_name(run, tmp_path, capsys, recwarn, name):
    if BAD[name] is not None:
        (tmp_path / name).write_bytes(BAD[name])
    line = refused(run, capsys, "--predict", tmp_path / name, "--output", tmp_path / "labels.csv")
    assert name in line and ("pixels" in line) == (name in ("bomb.png", "large.png", "smaller.png"))
    assert not (tmp_path / "labels.csv").exists()
    assert not [each for each in recwarn if issubclass(each.category, UserWarning | RuntimeWarning)]  # a second line


def test_one_bad_picture_of_a_folder_is_named(run, pictures, tmp_path, capsys):
    (pictures / "deeper" / "bad.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more than a beginning")
    assert "bad.jpg" in refused(run, capsys, "--predict", pictures, "--output", tmp_path / "labels.csv")


def test_a_folder_called_like_a_picture_is_none(run, pictures, tmp_path):
    (pictures / "folder.png").mkdir()
    assert run("--predict", pictures, "--output", tmp_path / "labels.csv") == 0
    assert len(rows_of(tmp_path / "labels.csv")) == 21


def test_mixed_and_empty_sources_are_refused(run, pictures, test_set, tmp_path, capsys):
    hidden, output = pickled(tmp_path / "hidden", test_set.images, 5), tmp_path / "labels.csv"
    line = refused(run, capsys, "--predict", pictures / "00.png", hidden, "--output", output)
    assert "hidden" in line and "00.png" in line
    (tmp_path / "nothing").mkdir()
    assert "nothing" in refused(run, capsys, "--predict", tmp_path / "nothing", "--output", output)
    assert not output.exists()


def test_an_output_that_cannot_be_written_is_refused(run, test_set, tmp_path, capsys):
    hidden = pickled(tmp_path / "hidden", test_set.images[:2], 5)
    for output in (hidden / "labels.csv", tmp_path):
        assert "--output" in refused(run, capsys, "--predict", hidden, "--output", output)
    assert [path.name for path in tmp_path.iterdir()] == ["hidden"]
    assert str(hidden) in refused(run, capsys, "--evaluate", "--output", hidden / "pictures")


@pytest.mark.parametrize("flags", [["--channels", "32"], ["--num-blocks", "1", "1"], ["--block", "preact"],
                                   ["--se", "none"], ["--no-normalize"]])
def test_flags_that_contradict_the_checkpoint_are_refused_by_name(run, capsys, flags):
    assert flags[0].replace("--no-", "--") in refused(run, capsys, "--evaluate", *flags)
    assert run("--evaluate", *MODEL, "--normalize") == 0  # equal ones are fine


def test_flags_that_do_not_fit_a_published_checkpoint_are_refused(run, trained, tmp_path, capsys):
    published = publish(tmp_path / "ckpt.pth", evaluate.load_model(trained, CPU)[0])
    line = refused(run, capsys, "--evaluate", checkpoint=published)
    assert "another architecture" in line and "ckpt.pth" in line
    with pytest.raises(UserError, match="another architecture"):
        evaluate.load_model(published, CPU, {"num_blocks": [1, 1, 1], "channels": 32})


def test_a_missing_checkpoint_is_refused(run, tmp_path, capsys):
    assert "nowhere.pt" in refused(run, capsys, "--evaluate", checkpoint=tmp_path / "nowhere.pt")


@pytest.mark.parametrize("args", [{"channels": 1_000_000}, {"num_blocks": [1, 1, 90]}, {"channels": "16"},
                                  {"block": "none such"}, {"num_blocks": None}, {"se_reduction": 0}, []])
def test_a_checkpoint_that_claims_another_network_than_it_holds(run, trained, tmp_path, capsys, args):
    checkpoint = torch.load(trained)
    checkpoint["args"] = {**checkpoint["args"], **args} if args else args
    torch.save(checkpoint, tmp_path / "liar.pt")
    assert "liar.pt" in refused(run, capsys, "--evaluate", checkpoint=tmp_path / "liar.pt")


def test_both_files_of_a_run_have_the_accuracy_of_its_metrics(run, trained, capsys):
    rows = [float(row["test_accuracy"]) for row in csv.DictReader((trained.parent / "metrics.csv").open())]
    for name, accuracy in (("last.pt", rows[-1]), ("best.pt", max(rows))):
        assert run("--evaluate", checkpoint=trained.parent / name) == 0
        assert float(accuracy_of(capsys.readouterr().out)) == accuracy
