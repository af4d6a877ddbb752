"""Labels for pickles and for image files, where they are written, and what is refused."""

import csv
import io
import os
import pickle
import re
import sys

import numpy as np
import pytest
import torch
from conftest import one_by_one
from PIL import Image

import evaluate
import predict


def write_pickle(path, images, protocol=5, ids=None):
    """Write a test set without labels: planar rows in protocol 5, or whole images in protocol 4."""
    images = images.numpy() if protocol == 4 else images.permute(0, 3, 1, 2).reshape(len(images), -1).numpy()
    path.write_bytes(pickle.dumps({b"data": images} | ({} if ids is None else {b"ids": ids}), protocol))
    return path


def read_rows(path) -> list[list[str]]:
    return list(csv.reader(io.StringIO(path.read_bytes().decode(errors="surrogateescape"), newline="")))


@pytest.fixture
def photo(test_set, tmp_path):
    """One image as a PNG file."""
    Image.fromarray(test_set.images[0].numpy()).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def folder(test_set, tmp_path):
    """The first 20 test images in a tree of folders, with a text file and a folder named like an image."""
    root = tmp_path / "images"
    (root / "deeper/folder.png").mkdir(parents=True)
    for i, image in enumerate(test_set.images[:20].numpy()):
        Image.fromarray(image).save(root / ("deeper" if i % 3 else ".") / f"{i:02}{'.PNG' if i % 2 else '.png'}")
    (root / "notes.txt").write_text("not an image")
    return root


@pytest.fixture
def plain(trained, tmp_path):
    """A checkpoint that claims a training with --no-normalize."""
    checkpoint = torch.load(trained)
    checkpoint["args"]["normalize"] = False
    torch.save(checkpoint, tmp_path / "plain.pt")
    return tmp_path / "plain.pt"


@pytest.fixture
def refused(run_predict, capsys):
    """A function that runs predict.py on what must fail with one line and status 2, and returns that line."""
    def run(*argv) -> str:
        assert run_predict(*argv) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and re.fullmatch(r"predict\.py: error: .*\n", printed.err)
        return printed.err
    return run

@pytest.mark.parametrize("ids", [None, np.random.default_rng(0).permutation(10_000)[:50]])
def test_pickled_images_of_both_forms(run_predict, expected, test_set, tmp_path, ids):
    files = [write_pickle(tmp_path / name, test_set.images[rows], protocol, None if ids is None else ids[rows])
             for name, rows, protocol in (("b", slice(20), 5), ("a", slice(20, 50), 4))]
    assert run_predict(*files, "--output", tmp_path / "new/folder/labels.csv") == 0
    labels = expected.argmax(1).tolist()
    lines = ["ID,Labels", *(f"{i},{label}" for i, label in zip(range(50) if ids is None else ids, labels, strict=True))]
    assert (tmp_path / "new/folder/labels.csv").read_bytes().decode() == "\n".join(lines) + "\n"
    assert len(set(labels)) > 2

@pytest.mark.parametrize("case", ["default", "tta", "plain"])
def test_a_folder_of_images(case, run_predict, trained, plain, test_set, folder, tmp_path):
    model, images = evaluate.load_checkpoint_model(trained)[0], test_set.images[:20]
    probabilities = one_by_one(model, images, normalize=case != "plain").softmax(1)
    if case == "tta":
        probabilities = (probabilities + one_by_one(model, images.flip(2)).softmax(1)) / 2
    assert run_predict(folder, "--output", tmp_path / "labels.csv", *["--tta"] * (case == "tta"),
                       checkpoint=plain if case == "plain" else trained) == 0
    header, *rows = read_rows(tmp_path / "labels.csv")
    assert header == ["path", "class", "probability"] and len(rows) == 20
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    for path, name, probability in rows:
        row = probabilities[int(re.search(r"(\d\d)\.", path)[1])]
        assert name == test_set.classes[row.argmax()]
        assert float(probability) == pytest.approx(row.max().item(), abs=1e-4)


def test_an_unreadable_image_of_several_is_skipped(run_predict, folder, tmp_path, capsys):
    (folder / "deeper/bad.jpg").write_bytes((folder / "00.png").read_bytes()[:-200])
    assert run_predict(folder, "--output", tmp_path / "labels.csv") == 2
    lines = capsys.readouterr().err.splitlines()
    assert "warning: skipped" in lines[0] and "bad.jpg is not a readable PNG or JPEG image" in lines[0]
    assert lines[-1] == "predict.py: error: 1 of 21 images could not be read"
    assert len(read_rows(tmp_path / "labels.csv")) == 21


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16", "CMYK"])
def test_modes_of_images(test_set, tmp_path, mode):
    image = Image.fromarray(test_set.images[0].numpy().repeat(8, 0).repeat(8, 1)[:32, :32])  # smooth enough for JPEG
    image = stored = image.convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        stored = Image.fromarray(np.asarray(image).astype(np.uint16) * 256 + 99)
    stored.save(tmp_path / "image.png", "JPEG" if mode == "CMYK" else "PNG", quality=100)
    found = predict.read_image(tmp_path / "image.png")
    assert found.shape == (32, 32, 3) and found.dtype == np.uint8 and found.flags.writeable
    assert np.abs(found - np.asarray(image.convert("RGB")).astype(int)).max() <= (8 if mode == "CMYK" else 0)


