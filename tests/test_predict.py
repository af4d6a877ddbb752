"""Labels for pickles and for image files, where they are written, and what is refused."""

import csv
import io
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import one_by_one, six_views
from PIL import Image

import evaluate
import plots
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
    """The first 20 test images in a tree of folders, some behind links, with what must be skipped beside them."""
    root, outside = tmp_path / "images", tmp_path / "outside"
    for place in ("deeper/folder.png", "__MACOSX", ".cache"):
        (root / place).mkdir(parents=True)
    outside.mkdir()
    for i, image in enumerate(test_set.images[:20].numpy()):
        place = outside if i == 7 else root / "deeper" if i % 3 else root
        Image.fromarray(image).save(place / f"{i:02}{'.PNG' if i % 2 else '.png'}")
    for link, target in (("deeper/linked", outside), ("alias", root / "deeper"), ("deeper/loop", root)):
        (root / link).symlink_to(target)
    (outside / "back").symlink_to(root)
    for name in ("notes.txt", "a.webp", "b.webp", "__MACOSX/00.png", ".cache/00.png", "deeper/._01.png"):
        (root / name).write_text("not an image")
    return root


@pytest.fixture
def plain(trained, tmp_path):
    """A checkpoint that claims a training with --no-normalize."""
    checkpoint = torch.load(trained)
    checkpoint["args"]["normalize"] = False
    torch.save(checkpoint, tmp_path / "plain.pt")
    return tmp_path / "plain.pt"


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
def test_a_folder_of_images(case, run_predict, trained, plain, test_set, folder, tmp_path, capsys):
    model, images = evaluate.load_checkpoint_model(trained)[0], test_set.images[:20]
    probabilities = one_by_one(model, images, normalize=case != "plain").softmax(1)
    if case == "tta":
        probabilities = six_views(model, images)
    assert run_predict(folder, "--output", tmp_path / "labels.csv", *["--tta"] * (case == "tta"),
                       checkpoint=plain if case == "plain" else trained) == 0
    header, *rows = read_rows(tmp_path / "labels.csv")
    assert header == ["path", "class", "probability"] and len(rows) == 20
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)
    assert {str(Path(row[0]).parent.relative_to(folder)) for row in rows} == {".", "deeper", "deeper/linked"}
    assert capsys.readouterr().err == (f"warning: {folder}: other files left out: 3 (.txt, .webp)\n"
                                       f"20 labels in {tmp_path / 'labels.csv'}\n")
    for path, name, probability in rows:
        row = probabilities[int(re.search(r"(\d\d)\.", path)[1])]
        assert name == test_set.classes[row.argmax()]
        assert float(probability) == pytest.approx(row.max().item(), abs=1e-4)


def test_unreadable_images_of_several_are_skipped(run_predict, folder, tmp_path, capsys):
    (folder / "deeper/bad.jpg").write_bytes((folder / "00.png").read_bytes()[:-200])
    (folder / "moved.png").symlink_to("nowhere")
    assert run_predict(folder, "--output", tmp_path / "labels.csv") == 2
    _, *lines = capsys.readouterr().err.splitlines()
    assert "warning: skipped" in lines[0] and "bad.jpg is not a readable PNG or JPEG image" in lines[0]
    assert "moved.png" in lines[1] and lines[-1] == "predict.py: error: 2 of 22 images could not be read"
    assert len(read_rows(tmp_path / "labels.csv")) == 21


def test_a_file_that_is_named_is_always_tried(run_predict, photo, tmp_path, capsys):
    paths = [photo.rename(tmp_path / "._a.png"), tmp_path / "b.webp", tmp_path / "c"]
    for path in paths[1:]:
        path.write_bytes(paths[0].read_bytes())
    assert run_predict(*paths) == 0
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()[1:]] == [*map(str, paths)]


