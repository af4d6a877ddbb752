"""TrivialAugment (arXiv 2103.10158) with its wide augmentation space.

Each image gets one random operation at one random strength. The operations and their magnitudes are those of
torchvision's TrivialAugmentWide, which applies one of them to all images of a call, with random numbers of its own.
"""

from functools import cache

import numpy as np
import torch
from torch import Tensor

OPERATIONS = 14
BINS = 31
STRENGTHS = 2 * BINS  # the bins with a positive magnitude, then with a negative one if the operation is signed


@cache
def space() -> list[tuple[str, tuple[Tensor, bool]]]:
    """Return the operations: name, magnitude of each bin (or a single one), and whether it can be negative."""
    from torchvision.transforms import TrivialAugmentWide  # here, because it takes a second

    return list(TrivialAugmentWide()._augmentation_space(BINS).items())


def random_params(count: int, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
    """Return operation (0 to 13) and strength (0 to 61) of each image in an epoch, both (count,) int64."""
    rng = np.random.default_rng([seed, epoch, 1])  # a stream of its own: crops and flips do not depend on it
    return torch.from_numpy(rng.integers(0, OPERATIONS, count)), torch.from_numpy(rng.integers(0, STRENGTHS, count))


def transform_one(images: Tensor, operation: int, strength: int) -> Tensor:
    """Apply one operation to one or more images (..., 3, 32, 32) uint8."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.autoaugment import _apply_op
    from torchvision.transforms.v2.functional import equalize

    name, (magnitudes, is_signed) = space()[operation]
    if name == "Equalize":  # the function that _apply_op calls loops over images
        return equalize(images)
    magnitude = magnitudes.expand(BINS)[strength % BINS].item()
    sign = -1 if is_signed and strength >= BINS else 1
    return _apply_op(images, name, sign * magnitude, InterpolationMode.NEAREST, fill=None)


def transform(images: Tensor, operation: Tensor, strength: Tensor) -> Tensor:
    """Apply to each image its own operation.

    Takes and returns images (N, 32, 32, 3) uint8 on any device. Operation and strength are (N,) int64 on the CPU.
    Images that share both are transformed together, so one call for an epoch is faster than many for its batches.
    """
    if images.device.type == "mps":  # lacks operations, and samples some grids wrong (pytorch issues 176879, 174339)
        return transform(images.cpu(), operation, strength).to(images.device)
    has_strength = torch.tensor([magnitudes.ndim > 0 for _, (magnitudes, _) in space()])
    code = operation * STRENGTHS + strength * has_strength[operation]
    order = code.argsort()
    codes, counts = code[order].unique_consecutive(return_counts=True)
    out = torch.empty_like(images)
    for rows, value in zip(order.to(images.device).split(counts.tolist()), codes.tolist(), strict=True):
        group = images[rows].permute(0, 3, 1, 2).contiguous()  # channels_last would take sharpness to cuDNN, in TF32
        out[rows] = transform_one(group, *divmod(value, STRENGTHS)).permute(0, 2, 3, 1)
    return out
