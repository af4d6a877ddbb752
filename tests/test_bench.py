"""The benchmark: its model of a step by hand, its ratios, and all sections on a tiny network."""

import io
import json
import multiprocessing
import sys

import numpy as np
import pytest
import torch
from torch import nn

import data
import hardware
import models
import train
from tools import bench
from utils import RunError

TINY = ["--num-blocks", "1", "1", "--channels", "16", "--device", "cpu", "--precision", "fp32", "--batch-size", "32"]
COUNTS = bench.Counts(32, repeats=2, steps=2, published_steps=2, test_images=10, size=64)


def set_up(patch) -> None:
    """Shrink the benchmark, start no train.py, and restore what it sets in this process."""
    patch.setattr(bench, "EPOCH", 80)
    patch.setattr(bench, "COUNTS", {"cpu": COUNTS})
    patch.setattr(bench, "start_seconds", lambda *_: 5.0)
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        patch.setenv(name, "")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    """What the benchmark writes for a tiny network."""
    file, before = tmp_path_factory.mktemp("bench") / "new/cpu.json", set(multiprocessing.active_children())
    with pytest.MonkeyPatch.context() as patch:
        set_up(patch)
        matmul, build, settings = torch.backends.cuda.matmul, bench.build, []
        patch.setattr(bench, "build", lambda *args: settings.append(matmul.allow_tf32) or build(*args))
        assert not matmul.allow_tf32 and bench.main(["--json", str(file), *TINY]) == 0
        matmul.allow_tf32 = False
    assert settings == [True, True]  # set before anything can be compiled, with or without the extras
    assert set(multiprocessing.active_children()) == before  # no worker is left
    return json.loads(file.read_text())


def test_cost_of_training_by_hand():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
                          nn.Conv2d(4, 8, 1, groups=2), nn.Flatten(), nn.Linear(8 * 16 * 16, 10)).train()
    # multiply-adds: values of the output, times what each one sums; two channels in each group
    multiply_adds = 4 * 16 * 16 * (3 * 3 * 3) + 8 * 16 * 16 * 2 + 8 * 16 * 16 * 10
    gflop, gbytes = bench.training_cost(model, "bf16", compiled=True)
    assert gflop == pytest.approx(3 * 2 * multiply_adds / 1e9) and gbytes == pytest.approx(8 * 4 * 16 * 16 * 2 / 1e9)
    assert bench.training_cost(model, "fp32", compiled=False)[1] == pytest.approx((8 + 5) * 4 * 16 * 16 * 4 / 1e9)
    assert model.training and not any(layer._forward_hooks for layer in model) and model[0].weight.device.type == "cpu"
    assert bench.training_cost(models.SEResNet(), "fp32", False)[0] == pytest.approx(4.8, abs=0.05)  # published


def test_all_sections_are_measured_and_values_follow_from_each_other(results):
    rows = results["rows"]
    assert list(dict.fromkeys(row["section"] for row in rows.values())) == [
        "start", "memory", "loaders", "training", "epoch"]
    for row in rows.values():
        assert row["min"] <= row["median"] <= row["max"] and row["median"] == np.median(row["samples"])
        assert row["min"] > 0 and len(row["samples"]) in (1, COUNTS.repeats)  # without the round that warms up
    assert {"device", "torch", "date", "cpu", "cpu_bf16", "threads", "flags"} <= results["head"].keys()
    assert " ".join(TINY) in results["head"]["flags"]

    ours, product, copy = (np.array(rows[name]["samples"]) for name in (
        "this program, images/s", "large matrix product, GFLOP/s", "copy of a large tensor, GB/s"))
    for ratio, below in {"this program : bare steps": "bare steps, images/s",
                         "time with extras : without": "this program with extras, images/s",
                         "this program : published code": "published code, images/s"}.items():
        assert rows[ratio]["samples"] == pytest.approx(ours / rows[below]["samples"])  # round by round
    gflop, gbytes = (rows[name]["median"] for name in (
        "arithmetic, GFLOP per image", "batch norm and ReLU, GB per image"))
    assert rows["fraction of the product's rate, %"]["samples"] == pytest.approx(100 * gflop * ours / product)
    bound = 1 / (gflop / product + gbytes / copy)
    assert rows["fraction of the bound, %"]["samples"] == pytest.approx(100 * ours / bound)
    assert rows["training on 50,000 images, s"]["median"] == pytest.approx(80 / np.median(ours))
    assert rows["evaluation, % of an epoch"]["samples"] == pytest.approx(
        100 * np.array(rows["evaluation of 10,000 images, s"]["samples"]) * np.median(ours) / 80)


