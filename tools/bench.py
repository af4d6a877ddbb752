"""Measure how fast this program trains, beside the published way, on the device at hand.

python tools/bench.py --json results/bench/cpu.json

What is compared is measured in turns in one run, so that a machine that grows busier changes both sides of a ratio.
The images are random bytes: no time depends on what they show.
"""

import contextlib
import copy
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch import Tensor, nn

import batches
import data
import device as devices
import options
import train
from trainer import RunError, Trainer
from utils import Processes, Signals, UserError, save_checkpoint, say, write_text

EPOCH, TEST_SET = 50_000, 10_000  # images that the figures for an epoch and for an evaluation stand for
PROGRAM, PAPER, NO_TF32 = "this program", "the paper's way", "the paper's way, TF32 off"
ADDED = ["--trivial-augment", "--mixup", "0.2", "--cutmix", "1", "--ema", "0.999"]  # what the recipes add to a step


class Counts(NamedTuple):
    """How much is measured."""

    repeats: int  # of every measurement
    warm_ups: int  # rounds before; CUDA graphs need three
    steps: int  # of training, the last ones of an epoch
    loader_steps: int  # per process of the loaders that work image by image
    train_images: int
    test_images: int
    batch_size: int
    product: int  # rows and columns of the large matrices


COUNTS = {("cpu", False): Counts(5, 1, 2, 64, 390 * 128, 1000, 128, 4096),  # a last batch of 80 would weigh too much
          ("cpu", True): Counts(2, 1, 1, 16, 200 * 128, 125, 64, 2048),
          ("cuda", False): Counts(5, 3, 391, 64, EPOCH, TEST_SET, 128, 8192),
          ("cuda", True): Counts(2, 3, 391, 16, EPOCH, TEST_SET, 128, 8192)}


class Rows(dict[str, dict[str, Any]]):
    """The table: of every name, which ends in its unit, the samples, their median and spread."""

    def add(self, name: str, *samples: float) -> None:
        """Add a row."""
        self[name] = {"median": statistics.median(samples), "min": min(samples), "max": max(samples),
                      "samples": list(samples)}

    def measure(self, counts: Counts, actions: dict[str, Callable[[], float]]) -> None:
        """Take every measurement once, then every one again, and so on; the first rounds do not count."""
        rounds = [[action() for action in actions.values()] for _ in range(counts.warm_ups + counts.repeats)]
        for name, samples in zip(actions, zip(*rounds[counts.warm_ups:], strict=True), strict=True):
            self.add(name, *samples)

    def divide(self, name: str, above: str, below: str, factor: float = 1) -> None:
        """Add the ratio of two rows measured in turns, round by round: it has a spread of its own."""
        self.add(name, *(factor * a / b for a, b in zip(self[above]["samples"], self[below]["samples"], strict=True)))

    def __str__(self) -> str:
        width = max(map(len, self))
        lines = [f"{'':{width}}     median        min        max"]
        for name, row in self.items():
            values = list(row.values())[:3 if len(row["samples"]) > 1 else 1]  # one sample has no spread
            cells = (f"{value:10,.0f}" if abs(value) >= 1000 else f"{value:10.4g}" for value in values)
            lines.append(" ".join([f"{name:{width}}", *cells]))
        return "\n".join(lines)


