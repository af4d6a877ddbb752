"""Optimizers, learning-rate schedules, and the moving average of the weights."""

import math
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import get_ema_multi_avg_fn

from options import OPTIMIZERS, USES_MOMENTUM


def build_optimizer(name: str, model: nn.Module, lr: float, momentum: float, nesterov: bool, weight_decay: float,
                    precision: str = "fp32", bias_lr: float = 1.0) -> torch.optim.Optimizer:
    """Build an optimizer, fused where torch has a fused form for the parameters' device."""
    groups, parameters = group_parameters(name, model, lr, weight_decay, bias_lr), list(model.parameters())
    if name == "muon":
        return Muon(groups, momentum, torch.bfloat16 if precision == "bf16" else torch.float32)
    settings = {"lr": lr, "weight_decay": weight_decay}
    if name in USES_MOMENTUM:
        settings["momentum"] = momentum
    if name == "sgd":
        settings["nesterov"] = nesterov
    if name in ("sgd", "adam", "adamw"):  # one kernel over all parameters; with None, torch selects foreach if it can
        settings["fused"] = parameters[0].device.type in ("cuda", "cpu", "mps") or None
    optimizer = getattr(torch.optim, OPTIMIZERS[name][0])(groups, **settings)
    if name == "sgd" and momentum:  # torch's fused form leaves them unset if fp16 overflows in the first step
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def group_parameters(name: str, model: nn.Module, lr: float, weight_decay: float, bias_lr: float
                     ) -> list[dict[str, Any]]:
    """Group parameters by their settings.

    The biases of batch norm have `bias_lr` times the learning rate, and as much less weight decay (arXiv 2404.00498).
    With Muon, all convolutions without bias but the first have no decay, and the other parameters have twice the
    learning rate.
    """
    modules, is_muon = list(model.modules()), name == "muon"
    convolutions = [m.weight for m in modules if is_muon and isinstance(m, nn.Conv2d) and m.bias is None][1:]
    biases = [m.bias for m in modules if bias_lr != 1 and isinstance(m, nn.BatchNorm2d)]
    taken = {id(parameter) for parameter in (*convolutions, *biases)}
    others, other_lr = [p for p in model.parameters() if id(p) not in taken], 2 * lr if is_muon else lr
    groups = [{"params": convolutions, "lr": lr, "weight_decay": 0.0, "orthogonal": True},
              {"params": others, "lr": other_lr, "weight_decay": weight_decay},
              {"params": biases, "lr": bias_lr * other_lr, "weight_decay": weight_decay / bias_lr}]
    return [group for group in groups if group["params"]]


class Muon(torch.optim.Optimizer):
    """Muon for the groups with `orthogonal`, which hold convolutions; SGD with Nesterov momentum for the others.

    The step of a convolution is its momentum, as a matrix (out_channels, in_channels * k * k), with all singular values
    brought close to 1 (Keller Jordan et al., Muon, 2024; arXiv 2502.16982). Batch norm after them makes the length of
    these weights irrelevant (not in "preact" blocks), so it is kept at sqrt(out_channels) instead of decaying, as in
    KellerJordan/cifar10-airbench.

    torch.optim.Muon takes matrices only and always computes in bfloat16, which made a step of it 26 times as long on a
    CPU without bfloat16 instructions.
    """

    def __init__(self, groups: list[dict[str, Any]], momentum: float, dtype: torch.dtype):
        super().__init__(groups, {"momentum": momentum, "orthogonal": False})
        self.dtype = dtype  # of the products of matrices
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self) -> None:
        """Update the parameters that have a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            buffers = [self.state[p]["momentum_buffer"] for p in parameters]
            gradients = torch._foreach_add([p.grad for p in parameters], parameters, alpha=group["weight_decay"])
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, gradients)
            torch._foreach_add_(gradients, buffers, alpha=group["momentum"])
            if group["orthogonal"]:
                for shape in {p.shape for p in parameters}:  # all of one shape together: fewer kernels on a GPU
                    same = [i for i, p in enumerate(parameters) if p.shape == shape]
                    matrices = torch.stack([gradients[i] for i in same]).flatten(2)
                    steps = orthogonalize(matrices, self.dtype) * max(1, shape[0] / matrices.shape[2])**0.5
                    torch._foreach_copy_([gradients[i] for i in same], list(steps.view(-1, *shape)))
                norms = torch._foreach_norm(parameters)
                torch._foreach_mul_(parameters, [len(p)**0.5 / norm for p, norm in zip(parameters, norms, strict=True)])
            torch._foreach_add_(parameters, gradients, alpha=-group["lr"])


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Bring the singular values of (B, M, N) matrices close to 1, by five Newton-Schulz iterations in a dtype."""
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalize(matrices.mT, dtype).mT
    x = matrices.to(dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.to(matrices.dtype)


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
        lrs = [group["lr"] for group in optimizer.param_groups]
        scheduler = lr_scheduler.OneCycleLR(optimizer, lrs, total, cycle_momentum=has_momentum)
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
