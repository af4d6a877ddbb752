"""Optimizers, schedules against torch's own, and the moving average of the weights."""

import math

import numpy as np
import pytest
import runs
import torch
from torch import nn
from torch.optim import lr_scheduler

import train
from evaluate import load_checkpoint_model
from models import SEResNet
from optim import build_optimizer, build_scheduler, orthogonalize, schedule_lrs, update_ema
from options import OPTIMIZERS, SCHEDULERS, USES_MOMENTUM

small_data, run = runs.small_data, runs.run


def build(name: str, parameter=None, lr: float = 0.1, device: str = "cpu") -> torch.optim.Optimizer:
    parameter = nn.Parameter(torch.zeros(1, device=device)) if parameter is None else parameter
    return build_optimizer(name, nn.ParameterList([parameter]), lr, 0.9, False, 5e-4)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_moves_at_its_default_lr_and_is_fused_where_torch_has_it(name):
    parameter = nn.Parameter(torch.ones(10))
    optimizer = build(name, parameter, OPTIMIZERS[name][1])
    for _ in range(200):
        parameter.grad = 2 * parameter.detach()  # of the sum of squares
        optimizer.step()
    assert parameter.abs().max() < 0.9
    assert bool(optimizer.param_groups[0].get("fused")) == (name in ("sgd", "adam", "adamw"))
    assert not build(name, device="meta").param_groups[0].get("fused")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_setting_reaches_its_optimizer(name):
    model = nn.ParameterList([nn.Parameter(torch.zeros(1))])
    group = build_optimizer(name, model, 0.3, 0.7, name == "sgd", 0.2).param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.6 if name == "muon" else 0.3, 0.2)
    assert group.get("momentum") == (0.7 if name in USES_MOMENTUM else None)
    assert group.get("nesterov", False) == (name == "sgd")


def test_muon_is_torch_s_for_the_convolutions_but_the_first_and_sgd_for_the_rest():
    torch.manual_seed(0)
    model = SEResNet((1, 2), 16, se="block", se_reduction=4).to(memory_format=torch.channels_last)
    names = [name for name, p in model.named_parameters() if name.startswith("residual_layers") and p.ndim == 4
             and "seblock" not in name]
    assert len(names) == 7 and {p.shape[2:] for p in map(model.get_parameter, names)} == {(3, 3), (1, 1)}
    rest = {name: nn.Parameter(p.detach().clone()) for name, p in model.named_parameters() if name not in names}
    matrices = {name: nn.Parameter(model.get_parameter(name).detach().flatten(1).clone()) for name in names}
    muon = torch.optim.Muon(matrices.values(), lr=0.05, weight_decay=0, momentum=0.9)
    sgd = torch.optim.SGD(rest.values(), lr=0.1, weight_decay=0.01, momentum=0.9, nesterov=True)
    optimizer = build_optimizer("muon", model, 0.05, 0.9, False, 0.01)
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


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 64, 576), (2, 128, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_orthogonalize_keeps_the_singular_vectors_and_brings_the_values_close_to_1(shape, dtype):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-4
    u, values, vh = torch.linalg.svd(matrices, full_matrices=False)
    found = u.mT @ orthogonalize(matrices, dtype) @ vh.mT  # diagonal, if the singular vectors are the same
    large = values > 0.05 * values.norm(dim=1, keepdim=True) / values.shape[1]**0.5  # tiny ones need more iterations
    diagonal = found.diagonal(dim1=1, dim2=2)
    assert ((diagonal > 0.6) & (diagonal < 1.3))[large].all() and large.float().mean() > 0.9
    assert (found - torch.diag_embed(diagonal)).abs().max() < (1e-4 if dtype == torch.float32 else 0.05)


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
@pytest.mark.parametrize("epochs", [1, 2, 3, 10])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_schedule_is_above_0_in_runs_of_few_steps(name, epochs):
    lrs = schedule_lrs(name, 0.1, 1, epochs, 0)
    assert len(lrs) == epochs and all(0 < lr <= 0.1 + 1e-12 for lr in lrs)
    assert lrs is schedule_lrs(name, 0.1, 1, epochs, 0)  # computed once


@pytest.mark.parametrize("steps_per_epoch, epochs", [(98, 40), (7, 5), (1, 3), (5, 1)])
def test_cosine_equals_torch_s_at_the_epoch_boundaries(steps_per_epoch, epochs):
    by_epoch, expected = lr_scheduler.CosineAnnealingLR(build("sgd"), epochs), []
    for _ in range(epochs):
        expected += by_epoch.get_last_lr()
        by_epoch.optimizer.step()
        by_epoch.step()
    lrs = schedule_lrs("cosine", 0.1, steps_per_epoch, epochs, 0)
    assert lrs[::steps_per_epoch] == pytest.approx(expected, rel=0, abs=1e-12) and (np.diff(lrs) < 0).all()


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


@pytest.mark.parametrize("name", ["cosine", "constant"])
@pytest.mark.parametrize("steps_per_epoch, epochs, warmup_epochs, warmup", [
    (4, 10, 2, 8), (4, 10, 2.5, 10), (3, 1, 0.9, 2), (1, 2, 1.9, 1), (1, 1, 0.6, 0)])  # it never takes all steps
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


@pytest.mark.parametrize(("decay", "steps"), [(0.999, 237), (0.99, 237), (0.9, 237), (0.5, 20)])
def test_the_average_forgets_the_initial_weights(decay, steps):
    average, current = [torch.ones(1)], [torch.zeros(1)]
    for step in range(steps):
        update_ema(average, current, decay, step)
    left = average[0].item()  # of the initial 1
    assert left == pytest.approx(math.prod(min(decay, (1 + step) / (10 + step)) for step in range(steps)), rel=1e-4)
    assert left < 1e-6  # 0.999 alone would leave 79%


def test_averaged_weights_are_evaluated_and_saved(run, monkeypatch, tmp_path):
    average, train_step, accuracies = {}, train.train_step, iter(range(9))

    def step_and_average(run, state, *batch):
        if not average:
            average.update({name: value.clone() for name, value in state.model.state_dict().items()})
        step = 4 * state.epoch + state.step
        train_step(run, state, *batch)
        decay = (1 + step) / (10 + step)  # below 0.9
        for name, value in state.model.state_dict().items():
            average[name] = decay * average[name] + (1 - decay) * value
    monkeypatch.setattr(train, "train_step", step_and_average)
    monkeypatch.setattr(train.evaluate, "score", lambda *_: (0.0, next(accuracies)))  # the last epoch is the best
    assert run("--epochs", "3", "--ema", "0.9", "--cutmix", "1", "--trivial-augment") == 0
    saved, best = runs.read(tmp_path / "run"), runs.read(tmp_path / "run", "best.pt")
    for name, value in saved["ema"].items():
        if value.is_floating_point():  # batch norm statistics, too
            torch.testing.assert_close(value, average[name])
            assert not torch.equal(value, saved["model"][name])
        else:
            assert value == 0 and saved["model"][name] == 12  # num_batches_tracked is left alone
    model, _ = load_checkpoint_model(tmp_path / "run" / "last.pt")
    for weights in (model.state_dict(), best["model"]):
        assert runs.difference(dict(weights), dict(saved["ema"])) is None
