"""Small things that many tests share: generated batch files, and flags that make a run take a second."""

import os
from pathlib import Path

import pytest
import torch

import data
import train

# A network of some thousand parameters on 96 images: 3 steps an epoch.
TINY = ["--num-blocks", "1", "1", "1", "--channels", "16", "--batch-size", "32", "--limit-train", "96",
        "--limit-test", "50", "--synthetic", "--device", "cpu", "--precision", "fp32", "--lr", "0.05"]

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
    data.load_train(str(folder), synthetic=True, limit=96)
    data.load_test(str(folder), synthetic=True, limit=50)
    return folder


@pytest.fixture
def run_train(data_dir, tmp_path):
    """Give a function that runs the program in this process, in a folder of its own, and returns its status."""
    def run(*flags: str) -> int:
        places = ["--data-dir", str(data_dir), "--checkpoint-dir", str(tmp_path / "runs")]
        return train.main([*TINY, *places, *flags] if "--resume" not in flags else [*places, *flags])
    return run
