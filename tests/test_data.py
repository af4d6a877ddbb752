"""Splits, and the two loaders: the same pixels for any loader, number of workers and number of ranks."""

import functools
import itertools
import multiprocessing
import re
import signal
import time
from collections import Counter

import numpy as np
import pytest
import torch
from runs import at_step, make_split, needs_fork, write_batch

import augment
import cifar10
import data
import options
from distributed import World
from utils import UserError

FLAGS = ("--augment", "--normalize", "--trivial-augment")
ALL = ["--trivial-augment", "--mixup", "0.4", "--cutmix", "1", "--small-epochs", "3", "--alternating-flip"]


@pytest.fixture
def folder(tmp_path):
    """A folder in the official layout: 20 images per file, marked with the file's number and their position."""
    folder = tmp_path / cifar10.FOLDER
    folder.mkdir()
    for number, name in enumerate((*cifar10.TRAIN_FILES, *cifar10.TEST_FILES)):
        images = np.full((20, 32, 32, 3), number, np.uint8)
        images[:, 0, 0, 0] = np.arange(20)
        write_batch(folder / name, images, np.arange(20) % 10)
    return folder


def test_files_are_read_in_order_from_the_folder_or_its_parent(folder):
    for data_dir in (folder, str(folder.parent)):
        split = data.load_split(data_dir, cifar10.TRAIN_FILES)
        assert split.images.shape == (100, 32, 32, 3) and split.images.dtype == torch.uint8
        assert split.images[:, 1, 1, 1].tolist() == [number for number in range(5) for _ in range(20)]
        assert split.targets.tolist() == [*range(10)] * 10 and split.targets.dtype == torch.int64
        first = data.load_split(data_dir, cifar10.TRAIN_FILES, limit=25)
        assert torch.equal(first.images, split.images[:25]) and torch.equal(first.targets, split.targets[:25])
        assert data.load_split(data_dir, cifar10.TEST_FILES).images[0, 1, 1, 1] == 5
    assert split.classes == list(cifar10.CLASSES)


def test_validation_images_are_balanced_and_the_same_for_all_seeds(folder):
    whole = data.load_split(folder, cifar10.TRAIN_FILES)
    splits = [data.load_data(options.parse_args(["--data-dir", str(folder), "--val-size", "33", "--batch-size", "9",
                                                 "--seed", seed])[0], World()) for seed in ("1", "2")]
    train, val, test = splits[0]
    assert len(train.targets) == 67 and sorted(Counter(val.targets.tolist()).values()) == [3] * 7 + [4] * 3
    together = torch.cat([train.images, val.images]).view(100, -1)
    assert sorted(map(bytes, together.numpy())) == sorted(map(bytes, whole.images.view(100, -1).numpy()))
    assert torch.equal(splits[1][1].images, val.images) and len(test.targets) == 20


def test_an_impossible_validation_set_is_refused_and_other_sizes_end_with_the_data(folder):
    def load(*flags: str) -> tuple[data.Split, ...]:
        return data.load_data(options.parse_args(["--data-dir", str(folder), *flags])[0], World())
    with pytest.raises(UserError, match=r"--val-size \(100\) leaves no training images of class airplane"):
        load("--val-size", "100")
    train, _, test = load("--limit-train", "101", "--limit-test", "99")
    assert (len(train.targets), len(test.targets)) == (100, 20)


# --- loaders ---------------------------------------------------------------------------------------------------------


def parse(*flags: str, batch_size: int = 16):
    return options.parse_args(["--batch-size", str(batch_size), "--seed", "5", *flags])[0]


def batches_of(loader: data.Loader, epoch: int = 2, first_step: int = 0) -> list[list[torch.Tensor]]:
    return [[tensor.clone() for tensor in batch] for batch in loader.epoch(epoch, first_step)]


def assert_same_batches(found, expected):
    assert len(found) == len(expected)
    for batch, wanted in zip(found, expected, strict=True):
        assert len(batch) == len(wanted) and all(torch.equal(a, b) for a, b in zip(batch, wanted, strict=True))


