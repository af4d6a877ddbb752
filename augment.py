"""What happens to images between the data set and the network, in whole batches on any device.

Every random choice of an epoch stands in one table, made on the CPU from (seed, epoch). Both loaders read it, so
that the pixels depend neither on the loader nor on the number of workers or processes.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import trivial_augment

SIZE = 32
PADDING = 4
# The published constants. STD is a mean of per-image deviations; per pixel it would be 0.2470, 0.2435, 0.2616.
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2023, 0.1994, 0.2010)


class Draws(NamedTuple):
    """The draws of an epoch, one row per position in its order; each field (N,), on the CPU."""

    index: Tensor  # int64, which image comes at this position
    top: Tensor  # int64, 0 to 8: upper edge of the crop in the padded image
    left: Tensor  # int64, 0 to 8
    flip: Tensor  # bool
    operation: Tensor  # int64, of TrivialAugment, which these two are for
    strength: Tensor  # int64

    def rows(self, chosen: slice | Tensor) -> "Draws":
        """Take some positions of the table."""
        return Draws(*(field[chosen] for field in self))


def draw_epoch(count: int, seed: int, epoch: int) -> Draws:
    """Draw order, crop and flip of `count` images for one epoch; the same for the same arguments, on any machine."""
    rng = np.random.default_rng([seed, epoch])
    offsets = rng.integers(0, 2 * PADDING + 1, (2, count))
    return Draws(torch.from_numpy(rng.permutation(count)), torch.from_numpy(offsets[0]),
                 torch.from_numpy(offsets[1]), torch.from_numpy(rng.random(count) < 0.5),
                 *trivial_augment.draw(count, seed, epoch))


class Mixes(NamedTuple):
    """How the batches of an epoch are mixed, one row per step, on the CPU."""

    share: Tensor  # (S,) float32, of each image's own pixels and label; its partner has the rest
    box: Tensor  # (S, 4) int64: top, bottom, left, right of what CutMix pastes; empty where MixUp blends


def draw_mixes(steps: int, seed: int, epoch: int, mixup: float, cutmix: float) -> Mixes:
    """Draw the mixing of every batch of an epoch, from Beta(A, A) with A `mixup` or `cutmix`.

    MixUp is arXiv 1710.09412, CutMix arXiv 1905.04899. Where both are wanted, a batch takes one of them.
    """
    rng = np.random.default_rng([seed, epoch, 2])  # a stream of its own: it changes no crop
    cuts = rng.random(steps) < (0.5 if mixup and cutmix else float(cutmix > 0))
    share = np.where(cuts, rng.beta(cutmix or 1, cutmix or 1, steps), rng.beta(mixup or 1, mixup or 1, steps))
    half = SIZE * np.sqrt(1 - share)[:, None] / 2
    centre = rng.integers(0, SIZE, (steps, 2))
    low, high = (np.clip(edge, 0, SIZE).astype(np.int64) for edge in (centre - half, centre + half))
    low, high = low * cuts[:, None], high * cuts[:, None]
    box = np.stack((low[:, 0], high[:, 0], low[:, 1], high[:, 1]), 1)
    share = np.where(cuts, 1 - (high - low).prod(1) / SIZE**2, share)  # of what lies inside the image
    return Mixes(torch.from_numpy(share.astype(np.float32)), torch.from_numpy(box))


def mix(inputs: Tensor, share: Tensor, box: list[int]) -> Tensor:
    """Mix each image with the one before it.

    Args:
        inputs: (n + 1, 3, 32, 32), the first one only as a partner.
        share: () of the image's own pixels, on the device.
        box: Row of `Mixes.box`.

    Returns:
        (n, 3, 32, 32).
    """
    partners, own = inputs[:-1], inputs[1:]
    top, bottom, left, right = box
    if bottom == 0:
        return torch.lerp(partners, own, share)
    mixed = own.clone(memory_format=torch.preserve_format)
    mixed[:, :, top:bottom, left:right] = partners[:, :, top:bottom, left:right]
    return mixed


def reflect(position: Tensor) -> Tensor:
    """Fold positions of the padded image (-4 to 35) back into 0 to 31, without repeating the edge."""
    last = SIZE - 1
    return last - (last - position.abs()).abs()


def crop_and_flip(images: Tensor, draws: Draws) -> Tensor:
    """Cut the drawn 32x32 windows out of reflect-padded images, and mirror the drawn ones, in one gather.

    Args:
        images: The whole set, (M, 32, 32, 3) uint8.
        draws: N rows of a table, on the device of `images`.

    Returns:
        (N, 32, 32, 3) uint8.
    """
    steps = torch.arange(SIZE, device=images.device)
    rows = reflect(draws.top[:, None] + steps - PADDING)  # (N, 32)
    columns = torch.where(draws.flip[:, None], SIZE - 1 - steps, steps)
    columns = reflect(draws.left[:, None] + columns - PADDING)  # (N, 32)
    pixels = (draws.index[:, None] * SIZE + rows)[:, :, None] * SIZE + columns[:, None, :]  # (N, 32, 32)
    # index_select copies whole pixels: over twice as fast on a CPU as indexing with three tensors
    return images.view(-1, 3).index_select(0, pixels.view(-1)).view(-1, SIZE, SIZE, 3)


def to_input(images: Tensor, normalize: bool = True) -> Tensor:
    """Turn bytes into the network's input, to the bit as torchvision's ToTensor and Normalize do.

    Args:
        images: (N, 32, 32, 3) uint8.
        normalize: Subtract MEAN and divide by STD; without it the values lie in [0, 1].

    Returns:
        (N, 3, 32, 32) float32, channels last in memory.
    """
    mean, std, largest = _constants(images.device)
    inputs = images.permute(0, 3, 1, 2).float().div_(largest)  # by a number, CUDA would multiply by 1 / 255
    if normalize:
        inputs.sub_(mean).div_(std)
    return inputs


@cache  # a copy to a GPU at every batch would wait for it
def _constants(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.tensor(values, device=device).view(-1, 1, 1) for values in (MEAN, STD, (255.0,)))
