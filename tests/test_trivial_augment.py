"""TrivialAugment: every operation, strength and sign is bitwise identical to torchvision's own class."""

from unittest import mock

import numpy as np
import pytest
import torch
from torchvision.transforms import TrivialAugmentWide

import data
import options
import trivial_augment

OPERATIONS = tuple(TrivialAugmentWide()._augmentation_space(31))  # names, in the order of the random parameter
MPS = torch.device("mps")
UNSCALED = ("Identity", "AutoContrast", "Equalize")  # all strengths are the same to them


def torchvision_transform(images: torch.Tensor, operation: int, strength: int) -> torch.Tensor:
    """Run TrivialAugmentWide on images (N, 32, 32, 3) with fixed random parameters: operation, bin, sign."""
    params = iter([operation, strength % 31, strength // 31])
    # not every operation needs a bin or a sign, but those that do ask in this order
    with mock.patch("torch.randint", lambda *_, **__: torch.tensor([next(params)])):
        return TrivialAugmentWide()(images.permute(0, 3, 1, 2).contiguous()).permute(0, 2, 3, 1)


def structured_images() -> list[torch.Tensor]:
    """Make constant images, ramps, edges, two values, few gray levels, and all levels of color."""
    row, column = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    cube = torch.cartesian_prod(*3 * [torch.arange(0, 256, 17)]).view(4, 32, 32, 3)
    levels = [torch.full((32, 32), value) for value in (0, 1, 128, 255)]
    grays = [*levels, (row * 32 + column) // 4, row * 8, 255 * ((row + column) % 2), 255 * (column > 15), row // 3 + 90,
             254 + (row == 0)]
    constant_red = torch.stack([levels[1], row * 7, column * 3 + 100], -1)
    return [image.to(torch.uint8) for image in
            [*(gray[..., None].expand(32, 32, 3) for gray in grays), constant_red, *cube]]


@pytest.fixture(scope="module")
def images():
    """Make noise and structured images, (17, 32, 32, 3)."""
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8))
    return torch.stack([*noise, *structured_images()])


@pytest.fixture(scope="module")
def everything(images):
    """Transform every image by every operation and strength in one shuffled batch: (14, 62, 17, 32, 32, 3)."""
    grid = torch.cartesian_prod(torch.arange(14), torch.arange(62), torch.arange(len(images)))
    order = torch.from_numpy(np.random.default_rng(1).permutation(len(grid)))
    operation, strength, index = grid[order].unbind(1)
    transformed = torch.empty(len(grid), 32, 32, 3, dtype=torch.uint8)
    transformed[order] = trivial_augment.transform(images[index], operation, strength)
    return transformed.view(14, 62, len(images), 32, 32, 3)


@pytest.mark.parametrize("operation", range(14), ids=OPERATIONS)
def test_batches_and_single_images_equal_torchvision_at_every_strength(images, everything, operation):
    for strength in range(62):
        if strength == 0 or OPERATIONS[operation] not in UNSCALED:
            expected = torchvision_transform(images, operation, strength)
        assert torch.equal(everything[operation, strength], expected), strength
        i = strength % len(images)
        single = trivial_augment.transform_one(images[i].permute(2, 0, 1).contiguous(), operation, strength)
        assert torch.equal(single.permute(1, 2, 0), expected[i]), strength


def test_equalize_equals_torchvision_for_every_count_of_the_brightest():
    rng = np.random.default_rng(0)
    noise = torch.from_numpy(rng.integers(0, 200, (342, 1024, 3)))
    counts = torch.arange(3 * 342).view(-1, 1, 3)  # pixels at 220: from none over each step of the formula to all
    images = torch.where(torch.arange(1024)[:, None] < counts, 220, noise).to(torch.uint8).view(-1, 32, 32, 3)
    operation = torch.full((len(images),), OPERATIONS.index("Equalize"))
    transformed = trivial_augment.transform(images, operation, torch.zeros_like(operation))
    assert torch.equal(transformed, torchvision_transform(images, OPERATIONS.index("Equalize"), 0))


def test_images_on_mps_are_transformed_on_the_cpu(images, monkeypatch):
    operation, strength = trivial_augment.random_params(len(images), 0, 0)
    to, expected = torch.Tensor.to, trivial_augment.transform(images, operation, strength)
    monkeypatch.setattr(torch.Tensor, "to", lambda image, to_: image if to_ == MPS else to(image, to_))
    on_mps = mock.Mock(device=MPS, cpu=lambda: images)
    assert torch.equal(trivial_augment.transform(on_mps, operation, strength), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_batches_on_cuda_are_those_on_the_cpu(images):
    split = data.Split(images[torch.arange(2000) % len(images)], torch.arange(2000), [])
    args, _ = options.parse_args(["--trivial-augment", "--batch-size", "2000"])
    found, expected = (next(data.DeviceLoader(split, args, device).epoch(0)) for device in ("cuda", "cpu"))
    assert all(torch.equal(a.cpu(), b) for a, b in zip(found, expected, strict=True))


def test_random_params_are_uniform_and_independent():
    operation, strength = trivial_augment.random_params(140_000, 0, 0)
    assert operation.dtype == strength.dtype == torch.int64
    counts = torch.bincount(operation * 62 + strength, minlength=14 * 62)  # about 161 each
    assert len(counts) == 14 * 62 and 90 < counts.min() and counts.max() < 240
    assert (torch.bincount(operation) - 10_000).abs().max() < 400  # standard deviation 96
    assert (torch.bincount(strength % 31) - 140_000 / 31).abs().max() < 270  # 66
    assert abs((strength > 30).sum() - 70_000) < 800  # 187
