"""TrivialAugment (arXiv 2103.10158) with its wide augmentation space.

Each image gets one random operation at one random strength. `transform_one` equals torchvision's TrivialAugmentWide on
tensors; `transform` returns bitwise identical images for whole batches of mixed operations, on any device.
"""

from functools import cache
from math import atan, degrees

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import functional as tv
from torchvision.transforms.v2.functional import equalize  # version 1 loops over the images

SIZE = 32
PIXELS = SIZE * SIZE
BINS = 31
STRENGTHS = 2 * BINS  # the bins with a positive magnitude, then with a negative one if the operation is signed
# The operations in torchvision's order, which `transform` relies on: magnitude m of the first and of the last bin, sign
# of m in the second half of the strengths, function.
SPACE = (
    (0, 0, 1, lambda image, _: image),
    (0, 0.99, -1, lambda image, m: tv.affine(image, 0.0, [0, 0], 1.0, [degrees(atan(m)), 0.0], center=[0, 0])),
    (0, 0.99, -1, lambda image, m: tv.affine(image, 0.0, [0, 0], 1.0, [0.0, degrees(atan(m))], center=[0, 0])),
    (0, 32, -1, lambda image, m: tv.affine(image, 0.0, [int(m), 0], 1.0, [0.0, 0.0])),
    (0, 32, -1, lambda image, m: tv.affine(image, 0.0, [0, int(m)], 1.0, [0.0, 0.0])),
    (0, 135, -1, lambda image, m: tv.rotate(image, m)),
    (0, 0.99, -1, lambda image, m: tv.adjust_brightness(image, 1 + m)),
    (0, 0.99, -1, lambda image, m: tv.adjust_saturation(image, 1 + m)),
    (0, 0.99, -1, lambda image, m: tv.adjust_contrast(image, 1 + m)),
    (0, 0.99, -1, lambda image, m: tv.adjust_sharpness(image, 1 + m)),
    (8, 2, 1, lambda image, m: tv.posterize(image, round(m))),
    (255, 0, 1, lambda image, m: tv.solarize(image, m)),
    (0, 0, 1, lambda image, _: tv.autocontrast(image)),
    (0, 0, 1, lambda image, _: tv.equalize(image)))


def random_params(count: int, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
    """Return operation (0 to 13) and strength (0 to 61) of each image in an epoch, both (count,) int64."""
    rng = np.random.default_rng([seed, epoch, 1])  # a stream of its own: crops and flips do not depend on it
    return torch.from_numpy(rng.integers(0, len(SPACE), count)), torch.from_numpy(rng.integers(0, STRENGTHS, count))


@cache
def magnitudes() -> Tensor:
    """Return the magnitude of each operation at each strength, (14, 62) float32."""
    bins = torch.stack([torch.linspace(first, last, BINS) for first, last, _, _ in SPACE])
    return torch.cat([bins, bins * torch.tensor([[sign] for _, _, sign, _ in SPACE])], 1)


def transform_one(image: Tensor, operation: int, strength: int) -> Tensor:
    """Apply one operation to one image (3, 32, 32) uint8 with torchvision's functions."""
    return SPACE[operation][-1](image, magnitudes()[operation, strength].item())


@cache  # also because a copy to the GPU for every batch would synchronize
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return all magnitudes (14 * 62,) and the source pixels of the first 6 operations (6 * 62, 1024) int64."""
    positions = torch.arange(1.0, PIXELS + 1).view(1, SIZE, SIZE)  # moved by torchvision, which fills with 0
    moved = [transform_one(positions, i, strength) for i in range(6) for strength in range(STRENGTHS)]
    return magnitudes().flatten().to(device), torch.stack(moved).view(-1, PIXELS).long().to(device)


def transform(images: Tensor, operation: Tensor, strength: Tensor) -> Tensor:
    """Apply to each image its own operation, in about 80 kernels for any batch size and without a GPU sync.

    Takes and returns images (N, 32, 32, 3) uint8 on any device. Operation and strength are (N,) int64 on the CPU, where
    the images are sorted by operation.
    """
    order = operation.argsort(stable=True)
    plan = torch.stack([order, order.argsort(), (operation * STRENGTHS + strength)[order]])
    plan = plan.pin_memory() if images.is_cuda else plan  # otherwise the copy would synchronize
    order, inverse, code = plan.to(images.device, non_blocking=True)
    counts = torch.bincount(operation, minlength=len(SPACE)).tolist()
    sizes = [sum(counts[:6]), sum(counts[6:10]), *counts[10:]]
    moved, blended, posterized, solarized, stretched, equalized = images.index_select(0, order).split(sizes)
    table, sources = _tables(images.device)
    _, magnitude, bits, threshold, _, _ = table.index_select(0, code).view(-1, 1, 1, 1).split(sizes)
    dropped = (8 - bits).round_().to(torch.uint8)
    # every magnitude m is a multiple of 2^-28, so torchvision's float64 1 - (1 + m) is exactly -m
    blended = blended.float().mul_(1 + magnitude).sub_(_blend_targets(blended, counts[6:10]).mul_(magnitude))
    parts = [_move(moved, sources.index_select(0, code[:sizes[0]])), blended.clamp_(0, 255).to(torch.uint8),
             posterized >> dropped << dropped,
             torch.where(solarized >= threshold, 255 - solarized, solarized),
             tv.autocontrast(stretched.permute(0, 3, 1, 2)).permute(0, 2, 3, 1),
             equalize(equalized.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)]
    return torch.cat(parts).index_select(0, inverse)


def _move(images: Tensor, sources: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(images.view(-1, PIXELS, 3), (0, 0, 1, 0))  # pixel 0 is the fill value
    first = torch.arange(len(images), device=images.device)[:, None] * (PIXELS + 1)
    return padded.view(-1, 3).index_select(0, (sources + first).view(-1)).view_as(images)


def _blend_targets(images: Tensor, counts: list[int]) -> Tensor:
    """Return what brightness, color, contrast and sharpness blend with: black, gray, mean gray and blurred images."""
    bright, tinted, sharp = images.split([counts[0], counts[1] + counts[2], counts[3]])
    red, green, blue = tinted.unbind(-1)
    gray = (0.2989 * red + 0.587 * green + 0.114 * blue).to(torch.uint8)[..., None].float()
    gray, flat = gray.split(counts[1:3])
    blurred = sharp.float()
    rows = blurred[:, :-2] + blurred[:, 1:-1] + blurred[:, 2:]
    total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    inner = blurred[:, 1:-1, 1:-1]  # the border stays; the sums are exact integers, and k / 13 is never a tie
    inner.copy_(total.add_(inner, alpha=4).div_(13).round_())
    return torch.cat([torch.zeros_like(bright, dtype=torch.float32), gray.expand(-1, -1, -1, 3),
                      flat.mean((1, 2, 3), True).expand(-1, SIZE, SIZE, 3), blurred])
