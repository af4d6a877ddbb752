"""The gradient check: wrong gradients end a run, right ones of every kind of network pass, and nothing changes."""

import copy
import functools
import itertools
import math
import re

import pytest
import runs
import torch
from torch import nn

import evaluate
import gradient_check
import models
import options
import train
from hardware import CPU
from utils import RunError


def lie(monkeypatch, factor: float | None) -> None:
    """Let batch norm in bf16 return a weight's gradient times a factor; or fail, with None."""
    batch_norm = nn.functional.batch_norm

    def lying(inputs, mean, var, weight, *args):
        if inputs.dtype == torch.bfloat16:
            if factor is None:
                raise RuntimeError("CUDA error: misaligned address\nmore about it")
            weight = factor * weight - (factor * weight - weight).detach()
        return batch_norm(inputs, mean, var, weight, *args)
    monkeypatch.setattr(nn.functional, "batch_norm", lying)


@pytest.mark.parametrize("resumes", [False, True])
@pytest.mark.parametrize(("factor", "problem"), [
    (1e7, r"\S*(bn\d|shortcut\.1)\.weight is off by \d{6,}\.\d%"),
    (1.2, r"\S*(bn\d|shortcut\.1)\.weight is off by \d\d\.\d%"),
    (0, r"\S*\.weight is off by \d\d+\.\d%"), (math.nan, "the loss or the whole gradient is not finite"),
    (None, "RuntimeError: CUDA error: misaligned address")])
def test_wrong_gradients_end_the_run_before_anything_is_written(monkeypatch, run, tmp_path, capsys, resumes, factor,
                                                                problem):
    flags = ["--precision", "bf16"]
    if resumes:
        runs.stop(run, "first", *flags)
        flags = ["--resume"]
    before = {path: path.read_bytes() for path in (tmp_path / "run").glob("*.*")}
    lie(monkeypatch, factor)
    capsys.readouterr()
    assert run(*flags) == 1
    error = capsys.readouterr().err
    verb = "cannot compute" if factor is None else "computes wrong"
    assert re.fullmatch(rf"train\.py: error: .* with torch \S+ {verb} gradients in bf16 \({problem}\); use "
                        r"--precision fp32, --device cpu or another version of torch\n", error), error
    assert {path: path.read_bytes() for path in (tmp_path / "run").glob("*.*")} == before


def check(model: nn.Module, precision: str, *flags: str) -> None:
    args, _ = options.parse_args(flags)
    gradient_check.check_gradients(model, functools.partial(train.build_forward, args), CPU, precision)


@pytest.mark.parametrize("block", ["basic", "preact"])
def test_right_gradients_pass_for_every_network_and_change_nothing(block):
    networks = itertools.product(("stem", "block", "none"), ("1", "3", "5"))
    for (se, size), precision in zip(networks, itertools.cycle(("bf16", "fp16")), strict=False):
        args, _ = options.parse_args([*runs.NETWORK, "--block", block, "--se", se, "--kernel-sizes", size,
                                      "--shortcut-kernel-sizes", size, "--dropout", "0.5"])
        model = options.build_model(args)
        weights, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
        check(model, precision, "--label-smoothing", "0.1")
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())
        assert torch.equal(torch.get_rng_state(), state)


def test_gradients_of_a_deep_and_of_a_trained_network_pass(trained):
    torch.manual_seed(0)
    for model in (models.SEResNet([9, 9, 9], 8, se_reduction=2), evaluate.load_checkpoint_model(trained)[0]):
        check(model, "bf16")
        next(model.parameters()).data.fill_(math.nan)  # is not the device's fault
        check(model, "bf16")


@pytest.mark.parametrize("place", ["output", "input", "weight"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("fp16", 0.02), ("bf16", 0.1)])
def test_errors_above_the_tolerance_are_found(monkeypatch, precision, tolerance, place):
    def compute(*args):
        found, error = right(*args), errors[0]
        calls.append(args)
        if len(calls) % 2:  # the second call is the one to compare with
            found[("output", "input", "weight").index(place)] *= 1 + error
        return found
    right, calls = gradient_check.run_layer, []
    monkeypatch.setattr(gradient_check, "run_layer", compute)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10, bias=False))
    errors = [0.0]
    for errors[0] in (0.8 * tolerance, -0.8 * tolerance):
        check(model, precision)
    for errors[0] in (1.3 * tolerance, -1.3 * tolerance):
        with pytest.raises(RunError, match=rf"gradients in {precision} \(1\.{place} is off by"):
            check(model, precision)


def test_sums_of_large_activations_do_not_overflow_in_fp16():
    images, gradient = torch.full((4, 3, 32, 32), 20.0), torch.ones(4, 2, 32, 32)  # 4 * 32 * 32 * 20 > 65504
    found = gradient_check.run_layer(nn.Conv2d(3, 2, 1), images, gradient, CPU, "fp16")
    assert all(tensor.isfinite().all() for tensor in found)


def test_too_little_memory_is_not_called_a_wrong_gradient(run, monkeypatch, capsys):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
    monkeypatch.setattr(gradient_check, "largest_error", fail)
    assert run("--precision", "bf16") == 1
    assert capsys.readouterr().err.startswith("train.py: error: out of memory; choose a smaller --batch-size")
