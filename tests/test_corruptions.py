"""tools/corruptions.py: what it measures, reads, prints and refuses."""

import json
import os
import pickle

import numpy as np
import pytest
import torch
from runs import trap
from torch.nn.functional import one_hot

from tools import corruption_ops as ops
from tools import corruptions
from utils import UserError

NAMES = [operation.__name__ for operation in ops.CORRUPTIONS]


def test_every_corruption_is_measured_and_an_interrupted_measurement_continues(trained, test_set, tmp_path, monkeypatch,
                                                                              refused, capsys):
    argv = [str(trained), "--limit-test", "8", "--device", "cpu", "--precision", "fp32", "--output"]
    monkeypatch.setattr(ops, "BLOCK", 8)
    whole, part = tmp_path / "new" / "folder" / "whole.json", tmp_path / "part.json"
    assert corruptions.main([*argv, str(whole)]) == 0
    results, table = json.loads(whole.read_text()), capsys.readouterr().out
    assert list(results["accuracy"]) == list(results["settings"]["images"]) == ["clean", *NAMES]
    assert [len(row) for row in results["accuracy"].values()] == [1] + [5] * 14
    assert results["mean"] == pytest.approx(np.mean([results["accuracy"][name] for name in NAMES]))
    assert results["left_out"] == ["frost"] and "mean: frost" in table and "14 of the 15" in table
    row = next(line for line in table.splitlines() if line.startswith("contrast"))
    assert [float(cell) for cell in row.split()[1:6]] == pytest.approx(results["accuracy"]["contrast"], abs=0.005)

    predict, calls, clean = corruptions.predict_logits, [], test_set.images[:8]

    def interrupted(model, images, **kwargs):
        assert kwargs["normalize"]  # as the checkpoint says
        calls.append(images)
        if len(calls) == 30:  # in the seventh set
            raise KeyboardInterrupt
        return predict(model, images, **kwargs)
    monkeypatch.setattr(corruptions, "predict_logits", interrupted)
    assert corruptions.main([*argv, str(part)]) == 130
    assert len(json.loads(part.read_text())["accuracy"]) == 6
    capsys.readouterr()
    assert corruptions.main([*argv, str(part)]) == 0
    assert part.read_text() == whole.read_text()
    assert capsys.readouterr().out == table.replace(str(whole), str(part))
    images = [clean, *(ops.corrupt(clean, operation, i, 0) for operation in ops.CORRUPTIONS for i in range(1, 6))]
    assert all(torch.equal(*pair) for pair in zip(calls, images[:30] + images[26:], strict=True))

    assert "with other settings or weights" in refused(corruptions.main, [*argv, str(part), "--seed", "1"])
    part.write_text("notes")
    assert refused(corruptions.main, [*argv, str(part)]) and part.read_text() == "notes"


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


def test_published_files_are_read_by_severity(folder, capsys):
    def predict(images, title):
        return one_hot(images[:, 0, 0, 0].long(), 10).float()
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


@pytest.mark.parametrize("name, write, message", [
    ("fog.npy", lambda path: np.save(path, np.zeros((29, 32, 32, 3), np.uint8)), "fog.npy has uint8 (29, 32, 32, 3)"),
    ("fog.npy", lambda path: path.write_bytes(pickle.dumps(trap(path.with_name("run")))), "fog.npy is not a"),
    ("fog.npy", lambda path: np.save(path, np.array([trap(path.with_name("run"))])), "fog.npy is not a"),
    ("fog.npy", lambda path: os.truncate(path, path.stat().st_size - 1), "fog.npy is not a"),
    ("labels.npy", lambda path: np.save(path, np.full(30, 10, np.uint8)), "from 0 to 9"),
    ("labels.npy", lambda path: np.save(path, np.arange(30) % 10), "the same ones for each severity"),
    ("labels.npy", lambda path: np.save(path, np.zeros((6, 5), np.uint8)), "(6, 5)"),
    ("labels.npy", lambda path: path.unlink(), "labels.npy is not a valid .npy array (No such file")])
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
])
def test_mistakes_are_one_line(trained, folder, monkeypatch, refused, flags, message):
    monkeypatch.setattr(corruptions, "measure", None)  # found before anything is computed
    assert message.format(folder) in refused(corruptions.main, [str(trained), *(each.format(folder) for each in flags)])