def test_a_photo_taken_sideways_is_read_upright(test_set, tmp_path):
    upright = test_set.images[0].numpy().repeat(8, 0).repeat(8, 1)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn right to view
    Image.fromarray(np.rot90(upright)).save(tmp_path / "phone.jpg", quality=95, exif=exif)
    found = predict.read_image(tmp_path / "phone.jpg")
    assert found.flags.writeable and np.abs(found.astype(int) - test_set.images[0].numpy()).mean() < 8
    assert np.abs(np.rot90(found).astype(int) - test_set.images[0].numpy()).mean() > 16


def test_images_are_resized_and_no_pixel_is_left_out(tmp_path):
    Image.new("RGB", (1, 1), (10, 20, 30)).save(tmp_path / "tiny.png")
    assert (predict.read_image(tmp_path / "tiny.png") == [10, 20, 30]).all()
    board = np.tile(np.array([[0, 255], [255, 0]], np.uint8), (1500, 2000))
    Image.fromarray(board).save(tmp_path / "board.png")  # 12 megapixels
    assert np.abs(predict.read_image(tmp_path / "board.png").astype(int) - 127).max() < 30

@pytest.mark.skipif(sys.platform != "linux", reason="other file systems take no such names")
@pytest.mark.parametrize("flags", [[], ["--output", "-"]])
@pytest.mark.parametrize("name", ["Bär 1.png", b"caf\xe9,\n.png".decode("utf-8", "surrogateescape")])
def test_without_a_file_the_labels_alone_are_printed_whatever_the_names(run_predict, photo, tmp_path, monkeypatch,
                                                                        capsys, name, flags):
    path = photo.rename(tmp_path / name)
    assert run_predict(path, "--output", tmp_path / "labels.csv") == 0
    assert read_rows(tmp_path / "labels.csv")[1][0] == str(path)
    with monkeypatch.context() as patch, io.TextIOWrapper(io.BytesIO(), encoding="ascii") as stdout:
        patch.setattr(sys, "stdout", stdout)
        assert run_predict(path, *flags) == 0
        assert stdout.buffer.getvalue() == (tmp_path / "labels.csv").read_bytes()
    assert re.fullmatch(r"1 labels in .*labels\.csv\n", capsys.readouterr().err)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipes_are_written_to(run_predict, photo, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    named, (reader, writer) = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK), os.pipe()
    for output in (tmp_path / "pipe", f"/dev/fd/{writer}"):  # what >(command) and /dev/stdout stand for
        assert run_predict(photo, "--output", output) == 0
    text = os.read(named, 10_000)
    assert text.startswith(b"path,class,probability\n") and text == os.read(reader, 10_000)
    for descriptor in (named, reader, writer):
        os.close(descriptor)


def test_an_output_that_cannot_be_written_is_refused_before_images_are_labeled(refused, photo, tmp_path, monkeypatch):
    monkeypatch.setattr(predict, "predict_logits", None)
    for output in (tmp_path, photo / "labels.csv"):
        assert str(output) in refused(photo, "--output", output)
    assert list(tmp_path.iterdir()) == [photo]

@pytest.mark.parametrize("name, content", {
    "text.png": b"this is a text file", "notes.txt": b"this is a text file", "empty.png": b"", "empty.pickle": b"",
    "a.gif": "GIF", "a.webp": "WEBP", "webp.png": "WEBP", "start.jpg": b"\xff\xd8\xff\xe0"}.items())
def test_files_that_are_no_readable_image(name, content, refused, photo, tmp_path):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        Image.open(photo).save(path, content)
    line = refused(path, "--output", tmp_path / "labels.csv")
    assert f"{name} is not a readable PNG or JPEG image" in line and "pickle" not in line.replace(name, "")
    assert not (tmp_path / "labels.csv").exists()


def test_other_sources_that_are_refused(refused, photo, test_set, tmp_path):
    hidden = write_pickle(tmp_path / "hidden", test_set.images)
    assert re.search("hidden is a pickle and .*photo.png an image", refused(photo, hidden))
    assert "nowhere.png: no such file or folder" in refused(tmp_path / "nowhere.png")
    (tmp_path / "nothing").mkdir()
    assert "nothing: the folder has no .png, .jpg, .jpeg file" in refused(tmp_path / "nothing")
    hidden.write_bytes(hidden.read_bytes()[:-100])
    assert "hidden" in refused(hidden)

@pytest.mark.parametrize("normalize", [True, False])
def test_load_model_takes_floats_from_0_to_1(normalize, trained, plain, test_set):
    model, classes = predict.load_model(trained if normalize else plain)
    with torch.no_grad():
        found = model(test_set.images.permute(0, 3, 1, 2) / 255)
    wanted = one_by_one(evaluate.load_checkpoint_model(trained)[0], test_set.images, normalize)
    torch.testing.assert_close(found.softmax(1), wanted.softmax(1), rtol=1e-4, atol=1e-5)
    assert classes == test_set.classes and not any(module.training for module in model.modules())
