"""Labels for hidden test sets, as pickles and as pictures; and what is refused."""

import csv
import os
import pickle
import re
import struct
import zlib

import numpy as np
import pytest
import torch
from conftest import TINY, accuracy_of, one_by_one, publish, refused
from PIL import Image

import evaluate
import plots
import predict
from utils import load_checkpoint

CPU = torch.device("cpu")
MODEL = TINY[:TINY.index("--batch-size")]  # the flags of the network


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
def test_labels_of_a_hidden_test_set(run_mode, expected, test_set, tmp_path, capsys, protocol):
    ids = np.random.default_rng(0).permutation(10_000)[:50]
    assert run_mode("--predict", pickled(tmp_path / "hidden", test_set.images, protocol, ids=ids),
               "--output", tmp_path / "labels.csv") == 0
    assert "50 labels" in capsys.readouterr().out
    text = (tmp_path / "labels.csv").read_text()
    assert text.startswith("ID,Labels\n") and text.endswith("\n") and "\r" not in text
    rows = rows_of(tmp_path / "labels.csv")[1:]
    assert rows == [[str(i), str(label)] for i, label in zip(ids, expected.argmax(1).tolist(), strict=True)]
    hits = sum(int(label) == target for (_, label), target in zip(rows, test_set.targets.tolist(), strict=True))
    assert run_mode("--evaluate") == 0
    assert accuracy_of(capsys.readouterr().out) == f"{100 * hits / 50:.2f}"
    assert len({label for _, label in rows}) > 2


def test_several_pickles_without_ids_are_counted_on(run_mode, expected, test_set, tmp_path):
    files = [pickled(tmp_path / "b", test_set.images[:20], 5), pickled(tmp_path / "a", test_set.images[20:], 4)]
    assert run_mode("--predict", *files, "--output", tmp_path / "labels.csv") == 0
    assert rows_of(tmp_path / "labels.csv")[1:] == [[str(i), str(label)]
                                                    for i, label in enumerate(expected.argmax(1).tolist())]


def test_tta_reaches_predict(run_mode, trained, test_set, tmp_path):
    hidden = pickled(tmp_path / "hidden", test_set.images, 5)
    assert run_mode("--predict", hidden, "--output", tmp_path / "labels.csv", "--tta") == 0
    logits = evaluate.predict_logits(evaluate.load_model(trained, CPU)[0], test_set.images, CPU, tta=True)
    assert [int(label) for _, label in rows_of(tmp_path / "labels.csv")[1:]] == logits.argmax(1).tolist()


def test_a_network_trained_without_normalisation_is_used_without(trained, run_mode, test_set, tmp_path):
    checkpoint = torch.load(trained)
    checkpoint["args"]["normalize"] = False
    torch.save(checkpoint, tmp_path / "plain.pt")
    hidden = pickled(tmp_path / "hidden", test_set.images, 5)
    assert run_mode("--predict", hidden, "--output", tmp_path / "labels.csv", checkpoint=tmp_path / "plain.pt") == 0
    plain = one_by_one(evaluate.load_model(trained, CPU)[0], test_set.images, normalize=False).argmax(1).tolist()
    assert [int(label) for _, label in rows_of(tmp_path / "labels.csv")[1:]] == plain


def test_a_published_checkpoint_predicts_and_begins_a_run(monkeypatch, run_mode, run_train, trained, expected, test_set,
                                                          tmp_path):
    monkeypatch.setattr(plots, "safely", lambda *_: None)
    published = publish(tmp_path / "ckpt.pth", evaluate.load_model(trained, CPU)[0])
    hidden = pickled(tmp_path / "hidden", test_set.images, 5)
    assert run_mode("--predict", hidden, "--output", tmp_path / "labels.csv", *MODEL, checkpoint=published) == 0
    labels = [int(label) for _, label in rows_of(tmp_path / "labels.csv")[1:]]
    assert labels == expected.argmax(1).tolist()
    flags = ["--init", str(published), "--epochs", "1", "--lr", "0", "--batch-size", "96"]  # nothing moves
    assert run_train(*flags) == 0
    begun = load_checkpoint(tmp_path / "runs" / "se-resnet" / "last.pt")["model"]
    weights = load_checkpoint(trained)["model"]
    assert all(torch.equal(begun[name], value) for name, value in weights.items() if "running" not in name
               and "num_batches" not in name)


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


def test_pictures_of_a_folder(run_mode, expected, test_set, pictures, tmp_path):
    assert run_mode("--predict", pictures, "--output", tmp_path / "labels.csv") == 0
    header, *rows = rows_of(tmp_path / "labels.csv")
    assert header == ["path", "class", "probability"]
    assert [row[0] for row in rows] == sorted(str(path) for path in pictures.rglob("*.[pP]*"))
    for path, name, probability in rows:
        row = expected[int(re.search(r"(\d\d)\.", path)[1])]
        assert name == test_set.classes[row.argmax()]
        assert float(probability) == pytest.approx(row.max().item(), abs=1e-4)


def test_jpeg_files_and_other_sizes_and_modes(run_mode, test_set, tmp_path):
    image = Image.fromarray(test_set.images[0].numpy())
    image.save(tmp_path / "a.jpg", quality=95)
    image.resize((200, 150)).save(tmp_path / "b.JPEG")
    for mode in ("RGBA", "L", "P", "LA", "1"):
        image.convert(mode).save(tmp_path / f"{mode}.png")
    files = [tmp_path / name for name in ("b.JPEG", "a.jpg", "RGBA.png", "L.png", "P.png", "LA.png", "1.png")]
    assert run_mode("--predict", *files, "--output", tmp_path / "labels.csv") == 0
    rows = rows_of(tmp_path / "labels.csv")[1:]
    assert [row[0] for row in rows] == [str(path) for path in files]  # in the order given
    assert all(row[1] in test_set.classes and 0.1 <= float(row[2]) <= 1 for row in rows)


