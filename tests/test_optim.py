"""Schedules against torch's own, and every optimiser at its default lr."""

import math

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import options
from optim import OPTIMIZERS, USES_MOMENTUM, build_optimizer, build_scheduler, lr_factor


def sgd(lr: float) -> torch.optim.SGD:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr)


def rates(optimizer: torch.optim.Optimizer, scheduler: lr_scheduler.LRScheduler, steps: int) -> list[float]:
    """Give the lr that each step uses, and the one after the last of them."""
    found = [optimizer.param_groups[0]["lr"]]
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        found.append(optimizer.param_groups[0]["lr"])
    return found


def built(name: str, steps_per_epoch: int, epochs: int, warmup_epochs: float = 0.0, lr: float = 0.1) -> list[float]:
    optimizer = sgd(lr)
    return rates(optimizer, build_scheduler(optimizer, name, steps_per_epoch, epochs, warmup_epochs),
                 steps_per_epoch * epochs)


@pytest.mark.parametrize(("steps_per_epoch", "epochs"), [(98, 40), (7, 5), (1, 3), (5, 1), (1, 1)])
def test_cosine_passes_through_the_paper_s_values_and_ends_at_0(steps_per_epoch, epochs):
    optimizer = sgd(0.1)
    paper = rates(optimizer, lr_scheduler.CosineAnnealingLR(optimizer, epochs), epochs)
    found = built("cosine", steps_per_epoch, epochs)
    assert found[::steps_per_epoch] == pytest.approx(paper, rel=0, abs=1e-12)
    assert found[-1] == 0
    assert all(a > b for a, b in zip(found, found[1:], strict=False))


@pytest.mark.parametrize("total", [1, 2, 3, 4, 10, 100, 1955])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_onecycle_moves_lr_up_and_down_and_momentum_down_and_up(name, total):
    optimizer = build_optimizer(name, [nn.Parameter(torch.zeros(1))], 0.1, 0.9, False, 0)
    scheduler, lrs, momenta = build_scheduler(optimizer, "onecycle", 1, total, 0), [], []
    for _ in range(total):
        group = optimizer.param_groups[0]
        lrs.append(group["lr"])
        momenta.append(group["betas"][0] if "betas" in group else group.get("momentum"))
        optimizer.step()
        scheduler.step()
    def course(start: float, top: float, end: float) -> list[float]:
        """Write out the two half cosines; the top lies at 30 % of the steps, less one."""
        top_step = 0.3 * total - 1
        def value(step: int) -> float:
            if step <= top_step:
                return top + (start - top) * (1 + math.cos(math.pi * step / top_step)) / 2
            return end + (top - end) * (1 + math.cos(math.pi * (step - top_step) / (total - 1 - top_step))) / 2
        return [value(step) for step in range(total)]
    assert lrs == pytest.approx(course(0.1 / 25, 0.1, 0.1 / 250_000), rel=1e-9)
    if name in ("adagrad", "adadelta"):
        assert momenta == [None] * total
    else:
        assert momenta == pytest.approx(course(0.95, 0.85, 0.95), rel=1e-9)


def test_constant():
    assert built("constant", 3, 4) == [0.1] * 13


@pytest.mark.parametrize("name", ["cosine", "constant"])
@pytest.mark.parametrize("warmup_epochs", [2, 2.5])
def test_warmup_rises_linearly_and_joins_the_schedule(name, warmup_epochs):
    warmup, found = int(warmup_epochs * 4), built(name, 4, 10, warmup_epochs)
    assert found[:warmup + 1] == pytest.approx([0.1 * (i + 1) / (warmup + 1) for i in range(warmup + 1)])
    rest = [0.05 * (1 + math.cos(math.pi * i / (40 - warmup))) if name == "cosine" else 0.1
            for i in range(41 - warmup)]
    assert found[warmup:] == pytest.approx(rest, abs=1e-12)


@pytest.mark.parametrize("name", ["cosine", "constant"])
@pytest.mark.parametrize(("steps_per_epoch", "epochs", "warmup_epochs"), [(3, 1, 0.9), (1, 1, 0.6), (1, 2, 1.9)])
def test_warmup_that_rounds_up_to_the_whole_run(name, steps_per_epoch, epochs, warmup_epochs):
    found = built(name, steps_per_epoch, epochs, warmup_epochs)
    assert all(0 < lr <= 0.1 for lr in found[:-1])


