"""From CIFAR-10's batch files to batches on the device: splits, and the two loaders.

CIFAR-10 is from Learning Multiple Layers of Features from Tiny Images, A. Krizhevsky, 2009.
"""

import itertools
import signal
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

import augment
import cifar10
import download
import synthetic
import trivial_augment
from distributed import World, on_every_rank
from hardware import count_cores, memory_format
from process import STOP_SIGNALS
from utils import UserError

BATCHES_PER_BLOCK = 8  # made at once, so that a GPU has fewer and larger kernels to launch
# Python 3.14 would start workers through a server, which a signal to the whole job kills, and they end with it
START_METHOD = "fork" if sys.platform == "linux" else None
SPLIT_SEED = 20090408  # of --val-size alone: runs with different --seed hold out the same images


class Split(NamedTuple):
    """Images and their labels, in the order of the files."""

    images: Tensor  # (N, 32, 32, 3) uint8
    targets: Tensor  # (N,) int64
    classes: list[str]  # ten names


def load_split(data_dir: str | Path, files: Sequence[str], use_synthetic: bool = False, limit: int | None = None
               ) -> Split:
    """Read the images of `cifar10.TRAIN_FILES` or `TEST_FILES`, or the first `limit` of them.

    CIFAR-10 is downloaded if the folder does not hold it. `use_synthetic` draws images instead.
    """
    folder = None if use_synthetic else download.get_folder(data_dir)
    parts, count = [], 0
    for name in files:
        if limit is None or count < limit:
            parts.append(synthetic.make_batch(name) if use_synthetic else cifar10.read_labeled(folder / name))
            count += len(parts[-1][1])
    images, targets = (torch.from_numpy(np.concatenate(arrays)[:limit]) for arrays in zip(*parts, strict=True))
    return Split(images, targets, list(synthetic.NAMES if use_synthetic else cifar10.CLASSES))


def hold_out(split: Split, val_size: int) -> tuple[Split, Split]:
    """Split a training set into training images and `val_size` validation images, balanced over the classes."""
    order = torch.from_numpy(np.random.default_rng(SPLIT_SEED).permutation(len(split.targets)))
    is_val = torch.zeros(len(split.targets), dtype=torch.bool)
    for label in range(10):
        size = val_size // 10 + (label < val_size % 10)
        members = order[split.targets[order] == label]
        if len(members) <= size:
            raise UserError(f"--val-size ({val_size}) leaves no training images of class {split.classes[label]}, which "
                            f"has {len(members)}; choose a smaller value")
        is_val[members[:size]] = True
    return tuple(Split(split.images[rows], split.targets[rows], split.classes) for rows in (~is_val, is_val))


def load_data(args: Namespace, world: World) -> tuple[Split, Split | None, Split]:
    """Read the training, validation (or None) and test images that the flags select."""
    def read() -> tuple[Split, Split | None, Split]:
        train = load_split(args.data_dir, cifar10.TRAIN_FILES, args.synthetic, args.limit_train)
        test = load_split(args.data_dir, cifar10.TEST_FILES, args.synthetic, args.limit_test)
        train, val = hold_out(train, args.val_size) if args.val_size else (train, None)
        return train, val, test
    # the first rank of each machine goes ahead: it may have to download
    first = on_every_rank(lambda: read() if world.local_rank == 0 else None)()
    return on_every_rank(lambda: first or read())()


