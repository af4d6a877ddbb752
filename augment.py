"""Augmentation, normalization and mixing of whole batches, on any device.

Every random choice of an epoch comes from one table, made on the CPU from (seed, epoch). Both loaders read it, so the
pixels depend neither on the loader nor on the number of workers or ranks.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import trivial_augment
from hardware import memory_format
from models import MEAN, STD

SIZE = 32
SMALL_SIZE = 24
SMALL_COST = (SMALL_SIZE / SIZE)**2  # computation of a small image, relative to a full-size one
PADDING = 4


class Params(NamedTuple):
    """The random parameters of an epoch, one row per position in its order; each field (N,), on the CPU."""

    index: Tensor  # int64, the image at this position
    top: Tensor  # int64, 0 to 8: upper edge of the crop in the padded image
    left: Tensor  # int64, 0 to 8
    flip: Tensor  # bool, horizontal flip
    operation: Tensor  # int64, of TrivialAugment
    strength: Tensor  # int64, of TrivialAugment

    def rows(self, rows: slice | Tensor) -> "Params":
        """Select some positions of the table."""
        return Params(*(field[rows] for field in self))


def random_params(count: int, seed: int, epoch: int, alternating_flip: bool = False) -> Params:
    """Make the table of `count` images for one epoch; the same arguments give the same table on any machine.

    With `alternating_flip`, each image is flipped in every other epoch, from a random one of the first two on (arXiv
    2404.00498).
    """
    rng = np.random.default_rng([seed, epoch])
    offsets = rng.integers(0, 2 * PADDING + 1, (2, count))
    order, flip = rng.permutation(count), rng.random(count) < 0.5
    if alternating_flip:
        flip = (np.random.default_rng([seed, 0, 3]).random(count) < 0.5)[order] ^ bool(epoch % 2)
    return Params(torch.from_numpy(order), torch.from_numpy(offsets[0]), torch.from_numpy(offsets[1]),
                  torch.from_numpy(flip), *trivial_augment.random_params(count, seed, epoch))


def random_mix_params(steps: int, seed: int, epoch: int, mixup: float, cutmix: float) -> tuple[Tensor, Tensor]:
    """Make the table for MixUp (arXiv 1710.09412) and CutMix (arXiv 1905.04899), one row per step, on the CPU.

    Returns:
        lam (S,) float32, the weight of each image's own pixels and label, from Beta(A, A), where A is `mixup` or
        `cutmix` (with both, each batch uses one of them); and boxes (S, 4) int64: top, bottom, left, right of what
        CutMix pastes, empty where MixUp blends.
    """
    rng = np.random.default_rng([seed, epoch, 2])  # a stream of its own: the crops stay the same
    cuts = rng.random(steps) < (0.5 if mixup and cutmix else float(cutmix > 0))
    lam = np.where(cuts, rng.beta(cutmix or 1, cutmix or 1, steps), rng.beta(mixup or 1, mixup or 1, steps))
    half = SIZE * np.sqrt(1 - lam)[:, None] / 2
    center = rng.integers(0, SIZE, (steps, 2))
    low, high = (np.clip(edge, 0, SIZE).astype(np.int64) for edge in (center - half, center + half))
    low, high = low * cuts[:, None], high * cuts[:, None]
    box = np.stack((low[:, 0], high[:, 0], low[:, 1], high[:, 1]), 1)
    lam = np.where(cuts, 1 - (high - low).prod(1) / SIZE**2, lam)  # of the box inside the image
    return torch.from_numpy(lam.astype(np.float32)), torch.from_numpy(box)


def mix(inputs: Tensor, lam: Tensor, box: list[int]) -> Tensor:
    """Mix each of (n + 1, 3, 32, 32) images with the one before it: (n, 3, 32, 32); `lam` is () on their device."""
    inputs_b, own = inputs[:-1], inputs[1:]
    top, bottom, left, right = box
    if bottom == 0:
        return torch.lerp(inputs_b, own, lam)
    mixed = own.clone(memory_format=torch.preserve_format)
    mixed[:, :, top:bottom, left:right] = inputs_b[:, :, top:bottom, left:right]
    return mixed


def reflect(position: Tensor) -> Tensor:
    """Fold positions of the padded image (-4 to 35) back into 0 to 31, without repeating the edge."""
    last = SIZE - 1
    return last - (last - position.abs()).abs()


def crop_and_flip(images: Tensor, params: Params) -> Tensor:
    """Crop 32x32 windows out of reflect-padded images and flip some horizontally, in one gather.

    `images` is the whole set, (M, 32, 32, 3) uint8; `params` are N rows of a table on its device: (N, 32, 32, 3) uint8.
    """
    steps = torch.arange(SIZE, device=images.device)
    rows = reflect(params.top[:, None] + steps - PADDING)  # (N, 32)
    columns = torch.where(params.flip[:, None], SIZE - 1 - steps, steps)
    columns = reflect(params.left[:, None] + columns - PADDING)  # (N, 32)
    pixels = (params.index[:, None] * SIZE + rows)[:, :, None] * SIZE + columns[:, None, :]  # (N, 32, 32)
    # index_select copies whole pixels: on a CPU over twice as fast as indexing with three tensors
    return images.view(-1, 3).index_select(0, pixels.view(-1)).view(-1, SIZE, SIZE, 3)


def to_input(images: Tensor, normalize: bool = True) -> Tensor:
    """Turn (N, 32, 32, 3) uint8 images into network input, (N, 3, 32, 32) float32 in the device's memory format.

    Bitwise identical to torchvision's ToTensor and Normalize; without `normalize` the values lie in [0, 1].
    """
    mean, std, largest = _constants(images.device)
    inputs = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=memory_format(images.device))
    inputs.div_(largest)  # by a plain number, CUDA would multiply by 1 / 255
    if normalize:
        inputs.sub_(mean).div_(std)
    return inputs


def shrink(inputs: Tensor) -> Tensor:
    """Resize (N, 3, 32, 32) images to (N, 3, 24, 24), averaging what a pixel covers, as PIL's bilinear filter does."""
    small = F.interpolate(inputs, size=SMALL_SIZE, mode="bilinear", antialias=True)
    return small.contiguous(memory_format=memory_format(inputs.device))


@cache  # copying them to a GPU in every batch would synchronize
def _constants(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.tensor(values, device=device).view(-1, 1, 1) for values in (MEAN, STD, (255.0,)))
