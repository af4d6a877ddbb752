"""tools/corruptions.py: what it measures, reads, prints and refuses."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

from tools import corruption_ops as ops
from tools import corruptions
from utils import UserError

NAMES = [operation.__name__ for operation in ops.CORRUPTIONS]


def test_program_measures_every_corruption(trained, data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ops, "BLOCK", 8)
    output = tmp_path / "new" / "folder" / "out.json"
    assert corruptions.main([str(trained), "--data-dir", str(data_dir), "--synthetic", "--limit-test", "8", "--device",
                             "cpu", "--precision", "fp32", "--output", str(output)]) == 0
    results, printed = json.loads(output.read_text()), capsys.readouterr().out
    assert list(results["accuracy"]) == list(results["settings"]["images"]) == ["clean", *NAMES]
    assert [len(row) for row in results["accuracy"].values()] == [1] + [5] * 14
    assert results["mean"] == pytest.approx(np.mean([results["accuracy"][name] for name in NAMES]))
    assert results["left_out"] == ["frost"] and "mean: frost" in printed and "14 of the 15" in printed
    row = next(line for line in printed.splitlines() if line.startswith("contrast"))
    assert [float(cell) for cell in row.split()[1:6]] == pytest.approx(results["accuracy"]["contrast"], abs=0.005)


def test_an_interrupted_measurement_continues_from_its_output(trained, data_dir, tmp_path, monkeypatch, capsys):
    argv = [str(trained), "--data-dir", str(data_dir), "--synthetic", "--limit-test", "4", "--output"]
    whole, part = tmp_path / "whole.json", tmp_path / "part.json"
    assert corruptions.main([*argv, str(whole)]) == 0
    table = capsys.readouterr().out
    predict, calls = corruptions.predict_logits, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 30:  # in the seventh set
            raise KeyboardInterrupt
        return predict(*args, **kwargs)
    monkeypatch.setattr(corruptions, "predict_logits", interrupted)
    assert corruptions.main([*argv, str(part)]) == 130
    assert len(json.loads(part.read_text())["accuracy"]) == 6
    capsys.readouterr()
    assert corruptions.main([*argv, str(part)]) == 0
    assert part.read_text() == whole.read_text() and len(calls) == 30 + 71 - 26
    assert capsys.readouterr().out == table.replace("whole.json", "part.json")

    assert corruptions.main([*argv, str(part), "--seed", "1"]) == 2
    assert "with other settings or weights" in capsys.readouterr().err
    part.write_text("notes")
    assert corruptions.main([*argv, str(part)]) == 2 and part.read_text() == "notes"


def test_generated_sets_are_the_clean_images_and_every_corruption(test_set, monkeypatch):
    monkeypatch.setattr(ops, "BLOCK", 2)
    split = test_set._replace(images=test_set.images[:3], targets=test_set.targets[:3])
    clean, *others = corruptions.generate_sets(split, 7, torch.device("cpu"))
    assert torch.equal(clean.versions[0](), split.images) and [each.name for each in others] == NAMES
    for each, operation in zip(others, ops.CORRUPTIONS, strict=True):
        assert len(each.versions) == 5 and torch.equal(each.targets, split.targets)
        assert torch.equal(each.versions[4](), ops.corrupt(split.images, operation, 5, seed=7))


# --- published files -------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Write 6 images per severity that hold their label in a byte, the wrong one in the first s of severity s."""
    labels = np.arange(6)
    np.save(tmp_path / "labels.npy", np.tile(labels, 5).astype(np.uint8))
    images = np.zeros((5, 6, 32, 32, 3), np.uint8)
    images[:, :, 0, 0, 0] = labels
    for severity in range(1, 6):
        images[severity - 1, :severity, 0, 0, 0] += 1
    for name in ("frost", "fog", "snow"):
        np.save(tmp_path / f"{name}.npy", images.reshape(-1, 32, 32, 3))
    np.save(tmp_path / "cifar10.1_v6_data.npy", images[1])
    np.save(tmp_path / "cifar10.1_v6_labels.npy", labels.astype(np.int32))
    return tmp_path


def test_published_files_are_read_by_severity(folder, monkeypatch, capsys):
    monkeypatch.setattr(corruptions, "CHUNK", 4)  # of 6 images
    def predict(images):
        return one_hot(images[:, 0, 0, 0].long(), 10)
    accuracy, limited = {}, {}
    corruptions.measure(corruptions.find_sets(folder, None), predict, accuracy, lambda: None)
    expected = [100 * (6 - severity) / 6 for severity in range(1, 6)]
    assert accuracy == {name: pytest.approx(expected) for name in ("frost", "fog", "snow")} | {
        "cifar10.1_v6": [pytest.approx(expected[1])]}
    summary = corruptions.summarize(accuracy, published=True)
    assert summary["mean"] == pytest.approx(50)
    assert summary["left_out"] == [name for name in NAMES if name not in ("fog", "snow")]
    assert "3 of the 15" in capsys.readouterr().out
    corruptions.measure(corruptions.find_sets(folder, 4), predict, limited, lambda: None)
    assert limited["fog"] == pytest.approx([75, 50, 25, 0, 0])


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def cut_off(array: np.ndarray, path: Path):
    np.save(path, array)
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("name, write, message", [
    ("fog.npy", lambda path: np.save(path, np.zeros((29, 32, 32, 3), np.uint8)), "fog.npy has uint8 (29, 32, 32, 3)"),
    ("fog.npy", lambda path: path.write_bytes(pickle.dumps(Malicious(path.with_name("run")))), "fog.npy is not a"),
    ("fog.npy", lambda path: np.save(path, np.array([Malicious(path.with_name("run"))])), "fog.npy is not a"),
    ("fog.npy", lambda path: cut_off(np.load(path), path), "fog.npy is not a"),
    ("labels.npy", lambda path: np.save(path, np.full(30, 10, np.uint8)), "from 0 to 9"),
    ("labels.npy", lambda path: np.save(path, np.arange(30) % 10), "the same ones for each severity"),
    ("labels.npy", lambda path: np.save(path, np.zeros((6, 5), np.uint8)), "(6, 5)"),
    ("labels.npy", lambda path: path.unlink(), "labels.npy is not a valid .npy array (No such file"),
])
def test_malformed_files_are_refused_and_never_run(folder, name, write, message):
    write(folder / name)
    with pytest.raises(UserError) as error:
        corruptions.find_sets(folder, None)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert not (folder / "run").exists()


@pytest.mark.parametrize("flags, message", [
    (["--test-dir", "{}/empty"], "expected files of CIFAR-10-C"),
    (["--test-dir", "{}", "--limit-test", "7"], "--limit-test 7"),
    (["--test-dir", "{}", "--synthetic"], "cannot be combined"),
    (["--test-dir", "{}"], "was trained on the classes"),
    (["--synthetic", "--output", "{}"], "cannot write to {}"),
    (["--synthetic", "--output", "{}/fog.npy/out.json"], "fog.npy"),
])
def test_mistakes_are_one_line(trained, folder, monkeypatch, capsys, flags, message):
    monkeypatch.setattr(corruptions, "measure", None)  # found before anything is computed
    status = corruptions.main([str(trained), *(flag.format(folder) for flag in flags)])
    error = capsys.readouterr().err
    assert status == 2 and message.format(folder) in error and error.count("\n") == 1
