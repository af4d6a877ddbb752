"""Optimizers, schedules against torch's own, and the moving average of the weights."""

import numpy as np
import pytest
import runs
import torch
from torch import nn

import train
from models import SEResNet
from optim import build_optimizer, build_scheduler, schedule_lrs
from options import OPTIMIZERS, USES_MOMENTUM


def build(name: str, parameter=None, lr: float = 0.1, device: str = "cpu") -> torch.optim.Optimizer:
    parameter = nn.Parameter(torch.zeros(1, device=device)) if parameter is None else parameter
    return build_optimizer(name, nn.ParameterList([parameter]), lr, 0.9, False, 5e-4)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_moves_at_its_default_lr_is_fused_where_it_can_be_and_takes_its_settings(name):
    parameter = nn.Parameter(torch.ones(10))
    optimizer = build(name, parameter, OPTIMIZERS[name][1])
    for _ in range(200):
        parameter.grad = 2 * parameter.detach()  # of the sum of squares
        optimizer.step()
    assert parameter.abs().max() < 0.9
    assert bool(optimizer.param_groups[0].get("fused")) == (name in ("sgd", "adam", "adamw"))
    assert not build(name, device="meta").param_groups[0].get("fused")
    model = nn.ParameterList([nn.Parameter(torch.zeros(1))])
    group = build_optimizer(name, model, 0.3, 0.7, name == "sgd", 0.2).param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.6 if name == "muon" else 0.3, 0.2)
    assert group.get("momentum") == (0.7 if name in USES_MOMENTUM else None)
    assert group.get("nesterov", False) == (name == "sgd")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_muon_is_torch_s_for_the_convolutions_but_the_first_and_sgd_for_the_rest(precision):
    torch.manual_seed(0)
    model = SEResNet((1, 2), 16, se="block", se_reduction=4).to(memory_format=torch.channels_last)
    names = [name for name, p in model.named_parameters() if name.startswith("residual_layers") and p.ndim == 4
             and "seblock" not in name]
    assert len(names) == 7 and {p.shape[2:] for p in map(model.get_parameter, names)} == {(3, 3), (1, 1)}
    rest = {name: nn.Parameter(p.detach().clone()) for name, p in model.named_parameters() if name not in names}
    matrices = {name: nn.Parameter(model.get_parameter(name).detach().flatten(1).clone()) for name in names}
    muon = torch.optim.Muon(matrices.values(), lr=0.05, weight_decay=0, momentum=0.9)
    sgd = torch.optim.SGD(rest.values(), lr=0.1, weight_decay=0.01, momentum=0.9, nesterov=True)
    optimizer = build_optimizer("muon", model, 0.05, 0.9, False, 0.01, precision)
    for _ in range(3):
        for name, p in model.named_parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) * 1e-3 + p.detach()**2
            other = rest.get(name, matrices.get(name))
            other.grad = p.grad.reshape(other.shape).clone()
        for matrix in matrices.values():
            matrix.data *= len(matrix)**0.5 / matrix.data.norm()
        before = {name: matrix.detach().clone() for name, matrix in matrices.items()}
        for each in (optimizer, muon, sgd):
            each.step()
        for name, expected in rest.items():
            torch.testing.assert_close(model.get_parameter(name), expected)
        for name, matrix in matrices.items():  # torch computes in bfloat16
            error = model.get_parameter(name).flatten(1) - matrix
            assert error.norm() < 0.04 * (matrix - before[name]).norm(), name
            matrix.data.copy_(model.get_parameter(name).flatten(1))


