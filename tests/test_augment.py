"""Draws and pixels: the table, and both loaders against torchvision's own transforms."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

import augment
import data
from utils import Processes


@pytest.fixture(scope="module")
def split():
    rng = np.random.default_rng(0)
    return data.Split(torch.from_numpy(rng.integers(0, 256, (70, 32, 32, 3), dtype=np.uint8)),
                      torch.from_numpy(rng.integers(0, 10, 70)), list("abcdefghij"))


def torchvision_pixels(image: torch.Tensor, top: int, left: int, flip: bool) -> torch.Tensor:
    """Do to one image what the published recipe does, with torchvision's classes and the draws put in."""
    crop = transforms.RandomCrop(32, padding=4, padding_mode="reflect")
    crop.get_params = lambda *_: (top, left, 32, 32)
    steps = [crop, transforms.RandomHorizontalFlip(float(flip)), transforms.ToTensor(),
             transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))]
    return transforms.Compose(steps)(Image.fromarray(image.numpy()))


def test_pixels_equal_torchvisions_for_every_offset_and_flip(split):
    grid = torch.cartesian_prod(torch.arange(9), torch.arange(9), torch.arange(2))
    nothing = torch.zeros(len(grid), dtype=torch.int64)
    draws = augment.Draws(torch.arange(len(grid)) % 70, grid[:, 0], grid[:, 1], grid[:, 2].bool(), nothing, nothing)
    inputs = augment.to_input(augment.crop_and_flip(split.images, draws))
    for i, (index, top, left, flip) in enumerate(zip(*(field.tolist() for field in draws[:4]), strict=True)):
        assert torch.equal(inputs[i], torchvision_pixels(split.images[index], top, left, flip))


def test_inputs_lie_channels_last_and_can_stay_unnormalised(split):
    inputs = augment.to_input(split.images, normalize=False)
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    assert inputs.dtype == torch.float32 and 0 <= inputs.min() and inputs.max() == 1


def test_draws_are_a_function_of_seed_and_epoch():
    first, again = augment.draw_epoch(50, 3, 7), augment.draw_epoch(50, 3, 7)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (augment.draw_epoch(50, 3, 8), augment.draw_epoch(50, 4, 7)):
        assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_draws_have_the_published_distributions():
    draws = augment.draw_epoch(40_000, 0, 0)
    assert torch.equal(draws.index.sort().values, torch.arange(40_000))
    for offsets in (draws.top, draws.left):
        shares = torch.bincount(offsets, minlength=9) / 40_000
        assert len(shares) == 9 and (shares - 1 / 9).abs().max() < 0.01
    assert abs(draws.flip.float().mean() - 0.5) < 0.01


def batches_of(loader, epoch=2, first_step=0):
    return [[tensor.clone() for tensor in batch] for batch in loader.epoch(epoch, first_step)]


def assert_same_batches(found, expected):
    assert len(found) == len(expected)
    for batch, wanted in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, wanted, strict=True))


@pytest.mark.parametrize("flags", [(True, True), (False, True), (True, False), (False, False)])
def test_both_loaders_give_the_same_pixels(split, flags):
    settings = (split, 16, torch.device("cpu"), 5, *flags)
    expected = batches_of(data.DeviceLoader(*settings))
    assert [len(targets) for _, targets in expected] == [16, 16, 16, 16, 6]
    assert_same_batches(batches_of(data.WorkersLoader(*settings, workers=0)), expected)


@pytest.mark.parametrize("start_method", [
    "spawn", pytest.param("fork", marks=pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="no fork"))])
def test_workers_give_the_same_pixels_in_later_epochs_too(split, start_method):
    settings = (split, 16, torch.device("cpu"), 5)
    loader = data.WorkersLoader(*settings, workers=2, start_method=start_method)
    for epoch, first_step in ((0, 0), (1, 3), (2, 0)):  # the workers persist, and must not keep a stale epoch
        assert_same_batches(batches_of(loader, epoch, first_step),
                            batches_of(data.DeviceLoader(*settings), epoch, first_step))


@pytest.mark.parametrize("batch_size", [1, 7, 10, 23, 69, 70])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_processes_divide_each_batch_without_rest(split, batch_size, size):
    whole = data.DeviceLoader(split, batch_size, torch.device("cpu"), 0)
    parts = [data.DeviceLoader(split, batch_size, torch.device("cpu"), 0, processes=Processes(rank, rank, size))
             for rank in range(size)]
    together = [[torch.cat(tensors) for tensors in zip(*batch, strict=True)]
                for batch in zip(*(loader.epoch(0) for loader in parts), strict=True)]
    assert_same_batches(together, list(whole.epoch(0)))
    assert sum(whole.count(step) for step in range(len(whole))) == 70


def test_workers_loader_without_an_image_in_the_last_batch(split):
    loader = data.WorkersLoader(split, 23, torch.device("cpu"), 0, processes=Processes(3, 3, 4), workers=0)
    inputs, targets = list(loader.epoch(0))[-1]
    assert inputs.shape == (0, 3, 32, 32) and targets.shape == (0,)


def test_an_epoch_can_begin_at_any_step(split):
    loader = data.DeviceLoader(split, 16, torch.device("cpu"), 1)
    assert_same_batches(batches_of(loader, 4, 3), batches_of(loader, 4)[3:])
    assert batches_of(loader, 4, 5) == []
