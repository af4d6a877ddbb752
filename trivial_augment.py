"""TrivialAugment (arXiv 2103.10158) with its wide augmentation space.

Each image gets one random operation at one random strength. The operations are torchvision's functions, so that the
images are bitwise identical to those of its TrivialAugmentWide.
"""

from functools import cache
from math import atan, degrees

import numpy as np
import torch
from torch import Tensor

OPERATIONS = 14
BINS = 31
STRENGTHS = 2 * BINS  # the bins with a positive magnitude, then with a negative one if the operation is signed


@cache
def space() -> tuple[tuple, ...]:
    """Return the operations in torchvision's order.

    Each is: magnitude m of the first and of the last bin, sign of m in the second half of the strengths, function.
    """
    from torchvision.transforms import functional as tv  # here, because it takes a second
    from torchvision.transforms.v2.functional import equalize  # the older function loops over images

    return (
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
        (0, 0, 1, lambda image, _: equalize(image)))


def random_params(count: int, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
    """Return operation (0 to 13) and strength (0 to 61) of each image in an epoch, both (count,) int64."""
    rng = np.random.default_rng([seed, epoch, 1])  # a stream of its own: crops and flips do not depend on it
    return torch.from_numpy(rng.integers(0, OPERATIONS, count)), torch.from_numpy(rng.integers(0, STRENGTHS, count))


@cache
def magnitudes() -> Tensor:
    """Return the magnitude of each operation at each strength, (14, 62) float32."""
    bins = torch.stack([torch.linspace(first, last, BINS) for first, last, _, _ in space()])
    return torch.cat([bins, bins * torch.tensor([[sign] for _, _, sign, _ in space()])], 1)


def transform_one(images: Tensor, operation: int, strength: int) -> Tensor:
    """Apply one operation to one or more images (..., 3, 32, 32) uint8."""
    return space()[operation][-1](images, magnitudes()[operation, strength].item())


def transform(images: Tensor, operation: Tensor, strength: Tensor) -> Tensor:
    """Apply to each image its own operation.

    Takes and returns images (N, 32, 32, 3) uint8 on any device. Operation and strength are (N,) int64 on the CPU.
    Images that share both are transformed together, so one call for an epoch is faster than many for its batches.
    """
    if images.device.type == "mps":  # lacks operations, and samples some grids wrong (pytorch issues 176879, 174339)
        return transform(images.cpu(), operation, strength).to(images.device)
    has_strength = torch.tensor([first != last for first, last, _, _ in space()])
    code = operation * STRENGTHS + strength * has_strength[operation]
    order = code.argsort()
    codes, counts = code[order].unique_consecutive(return_counts=True)
    out = torch.empty_like(images)
    for rows, value in zip(order.to(images.device).split(counts.tolist()), codes.tolist(), strict=True):
        group = images[rows].permute(0, 3, 1, 2).contiguous()  # channels_last would take sharpness to cuDNN, in TF32
        out[rows] = transform_one(group, *divmod(value, STRENGTHS)).permute(0, 2, 3, 1)
    return out
