"""From CIFAR-10's batch files to batches on the device: folders, download, splits, and the two loaders.

CIFAR-10 is from Learning Multiple Layers of Features from Tiny Images, A. Krizhevsky, 2009.
"""

import hashlib
import http.client
import itertools
import multiprocessing
import os
import shutil
import signal
import tarfile
import tempfile
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional as transforms
from tqdm import tqdm

import augment
import batches
import synthetic
import trivial_augment
from utils import SIGNALS, Processes, UserError

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
MD5 = "c58f30108f718f92721af3b95e74349a"
FOLDER = "cifar-10-batches-py"
SYNTHETIC_FOLDER = "synthetic-10-batches-py"
TRAIN_FILES = tuple(f"data_batch_{i}" for i in range(1, 6))
TEST_FILES = ("test_batch",)
META_FILE = "batches.meta"
BATCHES_PER_BLOCK = 8  # made at once, so that a GPU has fewer and larger operations to launch
SPLIT_SEED = 20090408  # of --val-size alone, so that runs with different --seed hold out the same images


class Split(NamedTuple):
    """Images and their labels, in the files' order."""

    images: Tensor  # (N, 32, 32, 3) uint8
    targets: Tensor  # (N,) int64
    classes: list[str]  # ten names


# --- folders and files -----------------------------------------------------------------------------------------------


def prepare_folder(data_dir: str, use_synthetic: bool, download: bool, files: Sequence[str]) -> Path:
    """Find the folder of the batch files, below `data_dir` or that folder itself; download or draw them if need be.

    Raises:
        UserError: They are not there, and cannot be had.
    """
    root = Path(data_dir)
    if use_synthetic:
        try:
            synthetic.write(root / SYNTHETIC_FOLDER, files)
        except OSError as error:
            raise UserError(f"generated images cannot be written to {root / SYNTHETIC_FOLDER} ({error.strerror}); "
                            "choose another --data-dir") from error
        return root / SYNTHETIC_FOLDER
    for folder in (root / FOLDER, root):
        if any((folder / name).exists() for name in TRAIN_FILES + TEST_FILES):
            return folder
    if download:
        return download_archive(root)
    raise UserError(f"no CIFAR-10 in {data_dir}: expected a folder {FOLDER} with {TRAIN_FILES[0]} and so on; "
                    "leave out --no-download to fetch it, or try --synthetic")


