"""Print the errors that rounding alone causes in the gradient check, on a CPU."""

import functools
import itertools
import sys
import time
import warnings
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import gradient_check
import options
import train
from evaluate import load_checkpoint_model
from hardware import CPU, describe, memory_format

MODES = ("fp32, other kernels", "TF32", "fp16", "bf16")
conv2d, run_layer = torch.nn.functional.conv2d, gradient_check.run_layer


def tf32(tensor: torch.Tensor) -> torch.Tensor:
    """Round to the 10 bits of mantissa of TF32."""
    bits = tensor.detach().contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32).view_as(tensor)


class Conv(torch.autograd.Function):
    """A convolution whose three products take TF32 factors, as cuDNN's do."""

    @staticmethod
    def forward(ctx, inputs, weight, bias, *settings):
        ctx.save_for_backward(inputs, weight, bias)
        ctx.settings = settings
        return conv2d(tf32(inputs), tf32(weight), bias, *settings)

    @staticmethod
    def backward(ctx, gradient):
        (inputs, weight, bias), rounded = ctx.saved_tensors, tf32(gradient)
        return (torch.nn.grad.conv2d_input(inputs.shape, tf32(weight), rounded, *ctx.settings),
                torch.nn.grad.conv2d_weight(tf32(inputs), weight.shape, rounded, *ctx.settings),
                None if bias is None else gradient.sum((0, 2, 3)), *4 * (None,))


def measure(model: torch.nn.Module, args, mode: str) -> tuple[float, float, float]:
    """Return the largest error of a layer, that of loss and length of the gradient, and the seconds of CPU time.

    Only the device's side of the comparison of layers is changed.
    """
    calls, start = itertools.count(), time.process_time()

    def run_other(*values):
        if next(calls) % 2:
            return run_layer(*values)
        with torch.backends.mkldnn.flags(enabled=mode != MODES[0]), mock.patch(
                "torch.nn.functional.conv2d", (lambda *a: Conv.apply(*a)) if mode == "TF32" else conv2d):
            return run_layer(*values)
    build_forward = functools.partial(train.build_forward, args)
    reference = gradient_check.compute_reference(model, build_forward, memory_format(CPU))
    precision = mode if mode in ("fp16", "bf16") else "fp32"
    with mock.patch.object(gradient_check, "run_layer", run_other):
        error, _ = gradient_check.largest_error(reference, build_forward, CPU, precision)
    seconds = time.process_time() - start
    whole = gradient_check.run_whole(reference.network, reference.images, build_forward, CPU, precision)
    return error, (whole / reference.whole - 1).abs().max().item(), seconds


def networks():
    """Yield the flags of every kind of network, without and with depth."""
    yield from ([], "--num-blocks 9 9 9 --channels 16".split(), "--num-blocks 18 18 18 --channels 16".split(),
                "--num-blocks 18 18 18 --channels 16 --se block".split(),
                "--num-blocks 9 9 9 --channels 16 --block preact".split())
    for block, se, size, (stages, channels) in itertools.product(
            ("basic", "preact"), ("stem", "block", "none"), (1, 3, 7), ((1, 8), (3, 16), (5, 8))):
        if stages < 5 or size == 3:
            yield ["--block", block, "--se", se, "--kernel-sizes", str(size), "--num-blocks", *["2"] * stages,
                   "--channels", str(channels), "--se-reduction", "4", "--max-params", "0", "--dropout", "0.1"]


def main() -> None:
    """Print a row per network, and the largest errors of each mode."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(f"{describe(CPU)}, torch {torch.__version__}, one thread. {', '.join(MODES)}:\n"
          "error of a layer / error of the loss or the length of the gradient (seconds of CPU time)")
    largest = {mode: [0.0, 0.0] for mode in MODES}
    for flags in (None, *networks()):
        args, _ = options.parse_args(flags or [])
        torch.manual_seed(0)
        pretrained = ROOT / "checkpoints" / "pretrained.pt"
        model = load_checkpoint_model(pretrained)[0] if flags is None else options.build_model(args)
        cells = []
        for mode in MODES:
            layer, whole, seconds = measure(model, args, mode)
            largest[mode] = [max(pair) for pair in zip(largest[mode], (layer, whole), strict=True)]
            cells.append(f"{layer:.1e} / {whole:.1e} ({seconds:.1f})")
        print("  ".join(cells), "pretrained.pt" if flags is None else " ".join(flags) or "default", flush=True)
    print("  ".join(f"{layer:.1e} / {whole:.1e}" for layer, whole in largest.values()), "largest")


if __name__ == "__main__":
    main()