def test_sixteen_bits_of_grey_are_scaled_down(test_set, tmp_path):
    grey = np.asarray(Image.fromarray(test_set.images[0].numpy()).convert("L"))
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "wide.png")
    assert Image.open(tmp_path / "wide.png").mode.startswith("I")
    assert np.array_equal(predict.read_picture(tmp_path / "wide.png"), np.stack([grey] * 3, -1))


def test_a_picture_is_resized_to_32_by_32(test_set, tmp_path):
    image = test_set.images[0].numpy()
    Image.fromarray(image).resize((96, 96), Image.Resampling.NEAREST).save(tmp_path / "large.png")
    Image.fromarray(image).save(tmp_path / "same.png")
    assert np.array_equal(predict.read_picture(tmp_path / "same.png"), image)
    found = predict.read_picture(tmp_path / "large.png")
    assert found.shape == (32, 32, 3) and found.dtype == np.uint8
    assert np.abs(found.astype(int) - image).mean() < 8
    board = np.indices((96, 64)).sum(0, dtype=np.uint8) % 2 * 255
    Image.fromarray(board).save(tmp_path / "board.png")
    assert np.abs(predict.read_picture(tmp_path / "board.png").astype(int) - 127).max() < 30  # no pixel is left out


def test_names_that_are_no_utf8(run_mode, test_set, tmp_path):
    path = tmp_path / b"caf\xe9,\n.png".decode("utf-8", "surrogateescape")
    try:
        Image.fromarray(test_set.images[0].numpy()).save(path)
    except OSError:
        pytest.skip("the file system takes no such name")
    assert run_mode("--predict", path, "--output", tmp_path / "labels.csv") == 0
    with open(tmp_path / "labels.csv", errors="surrogateescape", newline="") as file:
        assert list(csv.reader(file))[1][0] == str(path)


# --- what is refused -------------------------------------------------------------------------------------------------


def png(width: int, height: int) -> bytes:
    """Make a PNG file of some sixty bytes that claims to be of any size."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


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


def test_a_picture_of_another_kind_is_told_which_there_are(run_mode, pictures, tmp_path, capsys):
    Image.open(pictures / "00.png").save(tmp_path / "a.bmp")
    line = refused(run_mode, capsys, "--predict", tmp_path / "a.bmp", "--output", tmp_path / "labels.csv")
    assert "a.bmp" in line and "a picture named .png, .jpg or .jpeg" in line


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_links_and_pipes_are_written_to_and_stay(run_mode, test_set, tmp_path):
    hidden, target, link = (tmp_path / name for name in ("hidden", "labels.csv", "link.csv"))
    pickled(hidden, test_set.images, 5)
    link.symlink_to(target)
    assert run_mode("--predict", hidden, "--output", link) == 0
    assert link.is_symlink() and len(rows_of(target)) == 51
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    assert run_mode("--predict", hidden, "--output", tmp_path / "pipe") == 0
    assert os.read(reader, 10_000) == target.read_bytes()
    os.close(reader)


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_by_name(run_mode, tmp_path, capsys, recwarn, name):
    if BAD[name] is not None:
        (tmp_path / name).write_bytes(BAD[name])
    line = refused(run_mode, capsys, "--predict", tmp_path / name, "--output", tmp_path / "labels.csv")
    assert name in line and ("pixels" in line) == (name in ("bomb.png", "large.png", "smaller.png"))
    assert not (tmp_path / "labels.csv").exists()
    assert not [each for each in recwarn if issubclass(each.category, UserWarning | RuntimeWarning)]  # a second line


def test_one_bad_picture_of_a_folder_is_named(run_mode, pictures, tmp_path, capsys):
    (pictures / "deeper" / "bad.jpg").write_bytes(b"\xff\xd8\xff\xe0 no more than a beginning")
    assert "bad.jpg" in refused(run_mode, capsys, "--predict", pictures, "--output", tmp_path / "labels.csv")


def test_a_folder_called_like_a_picture_is_none(run_mode, pictures, tmp_path):
    (pictures / "folder.png").mkdir()
    assert run_mode("--predict", pictures, "--output", tmp_path / "labels.csv") == 0
    assert len(rows_of(tmp_path / "labels.csv")) == 21


def test_mixed_and_empty_sources_are_refused(run_mode, pictures, test_set, tmp_path, capsys):
    hidden, output = pickled(tmp_path / "hidden", test_set.images, 5), tmp_path / "labels.csv"
    line = refused(run_mode, capsys, "--predict", pictures / "00.png", hidden, "--output", output)
    assert "hidden" in line and "00.png" in line
    (tmp_path / "nothing").mkdir()
    assert "nothing" in refused(run_mode, capsys, "--predict", tmp_path / "nothing", "--output", output)
    assert not output.exists()


def test_an_output_that_cannot_be_written_is_refused(run_mode, test_set, tmp_path, capsys):
    hidden = pickled(tmp_path / "hidden", test_set.images[:2], 5)
    for output in (hidden / "labels.csv", tmp_path):
        assert "--output" in refused(run_mode, capsys, "--predict", hidden, "--output", output)
    assert [path.name for path in tmp_path.iterdir()] == ["hidden"]
    assert str(hidden) in refused(run_mode, capsys, "--evaluate", "--output", hidden / "pictures")