@pytest.mark.parametrize("count", [20, 36])  # a folder; the first of a pickle
def test_a_picture_of_the_labeled_images(count, run_predict, folder, test_set, expected, tmp_path, monkeypatch):
    drawn, draw_images = [], plots.draw_images
    monkeypatch.setattr(plots, "draw_images", lambda *args: drawn.extend(draw_images(*args).axes))
    path = folder if count == 20 else write_pickle(tmp_path / "p", test_set.images, 5, np.arange(50))
    assert run_predict(path, "--output", tmp_path / "labels.csv", "--picture", tmp_path / "new/labels.png") == 0
    assert Image.open(tmp_path / "new/labels.png").format == "PNG" and len(drawn) == count
    for axes, (name, *_) in zip(drawn, read_rows(tmp_path / "labels.csv")[1:], strict=False):
        index, (confidence, best) = int(Path(name).stem), expected[int(Path(name).stem)].max(0)
        assert np.array_equal(axes.images[0].get_array(), test_set.images[index])
        assert [text.get_text() for text in axes.texts] == [
            Path(name).name if count == 20 else f"ID {name}", f"{test_set.classes[best]} {100 * confidence:.1f}%"]


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


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
@pytest.mark.parametrize("hidden", [30, 220])
def test_transparent_pixels_are_white_whatever_their_hidden_color(tmp_path, monkeypatch, recwarn, mode, hidden):
    alpha, transparency = np.zeros((32, 32), np.uint8), None
    alpha[4:28, 4:28], alpha[8:24, 8:24] = 128, 255
    image = Image.fromarray(np.where(alpha, 110, hidden).astype(np.uint8)).convert(mode[:-1] if "A" in mode else "L")
    if mode == "P":
        image, transparency = Image.fromarray(alpha // 127).convert("P"), bytes([0, 128, 255])
        image.putpalette([hidden] * 3 + [110] * 6)
    else:
        image.putalpha(Image.fromarray(alpha))
    image.save(tmp_path / "image.png", transparency=transparency)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # makes Pillow warn of a large image
    found = predict.read_image(tmp_path / "image.png")
    expected = (110.0 * alpha + 255 * (255.0 - alpha)) / 255
    assert image.mode == mode and np.abs(found - expected[:, :, None]).max() <= 1 and not list(recwarn)


@pytest.mark.parametrize("mode, color", [("L", 85), ("RGB", (85, 85, 85))])
def test_a_transparent_color_becomes_white(tmp_path, mode, color):
    image = Image.new(mode, (32, 32))
    image.paste(color, (0, 0, 16, 32))  # left transparent, right black
    image.save(tmp_path / "image.png", transparency=color)
    assert (predict.read_image(tmp_path / "image.png") == np.repeat([255, 0], 16)[:, None]).all()


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
        patch.setattr(sys, "stdout", None)  # closed, as by >&-; of a notebook below: neither can be reconfigured
        assert run_predict(path, *flags) == 0
        patch.setattr(sys, "stdout", io.StringIO())
        assert run_predict(path, *flags) == 0 and sys.stdout.getvalue().startswith("path,class,probability\n")
    assert re.fullmatch(r"1 label in .*labels\.csv\n", capsys.readouterr().err)


@pytest.mark.skipif(not os.path.exists("/dev/fd"), reason="needs /dev/fd")
def test_pipes_are_written_to(run_predict, photo):
    reader, writer = os.pipe()
    assert run_predict(photo, "--output", f"/dev/fd/{writer}") == 0  # what >(command) and /dev/stdout stand for
    assert os.read(reader, 10_000).startswith(b"path,class,probability\n")
    os.close(reader)
    os.close(writer)


def test_an_output_that_cannot_be_written_is_refused_at_once(run_predict, refused, trained, photo, tmp_path,
                                                             monkeypatch):
    monkeypatch.setattr(predict, "predict_logits", None)
    for flag in ("--output", "--picture"):
        for output in (tmp_path, photo / "labels.csv"):
            assert str(output) in refused(run_predict, photo, flag, output)
    for flags in (["--output", photo], ["--picture", tmp_path / "a" / ".." / photo.name], ["--output", trained],
                  ["--output", tmp_path / "x", "--picture", tmp_path / "x"]):
        assert f"{flags[-1]} is an input or another output" in refused(run_predict, photo, *flags)
    assert list(tmp_path.iterdir()) == [photo]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_labels_that_cannot_be_printed_are_an_error(trained, photo):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, predict.__file__, trained, photo], stdout=full, stderr=subprocess.PIPE,
                              text=True)
    assert (done.returncode, done.stderr) == (1, "predict.py: error: stdout: No space left on device\n")


@pytest.mark.parametrize("name, content", {
    "text.png": b"this is a text file", "notes.txt": b"this is a text file", "empty.png": b"", "empty.pickle": b"",
    "a.gif": "GIF", "webp.png": "WEBP", "start.jpg": b"\xff\xd8\xff\xe0"}.items())
def test_files_that_are_no_readable_image(name, content, run_predict, refused, photo, tmp_path):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        Image.open(photo).save(tmp_path / name, content)
    line = refused(run_predict, tmp_path / name, "--output", tmp_path / "labels.csv")
    assert f"{name} is not a readable PNG or JPEG image" in line and "pickle" not in line.replace(name, "")
    assert not (tmp_path / "labels.csv").exists()


def test_other_sources_that_are_refused(run_predict, refused, photo, test_set, tmp_path):
    hidden = write_pickle(tmp_path / "hidden", test_set.images)
    assert re.search("hidden is a pickle and .*photo.png an image", refused(run_predict, photo, hidden))
    assert re.search("nowhere.png is not a readable .*No such file", refused(run_predict, tmp_path / "nowhere.png"))
    (tmp_path / "nothing").mkdir()
    assert "nothing: the folder has no .png, .jpg, .jpeg file" in refused(run_predict, tmp_path / "nothing")
    for content in (hidden.read_bytes()[:-100], pickle.dumps({b"data": 1}, 0), pickle.dumps({b"data": 1}, 1)):
        hidden.write_bytes(content)
        line = refused(run_predict, hidden)
        assert "hidden" in line and "image" not in line


@pytest.mark.parametrize("normalize", [True, False])
def test_load_model_takes_floats_from_0_to_1(normalize, trained, plain, test_set):
    model, classes = predict.load_model(trained if normalize else plain)
    with torch.no_grad():
        found = model(test_set.images.permute(0, 3, 1, 2) / 255)
    wanted = one_by_one(evaluate.load_checkpoint_model(trained)[0], test_set.images, normalize)
    torch.testing.assert_close(found.softmax(1), wanted.softmax(1), rtol=1e-4, atol=1e-5)
    assert classes == test_set.classes and not any(module.training for module in model.modules())