def random_split(count: int) -> data.Split:
    """Make images that show nothing."""
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**64, (count, 32 * 32 * 3 // 8), dtype=np.uint64)  # far faster than byte by byte
    return data.Split(torch.from_numpy(words.view(np.uint8).reshape(count, 32, 32, 3)),
                      torch.from_numpy(rng.integers(0, 10, count)), list(batches.CLASSES))


def build(flags: Sequence[str], folder: Path, name: str) -> Trainer:
    """Build a run as train.py does."""
    args, given = options.parse_args([*flags, "--data-dir", str(folder), "--checkpoint-dir", str(folder),
                                      "--name", name, "--save-minutes", "1e9"])
    trainer, _ = train.set_up(args, given, Processes())
    trainer.folder.close()  # Windows removes no open file
    return trainer


@cache  # where there is one, it is used again and again
def build_paper(flags: tuple[str, ...], folder: Path) -> Trainer:
    """Build a run of the published way: torchvision's loader, float32, NCHW, three waits a step."""
    def step(inputs: Tensor, targets: Tensor) -> None:
        Trainer.train_step(trainer, inputs.contiguous(), targets)  # the copy is less than a thousandth of the step
        for index in (0, 1, 0):  # the published loop reads the loss, the hits, and the loss again
            trainer.totals[index].item()
    with mock.patch.object(devices, "keep_freed_memory"):  # PyTorch does not do so by itself
        trainer = build([*flags, "--loader", "workers", "--workers", str(data.count_cores()), "--precision", "fp32",
                         "--no-compile"], folder, "paper")
    trainer.model.to(memory_format=torch.contiguous_format)
    for state in trainer.optimizer.state.values():  # with other strides torch would step tensor by tensor
        state["momentum_buffer"] = state["momentum_buffer"].contiguous()
    for group in trainer.optimizer.param_groups:
        group["fused"] = None  # as PyTorch leaves it
    trainer.train_step = step
    return trainer


def close_loader(trainer: Trainer) -> None:
    """End the loader's workers, which their process would wait for."""
    trainer.loader.close()


def call_paper(flags: tuple[str, ...], folder: Path, way: str, function: Callable[..., Any], *args: Any) -> Any:
    """Call a function with the published way's trainer, in the process where it is alone."""
    # By itself PyTorch allows TF32 in convolutions and not in products, of which training has a millionth.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = way != NO_TF32
    return function(build_paper(flags, folder), *args)


def seconds(device: torch.device, action: Callable[[], Any]) -> float:
    """Time an action, from an idle device to an idle device."""
    wait = torch.get_device_module(device).synchronize
    wait()
    start = time.perf_counter()
    action()
    wait()
    return time.perf_counter() - start


def loader_rate(loader: data.Loader, steps: int) -> float:
    """Return images/s of the last `steps` batches of an epoch, made and not used."""
    first = max(0, len(loader) - steps)
    duration = seconds(loader.device, lambda: sum(1 for _ in loader.epoch(0, first)))
    return (len(loader.targets) - first * loader.batch_size) / duration


def bare_rate(trainer: Trainer, steps: int) -> float:
    """Return images/s of training steps on one batch that is there already."""
    inputs = torch.randn(trainer.loader.batch_size, 3, 32, 32, device=trainer.device)
    inputs = inputs.contiguous(memory_format=torch.channels_last)
    targets = torch.zeros(len(inputs), dtype=torch.int64, device=trainer.device)

    def run() -> None:
        for _ in range(steps):
            trainer.step = 0  # a whole batch, for `Loader.count`
            trainer.train_step(inputs, targets)
    trainer.model.train()
    return steps * len(targets) / seconds(trainer.device, run)


def whole_rate(trainer: Trainer, steps: int, loader: data.Loader | None = None) -> float:
    """Return images/s of the last `steps` steps of the next epoch, with all that training does; switch to a loader."""
    loader = loader or trainer.loader
    first = max(0, len(loader) - steps)
    trainer.loader, trainer.epoch, trainer.step = loader, trainer.epoch + 1, first
    trainer.totals, trainer.seconds = trainer.no_totals(), 0.0
    duration = seconds(trainer.device, lambda: trainer.train_epoch(Signals()))
    return (len(loader.targets) - first * loader.batch_size) / duration


def product_rate(trainer: Trainer, size: int) -> float:
    """Return the GFLOP/s of large matrix products in the precision of training."""
    a, b = torch.randn(2, size, size, device=trainer.device).to(devices.PRECISIONS[trainer.precision])
    count = 1 if trainer.device.type == "cpu" else 20
    a @ b
    return 2e-9 * size**3 * count / seconds(trainer.device, lambda: [a @ b for _ in range(count)])


def count_flops(model: nn.Module) -> int:
    """Count the floating point operations of training on one image, in convolutions and linear layers.

    A multiply-add is two. Training takes three times the forward pass: going back, the gradients of a layer's inputs
    and of its weights each cost what its outputs did. (The first layer's inputs need none, 0.1 % of the whole.)
    """
    model, counted = copy.deepcopy(model).cpu().eval(), []
    for layer in (module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)):
        layer.register_forward_hook(lambda layer, _, out: counted.append(2 * out.numel() * layer.weight[0].numel()))
    with torch.inference_mode():
        model(torch.zeros(1, 3, 32, 32))
    return 3 * sum(counted)


