"""What the corruption program measures, reads, says and refuses."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

import evaluate
import models
from synthetic import NAMES, make_images
from tools import corruption_ops as ops
from tools import corruptions
from utils import UserError, save_checkpoint


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    args = {"num_blocks": [1, 1, 1], "channels": 16, "se_reduction": 4}
    state = {"model": models.build_model(**args).state_dict(), "args": args}
    save_checkpoint({**state, "classes": list(NAMES)}, tmp_path / "synthetic.pt")
    save_checkpoint(state, tmp_path / "cifar.pt")
    return tmp_path / "synthetic.pt"


def test_measures_every_corruption_and_names_frost(checkpoint, data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ops, "BLOCK", 20)
    flags = ["--checkpoint", str(checkpoint), "--data-dir", str(data_dir), "--synthetic", "--limit-test", "20",
             "--device", "cpu", "--precision", "fp32"]
    assert corruptions.main([*flags, "--output", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    main_ones, extra = (([found["accuracy"][operation.__name__] for operation in group])
                        for group in (ops.MAIN, ops.EXTRA))
    assert (len(main_ones), len(extra), len(found["accuracy"])) == (14, 4, 19)
    assert {len(row) for row in main_ones + extra} == {5}
    assert found["mean"] == pytest.approx(np.mean(main_ones)) and found["left_out"] == ["frost"]
    printed = capsys.readouterr().out
    assert "left out of the mean: frost" in printed and "14 of the 15" in printed and "--test-dir" in printed
    assert f"clean accuracy {found['accuracy']['clean'][0]:.2f} %" in printed
    row = next(line for line in printed.splitlines() if line.startswith("contrast"))
    assert [float(cell) for cell in row.split()[1:6]] == pytest.approx(found["accuracy"]["contrast"], abs=0.005)


def test_generated_sets_are_the_clean_images_and_every_corruption_of_them():
    images = torch.from_numpy(make_images(4, 3, 0)[0])
    targets = torch.arange(len(images))
    sets = corruptions.make_sets(corruptions.data.Split(images, targets, []), 7, torch.device("cpu"))
    assert [(each.name, each.kind) for each in sets] == [
        ("clean", "other"), *((operation.__name__, "main") for operation in ops.MAIN),
        *((operation.__name__, "extra") for operation in ops.EXTRA)]
    assert torch.equal(sets[0].versions[0](), images) and all(torch.equal(each.targets, targets) for each in sets)
    for each, operation in zip(sets[1:], [*ops.MAIN, *ops.EXTRA], strict=True):
        assert len(each.versions) == 5
        for severity in (2, 5):
            assert torch.equal(each.versions[severity - 1](), ops.corrupt(images, operation, severity, seed=7))


def test_accuracy_counts_every_image(monkeypatch):
    monkeypatch.setattr(evaluate, "BATCH_SIZE", 3)
    targets, sizes = torch.tensor([1, 1, 1, 1, 2, 3, 1]), []

    def predict(images):  # always class 1
        sizes.append(len(images))
        return torch.nn.functional.one_hot(torch.ones(len(images), dtype=torch.int64), 10)

    sets = [corruptions.TestSet("clean", "other", targets, [lambda: torch.zeros(7, 32, 32, 3, dtype=torch.uint8)])]
    assert corruptions.measure(sets, predict) == {"clean": [pytest.approx(100 * 5 / 7)]}
    assert sizes == [3, 3, 1]


def write_published(folder, count=6):
    """Write images that show their label in a byte, but at severity s the first s of them a wrong one."""
    labels = np.arange(count) % 10
    np.save(folder / "labels.npy", np.tile(labels, 5).astype(np.uint8))
    images = np.zeros((5, count, 32, 32, 3), np.uint8)
    images[:, :, 0, 0, 0] = labels
    for severity in range(1, 6):
        images[severity - 1, :severity, 0, 0, 0] += 1
    for name in ("frost", "fog", "spatter"):
        np.save(folder / f"{name}.npy", images.reshape(-1, 32, 32, 3))
    np.save(folder / "cifar10.1_v6_data.npy", images[1])
    np.save(folder / "cifar10.1_v6_labels.npy", labels.astype(np.int32))


def read_label(images):
    return torch.nn.functional.one_hot(images[:, 0, 0, 0].long(), 11)


def test_published_files_are_read_by_severity(tmp_path):
    write_published(tmp_path)
    sets = corruptions.find_sets(tmp_path, None)
    found = corruptions.measure(sets, read_label)
    expected = [100 * (6 - severity) / 6 for severity in range(1, 6)]
    assert found == {name: pytest.approx(expected) for name in ("frost", "fog", "spatter")} | {
        "cifar10.1_v6": [pytest.approx(expected[1])]}
    summary = corruptions.summarise(sets, found)
    assert summary["mean"] == pytest.approx(50) and "frost" not in summary["left_out"]
    assert len(summary["left_out"]) == 13
    assert "compare with published ones" in corruptions.describe(summary, True)
    limited = corruptions.measure(corruptions.find_sets(tmp_path, 4), read_label)
    assert limited["fog"] == pytest.approx([75, 50, 25, 0, 0])


def test_table_as_csv(tmp_path, checkpoint):
    write_published(tmp_path)
    flags = ["--checkpoint", str(tmp_path / "cifar.pt"), "--test-dir", str(tmp_path), "--device", "cpu"]
    corruptions.main([*flags, "--output", str(tmp_path / "out.csv")])
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert lines[0] == "name,severity_1,severity_2,severity_3,severity_4,severity_5,mean"
    assert [line.split(",")[0] for line in lines[1:]] == ["frost", "fog", "spatter", "cifar10.1_v6"]
    assert lines[4].startswith("cifar10.1_v6,,,,,,")


@pytest.mark.parametrize("name, array, message", [
    ("fog.npy", np.zeros((29, 32, 32, 3), np.uint8), "fog.npy has uint8 (29, 32, 32, 3)"),
    ("fog.npy", np.zeros((30, 3, 32, 32), np.uint8), "(30, 3, 32, 32)"),
    ("fog.npy", np.zeros((30, 32, 32, 3), np.float32), "float32"),
    ("fog.npy", np.array([{}], dtype=object), "fog.npy cannot be read"),
    ("labels.npy", np.full(30, 10, np.uint8), "from 0 to 9"),
    ("labels.npy", np.full(30, 1.0), "float64"),
    ("labels.npy", np.arange(30) % 10, "does not repeat"),
    ("labels.npy", np.zeros((6, 5), np.uint8), "(6, 5)"),
    ("labels.npy", None, "labels.npy cannot be read"),
])
def test_foreign_published_files_are_refused(tmp_path, name, array, message):
    write_published(tmp_path)
    (tmp_path / name).unlink()
    if array is not None:
        np.save(tmp_path / name, array, allow_pickle=True)
    with pytest.raises(UserError) as error:
        corruptions.find_sets(tmp_path, None)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_severities_of_unequal_size_are_refused(tmp_path):
    write_published(tmp_path)
    for name in ("fog", "labels"):
        np.save(tmp_path / f"{name}.npy", np.load(tmp_path / f"{name}.npy")[:29])
    (tmp_path / "frost.npy").unlink()
    with pytest.raises(UserError, match="5 severities of the same size"):
        corruptions.find_sets(tmp_path, None)


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickle_in_place_of_an_array_is_not_run(tmp_path):
    write_published(tmp_path)
    (tmp_path / "fog.npy").write_bytes(pickle.dumps(Hostile(tmp_path / "touched")))
    with pytest.raises(UserError, match="fog.npy cannot be read"):
        corruptions.find_sets(tmp_path, None)
    assert not (tmp_path / "touched").exists()


def test_cut_off_published_file_is_refused(tmp_path):
    write_published(tmp_path)
    whole = (tmp_path / "fog.npy").read_bytes()
    for length in (0, 50, len(whole) - 1):
        (tmp_path / "fog.npy").write_bytes(whole[:length])
        with pytest.raises(UserError, match="fog.npy cannot be read"):
            corruptions.find_sets(tmp_path, None)


@pytest.mark.parametrize("flags, message", [
    (["--test-dir", "{}/empty"], "holds neither"),
    (["--test-dir", "{}", "--limit-test", "7"], "fewer than --limit-test 7"),
    (["--test-dir", "{}", "--synthetic"], "not allowed with"),
    (["--test-dir", "{}"], "knows the classes"),
    (["--synthetic", "--output", "{}/out.txt"], "out.txt"),
    (["--synthetic", "--seed", "-1"], "-1"),
])
def test_mistakes_are_one_line(tmp_path, checkpoint, capsys, flags, message):
    write_published(tmp_path)
    with pytest.raises(SystemExit) as stop:
        corruptions.main(["--checkpoint", str(checkpoint), *(flag.format(tmp_path) for flag in flags)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and error.count("\n") == 1