def load_split(data_dir: str, files: Sequence[str], use_synthetic: bool = False, download: bool = True,
               limit: int | None = None) -> Split:
    """Read the images of `TRAIN_FILES` or `TEST_FILES`, or the first `limit` of them."""
    if use_synthetic and limit is not None:  # only as many files as are needed have to be drawn
        files = files[:-(-limit // synthetic.IMAGES_PER_FILE)]
    folder = prepare_folder(data_dir, use_synthetic, download, files)
    parts, count = [], 0
    for name in files:
        if limit is None or count < limit:
            parts.append(batches.read_labelled(folder / name))
            count += len(parts[-1][1])
    if limit is not None and count < limit:
        raise UserError(f"{folder} holds {count} images in {', '.join(files)}, fewer than the limit of {limit}")
    images, targets = (np.concatenate(arrays)[:limit] for arrays in zip(*parts, strict=True))
    meta = folder / META_FILE
    names = batches.read_label_names(meta) if meta.exists() else list(batches.CLASSES)
    return Split(torch.from_numpy(images), torch.from_numpy(targets), names)


def hold_out(split: Split, val_size: int) -> tuple[Split, Split]:
    """Divide a training set into what is trained on and `val_size` images for validation.

    The held-out images are balanced over the classes and drawn by a fixed seed, the same for every `--seed`.

    Raises:
        UserError: A class has too few images.
    """
    order = torch.from_numpy(np.random.default_rng(SPLIT_SEED).permutation(len(split.targets)))
    chosen = []
    for label in range(10):
        share = val_size // 10 + (label < val_size % 10)
        members = order[split.targets[order] == label]
        if len(members) <= share:
            raise UserError(f"--val-size {val_size} takes {share} images of class {split.classes[label]}, "
                            f"which has {len(members)}; choose a smaller one")
        chosen.append(members[:share])
    held_out = torch.zeros(len(split.targets), dtype=torch.bool)
    held_out[torch.cat(chosen)] = True
    return tuple(Split(split.images[rows], split.targets[rows], split.classes) for rows in (~held_out, held_out))


# --- download --------------------------------------------------------------------------------------------------------


def download_archive(data_dir: Path, url: str = URL, md5: str = MD5) -> Path:
    """Fetch the official archive, check it, and unpack its batch files into `data_dir`.

    Returns:
        The new folder; it appears whole or not at all.

    Raises:
        UserError: There is no network, the checksum differs, or the folder cannot be written.
    """
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=data_dir, prefix=".download-") as scratch:
            archive, folder = Path(scratch) / "archive.tar.gz", Path(scratch) / FOLDER
            found = fetch(url, archive)
            if found != md5:
                raise UserError(f"the archive from {url} has MD5 {found}, expected {md5}; try again later")
            folder.mkdir()
            unpack(archive, folder)
            try:
                os.replace(folder, data_dir / FOLDER)
            except OSError:
                if not (data_dir / FOLDER / META_FILE).exists():  # else another process was faster
                    raise
    except (OSError, http.client.HTTPException) as error:  # urllib's URLError is an OSError, too
        reason = getattr(error, "reason", None) or error
        raise UserError(f"CIFAR-10 cannot be fetched from {url} ({reason}); put its batch files into "
                        f"{data_dir / FOLDER} by hand, or try --synthetic") from error
    return data_dir / FOLDER


def fetch(url: str, path: Path) -> str:
    """Download a file with a progress bar; return its MD5 in hexadecimal digits."""
    digest = hashlib.md5(usedforsecurity=False)
    with urllib.request.urlopen(url, timeout=30) as response, open(path, "wb") as file:
        length = int(response.headers.get("Content-Length") or 0)
        with tqdm(total=length or None, unit="B", unit_scale=True, desc=f"fetching {Path(url).name}") as bar:
            while block := response.read(1 << 20):
                file.write(block)
                digest.update(block)
                bar.update(len(block))
    return digest.hexdigest()


def unpack(archive: Path, folder: Path) -> None:
    """Unpack the known batch files, as plain files and by their base names, and nothing else.

    Raises:
        UserError: One of them is missing, no plain file, or too large.
    """
    wanted = {*TRAIN_FILES, *TEST_FILES, META_FILE}
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                name = member.name.removeprefix(f"{FOLDER}/")
                if name not in wanted:  # also every absolute path and every ..
                    continue
                if not member.isfile() or member.size > batches.MAX_BYTES:
                    raise UserError(f"{archive.name}: {member.name} is no plain file of sensible size")
                with tar.extractfile(member) as source, open(folder / name, "wb") as target:
                    shutil.copyfileobj(source, target)
                wanted.remove(name)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{archive.name} cannot be unpacked ({error})") from error
    if wanted:
        raise UserError(f"{archive.name} holds no {', '.join(sorted(wanted))}")


# --- loaders ---------------------------------------------------------------------------------------------------------


class Loader:
    """What both loaders share: which images of which batch belong to this process, and how they are mixed.

    Args:
        split: The training set.
        batch_size: Of all processes together; the last batch of an epoch holds what is left.
        device: Where batches are wanted.
        seed: Of the tables of draws.
        augment: Crop and mirror.
        normalize: Subtract the mean and divide by the std.
        trivial: Apply TrivialAugment.
        mixup: A of MixUp's Beta(A, A); 0 is off.
        cutmix: Likewise of CutMix.
        processes: Each takes its part of the same global batch.
    """

    def __init__(self, split: Split, batch_size: int, device: torch.device, seed: int, augment: bool = True,
                 normalize: bool = True, trivial: bool = False, mixup: float = 0.0, cutmix: float = 0.0,
                 processes: Processes | None = None):
        self.images, self.targets = split.images, split.targets
        self.batch_size, self.device, self.seed = batch_size, device, seed
        self.augment, self.normalize, self.trivial, self.mixup, self.cutmix = augment, normalize, trivial, mixup, cutmix
        self.processes = processes or Processes()

    def __len__(self) -> int:
        """Count the steps of an epoch."""
        return -(-len(self.targets) // self.batch_size)

    def count(self, step: int) -> int:
        """Count the images of a global batch."""
        return min(self.batch_size, len(self.targets) - step * self.batch_size)

    def part(self, step: int) -> range:
        """Return this process's positions in the order of the epoch; the first processes take what does not divide."""
        share, rest = divmod(self.count(step), self.processes.size)
        rank = self.processes.rank
        start = step * self.batch_size + rank * share + min(rank, rest)
        return range(start, start + share + (rank < rest))

    def positions(self, step: int) -> Tensor:
        """Return the positions to load: this process's part, and where batches are mixed, the one before it first.

        Every image's partner is the one before it in the global batch; before the first comes the last.
        """
        part, start = self.part(step), step * self.batch_size
        found = torch.arange(part.start, part.stop)
        if not (self.mixup or self.cutmix) or not part:
            return found
        return torch.cat([torch.tensor([start + (part.start - start - 1) % self.count(step)]), found])

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[tuple[Tensor, ...]]:
        """Yield this process's part of the batches of an epoch, from any step on, on the device.

        Yields:
            Inputs (n, 3, 32, 32) float32 and targets (n,) int64; where batches are mixed, also the partners' targets
            (n,) and the share () float32 of the first ones. n can be 0 in the last batch of several processes.
        """
        positions = [self.positions(step) for step in range(first_step, len(self))]
        rows = torch.cat([torch.arange(0), *positions])  # a run stopped after an epoch's last step has no more
        draws = augment.draw_epoch(len(self.targets), self.seed, epoch).rows(rows)
        loaded = self.load(draws, [len(batch) for batch in positions])
        if not (self.mixup or self.cutmix):
            yield from loaded
            return
        mixes = augment.draw_mixes(len(self), self.seed, epoch, self.mixup, self.cutmix)
        shares, boxes = mixes.share.to(self.device), mixes.box.tolist()
        for step, (inputs, targets) in enumerate(loaded, first_step):
            yield augment.mix(inputs, shares[step], boxes[step]), targets[1:], targets[:-1], shares[step]

    def load(self, draws: augment.Draws, sizes: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs and targets for consecutive rows of `draws`, `sizes` many at a time."""
        raise NotImplementedError

    def close(self) -> None:
        """End what the loader has started."""


class DeviceLoader(Loader):
    """The whole set as bytes in the device's memory; batches are cut, mirrored and normalised there."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.images, self.targets = self.images.to(self.device), self.targets.to(self.device)

    def load(self, draws: augment.Draws, sizes: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
        on_device = augment.Draws(*(field.to(self.device) for field in draws))  # once an epoch: some megabytes
        start = 0
        for block in (sizes[i:i + BATCHES_PER_BLOCK] for i in range(0, len(sizes), BATCHES_PER_BLOCK)):
            rows = slice(start, start + sum(block))
            chosen, start = on_device.rows(rows), rows.stop
            images = augment.crop_and_flip(self.images, chosen) if self.augment else self.images[chosen.index]
            if self.trivial:  # the draws on the CPU group the images, without a wait for the device
                images = trivial_augment.transform(images, draws.operation[rows], draws.strength[rows])
            targets = self.targets[chosen.index].split(block)
            for part, labels in zip(images.split(block), targets, strict=True):
                yield augment.to_input(part, self.normalize), labels


class WorkersLoader(Loader):
    """The published way: torchvision's transforms, image by image, in a DataLoader's worker processes.

    Args:
        workers: Worker processes; at most the number of cores is used.
        start_method: Of the workers: fork, spawn or forkserver; None is the platform's default.
    """

    def __init__(self, *args, workers: int = 16, start_method: str | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        workers = min(workers, count_cores())
        context = multiprocessing.get_context(start_method) if workers else None
        self.batches: list[list[tuple]] = []  # a sampler: it hands each image's draws to the workers, so that they
        # need to know of no epoch; filled anew for every one
        self.loader = DataLoader(
            ImageDataset(self.images, self.targets, self.augment, self.normalize, self.trivial),
            batch_sampler=self.batches, num_workers=workers, persistent_workers=workers > 0,
            multiprocessing_context=context, worker_init_fn=ignore_signals, collate_fn=collate,
            generator=torch.Generator(),  # for its seeds, which nobody uses: the run's own state must not move
            pin_memory=self.device.type == "cuda")

    def load(self, draws: augment.Draws, sizes: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
        rows = zip(*(field.tolist() for field in draws), strict=True)
        self.batches[:] = [list(itertools.islice(rows, size)) for size in sizes]
        for inputs, targets in self.loader:
            yield (inputs.to(self.device, non_blocking=True).contiguous(memory_format=torch.channels_last),
                   targets.to(self.device, non_blocking=True))

    def close(self) -> None:
        if self.loader._iterator is not None:  # there is no public way; left to the garbage collector, which may
            self.loader._iterator._shutdown_workers()  # take the queues first, each worker lives on for 5 s


class ImageDataset(Dataset):
    """Transform single images by torchvision, with the draws handed in."""

    def __init__(self, images: Tensor, targets: Tensor, augment: bool, normalize: bool, trivial: bool):
        self.images, self.targets = images, targets
        self.augment, self.normalize, self.trivial = augment, normalize, trivial

    def __getitem__(self, draw: tuple) -> tuple[Tensor, Tensor]:
        index, top, left, flip, operation, strength = draw
        image = transforms.to_pil_image(self.images[index].numpy())
        if self.augment:
            image = transforms.pad(image, augment.PADDING, padding_mode="reflect")
            image = transforms.crop(image, top, left, augment.SIZE, augment.SIZE)
            image = transforms.hflip(image) if flip else image
        if self.trivial:
            image = trivial_augment.transform_one(transforms.pil_to_tensor(image), operation, strength)
            image = transforms.convert_image_dtype(image)
        else:
            image = transforms.to_tensor(image)
        return transforms.normalize(image, augment.MEAN, augment.STD) if self.normalize else image, self.targets[index]


def count_cores() -> int:
    """Count the cores that this process may use: a queue or a container may give it fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def collate(items: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Stack a batch, which has no image where there are more processes than images left."""
    if not items:
        return torch.empty(0, 3, augment.SIZE, augment.SIZE), torch.empty(0, dtype=torch.int64)
    images, targets = zip(*items, strict=True)
    return torch.stack(images), torch.stack(targets)


def ignore_signals(_: int) -> None:
    """Leave a job's signals to the main process, which finishes its step and then ends the workers."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
