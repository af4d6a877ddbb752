"""Each corruption of a batch against a plain implementation that shares only the random numbers with it."""

import itertools
import math

import numpy as np
import plain_corruptions
import pytest
import torch

from synthetic import make_batch
from tools import corruption_ops as ops

ALL = list(ops.CORRUPTIONS)
EXACT = {"pixelate", "jpeg_compression", "shot_noise", "impulse_noise"}
NOT_RANDOM = {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}


@pytest.fixture(scope="module")
def images():
    """Make noise, a generated image, gray with a spot, and colors with black and white; (4, 32, 32, 3)."""
    images = np.random.default_rng(5).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    images[1] = make_batch("test_batch", 1)[0][0]
    images[2] = 119
    images[2, 8:12, 20:23] = (250, 30, 40)
    images[3] = np.linspace(0, 255, 32).astype(np.uint8)[:, None]
    images[3, 10:20, :, 1] = 0
    return torch.from_numpy(images)


def recorded(function, numbers):
    """Let a function of `BlockRandom` also append what it returns to a list."""
    def record(*args):
        found = function(*args)
        numbers.append(found.double().numpy())
        return found
    return record


@pytest.mark.parametrize("severity", [1, 3, 5])
@pytest.mark.parametrize("operation", ALL, ids=lambda operation: operation.__name__)
def test_batch_equals_plain_implementation(images, monkeypatch, operation, severity):
    numbers = []
    for name in ("normal", "uniform", "poisson"):
        monkeypatch.setattr(ops.BlockRandom, name, recorded(getattr(ops.BlockRandom, name), numbers))
    corrupted = ops.corrupt(images, operation, severity, seed=5).numpy()
    plain, constants = getattr(plain_corruptions, operation.__name__), ops.CORRUPTIONS[operation][severity - 1]
    expected = plain_corruptions.to_bytes(np.stack([
        plain(image / 255, (values[i] for values in numbers), *constants) for i, image in enumerate(images.numpy())]))
    assert corrupted.dtype == np.uint8 and corrupted.shape == expected.shape
    difference = np.abs(corrupted.astype(int) - expected)
    assert difference.max() <= (operation.__name__ not in EXACT)  # float32 may round to the other side of an integer
    assert (difference > 0).mean() < 0.005


@pytest.mark.parametrize("operation", ALL, ids=lambda operation: operation.__name__)
def test_depends_on_seed_and_position_but_not_on_batch_size(images, monkeypatch, operation):
    monkeypatch.setattr(ops, "BLOCK", 4)
    many = images.repeat(3, 1, 1, 1)[:10]
    before = many.clone()
    corrupted = ops.corrupt(many, operation, 3, seed=1)
    assert torch.equal(many, before)
    for count in (1, 5):
        assert torch.equal(ops.corrupt(many[:count], operation, 3, seed=1), corrupted[:count])
    is_fixed = operation.__name__ in NOT_RANDOM
    assert torch.equal(corrupted, ops.corrupt(many, operation, 3, seed=2)) == is_fixed
    assert torch.equal(corrupted[:4], corrupted[4:8]) == is_fixed  # the same images in another block


def test_constants_are_those_of_cifar_10_c():
    """Compare sums weighted by severity and by place; the expected ones were computed from make_cifar_c.py."""
    published = {
        "gaussian_noise": 1.26, "shot_noise": 1850, "impulse_noise": 0.69, "defocus_blur": 23.1, "glass_blur": 52.75,
        "motion_blur": 174, "zoom_blur": 17.9, "snow": 1729.7, "fog": 81.45, "brightness": 3, "contrast": 4.9,
        "elastic_transform": 5.27, "pixelate": 11.55, "jpeg_compression": 784}
    sums = {operation.__name__: sum(severity * place * constant for severity, constants in enumerate(rows, 1)
                                    for place, constant in enumerate(constants, 1))
            for operation, rows in ops.CORRUPTIONS.items()}
    assert sums == pytest.approx(published, abs=1e-9)


def test_noise_has_the_published_strength(monkeypatch):
    monkeypatch.setattr(ops, "BLOCK", 40)
    gray, value = torch.full((40, 32, 32, 3), 128, dtype=torch.uint8), 128 / 255
    for operation, expected in ((ops.gaussian_noise, 0.08), (ops.shot_noise, math.sqrt(value / 100))):
        noisy = ops.corrupt(gray, operation, 3).float() / 255
        assert noisy.mean().item() == pytest.approx(value, abs=0.005)
        assert noisy.std().item() == pytest.approx(expected, rel=0.02)
    noisy = ops.corrupt(gray, ops.impulse_noise, 5)
    for extreme in (0, 255):
        assert (noisy == extreme).float().mean().item() == pytest.approx(0.035, rel=0.05)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_cpu(images):
    for operation, severity in itertools.product(ALL, range(1, 6)):
        corrupted = ops.corrupt(images.cuda(), operation, severity).cpu().int()
        difference = (corrupted - ops.corrupt(images, operation, severity).int()).abs()
        assert difference.max() <= 1 and (difference > 0).float().mean() < 0.005, (operation, severity)