def test_rates_count_the_images_of_their_steps(tmp_path, monkeypatch):
    run, state = bench.build(TINY, 80, 10, tmp_path)
    monkeypatch.setattr(bench, "seconds", lambda device, action, count=1: action() and None or 2.0)
    assert bench.whole_rate(run, state, 2) == (32 + 16) / 2
    assert bench.loader_rate(run.loader, 1) == 16 / 2
    assert bench.bare_rate(run, state, 3) == 32 / 2


def test_the_published_code_is_what_it_claims_to_be(tmp_path, monkeypatch, capsys):
    kept, seen, waits, item = [], [], [], torch.Tensor.item
    monkeypatch.setattr(hardware, "keep_freed_memory", lambda: kept.append(True))
    monkeypatch.setattr(train, "train_step", train.train_step)  # restores it
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(sys, "stdin", io.StringIO("tf32\n"))

    def whole_rate(run, state, steps):
        state.model.residual_layers[0].register_forward_hook(lambda *values: seen.append(values[2]))
        inputs = torch.randn(32, 3, 32, 32).to(memory_format=torch.channels_last)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "item", lambda tensor: waits.append(item(tensor)) or waits[-1])
            train.train_step(run, state, inputs, torch.zeros(32, dtype=torch.int64))
        loss, correct = state.totals.tolist()
        assert waits[-3:] == [loss, correct, loss] and seen[0].is_contiguous() and seen[0].dtype == torch.float32
        assert isinstance(run.loader, data.WorkersLoader) and state.optimizer.param_groups[0]["fused"] is None
        assert all(p.is_contiguous() and state.optimizer.state[p]["momentum_buffer"].is_contiguous()
                   for p in state.model.parameters())
        print("epoch 1/1, step 1 of 3")  # as after a minute; the other process reads numbers
        return 7.5
    monkeypatch.setattr(bench, "whole_rate", whole_rate)
    bench.serve_published("1", "80", "10", str(tmp_path), *TINY)
    assert capsys.readouterr() == ("7.5\n", "epoch 1/1, step 1 of 3\n") and not kept


def test_an_interrupted_benchmark_has_written_the_sections_before(tmp_path, monkeypatch):
    def sections(*_):
        yield "start", {"a, s": [1.0]}
        yield "memory", {"b, MB": [2.0, 4.0]}
        raise KeyboardInterrupt
    set_up(monkeypatch)
    monkeypatch.setattr(bench, "sections", sections)
    assert bench.main(["--json", str(tmp_path / "cpu.json"), *TINY]) == 130
    assert list(json.loads((tmp_path / "cpu.json").read_text())["rows"]) == ["a, s", "b, MB"]


@pytest.mark.parametrize("flags, status, message", [
    (["--compile"], 1, "could not be compiled"), (["--small-epochs", "1"], 2, "takes no --resume")])
def test_mistakes_are_one_line(flags, status, message, monkeypatch, capsys):
    set_up(monkeypatch)
    monkeypatch.setattr(hardware, "compile_or_warn", lambda *_: None)
    assert bench.main([*TINY, *flags]) == status
    error = capsys.readouterr().err
    assert error.startswith("bench.py: error: ") and message in error and error.count("\n") == 1


@pytest.mark.slow
def test_the_start_is_timed_to_the_first_step(tmp_path):
    flags = [*TINY, "--synthetic", "--limit-train", "96", "--limit-test", "50"]
    assert bench.start_seconds(flags, tmp_path) > 0
    with pytest.raises(RunError, match="before its first step"):
        bench.start_seconds([*flags, "--batch-size", "1000"], tmp_path)
