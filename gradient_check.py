"""Compare the gradients of a device with those in fp32 on the CPU, before a run trusts it (docs/reliability.md)."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from distributed import on_every_rank
from hardware import CPU, PRECISIONS, autocast, describe, memory_format
from utils import RunError

# The largest relative errors that are accepted; results/gradient-check has those that rounding causes.
TOLERANCES = {"fp32": 1e-3, "fp16": 0.02, "bf16": 0.1}


class Reference(NamedTuple):
    """What one small batch gives in fp32 on the CPU."""

    network: nn.Module
    images: Tensor  # (4, 3, 32, 32) float32
    layers: list[tuple[nn.Module, Tensor, Tensor]]  # that have parameters; their inputs, and gradients of their outputs
    whole: Tensor  # (2,): the loss, and the length of the gradient of all parameters


@on_every_rank
def check_gradients(model: nn.Module, build_forward: Callable[..., Callable], device: torch.device, precision: str
                    ) -> None:
    """End the run with a RunError if the device computes other outputs or gradients than the CPU in fp32.

    `build_forward(model, device, precision)` returns the run's function from images and targets to the summed loss.
    The model, its gradients and all random states stay as they are.
    """
    reference = compute_reference(model, build_forward, memory_format(device))
    if not reference.whole.isfinite().all():
        return  # the weights are to blame, and the first save finds that
    try:
        error, name = largest_error(reference, build_forward, device, precision)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a device or its driver may raise
        verb, reason = "cannot compute", f"{type(error).__name__}: {error}".partition("\n")[0]
    else:
        # cuDNN computes fp32 in TF32, which has the mantissa of fp16
        if error < TOLERANCES["fp16" if precision == "fp32" and device.type == "cuda" else precision]:
            return
        verb, reason = "computes wrong", f"{name} is {f'off by {error:.1%}' if error < torch.inf else 'not finite'}"
    hint = "--device cpu" if precision == "fp32" else "--precision fp32, --device cpu"
    raise RunError(f"{describe(device)} with torch {torch.__version__} {verb} gradients in {precision} ({reason}); use "
                   f"{hint} or another version of torch")


def compute_reference(model: nn.Module, build_forward: Callable[..., Callable], layout: torch.memory_format
                      ) -> Reference:
    """Run four random images through a copy of the model, without dropout, in fp32 on the CPU."""
    network, layers = copy.deepcopy(model).to(CPU).train(), []
    for layer in network.modules():
        if isinstance(layer, nn.Dropout):
            layer.eval()
    generator = torch.Generator().manual_seed(0)  # leaves the run's random numbers alone
    # with means that differ: otherwise all images are the same to squeeze-and-excitation, and gradients cancel out
    images = torch.randn(4, 3, 32, 32, generator=generator) + torch.randn(4, 3, 1, 1, generator=generator)

    def record(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if inputs and list(layer.parameters(recurse=False)):
            output.register_hook(lambda gradient: layers.append((layer, inputs[0].detach(), gradient)))
    images = images.contiguous(memory_format=layout)
    with nn.modules.module.register_module_forward_hook(record):
        whole = run_whole(network, images, build_forward, CPU, "fp32")
    return Reference(network, images, layers, whole)


def largest_error(reference: Reference, build_forward: Callable[..., Callable], device: torch.device, precision: str
                  ) -> tuple[float, str]:
    """Return the largest relative error on a device, infinite for NaN, and what has it.

    Every layer gets the inputs and output gradients that it has on the CPU, because rounding errors grow with depth: in
    bf16, the gradients of a deep network have little in common with those in fp32. The whole network is compared by its
    loss and the length of its gradient, and counts only if they are off by half: rounding changes them by up to 12%.
    """
    network = copy.deepcopy(reference.network).to(device)
    whole = run_whole(network, reference.images, build_forward, device, precision)
    off = (whole / reference.whole - 1).abs().max()
    errors = [(off * (not off < 0.5), "the loss or the whole gradient")]
    names = {layer: name for name, layer in reference.network.named_modules()}
    for layer, *recorded in reference.layers:
        found, wanted = run_layer(layer, *recorded, device, precision), run_layer(layer, *recorded, CPU, "fp32")
        largest = max(tensor.norm() for tensor in wanted) + 1e-30
        for kind, a, b in zip(("output", "input", *dict(layer.named_parameters())), found, wanted, strict=True):
            least = 0.1 * largest / b.numel()**0.5  # few values may all be close to zero
            errors.append(((a - b).norm() / b.norm().clamp_min(least), f"{names[layer]}.{kind}"))
    return max((error.nan_to_num(torch.inf, torch.inf).item(), name) for error, name in errors)


def run_whole(network: nn.Module, images: Tensor, build_forward: Callable[..., Callable], device: torch.device,
              precision: str) -> Tensor:
    """Return the loss and the length of its gradient, (2,) on the CPU."""
    loss = build_forward(network, device, precision)(images.to(device), torch.arange(4, device=device))[0]
    gradients = torch.autograd.grad(loss, list(network.parameters()))
    return torch.stack([loss.detach(), torch.cat([gradient.flatten() for gradient in gradients]).norm()]).cpu()


def run_layer(layer: nn.Module, inputs: Tensor, gradient: Tensor, device: torch.device, precision: str) -> list[Tensor]:
    """Return a layer's output, and the gradients of its input and parameters for a gradient of the output."""
    layer = copy.deepcopy(layer).to(device)
    inputs = inputs.to(device, PRECISIONS[precision]).detach().requires_grad_()  # as the layer before returns them
    with autocast(device, precision):
        output = layer(inputs)
    gradient = gradient / (16 * gradient.abs().max().clamp_min(1e-30))  # fp16 can represent it, and its sums
    gradients = torch.autograd.grad(output, [inputs, *layer.parameters()], gradient.to(device, output.dtype))
    return [tensor.detach().cpu().double() for tensor in (output, *gradients)]