@pytest.mark.parametrize("name", ["sgd", "muon"])
def test_bias_lr_is_for_the_biases_of_batch_norm(name):
    """Plain SGD with one learning rate and decay for each parameter."""
    torch.manual_seed(0)
    model = SEResNet((1, 2), 16, se="block", se_reduction=4)
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    biases = {f"{name}.bias" for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    optimizer = build_optimizer(name, model, 0.1, 0.0, False, 0.5, bias_lr=8)
    for p in model.parameters():
        p.grad = torch.randn(p.shape)
    optimizer.step()
    for key, p in model.named_parameters():
        is_muon = name == "muon" and p.ndim == 4 and key.startswith("residual_layers") and "seblock" not in key
        lr, decay = (0.2 if name == "muon" else 0.1), 0.5
        lr, decay = (8 * lr, decay / 8) if key in biases else (lr, decay)
        if not is_muon:
            torch.testing.assert_close(p, expected[key] - lr * (p.grad + decay * expected[key]), msg=key)
    assert len(biases) == 8


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name, momentum", [("sgd", "momentum"), ("adam", "betas"), ("adagrad", None)])
def test_onecycle_is_torch_s_with_its_defaults(name, momentum):
    optimizer, found = build(name), []
    scheduler = build_scheduler(optimizer, "onecycle", 10, 10, 0)
    for _ in range(100):
        group = optimizer.param_groups[0]
        found.append((group["lr"], np.ravel(group[momentum])[0] if momentum else 0))
        scheduler.step()
    expected = [(0.1 / 25, 0.95), (0.1, 0.85), (0.1 / 250_000, 0.95)]
    assert np.array(found)[[0, 29, 99]] == pytest.approx(np.array(expected) * ([1, 1] if momentum else [1, 0]))
    assert all((schedule_lrs("onecycle", 0.1, 1, steps, 0) > 0).all() for steps in (1, 2, 3))
    optimizer = build_optimizer(name, SEResNet((1,), 8, se_reduction=2), 0.1, 0.9, False, 0, bias_lr=8)
    build_scheduler(optimizer, "onecycle", 10, 10, 0)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1 / 25, 8 * 0.1 / 25])


@pytest.mark.parametrize("name", ["cosine", "constant"])
@pytest.mark.parametrize("steps_per_epoch, epochs, warmup_epochs, warmup", [
    (7, 5, 0, 0), (4, 10, 2.5, 10), (3, 1, 0.9, 2), (1, 2, 1.9, 1), (1, 1, 0.6, 0)])  # it never takes all steps
def test_warmup_rises_linearly_and_joins_the_schedule(name, steps_per_epoch, epochs, warmup_epochs, warmup):
    lrs, total = schedule_lrs(name, 0.1, steps_per_epoch, epochs, warmup_epochs), steps_per_epoch * epochs
    assert lrs[:warmup] == pytest.approx([0.1 * (i + 1) / (warmup + 1) for i in range(warmup)])
    rest = 0.05 * (1 + np.cos(np.pi * np.arange(total - warmup) / (total - warmup)))
    assert lrs[warmup:] == pytest.approx(rest if name == "cosine" else 0.1)


@pytest.mark.parametrize("flags", [["cosine", "--warmup-epochs", "0.7"], ["onecycle"], ["constant"]])
def test_schedule_lrs_are_those_of_a_run(run, monkeypatch, tmp_path, flags):
    used, train_step = [], train.train_step

    def note_lr(run, state, *batch):
        used.append(state.optimizer.param_groups[0]["lr"])
        train_step(run, state, *batch)
    monkeypatch.setattr(train, "train_step", note_lr)
    assert run("--scheduler", *flags) == 0
    assert used == schedule_lrs(flags[0], 0.01, 4, 2, float(flags[2]) if len(flags) > 1 else 0).tolist()
    assert [row["lr"] for row in runs.read(tmp_path / "run")["history"]] == [used[3], used[7]]


# --- moving average --------------------------------------------------------------------------------------------------


def test_averaged_weights_are_those_of_a_loop(run, monkeypatch, tmp_path):
    average, train_step = {}, train.train_step

    def step_and_average(run, state, *batch):
        if not average:
            average.update({name: value.clone() for name, value in state.model.state_dict().items()})
        step = 4 * state.epoch + state.step
        train_step(run, state, *batch)
        decay = min(0.5, (1 + step) / (10 + step))  # the first 8 steps are below
        for name, value in state.model.state_dict().items():
            average[name] = decay * average[name] + (1 - decay) * value
    monkeypatch.setattr(train, "train_step", step_and_average)
    assert run("--epochs", "3", "--ema", "0.5", "--cutmix", "1", "--trivial-augment") == 0
    saved = runs.read(tmp_path / "run")
    for name, value in saved["ema"].items():
        if value.is_floating_point():  # batch norm statistics, too
            torch.testing.assert_close(value, average[name])
            assert not torch.equal(value, saved["model"][name])
        else:
            assert value == 0 and saved["model"][name] == 12  # num_batches_tracked is left alone
