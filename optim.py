"""Optimizers, learning-rate schedules, and the moving average of the weights."""

import math
from collections.abc import Iterable
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import get_ema_multi_avg_fn

from options import OPTIMIZERS, USES_MOMENTUM


def build_optimizer(name: str, parameters: Iterable[nn.Parameter], lr: float, momentum: float, nesterov: bool,
                    weight_decay: float) -> torch.optim.Optimizer:
    """Build an optimizer, fused where torch has a fused form for the parameters' device."""
    parameters = list(parameters)
    settings = {"lr": lr, "weight_decay": weight_decay}
    if name in USES_MOMENTUM:
        settings["momentum"] = momentum
    if name == "sgd":
        settings["nesterov"] = nesterov
    if name in ("sgd", "adam", "adamw"):  # one kernel over all parameters; with None, torch selects foreach if it can
        settings["fused"] = parameters[0].device.type in ("cuda", "cpu", "mps") or None
    optimizer = getattr(torch.optim, OPTIMIZERS[name][0])(parameters, **settings)
    if name == "sgd" and momentum:  # torch's fused form leaves them unset if fp16 overflows in the first step
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def lr_factor(step: int, total_steps: int, warmup_steps: int, scheduler: str) -> float:
    """Return the factor of the learning rate at a step, 0 <= step <= total_steps.

    `cosine` is one period of SGDR (arXiv 1608.03983): at the epoch boundaries it equals CosineAnnealingLR stepped by
    epoch, and it ends at 0.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if scheduler == "constant":
        return 1.0
    return (1 + math.cos(math.pi * (step - warmup_steps) / (total_steps - warmup_steps))) / 2


def build_scheduler(optimizer: torch.optim.Optimizer, name: str, steps_per_epoch: int, epochs: int,
                    warmup_epochs: float) -> lr_scheduler.LRScheduler:
    """Build the schedule, to be stepped after every optimizer step.

    `onecycle` is torch's OneCycleLR (arXiv 1708.07120) with its defaults: the learning rate rises from 1/25 to 1 over
    30% of the steps and falls to 1/250000, while momentum (Adam's beta1) falls from 0.95 to 0.85 and rises again.
    """
    total = epochs * steps_per_epoch
    if name == "onecycle":
        has_momentum = not {"momentum", "betas"}.isdisjoint(optimizer.defaults)
        scheduler = lr_scheduler.OneCycleLR(optimizer, optimizer.defaults["lr"], total, cycle_momentum=has_momentum)
    else:
        warmup = min(round(warmup_epochs * steps_per_epoch), total - 1)
        scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, total, warmup, name))
    optimizer.step()  # no gradients, no effect; otherwise torch warns where fp16 skips the very first step
    return scheduler


@cache  # the 78,200 steps of the default run take a second
def schedule_lrs(name: str, lr: float, steps_per_epoch: int, epochs: int, warmup_epochs: float) -> np.ndarray:
    """Return the learning rate at every step of a whole run, (epochs * steps_per_epoch,) float64, for plots."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr, momentum=0.9)
    scheduler = build_scheduler(optimizer, name, steps_per_epoch, epochs, warmup_epochs)
    lrs = np.empty(epochs * steps_per_epoch)
    for step in range(len(lrs)):
        lrs[step] = scheduler.get_last_lr()[0]
        scheduler.step()
    return lrs


def averaged_tensors(model: nn.Module) -> list[Tensor]:
    """List what the moving average covers: weights and batch norm statistics."""
    return [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]


def update_ema(averaged: list[Tensor], current: list[Tensor], decay: float, step: int) -> None:
    """Move averaged weights and batch norm statistics toward the current ones after step `step` (0, 1, ...).

    The decay warms up as min(decay, (1 + step) / (10 + step)), so that the random initial weights are soon forgotten
    (TensorFlow's `ExponentialMovingAverage(num_updates=step)`). AveragedModel would wait for a GPU twice a step.
    """
    get_ema_multi_avg_fn(min(decay, (1 + step) / (10 + step)))(averaged, current, None)
