"""What many tests share: generated batch files, flags that make a run take a second, and a network trained so."""

import os
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import data
import evaluate
import plots
import train

# A network of some thousand parameters on 96 images: 3 steps an epoch.
TINY = ["--num-blocks", "1", "1", "1", "--channels", "16", "--batch-size", "32", "--limit-train", "96",
        "--limit-test", "50", "--synthetic", "--device", "cpu", "--precision", "fp32", "--lr", "0.05"]

# The published constants once more, so that a slip in augment.py shows.
MEAN, STD = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2023, 0.1994, 0.2010])

# What --deterministic sets, too late for cuBLAS where an earlier test of this process has used it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Let small tensors be added by one thread: faster, and several processes may run beside each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """Give a data folder with generated images, made by the program itself."""
    folder = tmp_path_factory.mktemp("data")
    data.load_split(str(folder), data.TRAIN_FILES, use_synthetic=True, limit=96)
    data.load_split(str(folder), data.TEST_FILES, use_synthetic=True, limit=50)
    return folder


@pytest.fixture
def run_train(data_dir, tmp_path):
    """Give a function that runs the program in this process, in a folder of its own, and returns its status."""
    def run(*flags: str) -> int:
        places = ["--data-dir", str(data_dir), "--checkpoint-dir", str(tmp_path / "runs")]
        return train.main([*TINY, *places, *flags] if "--resume" not in flags else [*places, *flags])
    return run


# --- a trained network -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def trained(data_dir, tmp_path_factory):
    """Train a small network without pictures, and give its last.pt, which guesses several classes."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "safely", lambda *_: None)
        assert train.main([*TINY, "--data-dir", str(data_dir), "--checkpoint-dir", str(folder), "--epochs", "8",
                           "--batch-size", "16", "--no-augment"]) == 0
    return folder / "se-resnet" / "last.pt"


@pytest.fixture(scope="session")
def test_set(data_dir):
    return data.load_split(str(data_dir), data.TEST_FILES, use_synthetic=True, limit=50)


@pytest.fixture(scope="session")
def expected(trained, test_set):
    """Give the probabilities of the test images, computed one by one."""
    return one_by_one(evaluate.load_model(trained, torch.device("cpu"))[0], test_set.images).softmax(1)


@pytest.fixture
def run_mode(trained, data_dir):
    """Give a function that runs --evaluate or --predict."""
    def run(*flags, checkpoint=trained):
        source = ["--data-dir", str(data_dir), "--synthetic", "--limit-test", "50"]
        return train.main([*source, *map(str, flags), "--checkpoint", str(checkpoint), "--device", "cpu",
                           "--precision", "fp32"])
    return run


def one_by_one(model: nn.Module, images: torch.Tensor, normalize: bool = True) -> torch.Tensor:
    with torch.no_grad():
        inputs = [image.permute(2, 0, 1) / 255 for image in images]
        inputs = [(image - MEAN[:, None, None]) / STD[:, None, None] if normalize else image for image in inputs]
        return torch.cat([model(image[None]) for image in inputs])


def accuracy_of(text: str) -> str:
    return re.search(r"test accuracy (\d+\.\d\d) %", text)[1]


def publish(path, model: nn.Module):
    """Write weights as the published code does."""
    config = {"model": "SENet", "num_blocks": [1, 1, 1], "lr": 0.1, "optim": "sgd", "nothing": None}
    torch.save({"net": {f"module.{name}": value for name, value in model.state_dict().items()}, "acc": 93.21,
                "epoch": 187, "config": config}, path)
    return path


def refused(run_mode, capsys, *flags, **where) -> str:
    """Run what must fail with one line and status 2, and give that line."""
    assert run_mode(*flags, **where) == 2
    line = capsys.readouterr().err
    assert line.startswith("train.py: error: ") and line.count("\n") == 1
    return line