class Loader:
    """What both loaders share: which images belong to this rank's shard of each batch, and how they are mixed.

    `args` holds `epochs`, `batch_size` (of all ranks; an epoch ends with a smaller one), `seed` and the augmentation
    flags.
    """

    def __init__(self, split: Split, args: Namespace, device: torch.device, world: World | None = None):
        self.images, self.targets, self.args, self.device = split.images, split.targets, args, torch.device(device)
        self.world = world or World()
        self.mixes = bool(args.mixup or args.cutmix)

    def __len__(self) -> int:
        """Return the number of steps in an epoch."""
        return -(-len(self.targets) // self.args.batch_size)

    def batch_size(self, step: int) -> int:
        """Return the number of images in the global batch of a step."""
        return min(self.args.batch_size, len(self.targets) - step * self.args.batch_size)

    def shard(self, step: int) -> range:
        """Return this rank's positions in the order of the epoch; the first ranks take what does not divide evenly."""
        size, rest = divmod(self.batch_size(step), self.world.size)
        rank = self.world.rank
        start = step * self.args.batch_size + rank * size + min(rank, rest)
        return range(start, start + size + (rank < rest))

    def is_plain(self, epoch: int) -> bool:
        """Return whether an epoch is one of the last, without TrivialAugment, MixUp and CutMix."""
        return epoch >= self.args.epochs - self.args.plain_epochs

    def positions(self, step: int) -> Tensor:
        """Return the positions to load: the shard, and for MixUp and CutMix first the one before it.

        Each image is mixed with the one before it in the global batch, the first one with the last.
        """
        shard, start = self.shard(step), step * self.args.batch_size
        found = torch.arange(shard.start, shard.stop)
        if not self.mixes or not shard:
            return found
        return torch.cat([torch.tensor([start + (shard.start - start - 1) % self.batch_size(step)]), found])

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """Yield this rank's shard of the batches of an epoch, from any step on, on the device.

        Yields:
            inputs (n, 3, 32, 32) float32, or (n, 3, 24, 24) in the first `small_epochs`, and targets (n,) int64; with
            MixUp or CutMix also targets_b (n,) of the images mixed in and lam () float32, the weight of `targets`. n
            can be 0 in the last batch of several ranks.
        """
        positions = [self.positions(step) for step in range(first_step, len(self))]
        rows = torch.cat([torch.arange(0), *positions])  # none, for a run stopped after the last step of an epoch
        params = augment.random_params(len(self.targets), self.args.seed, epoch, self.args.alternating_flip).rows(rows)
        if self.is_plain(epoch):
            params = params._replace(operation=torch.zeros_like(params.operation))  # the identity
        batches = self.load(params, [len(batch) for batch in positions])
        if self.mixes:
            batches = self.mix(batches, epoch, first_step)
        for inputs, *others in batches:
            yield augment.shrink(inputs) if epoch < self.args.small_epochs else inputs, *others

    def mix(self, batches: Iterator[tuple[Tensor, Tensor]], epoch: int, first_step: int
            ) -> Iterator[tuple[Tensor, ...]]:
        """Mix the images of each batch; adds targets_b and lam."""
        lam, boxes = augment.random_mix_params(len(self), self.args.seed, epoch, self.args.mixup, self.args.cutmix)
        if self.is_plain(epoch):
            lam, boxes = torch.ones_like(lam), torch.zeros_like(boxes)
        lam, boxes = lam.to(self.device), boxes.tolist()
        for step, (inputs, targets) in enumerate(batches, first_step):
            yield augment.mix(inputs, lam[step], boxes[step]), targets[1:], targets[:-1], lam[step]

    def load(self, params: augment.Params, sizes: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs and targets of consecutive rows of `params`, `sizes[i]` rows for batch i."""
        raise NotImplementedError

    def close(self) -> None:
        """Stop the worker processes, if there are any."""


class DeviceLoader(Loader):
    """Keep the whole set in device memory as bytes; batches are cropped, flipped and normalized there."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.images, self.targets = self.images.to(self.device), self.targets.to(self.device)

    def load(self, params: augment.Params, sizes: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
        on_device = augment.Params(*(field.to(self.device) for field in params))  # once an epoch, a few megabytes
        batches = self.crop_and_flip(on_device, sizes)
        if self.args.trivial_augment and params.operation.any():  # of all batches at once
            images = torch.cat(list(batches))
            batches = trivial_augment.transform(images, params.operation, params.strength).split(sizes)
        for images, targets in zip(batches, self.targets[on_device.index].split(sizes), strict=True):
            yield augment.to_input(images, self.args.normalize), targets

    def crop_and_flip(self, params: augment.Params, sizes: list[int]) -> Iterator[Tensor]:
        """Yield the batches as bytes (n, 32, 32, 3), cropped and flipped if `--augment` is on."""
        start = 0
        for block in (sizes[i:i + BATCHES_PER_BLOCK] for i in range(0, len(sizes), BATCHES_PER_BLOCK)):
            rows = params.rows(slice(start, start + sum(block)))
            start += sum(block)
            images = augment.crop_and_flip(self.images, rows) if self.args.augment else self.images[rows.index]
            yield from images.split(block)


class WorkersLoader(Loader):
    """Load like the published code: torchvision's transforms per image, in `workers` processes (0: in this one)."""

    def __init__(self, *args, workers: int, **kwargs):
        super().__init__(*args, **kwargs)
        # A batch sampler that is refilled every epoch. It hands each image's random parameters to the workers, which
        # therefore need no epoch or random state of their own.
        self.batches: list[list[tuple]] = []
        self.loader = DataLoader(
            ImageDataset(self.images, self.targets, self.args), batch_sampler=self.batches, num_workers=workers,
            multiprocessing_context=START_METHOD if workers else None, persistent_workers=workers > 0,
            collate_fn=collate, worker_init_fn=ignore_signals,
            generator=torch.Generator(),  # for worker seeds, which nothing uses: leave the run's generator alone
            pin_memory=self.device.type == "cuda")

    def load(self, params: augment.Params, sizes: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
        rows = zip(*(field.tolist() for field in params), strict=True)
        self.batches[:] = [list(itertools.islice(rows, size)) for size in sizes]
        is_pinned = self.loader.pin_memory  # otherwise MPS may read memory that is used again (pytorch issue 189690)
        try:
            for inputs, targets in self.loader:
                inputs = inputs.to(self.device, non_blocking=is_pinned)
                yield (inputs.contiguous(memory_format=memory_format(self.device)),
                       targets.to(self.device, non_blocking=is_pinned))
        except (ConnectionError, EOFError) as error:  # torch reports others itself
            raise RuntimeError(f"DataLoader worker (pid unknown) was killed while it sent a batch ({error})") from error

    def close(self) -> None:
        iterator = self.loader._iterator  # there is no public way to stop persistent workers
        if iterator is not None:
            workers = list(iterator._workers)
            iterator._shutdown_workers()
            for worker in workers:
                if worker.is_alive():  # a stuck one; it ignores SIGTERM, and would block the exit
                    worker.kill()


def build_loader(split: Split, args: Namespace, device: torch.device, world: World) -> Loader:
    """Build the loader that `--workers` selects; the ranks of a machine share its cores."""
    if args.workers == 0:
        return DeviceLoader(split, args, device, world)
    workers = min(args.workers, max(1, count_cores() // world.local_size))
    return WorkersLoader(split, args, device, world, workers=workers)


class ImageDataset(Dataset):
    """Transform single images with torchvision, with random parameters handed in."""

    def __init__(self, images: Tensor, targets: Tensor, args: Namespace):
        import torchvision.transforms.functional  # noqa: F401, takes a second; here, so that forked workers need not

        self.images, self.targets, self.args = images, targets, args

    def __getitem__(self, params: tuple) -> tuple[Tensor, Tensor]:
        from torchvision.transforms import functional as transforms

        index, top, left, flip, operation, strength = params
        image = transforms.to_pil_image(self.images[index].numpy())
        if self.args.augment:
            image = transforms.pad(image, augment.PADDING, padding_mode="reflect")
            image = transforms.crop(image, top, left, augment.SIZE, augment.SIZE)
            image = transforms.hflip(image) if flip else image
        if self.args.trivial_augment:
            image = trivial_augment.transform_one(transforms.pil_to_tensor(image), operation, strength)
            image = transforms.convert_image_dtype(image)
        else:
            image = transforms.to_tensor(image)
        if self.args.normalize:
            image = transforms.normalize(image, augment.MEAN, augment.STD)
        return image, self.targets[index]


def collate(items: list[tuple[Tensor, Tensor]]) -> Sequence[Tensor]:
    """Stack a batch; it can be empty where there are more ranks than images left."""
    if not items:
        return torch.empty(0, 3, augment.SIZE, augment.SIZE), torch.empty(0, dtype=torch.int64)
    return default_collate(items)  # copies into shared memory here: an error in the sending thread would hang the run


def ignore_signals(_: int) -> None:
    """Leave a job's signals to the main process, which finishes its step and then stops the workers."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
