"""Random parameters, crop and flip, network input, MixUp and CutMix, each against a plain computation."""

import numpy as np
import pytest
import torch
from runs import make_split
from torch.nn import functional as F

import augment
import options
import train


def test_random_params_are_a_function_of_seed_and_epoch():
    first, again = augment.random_params(50, 3, 7), augment.random_params(50, 3, 7)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for other in (augment.random_params(50, 3, 8), augment.random_params(50, 4, 7)):
        assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_random_params_have_the_published_distributions():
    params = augment.random_params(40_000, 0, 0)
    assert torch.equal(params.index.sort().values, torch.arange(40_000))
    for offsets in (params.top, params.left):
        fractions = torch.bincount(offsets, minlength=9) / 40_000
        assert len(fractions) == 9 and (fractions - 1 / 9).abs().max() < 0.01
    assert abs(params.flip.float().mean() - 0.5) < 0.01
    fractions = torch.bincount((params.top * 9 + params.left) * 2 + params.flip, minlength=162) / 40_000
    assert (fractions - 1 / 162).abs().max() < 0.002  # standard deviation 0.0004


def test_alternating_flip_flips_each_image_in_every_other_epoch():
    plain, flips = [augment.random_params(400, 3, epoch) for epoch in range(4)], []
    for epoch, expected in enumerate(plain):
        params = augment.random_params(400, 3, epoch, alternating_flip=True)
        assert all(torch.equal(a, b) for a, b in zip(params._replace(flip=expected.flip), expected, strict=True))
        flips.append(params.flip[params.index.argsort()])
    assert 160 < flips[0].sum() < 240 and not torch.equal(flips[0], plain[0].flip[plain[0].index.argsort()])
    assert all(torch.equal(flip, flips[0] ^ bool(epoch % 2)) for epoch, flip in enumerate(flips))


def test_shrink_averages_what_a_pixel_covers():
    """Each of the 24 rows is a weighted mean of the rows near its center, with weights that fall linearly to 0."""
    centers, rows = (np.arange(24) + 0.5) * 32 / 24, np.arange(32) + 0.5
    weights = np.maximum(0, 1 - np.abs(rows - centers[:, None]) * 24 / 32)
    weights /= weights.sum(1, keepdims=True)
    inputs = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)
    small = augment.shrink(torch.from_numpy(inputs))
    np.testing.assert_allclose(small, weights @ inputs @ weights.T, rtol=1e-4, atol=1e-5)
    assert small.is_contiguous(memory_format=torch.channels_last)


# --- MixUp and CutMix ------------------------------------------------------------------------------------------------


def test_mix_params_have_the_published_distributions():
    lam, boxes = augment.random_mix_params(4000, 0, 0, 0.0, 1.0)
    top, bottom, left, right = boxes.T
    assert (0 <= top).all() and (top <= bottom).all() and (bottom <= 32).all()
    assert (0 <= left).all() and (left <= right).all() and (right <= 32).all()
    torch.testing.assert_close(lam, 1 - ((bottom - top) * (right - left)).float() / 1024)  # its real area
    whole = (bottom - top == right - left) & (bottom - top > 0)  # boxes that no edge has cut
    assert 0.2 < whole.float().mean() < 0.3
    assert abs(lam.mean() - 0.68) < 0.02  # above 0.5, because edges cut boxes
    lam, boxes = augment.random_mix_params(4000, 0, 0, 0.2, 0.0)
    assert not boxes.any() and abs(lam.mean() - 0.5) < 0.02
    assert ((lam < 0.1) | (lam > 0.9)).float().mean() > 0.6
    lam, boxes = augment.random_mix_params(4000, 0, 0, 0.2, 1.0)
    assert abs((boxes[:, 1] > 0).float().mean() - 0.5) < 0.03
    for seed, epoch in ((1, 0), (0, 1)):
        assert not torch.equal(lam, augment.random_mix_params(4000, seed, epoch, 0.2, 1.0)[0])


@pytest.mark.parametrize("box", [(0, 0, 0, 0), (0, 32, 0, 32), (5, 9, 0, 17), (31, 32, 30, 32)])
def test_mix_equals_a_loop_over_images(box):
    inputs, lam = augment.to_input(make_split(5).images), torch.tensor(0.3)
    mixed = augment.mix(inputs, lam, list(box))
    assert len(mixed) == 4 and mixed.is_contiguous(memory_format=torch.channels_last)
    for i in range(4):
        expected, partner = inputs[i + 1].clone(), inputs[i]
        if any(box):
            expected[:, box[0]:box[1], box[2]:box[3]] = partner[:, box[0]:box[1], box[2]:box[3]]
        else:
            expected = 0.3 * expected + 0.7 * partner
        torch.testing.assert_close(mixed[i], expected)


@pytest.mark.parametrize("smoothing", ["0", "0.1"])
def test_loss_and_accuracy_of_mixed_images_weigh_two_labels(smoothing):
    args, _ = options.parse_args(["--label-smoothing", smoothing])
    logits = torch.randn(5, 10, generator=torch.Generator().manual_seed(0))
    forward = train.build_forward(args, lambda _: logits, torch.device("cpu"), "fp32")
    targets, targets_b = torch.arange(5), logits.argmax(1)
    for lam, expected_correct in ((0.7, (targets_b == targets).sum()), (0.3, torch.tensor(5))):
        loss, correct = forward(None, targets, targets_b, torch.tensor(lam))
        expected = sum(weight * F.cross_entropy(logits, labels, reduction="sum", label_smoothing=float(smoothing))
                       for weight, labels in ((lam, targets), (1 - lam, targets_b)))
        torch.testing.assert_close(loss, expected)
        assert correct == expected_correct
