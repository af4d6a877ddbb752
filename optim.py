"""Optimisers and learning rate schedules."""

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim import lr_scheduler

# Each with the lr that --lr stands for when it is not given.
OPTIMIZERS = {
    "sgd": (torch.optim.SGD, 0.1),
    "adam": (torch.optim.Adam, 1e-3),
    "adamw": (torch.optim.AdamW, 1e-3),
    "rmsprop": (torch.optim.RMSprop, 1e-4),  # with momentum 0.9 a step is ten times that
    "adagrad": (torch.optim.Adagrad, 1e-2),
    "adadelta": (torch.optim.Adadelta, 1.0),
}
USES_MOMENTUM = ("sgd", "rmsprop")
SCHEDULERS = ("cosine", "onecycle", "constant")


def build_optimizer(name: str, parameters: Iterable[nn.Parameter], lr: float, momentum: float, nesterov: bool,
                    weight_decay: float) -> torch.optim.Optimizer:
    """Make an optimiser, in the fused form where torch has one for the parameters' device."""
    parameters = list(parameters)
    settings = {"lr": lr, "weight_decay": weight_decay}
    if name in USES_MOMENTUM:
        settings["momentum"] = momentum
    if name == "sgd":
        settings["nesterov"] = nesterov
    if name in ("sgd", "adam", "adamw"):  # one kernel over all parameters; elsewhere torch picks foreach where it can
        settings["fused"] = parameters[0].device.type in ("cuda", "cpu")
    optimizer = OPTIMIZERS[name][0](parameters, **settings)
    if name == "sgd" and momentum:  # torch's fused form leaves them unwritten if fp16 overflows in the first step
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def lr_factor(step: int, total_steps: int, warmup_steps: int, scheduler: str) -> float:
    """Return what the lr is multiplied by at a step, 0 <= step <= total_steps.

    `cosine` is SGDR's single period (arXiv 1608.03983): at the epoch boundaries the values of CosineAnnealingLR
    stepped by epoch, and 0 at the end.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if scheduler == "constant":
        return 1.0
    return (1 + math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps))) / 2


def build_scheduler(optimizer: torch.optim.Optimizer, name: str, steps_per_epoch: int, epochs: int,
                    warmup_epochs: float) -> lr_scheduler.LRScheduler:
    """Make the schedule; it is stepped after every optimiser step.

    `onecycle` is torch's (arXiv 1708.07120) at its defaults: the lr rises from 1/25 to 1 over 30 % of the steps and
    falls to 1/250000, while momentum (or Adam's first beta) falls from 0.95 to 0.85 and rises again.
    """
    total = epochs * steps_per_epoch
    if name == "onecycle":
        has_momentum = not {"momentum", "betas"}.isdisjoint(optimizer.defaults)
        scheduler = lr_scheduler.OneCycleLR(optimizer, optimizer.defaults["lr"], total, cycle_momentum=has_momentum)
    else:
        warmup = min(round(warmup_epochs * steps_per_epoch), total - 1)
        scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, total, warmup, name))
    optimizer.step()  # no gradients, no effect; or torch would warn where fp16 skips the very first step
    return scheduler