@pytest.mark.parametrize("mixes", [
    [], ["--mixup", "0.4"], ["--cutmix", "1"], ["--mixup", "0.4", "--cutmix", "1"], ["--small-epochs", "3"]])
def test_both_loaders_yield_the_same_for_every_combination_of_flags(mixes):
    """One of them calls torchvision for each image; the 70 images have every offset of a crop at both sides."""
    split = make_split()
    for chosen in itertools.product(("--", "--no-"), repeat=3):
        args = parse(*mixes, *(flag.replace("--", prefix) for flag, prefix in zip(FLAGS, chosen, strict=True)))
        expected = batches_of(data.DeviceLoader(split, args, "cpu"))
        assert [len(batch[1]) for batch in expected] == [16, 16, 16, 16, 6]
        assert all(batch[0].is_contiguous(memory_format=torch.channels_last) for batch in expected)
        assert_same_batches(batches_of(data.WorkersLoader(split, args, "cpu", workers=0)), expected)


@pytest.mark.parametrize("mixes", [[], ["--mixup", "0.4", "--cutmix", "1"]])
def test_the_first_small_epochs_shrink_the_same_batches(mixes):
    full, small = (data.DeviceLoader(make_split(), parse(*mixes, *flags), "cpu")
                   for flags in ([], ["--small-epochs", "2"]))
    for epoch in range(3):
        expected = batches_of(full, epoch, 1)
        if epoch < 2:
            expected = [[augment.shrink(inputs), *others] for inputs, *others in expected]
        assert_same_batches(batches_of(small, epoch, 1), expected)


@pytest.mark.parametrize("loader", [data.DeviceLoader, functools.partial(data.WorkersLoader, workers=0)])
@pytest.mark.parametrize("strong", [["--trivial-augment"], ["--mixup", "0.4", "--cutmix", "1"]])
def test_the_last_plain_epochs_are_without_strong_augmentation(loader, strong):
    mixed, plain, some = (loader(make_split(), parse("--epochs", "4", "--alternating-flip", *flags), "cpu")
                          for flags in (strong, [], [*strong, "--plain-epochs", "2"]))
    assert_same_batches(batches_of(some, 1, 1), batches_of(mixed, 1, 1))
    for epoch in (2, 3):
        batches = batches_of(some, epoch, 1)
        assert all((lam == 1).all() for _, _, _, lam in batches) if len(batches[0]) == 4 else len(batches[0]) == 2
        assert_same_batches([batch[:2] for batch in batches], batches_of(plain, epoch, 1))
    at_random = batches_of(loader(make_split(), parse("--epochs", "4"), "cpu"))  # the same crops, other flips
    assert not torch.equal(at_random[0][0], batches_of(plain)[0][0])


def test_batches_are_mixed_with_the_image_before():
    plain = batches_of(data.DeviceLoader(make_split(), parse(), "cpu"))
    order = augment.random_params(70, 5, 2).index  # of the seed and the epoch that `parse` and `batches_of` set
    assert torch.equal(torch.cat([labels for _, labels in plain]), make_split().targets[order])
    mix = augment.random_mix_params(5, 5, 2, 0.4, 1.0)
    batches = batches_of(data.DeviceLoader(make_split(), parse("--mixup", "0.4", "--cutmix", "1"), "cpu"))
    assert {bool(box.any()) for box in mix[1]} == {True, False}
    for (own, labels), (inputs, targets, targets_b, lam), wanted_lam, box in zip(plain, batches, *mix, strict=True):
        assert torch.equal(targets, labels) and torch.equal(targets_b, labels.roll(1)) and lam == wanted_lam
        assert torch.equal(inputs, augment.mix(torch.cat([own[-1:], own]), lam, box.tolist()))


