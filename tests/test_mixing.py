"""MixUp, CutMix and averaged weights: what they compute, and that neither loader nor processes matter."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import augment
import data
import train
from utils import Processes


@pytest.fixture(scope="module")
def split():
    rng = np.random.default_rng(0)
    return data.Split(torch.from_numpy(rng.integers(0, 256, (50, 32, 32, 3), dtype=np.uint8)),
                      torch.from_numpy(rng.integers(0, 10, 50)), list("abcdefghij"))


def batches(split, loader=data.DeviceLoader, rank=0, size=1, **more):
    settings = {"seed": 3, "mixup": 0.4, "cutmix": 1.0, "processes": Processes(rank, rank, size), **more}
    return list(loader(split, 16, torch.device("cpu"), **settings).epoch(1))


def test_mixes_are_those_of_the_papers():
    mixes = augment.draw_mixes(4000, 0, 0, 0.0, 1.0)
    top, bottom, left, right = mixes.box.T
    assert (0 <= top).all() and (top <= bottom).all() and (bottom <= 32).all() and (right <= 32).all()
    area = ((bottom - top) * (right - left)).float() / 1024
    torch.testing.assert_close(mixes.share, 1 - area)  # the label's share is that of the pixels
    blends = augment.draw_mixes(4000, 0, 0, 0.2, 0.0)
    assert blends.box.abs().sum() == 0
    assert abs(blends.share.mean() - 0.5) < 0.02 and ((blends.share < 0.1) | (blends.share > 0.9)).float().mean() > 0.6
    both = augment.draw_mixes(4000, 0, 0, 0.2, 1.0)
    assert abs((both.box[:, 1] > 0).float().mean() - 0.5) < 0.03


def test_a_batch_is_mixed_with_the_images_before(split):
    plain = batches(split, mixup=0.0, cutmix=0.0)
    mixes = augment.draw_mixes(4, 3, 1, 0.4, 1.0)
    seen = set()
    for step, (inputs, targets, partners, share) in enumerate(batches(split)):
        own, labels = plain[step]
        before = own.roll(1, 0)
        assert torch.equal(targets, labels) and torch.equal(partners, labels.roll(1)) and share == mixes.share[step]
        top, bottom, left, right = mixes.box[step].tolist()
        if bottom:
            pasted = torch.zeros(32, 32, dtype=torch.bool)
            pasted[top:bottom, left:right] = True
            expected = torch.where(pasted, before, own)
        else:
            expected = share * own + (1 - share) * before
        torch.testing.assert_close(inputs, expected)
        seen.add(bottom > 0)
    assert seen == {True, False}


def test_both_loaders_mix_alike(split):
    for trivial in (False, True):
        device = batches(split, trivial=trivial)
        workers = batches(split, data.WorkersLoader, trivial=trivial, workers=0)
        for batch, wanted in zip(workers, device, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(batch, wanted, strict=True))


@pytest.mark.parametrize("size", [2, 3, 5])
def test_processes_mix_as_one_does(split, size):
    parts = [batches(split, rank=rank, size=size, trivial=True) for rank in range(size)]
    for together, whole in zip(zip(*parts, strict=True), batches(split, trivial=True), strict=True):
        for i in range(3):
            assert torch.equal(torch.cat([part[i] for part in together]), whole[i])


def test_loss_and_hits_share_between_two_labels():
    trainer = object.__new__(train.Trainer)
    trainer.device, trainer.precision = torch.device("cpu"), "fp32"
    trainer.criterion = torch.nn.CrossEntropyLoss(reduction="sum")
    logits = torch.randn(5, 10, generator=torch.Generator().manual_seed(0))
    trainer.model = lambda inputs: logits
    targets, partners = torch.arange(5), logits.argmax(1)
    for share, hits in ((0.7, (partners == targets).sum()), (0.3, torch.tensor(5))):
        loss, found = trainer.forward_loss(None, targets, partners, torch.tensor(share))
        expected = share * F.cross_entropy(logits, targets, reduction="sum") + (1 - share) * F.cross_entropy(
            logits, partners, reduction="sum")
        torch.testing.assert_close(loss, expected)
        assert found == hits


def test_averaged_weights_are_evaluated_and_kept(run_train, tmp_path, monkeypatch):
    steps, train_step = [], train.Trainer.train_step
    def copied(model):
        return {name: value.clone() for name, value in model.state_dict().items()}
    def note(self, *batch):
        steps.extend([] if steps else [copied(self.model)])
        train_step(self, *batch)
        steps.append(copied(self.model))
    monkeypatch.setattr(train.Trainer, "train_step", note)
    assert run_train("--epochs", "2", "--name", "e", "--ema", "0.6", "--cutmix", "1", "--trivial-augment") == 0
    average = steps[0]
    for state in steps[1:]:
        average = {name: 0.6 * average[name] + 0.4 * value for name, value in state.items()}
    saved = torch.load(tmp_path / "runs/e/last.pt", weights_only=True)
    for name, value in saved["model"].items():
        assert torch.equal(value, steps[-1][name])
        if value.is_floating_point():
            torch.testing.assert_close(saved["ema"][name], average[name])
    best = torch.load(tmp_path / "runs/e/best.pt", weights_only=True)
    if best["epoch"] == 2:
        assert all(torch.equal(best["model"][name], saved["ema"][name]) for name in best["model"])
    monkeypatch.undo()
    model, _ = train.evaluate.load_model(tmp_path / "runs/e/last.pt", torch.device("cpu"))
    assert all(torch.equal(value, saved["ema"][name]) for name, value in model.state_dict().items())
