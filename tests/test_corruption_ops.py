"""Each corruption of a batch against the plain way to make it, which shares only the random numbers with it."""

import math

import numpy as np
import plain_corruptions
import pytest
import torch

from synthetic import make_images
from tools import corruption_ops as ops

ALL = [*ops.MAIN, *ops.EXTRA]
RANDOM = {"gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "glass_blur", "motion_blur", "fog", "snow",
          "spatter", "elastic_transform"}


@pytest.fixture(scope="module")
def images():
    """Give noise, a generated picture, flat grey with a spot, and colours with black and white; (4, 32, 32, 3)."""
    found = np.random.default_rng(5).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    found[1] = make_images(1, 3, 0)[0][0]
    found[2] = 119
    found[2, 8:12, 20:23] = (250, 30, 40)
    found[3] = np.repeat(np.linspace(0, 255, 32).astype(np.uint8)[None, :, None], 32, 0).repeat(3, 2)
    found[3, 10:20, :, 1] = 0
    return torch.from_numpy(found)


class Recorder(ops.Draws):
    """Draws that remember what they handed out."""

    def __init__(self, *args):
        super().__init__(*args)
        self.numbers = []

    def keep(self, tensor):
        self.numbers.append(tensor.double().numpy())
        return tensor

    def normal(self, *shape):
        return self.keep(super().normal(*shape))

    def uniform(self, *args):
        return self.keep(super().uniform(*args))

    def poisson(self, rates):
        return self.keep(super().poisson(rates))


@pytest.mark.parametrize("severity", [1, 3, 5])
@pytest.mark.parametrize("operation", ALL, ids=lambda operation: operation.__name__)
def test_batch_equals_image_by_image(images, monkeypatch, operation, severity):
    recorders = []
    monkeypatch.setattr(ops, "Draws", lambda *args: recorders.append(Recorder(*args)) or recorders[-1])
    found = ops.corrupt(images, operation, severity, seed=5).numpy()  # a seed by which drops of spatter wrap around
    constants = (ops.MAIN | ops.EXTRA)[operation][severity - 1]
    plain = getattr(plain_corruptions, operation.__name__)
    made = [plain(image / 255, (numbers[i] for numbers in recorders[0].numbers), *constants)
            for i, image in enumerate(images.numpy())]
    expected = plain_corruptions.to_bytes(np.stack(made))
    assert found.dtype == np.uint8 and found.shape == expected.shape
    if operation.__name__ in ("pixelate", "jpeg_compression", "shot_noise", "impulse_noise"):
        np.testing.assert_array_equal(found, expected)
    difference = np.abs(found.astype(int) - expected)
    assert difference.max() <= 1 and (difference > 0).mean() < 0.005  # float32 on one side of a whole number


@pytest.mark.parametrize("operation", ALL, ids=lambda operation: operation.__name__)
def test_depends_on_seed_and_place_but_not_on_batch_or_limit(images, monkeypatch, operation):
    monkeypatch.setattr(ops, "BLOCK", 4)
    many = images.repeat(3, 1, 1, 1)[:10]
    before = many.clone()
    found = ops.corrupt(many, operation, 3, seed=1)
    assert torch.equal(many, before)
    assert torch.equal(found, ops.corrupt(many, operation, 3, seed=1))
    for count in (1, 5):
        assert torch.equal(ops.corrupt(many[:count], operation, 3, seed=1), found[:count])
    is_random = operation.__name__ in RANDOM
    assert torch.equal(found, ops.corrupt(many, operation, 3, seed=2)) != is_random
    assert torch.equal(found[:4], found[4:8]) != is_random  # the same images, in another block


def test_constants_are_those_of_cifar_10_c():
    """Compare with sums over the published constants, weighted by severity; typed from make_cifar_c.py on their own."""
    published = {
        "gaussian_noise": 1.26, "shot_noise": 1850, "impulse_noise": 0.69, "defocus_blur": 18.6, "glass_blur": 28.75,
        "motion_blur": 143.5, "zoom_blur": 17.9, "snow": 335.7, "fog": 48.2, "brightness": 3, "contrast": 4.9,
        "elastic_transform": 2.88, "pixelate": 11.55, "jpeg_compression": 784, "speckle_noise": 2.26,
        "gaussian_blur": 11.9, "spatter": 50.15, "saturate": 26.9}
    found = {operation.__name__: sum(severity * sum(constants) for severity, constants in enumerate(rows, 1))
             for operation, rows in (ops.MAIN | ops.EXTRA).items()}
    assert found == pytest.approx(published, abs=1e-9)


def test_noise_has_the_published_strength():
    grey = torch.full((40, 32, 32, 3), 128, dtype=torch.uint8)
    value = 128 / 255
    for operation, expected in ((ops.gaussian_noise, 0.08), (ops.shot_noise, math.sqrt(value / 100)),
                                (ops.speckle_noise, 0.12 * value)):
        found = ops.corrupt(grey, operation, 3).float() / 255
        assert found.mean().item() == pytest.approx(value, abs=0.005)
        assert found.std().item() == pytest.approx(expected, rel=0.02)
    found = ops.corrupt(grey, ops.impulse_noise, 5)
    assert (found == 255).float().mean().item() == pytest.approx(0.035, rel=0.05)
    assert (found == 0).float().mean().item() == pytest.approx(0.035, rel=0.05)


def test_water_without_a_drop_changes_nothing(images):
    x = images.permute(0, 3, 1, 2).float() / 255
    found = ops.spatter(x, ops.Draws([0], len(x)), 0.1, 0.01, 0.7, 0.7, 0.5, False)
    assert torch.equal(found, x)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("operation", ALL, ids=lambda operation: operation.__name__)
def test_cuda_gives_the_bytes_of_the_cpu(images, operation):
    for severity in range(1, 6):
        found = ops.corrupt(images.cuda(), operation, severity).cpu().int()
        difference = (found - ops.corrupt(images, operation, severity).int()).abs()
        assert difference.max() <= 1 and (difference > 0).float().mean() < 0.005