def test_a_schedule_has_no_memory_but_its_step():
    """A resumed run must go on with the very same rates."""
    optimizer = sgd(0.1)
    scheduler = build_scheduler(optimizer, "cosine", 4, 5, 1)
    expected = rates(optimizer, scheduler, 7)
    saved = scheduler.state_dict()
    again = sgd(0.1)
    resumed = build_scheduler(again, "cosine", 4, 5, 1)
    resumed.load_state_dict(saved)
    resumed.step()
    assert again.param_groups[0]["lr"] == 0.1 * lr_factor(8, 20, 4, "cosine") < expected[-1]


def problem() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Make a small network and 64 points of three classes, which it can learn."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(64) % 3
    inputs = 2 * nn.functional.one_hot(targets, 8) + torch.randn(64, 8, generator=generator)
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3)), inputs, targets


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimiser_learns_at_the_lr_that_the_flags_give_it(name):
    args, _ = options.parse_args(["--optimizer", name])
    assert args.lr == OPTIMIZERS[name][1]
    model, inputs, targets = problem()
    optimizer = build_optimizer(name, model.parameters(), args.lr, args.momentum, args.nesterov, args.weight_decay)
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        losses.append(nn.functional.cross_entropy(model(inputs), targets))
        losses[-1].backward()
        nn.utils.clip_grad_value_(model.parameters(), args.grad_clip)
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_setting_reaches_its_optimiser(name):
    optimizer = build_optimizer(name, [nn.Parameter(torch.zeros(1))], 0.3, 0.7, name == "sgd", 0.2)
    assert type(optimizer) is OPTIMIZERS[name][0]
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.3, 0.2)
    assert group.get("momentum", "none") == (0.7 if name in USES_MOMENTUM else "none")
    assert group.get("nesterov", False) == (name == "sgd")


def test_fused_where_torch_has_it_for_the_device():
    for name in ("sgd", "adam", "adamw"):
        assert build_optimizer(name, [nn.Parameter(torch.zeros(1))], 0.1, 0.9, False, 0).param_groups[0]["fused"]
    elsewhere = [nn.Parameter(torch.zeros(1, device="meta"))]
    for name in OPTIMIZERS:
        assert not build_optimizer(name, elsewhere, 0.1, 0.9, False, 0).param_groups[0].get("fused")


def test_the_fused_step_is_the_plain_one():
    """The published SGD, written out: decay, momentum, step."""
    model, inputs, targets = problem()
    optimizer = build_optimizer("sgd", model.parameters(), 0.1, 0.9, False, 5e-4)
    plain = [parameter.detach().clone() for parameter in model.parameters()]
    velocities = [torch.zeros_like(parameter) for parameter in plain]
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        for value, velocity, parameter in zip(plain, velocities, model.parameters(), strict=True):
            velocity.mul_(0.9).add_(parameter.grad + 5e-4 * value)
            value.sub_(0.1 * velocity)
        optimizer.step()
        for value, parameter in zip(plain, model.parameters(), strict=True):
            torch.testing.assert_close(parameter.detach(), value, rtol=1e-5, atol=1e-6)


def test_lr_given_is_kept_and_resolved_only_when_not_given():
    assert options.parse_args(["--optimizer", "adam", "--lr", "0.02"])[0].lr == 0.02
    assert options.parse_args([])[0].lr == 0.1
    assert "lr" not in options.parse_args(["--optimizer", "adam"])[1]
    assert set(OPTIMIZERS) == {"sgd", "adam", "adamw", "rmsprop", "adagrad", "adadelta"}


@pytest.mark.parametrize(("flags", "names"), [
    (["--optimizer", "adam", "--momentum", "0.8"], ("--momentum", "adam")),
    (["--optimizer", "adam", "--nesterov"], ("--nesterov", "sgd")),
    (["--nesterov", "--momentum", "0"], ("--nesterov", "--momentum")),
    (["--scheduler", "onecycle", "--warmup-epochs", "1"], ("--warmup-epochs", "onecycle")),
    (["--scheduler", "onecycle", "--momentum", "0.8"], ("--momentum", "onecycle")),
    (["--warmup-epochs", "5", "--epochs", "5"], ("--warmup-epochs", "--epochs")),
    (["--optimizer", "sdg"], ("--optimizer", "sdg")),
])
def test_settings_that_contradict_each_other_are_refused_by_name(flags, names, capsys):
    with pytest.raises(SystemExit) as caught:
        options.parse_args(flags)
    message = capsys.readouterr().err
    assert caught.value.code == 2 and message.count("\n") == 1
    assert all(name in message for name in names)
