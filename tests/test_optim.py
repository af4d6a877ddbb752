"""Optimizers, schedules against torch's own, and the moving average of the weights."""

import math
import warnings

import numpy as np
import pytest
import runs
import torch
from torch import nn
from torch.optim import lr_scheduler

import train
from evaluate import load_checkpoint_model
from optim import build_optimizer, build_scheduler, schedule_lrs, update_ema
from options import OPTIMIZERS, SCHEDULERS, USES_MOMENTUM

small_data, run = runs.small_data, runs.run


def build(name: str, parameters=None, lr: float = 0.1, device: str = "cpu") -> torch.optim.Optimizer:
    return build_optimizer(name, parameters or [nn.Parameter(torch.zeros(1, device=device))], lr, 0.9, False, 5e-4)


def lrs_of(optimizer: torch.optim.Optimizer, scheduler: lr_scheduler.LRScheduler, steps: int) -> list[float]:
    """Return the learning rate of each step, and the one after the last."""
    lrs = [optimizer.param_groups[0]["lr"]]
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        lrs.append(optimizer.param_groups[0]["lr"])
    return lrs


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_learns_at_its_default_lr(name):
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(64) % 3
    inputs = 2 * nn.functional.one_hot(targets, 8) + torch.randn(64, 8, generator=generator)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
    optimizer, losses = build(name, model.parameters(), OPTIMIZERS[name][1]), []
    for _ in range(200):
        optimizer.zero_grad()
        losses.append(nn.functional.cross_entropy(model(inputs), targets))
        losses[-1].backward()
        nn.utils.clip_grad_value_(model.parameters(), 0.1)
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_setting_reaches_its_optimizer(name):
    group = build_optimizer(name, [nn.Parameter(torch.zeros(1))], 0.3, 0.7, name == "sgd", 0.2).param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.3, 0.2)
    assert group.get("momentum") == (0.7 if name in USES_MOMENTUM else None)
    assert group.get("nesterov", False) == (name == "sgd")


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fused_where_torch_has_it_for_the_device(name):
    assert bool(build(name).param_groups[0].get("fused")) == (name in ("sgd", "adam", "adamw"))
    assert not build(name, device="meta").param_groups[0].get("fused")


@pytest.mark.parametrize("total", [1, 2, 3, 10])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_steps_with_every_schedule(name, scheduler, total):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = build(name)
        schedule = build_scheduler(optimizer, scheduler, 1, total, 0)
        parameter = optimizer.param_groups[0]["params"][0]
        for _ in range(total):
            before, parameter.grad = parameter.item(), torch.ones(1)
            assert 0 < optimizer.param_groups[0]["lr"] <= 0.1 + 1e-12
            optimizer.step()
            schedule.step()
            assert math.isfinite(parameter.item()) and parameter.item() < before


@pytest.mark.parametrize(("steps_per_epoch", "epochs"), [(98, 40), (7, 5), (1, 3), (5, 1), (1, 1)])
def test_cosine_equals_torch_s_at_the_epoch_boundaries_and_ends_at_0(steps_per_epoch, epochs):
    optimizer, by_epoch = build("sgd"), build("sgd")
    expected = lrs_of(by_epoch, lr_scheduler.CosineAnnealingLR(by_epoch, epochs), epochs)
    scheduler = build_scheduler(optimizer, "cosine", steps_per_epoch, epochs, 0)
    lrs = lrs_of(optimizer, scheduler, steps_per_epoch * epochs)
    assert lrs[::steps_per_epoch] == pytest.approx(expected, rel=0, abs=1e-12)
    assert lrs[-1] == 0 and all(a > b for a, b in zip(lrs, lrs[1:], strict=False))


@pytest.mark.parametrize(("name", "momentum"), [("sgd", "momentum"), ("rmsprop", "momentum"), ("adam", "betas"),
                                                ("adamw", "betas"), ("adagrad", None), ("adadelta", None)])
def test_onecycle_is_torch_s_with_its_defaults(name, momentum):
    optimizer, lrs, momenta = build(name), [], []
    scheduler = build_scheduler(optimizer, "onecycle", 10, 10, 0)
    for _ in range(100):
        group = optimizer.param_groups[0]
        lrs.append(group["lr"])
        momenta.append(group["betas"][0] if momentum == "betas" else group.get("momentum"))
        optimizer.step()
        scheduler.step()
    assert [lrs[0], lrs[29], lrs[99]] == pytest.approx([0.1 / 25, 0.1, 0.1 / 250_000]) and max(lrs) == lrs[29]
    if momentum:
        assert [momenta[0], momenta[29], momenta[99]] == pytest.approx([0.95, 0.85, 0.95])
        assert min(momenta) == momenta[29]


@pytest.mark.parametrize("name", ["cosine", "constant"])
@pytest.mark.parametrize(("steps_per_epoch", "epochs", "warmup_epochs", "warmup"), [
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
    ema_model, model = nn.Linear(1, 1), nn.Linear(1, 1)
    nn.init.ones_(ema_model.weight)
    nn.init.zeros_(model.weight)
    for step in range(steps):
        update_ema(ema_model, model, decay, step)
    left = ema_model.weight.item()  # of the initial 1
    assert left == pytest.approx(math.prod(min(decay, (1 + step) / (10 + step)) for step in range(steps)), rel=1e-4)
    assert left < 1e-6  # 0.999 alone would leave 79%


def test_averaged_weights_are_evaluated_and_saved(run, monkeypatch, tmp_path):
    states, train_step = [], train.train_step

    def note_weights(run, state, *batch):
        if not states:
            states.append({name: value.clone() for name, value in state.model.state_dict().items()})
        train_step(run, state, *batch)
        states.append({name: value.clone() for name, value in state.model.state_dict().items()})
    monkeypatch.setattr(train, "train_step", note_weights)
    assert run("--epochs", "3", "--ema", "0.9", "--cutmix", "1", "--trivial-augment") == 0
    average = states[0]
    for step, current in enumerate(states[1:]):
        decay = (1 + step) / (10 + step)  # below 0.9
        average = {name: decay * average[name] + (1 - decay) * value for name, value in current.items()}
    saved, best = runs.read(tmp_path / "run"), runs.read(tmp_path / "run", "best.pt")
    for name, value in saved["model"].items():
        assert torch.equal(value, states[-1][name])
        if value.is_floating_point():  # batch norm statistics, too
            torch.testing.assert_close(saved["ema"][name], average[name])
        else:
            assert value == 12 and saved["ema"][name] == 0  # num_batches_tracked is left alone
    model, _ = load_checkpoint_model(tmp_path / "run" / "last.pt")
    assert all(torch.equal(value, saved["ema"][name]) for name, value in model.state_dict().items())
    assert not torch.equal(best["model"]["conv1.weight"], states[4 * best["epoch"]]["conv1.weight"])
    if best["epoch"] == 3:
        assert all(torch.equal(best["model"][name], saved["ema"][name]) for name in best["model"])