@pytest.mark.parametrize("ranks", [2, 3, 5])
@pytest.mark.parametrize("count", [11, 12, 13])
def test_ranks_share_each_batch_without_padding(count, ranks):
    split = make_split(count)
    for batch_size, loader in itertools.product((1, ranks - 1, ranks, ranks + 1, count - 1, count, count + 1),
                                                (data.DeviceLoader, data.WorkersLoader)):
        more = {"workers": 0} if loader is data.WorkersLoader else {}
        args = parse(*ALL, batch_size=batch_size)
        shards = [batches_of(loader(split, args, "cpu", World(rank, rank, ranks, ranks), **more))
                  for rank in range(ranks)]
        together = [[*map(torch.cat, zip(*(shard[:3] for shard in batch), strict=True)), batch[0][3]]
                    for batch in zip(*shards, strict=True)]
        assert_same_batches(together, batches_of(data.DeviceLoader(split, args, "cpu")))
        assert sum(len(batch[1]) for batch in together) == count
        assert all(len(batch[1]) <= -(-batch_size // ranks) for shard in shards for batch in shard)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_ranks_of_a_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr(data, "count_cores", lambda: 8)
    for asked, local_size, expected in ((4, 1, 4), (12, 1, 8), (4, 3, 2), (4, 16, 1), (1, 1, 1)):
        args = parse("--workers", str(asked))
        loader = data.build_loader(make_split(), args, torch.device("cpu"), World(0, 0, local_size, local_size))
        assert loader.loader.num_workers == expected
    assert type(data.build_loader(make_split(), parse(), torch.device("cpu"), World())) is data.DeviceLoader


def kill_workers() -> None:
    """Kill the workers at the end of a step, as the system does when memory runs out."""
    at_step(0, 1, lambda *_: [worker.kill() for worker in multiprocessing.active_children()])


def fill_shm() -> None:
    """Let tensors in shared memory fail like in a Docker container with its default of 64 MB."""
    def fail(*_, **__):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2>: No space left on device (28)")
    torch.TypedStorage._new_shared = fail


def hang_and_stop() -> None:
    """Let a worker hang at the first image of the second batch, and stop the run as soon as it does."""
    getitem, image = data.ImageDataset.__getitem__, augment.random_params(30, 0, 0).index[8]
    hangs = multiprocessing.Event()

    def get_or_hang(dataset, params):
        while params[0] == image:
            hangs.set()
            time.sleep(60)
        return getitem(dataset, params)
    data.ImageDataset.__getitem__ = get_or_hang
    torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.1  # patience with slow workers
    at_step(0, 1, lambda *_: hangs.wait() and signal.raise_signal(signal.SIGTERM))


@needs_fork
@pytest.mark.parametrize(("prepare", "status", "line"), [
    (kill_workers, 1, r"train.py: error: DataLoader worker \(pid.*(killed|exited).*; .*--workers 0.*--resume"),
    (fill_shm, 1, r"train.py: error: unable to allocate shared memory.*\(28\); .*--workers 0.*/dev/shm.*--shm-size"),
    (hang_and_stop, 143, "stopped in epoch 1 after step 1, all saved")])
def test_a_worker_that_fails_ends_the_run_with_one_line(start, prepare, status, line):
    """One that hangs ignores SIGTERM, like every worker, and so would hang the exit of the program.

    For a killed worker torch has two messages: it depends on whether it sees the signal or the dead process first.
    """
    child = start("--workers", "2", prepare=prepare)
    assert child.wait() == status
    found = [text for text in child.output().splitlines() if re.match("Traceback|.*[Ee]rror|  |stopped", text)]
    assert len(found) == 1 and re.match(line, found[0]), child.output()


def test_tensors_that_are_not_pinned_are_copied_at_once(monkeypatch):
    """MPS would read memory that a worker already uses for the next batch."""
    to, modes = torch.Tensor.to, []
    monkeypatch.setattr(torch.Tensor, "to", lambda *args, **kwargs: modes.append(kwargs) or to(*args, **kwargs))
    next(data.WorkersLoader(make_split(), parse(), "cpu", workers=0).epoch(0))
    assert modes and not any(kwargs.get("non_blocking") for kwargs in modes)