def peak_memory(device: torch.device) -> float:
    """Return the most memory used so far, in MB: of the GPU, else of this process; NaN where the system cannot tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if os.name == "nt":
        return float("nan")
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def start_seconds(flags: Sequence[str], folder: Path) -> float:
    """Time train.py from the command to the end of the first step, when a checkpoint appears; RunError if none does."""
    run = Path(tempfile.mkdtemp(dir=folder))
    start = time.perf_counter()
    with subprocess.Popen([sys.executable, train.__file__, *flags, "--data-dir", str(folder), "--checkpoint-dir",
                           str(folder), "--name", run.name, "--save-minutes", "0", "--no-compile"],
                          stdout=subprocess.DEVNULL) as process:
        while not (run / "last.pt").exists():
            if process.poll() is not None:
                raise RunError("train.py, started to be timed, has ended before its first step")
            time.sleep(0.01)
        duration = time.perf_counter() - start
        process.kill()
    return duration


def measure_scaling(rows: Rows, program: Trainer, counts: Counts) -> None:
    """Measure what ten times as many images change."""
    if program.device.type == "cuda":  # cuDNN's trials took more than a step does
        torch.cuda.reset_peak_memory_stats(program.device)
        whole_rate(program, counts.steps)
    before, once = peak_memory(program.device), program.loader
    images = 10 * (counts.train_images // once.batch_size) * once.batch_size  # no last batch of a size to compile for
    ten = data.DeviceLoader(random_split(images), once.batch_size, program.device, seed=0)
    ten_steps = len(ten) if counts.steps >= len(once) else counts.steps  # the draws are made once an epoch
    rows.measure(counts, {"images once, images/s": partial(whole_rate, program, counts.steps, once),
                          "ten times the images, images/s": partial(whole_rate, program, ten_steps, ten)})
    rows.divide("ten times the images : images once", "ten times the images, images/s", "images once, images/s")
    rows.add("memory growth : bytes of these images", 1e6 * (peak_memory(program.device) - before) / ten.images.nbytes)
    program.loader = once


def measure_loaders(rows: Rows, program: Trainer, counts: Counts) -> None:
    """Measure the loaders alone."""
    ours, workers = program.loader, data.count_cores()
    split = data.Split(ours.images.cpu(), ours.targets.cpu(), [])
    alone, several = (data.WorkersLoader(split, ours.batch_size, ours.device, 0, workers=n) for n in (0, workers))
    loaders = {"device loader": (ours, len(ours)), "torchvision in one process": (alone, counts.loader_steps),
               f"torchvision in {workers} workers": (several, workers * counts.loader_steps)}
    with contextlib.closing(several):  # or its workers outlive it, and the program waits for them
        rows.measure(counts, {f"{name}, images/s": partial(loader_rate, *of) for name, of in loaders.items()})
    for name in list(loaders)[1:]:
        rows.divide(f"device loader : {name}", "device loader, images/s", f"{name}, images/s")


def measure_training(rows: Rows, program: Trainer, harder: Trainer, paper: Callable[..., float], ways: Sequence[str],
                     counts: Counts) -> None:
    """Measure bare steps, whole training and large products, and what share of their rate training reaches.

    And `harder`, this program with what the recipes add, beside it without. `paper` calls `call_paper`.
    """
    rates = {"bare step, images/s": (bare_rate, counts.steps), "whole training, images/s": (whole_rate, counts.steps),
             "matrix product, GFLOP/s": (product_rate, counts.product)}
    added = f"{PROGRAM} with {' '.join(ADDED)}, images/s"
    actions = {f"{PROGRAM}: {name}": partial(rate, program, count) for name, (rate, count) in rates.items()}
    actions[added] = partial(whole_rate, harder, counts.steps)
    actions |= {f"{way}: {name}": partial(paper, way, *rate) for way in ways for name, rate in rates.items()}
    rows.measure(counts, actions)
    rows.divide("time of an epoch with these : without", f"{PROGRAM}: whole training, images/s", added)
    rows.add("GFLOP of training per image", gflop := count_flops(program.model) / 1e9)
    for way in (PROGRAM, *ways):
        bare, whole, product = (f"{way}: {name}" for name in rates)
        rows.divide(f"{way}: whole training : bare step", whole, bare)
        rows.add(f"{way}: arithmetic, GFLOP/s", *(gflop * rate for rate in rows[whole]["samples"]))
        rows.divide(f"{way}: share of the product's rate, %", f"{way}: arithmetic, GFLOP/s", product, 100)
        if way != PROGRAM:
            rows.divide(f"whole training, {PROGRAM} : {way}", f"{PROGRAM}: whole training, images/s", whole)


def measure(flags: Sequence[str], counts: Counts, folder: Path) -> tuple[dict[str, str], Rows]:
    """Measure everything in an empty folder; return what was measured on, and the table."""
    for name in (*data.TRAIN_FILES, *data.TEST_FILES):
        split = random_split(-(-counts.train_images // len(data.TRAIN_FILES)))
        batches.write_batch(folder / name, split.images.numpy(), split.targets.numpy(), name)
    settings = ["--batch-size", str(counts.batch_size), "--limit-train", str(counts.train_images),
                "--limit-test", str(counts.test_images), *flags]
    rows, program = Rows(), build(settings, folder, "program")
    whole_rate(program, counts.steps)
    rows.add("peak memory, MB", peak_memory(program.device))  # before anything else needs some
    measure_scaling(rows, program, counts)
    measure_loaders(rows, program, counts)
    ways = [PAPER, NO_TF32] if program.device.type == "cuda" else [PAPER]
    apart = multiprocessing.get_context("spawn")  # its settings, and how it takes memory, are not this program's
    with ProcessPoolExecutor(1, mp_context=apart) as process:
        def paper(*args: Any) -> Any:
            return process.submit(call_paper, tuple(settings), folder, *args).result()
        try:
            measure_training(rows, program, build([*settings, *ADDED], folder, "harder"), paper, ways, counts)
            published = paper(PAPER, Trainer.environment)
        finally:
            paper(PAPER, close_loader)
    epoch = EPOCH / rows[f"{PROGRAM}: whole training, images/s"]["median"]
    rows.add(f"epoch of {EPOCH:,} images, s", epoch)
    rows.measure(counts, {
        f"evaluation of {TEST_SET:,} images (from {counts.test_images:,}), % of an epoch": lambda: 100 / epoch
        * TEST_SET / counts.test_images * seconds(program.device, lambda: program.predict(program.held_out)),
        "save, s": lambda: seconds(program.device, lambda: save_checkpoint(
            program.state(), program.folder.last, program.folder.previous))})
    starts = [start_seconds(flags, folder) for _ in range(counts.repeats // 2)]
    rows.add("command to the end of the first step, without compile, s", *starts)
    cpuinfo = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    cpu = cpuinfo.partition("model name\t: ")[2].partition("\n")[0] or platform.processor()
    return {"device": f"{devices.describe(program.device)}; {data.count_cores()} cores of {cpu}",
            "torch": f"{torch.__version__}, Python {platform.python_version()}",
            "date": time.strftime("%Y-%m-%d %H:%M"),
            PROGRAM: f"{program.environment()}, {torch.get_num_threads()} threads",
            PAPER: f"{published}, {data.count_cores()} worker processes",
            "counts": ", ".join(f"{name} {value}" for name, value in counts._asdict().items())}, rows


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark and print its table; a mistake is one line and status 2."""
    parser = options.Parser(prog="bench.py", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="as in train.py")
    parser.add_argument("--quick", action="store_true", help="under a minute on two cores: smaller, fewer, less exact")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same as data")
    args = parser.parse_args(argv)
    try:
        if args.json and not args.json.parent.is_dir():
            raise UserError(f"--json {args.json}: there is no folder {args.json.parent}; make it first")
        counts = COUNTS["cuda" if devices.pick_device(args.device).type == "cuda" else "cpu", args.quick]
        with tempfile.TemporaryDirectory(dir=Path(train.__file__).parent / "checkpoints", prefix=".bench-") as folder:
            head, rows = measure(["--device", args.device], counts, Path(folder))
        head = {"command": " ".join(["python", *sys.argv]), **head}
        say("\n".join([*(f"{name:15} {value}" for name, value in head.items()), "", str(rows)]))
        if args.json:
            write_text(args.json, json.dumps({"head": head, "rows": rows}, indent=1) + "\n")
    except (UserError, RunError, OSError, torch.OutOfMemoryError) as error:
        parser.error(str(error).splitlines()[0])


if __name__ == "__main__":
    main()
