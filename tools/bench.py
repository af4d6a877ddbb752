"""Measure how fast this program trains, compared with the published code: `python tools/bench.py --json cpu.json`.

Measurements are interleaved in one run, so that other load on the machine affects both sides of a ratio.
The images are random bytes: no time depends on their content. Files go to a temporary folder.
"""

import contextlib
import copy
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from process import Signals, program, set_up_process
from utils import RunError, UserError, check_output, print_line, write_text

if __name__ == "__main__":
    set_up_process()  # before torch is imported

import numpy as np
import torch
from torch import Tensor, nn

import cifar10
import data
import evaluate
import hardware
import options
import train
from checkpoint import RunFolder, TrainState
from distributed import World
from train import Run, train_step

EPOCH, TEST_SET = 50_000, 10_000  # images
EXTRAS = ["--trivial-augment", "--mixup", "0.2", "--cutmix", "1", "--ema", "0.999"]  # what the recipes add
# Batch size, unless it is given; rounds, after one that warms up; steps at the end of an epoch, of this program and of
# the published code; test images; size of the matrices. Five minutes at most.
Counts = namedtuple("Counts", "batch_size repeats steps published_steps test_images size")
COUNTS = {"cpu": Counts(128, 2, 1, 1, 250, 4096), "cuda": Counts(128, 3, 391, 100, TEST_SET, 8192)}
Rows = dict[str, np.ndarray]  # a name, which ends in the unit, and the values of all rounds


def random_split(count: int) -> data.Split:
    """Make images of random bytes."""
    images = torch.randint(2**62, (count, 32 * 32 * 3 // 8)).view(torch.uint8).view(count, 32, 32, 3)
    return data.Split(images, torch.arange(count) % 10, list(cifar10.CLASSES))


def build(flags: Sequence[str], train_images: int, test_images: int, folder: Path) -> tuple[Run, TrainState]:
    """Build a run as train.py does, on random images; RunError if it is not compiled although it should be."""
    args, _ = options.parse_args([*flags, "--save-minutes", "1e9", "--epochs", "1000"])
    device, precision = hardware.select(args, World())
    model = train.build_model(args, None).to(device, memory_format=hardware.memory_format(device))
    loader = data.build_loader(random_split(train_images), args, device, World())
    state = TrainState(args, model, len(loader), precision)
    split = random_split(test_images)
    run = Run(args, World(), device, precision, RunFolder(folder), loader, split, split,
              train.build_forward(args, model, device, precision))
    if hardware.should_compile(args.compile, device):
        train.compile_forward(run, state)
        if run.compiled_forward is None:
            raise RunError("this program could not be compiled, which makes it slower; measure with --no-compile")
    run.environment = hardware.environment(run.device, run.precision, run.compiled_forward is not None, 1)
    return run, state


def published_step(run: Run, state: TrainState, inputs: Tensor, *targets: Tensor) -> None:
    """Take a step like the published code, which waits for the device three times."""
    train_step(run, state, inputs.contiguous(), *targets)  # the copy takes less than a thousandth of the step
    for index in (0, 1, 0):  # the published loop reads the loss, the correct predictions, and the loss again
        state.totals[index].item()


def serve_published(steps: str, train_images: str, test_images: str, folder: str, *flags: str) -> None:
    """Measure the published code once per line of standard input, in a process with settings and memory of its own.

    Its images come from torchvision in worker processes; fp32, NCHW, an optimizer that is not fused, no compiling.
    """
    hardware.keep_freed_memory, train.train_step = lambda: None, published_step
    own, out = ["--workers", str(hardware.count_cores()), "--precision", "fp32", "--no-compile"], sys.stdout
    run, state = build([*flags, *own], int(train_images), int(test_images), Path(folder))
    for model in (state.model, state.eval_model):
        model.to(memory_format=torch.contiguous_format)
    for values in state.optimizer.state.values():  # with the strides of the weights
        values.update({name: value.contiguous() for name, value in values.items()})
    for group in state.optimizer.param_groups:
        group["fused"] = None  # PyTorch's default
    with contextlib.closing(run.loader), contextlib.redirect_stdout(sys.stderr):  # of lines of progress
        for line in sys.stdin:  # ends with the other process, even if that is killed
            torch.backends.cudnn.allow_tf32 = line == "tf32\n"
            print_line(str(whole_rate(run, state, int(steps))), out)


def in_turns(repeats: int, actions: dict[str, Callable[[], float]]) -> Rows:
    """Take every measurement once, then every one again, and so on; the first round only warms up."""
    rounds = [[action() for action in actions.values()] for _ in range(1 + repeats)]
    return dict(zip(actions, np.array(rounds[1:]).T, strict=True))


def seconds(device: torch.device, action: Callable[[], Any], count: int = 1) -> float:
    """Return the seconds that an action takes, the mean of `count`, from an idle device to an idle device."""
    synchronize = torch.get_device_module(device).synchronize
    synchronize()
    start = time.perf_counter()
    for _ in range(count):
        action()
    synchronize()
    return (time.perf_counter() - start) / count


def loader_rate(loader: data.Loader, steps: int, use: Callable[[int], Any] | None = None) -> float:
    """Return images/s of the last `steps` steps of an epoch; `use(first)` takes them, or they are only loaded."""
    first = max(0, len(loader) - steps)
    use = use or (lambda first: sum(1 for _ in loader.epoch(0, first)))
    return (len(loader.targets) - first * loader.args.batch_size) / seconds(loader.device, lambda: use(first))


def whole_rate(run: Run, state: TrainState, steps: int) -> float:
    """Return images/s of the last `steps` steps of the next epoch, from the loader to the progress bar."""
    def use(first: int) -> None:
        state.epoch, state.step, state.seconds = state.epoch + 1, first, 0.0
        state.totals.zero_()
        train.train_one_epoch(run, state, Signals())
    return loader_rate(run.loader, steps, use)


def bare_rate(run: Run, state: TrainState, steps: int) -> float:
    """Return images/s of steps on one full batch that is on the device already."""
    batch, *_ = list(run.loader.epoch(0, max(0, len(run.loader) - 2)))
    state.model.train()

    def step() -> None:
        state.step = 0  # of a full batch
        train.train_step(run, state, *batch)
    return len(batch[1]) / seconds(run.device, step, steps)


def training_cost(model: nn.Module, precision: str, compiled: bool) -> tuple[float, float]:
    """Return the GFLOP, and the GB that batch norm and ReLU move, of training on one image.

    A multiply-add is two operations; the gradients of inputs and of weights each cost what the outputs do. Batch norm
    takes eight passes over its values: forward it reads them for the statistics, then reads and writes; backward it
    reads values and gradients for two sums, then reads both and writes. The ReLU after it takes five (read, write;
    read two, write), or none if it is compiled into batch norm.
    """
    model, flop, values = copy.deepcopy(model).to("meta").eval(), [], []
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(lambda layer, _, out: flop.append(6 * out.numel() * layer.weight[0].numel()))
        elif isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_hook(lambda layer, _, out: values.append(out.numel()))
    model(torch.zeros(1, 3, 32, 32, device="meta"))
    return 1e-9 * sum(flop), 1e-9 * sum(values) * (8 if compiled else 13) * hardware.PRECISIONS[precision].itemsize


def peak_memory(device: torch.device) -> float:
    """Return the most memory used so far, in MB: of the GPU, else of this process (not on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 1e6  # replayed CUDA graphs allocate nothing
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6


def start_seconds(flags: Sequence[str], folder: Path) -> float:
    """Time train.py from the command to the end of its first step and the save after it."""
    path, start = Path(tempfile.mkdtemp(dir=folder)), time.perf_counter()
    with subprocess.Popen([sys.executable, train.__file__, *flags, "--data-dir", folder, "--output-dir", path,
                           "--save-minutes", "0"], stdout=subprocess.DEVNULL) as process:
        try:
            while not (path / "previous.pt").exists():  # the checkpoint before the first step, renamed after it
                if process.poll() is not None:
                    raise RunError("the timed train.py ended before its first step")
                time.sleep(0.01)
            return time.perf_counter() - start
        finally:
            process.kill()


def sections(args: Namespace, flags: Sequence[str], counts: Counts, folder: Path) -> Iterator[tuple[str, Rows]]:
    """Measure everything; yield the title and the rows of each section."""
    device, cores, repeats = hardware.select_device(args.device), hardware.count_cores(), counts.repeats
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32  # now, or all is compiled a second time
    for name in (*cifar10.TRAIN_FILES, *cifar10.TEST_FILES):
        split = random_split(-(-EPOCH // len(cifar10.TRAIN_FILES)))
        batch = {"data": split.images.permute(0, 3, 1, 2).flatten(1).numpy(), "labels": split.targets.tolist()}
        (folder / name).write_bytes(pickle.dumps(batch))
    caches = (", cold compile cache", ", warm compile cache") if args.compile else ("",)
    yield "start", {f"command to the end of the first step{cache}, s": [start_seconds(flags, folder)]
                    for cache in caches}

    images = EPOCH if device.type == "cuda" else EPOCH - EPOCH % args.batch_size  # few steps: let all be full batches
    run, state = build(flags, images, counts.test_images, folder)
    with contextlib.closing(run.loader):
        whole_rate(run, state, counts.steps)
        if device.type == "cuda":  # forget what cuDNN's trials of algorithms took
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            whole_rate(run, state, counts.steps)
        if device.type == "cuda" or sys.platform != "win32":
            yield "memory", {"peak memory of training, MB": [peak_memory(device)]}

        split = data.Split(run.loader.images.cpu(), run.loader.targets.cpu(), [])
        one, several = (data.WorkersLoader(split, args, device, workers=workers) for workers in (0, cores))
        ours = data.DeviceLoader(split, args, device)
        with contextlib.closing(several):
            rows = in_turns(repeats, {
                "device loader, images/s": lambda: loader_rate(ours, len(ours)),
                "torchvision in one process, images/s": lambda: loader_rate(one, 16),
                f"torchvision in {cores} workers, images/s": lambda: loader_rate(several, 16 * cores)})
        first, *others = rows
        yield "loaders", rows | {f"device loader : {name.partition(',')[0]}": rows[first] / rows[name]
                                 for name in others}

        yield "training", (rows := measure_training(run, state, flags, counts))
        epoch = EPOCH / np.median(rows["this program, images/s"])
        rows = in_turns(repeats, {
            "evaluation of 10,000 images, s": lambda: TEST_SET / counts.test_images * seconds(
                device, lambda: evaluate.predict_logits(state.model, run.eval_split.images, device, run.precision)),
            "save, s": lambda: seconds(device, lambda: train.save(run, state, must_succeed=True))})
        yield "epoch", {"training on 50,000 images, s": [epoch], **rows,
                        "evaluation, % of an epoch": 100 / epoch * rows["evaluation of 10,000 images, s"]}


def measure_training(run: Run, state: TrainState, flags: Sequence[str], counts: Counts) -> Rows:
    """Measure this program with and without the extras, the published code, and the hardware, all in turns."""
    build_args, device = (len(run.loader.targets), counts.test_images, run.folder.path), run.device
    extras = build([*flags, *EXTRAS], *build_args)
    a, b = torch.randn(2, counts.size, counts.size, device=device)
    c, d = (matrix.to(hardware.PRECISIONS[run.precision]) for matrix in (a, b))
    actions = {"this program, images/s": lambda: whole_rate(run, state, counts.steps),
               "bare steps, images/s": lambda: bare_rate(run, state, counts.steps),
               "this program with extras, images/s": lambda: whole_rate(*extras, counts.steps),
               "large matrix product, GFLOP/s": lambda: 2e-9 * counts.size**3 / seconds(device, lambda: c @ d, 5),
               "copy of a large tensor, GB/s": lambda: 2e-9 * a.nbytes / seconds(device, lambda: b.copy_(a), 20)}
    sides = {"published code": "tf32\n"} | ({"published code, TF32 off": "\n"} if device.type == "cuda" else {})
    command = [sys.executable, __file__, "--published", counts.published_steps, *build_args, *flags]
    with contextlib.closing(extras[0].loader), subprocess.Popen(
            list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as child:
        rows = in_turns(counts.repeats, actions | {
            f"{side}, images/s": lambda line=line: child.stdin.write(line) and float(child.stdout.readline())
            for side, line in sides.items()})
    ours, bare, with_extras, product, bandwidth, *published = rows.values()
    gflop, gbytes = training_cost(state.model, run.precision, run.compiled_forward is not None)
    bound = 1 / (gflop / product + gbytes / bandwidth)
    return rows | {"this program : bare steps": ours / bare, "time with extras : without": ours / with_extras,
                   **{f"this program : {side}": ours / rate for side, rate in zip(sides, published, strict=True)},
                   "arithmetic, GFLOP per image": [gflop],
                   "fraction of the product's rate, %": 100 * gflop * ours / product,
                   "batch norm and ReLU, GB per image": [gbytes],
                   "bound by arithmetic and memory, images/s": bound, "fraction of the bound, %": 100 * ours / bound}


@program("bench.py")
def main(argv: Sequence[str] | None = None) -> int:
    """Print each section as it is finished, and write all that is measured so far."""
    parser = options.Parser("bench.py", "[--json FILE] [flags of train.py]", "Measure the speed of training.")
    parser.add_argument("--json", type=Path, default=None, metavar="FILE", help="also write results to this file")
    own, flags = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    args, _ = options.parse_args(flags)
    if args.resume is not None or args.init_from or args.summary or args.small_epochs:
        raise UserError("bench.py takes no --resume, --init-from or --summary, and only --small-epochs 0")
    if own.json:
        check_output(own.json)
    device = hardware.select_device(args.device)
    counts = COUNTS["cuda" if device.type == "cuda" else "cpu"]
    compiled = hardware.should_compile(args.compile, device)
    flags = ["--batch-size", str(counts.batch_size), *flags, "--compile" if compiled else "--no-compile"]
    head = {  # what the values depend on, so that those of different machines are not mixed
        "device": hardware.describe(device), **hardware.versions(), "date": time.strftime("%Y-%m-%d %H:%M"),
        "cpu": hardware.describe(hardware.CPU), "cpu_bf16": hardware.select_precision("auto", hardware.CPU) == "bf16",
        "cores": hardware.count_cores(), "threads": torch.get_num_threads(), "compiled": compiled,
        "precision": hardware.select_precision(args.precision, device), "flags": " ".join(flags),
        "extras": " ".join(EXTRAS), "counts": counts._asdict()}
    print_line("\n".join(f"{name:12} {value}" for name, value in head.items()))
    rows = {}
    with tempfile.TemporaryDirectory(prefix="bench-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        os.environ |= {"TORCHINDUCTOR_CACHE_DIR": f"{name}/inductor", "TRITON_CACHE_DIR": f"{name}/triton"}
        for title, found in sections(options.parse_args(flags)[0], flags, counts, folder):
            print_line(f"\n{title:50}    median        min        max")
            for name, samples in found.items():
                values = {f.__name__: float(f(samples)) for f in (np.median, np.min, np.max)}
                rows[name] = {"section": title, **values, "samples": list(map(float, samples))}
                shown = list(values.values())[:3 if len(samples) > 1 else 1]  # one sample has no spread
                print_line(f"{name:50}" + "".join(f"{v:11,.0f}" if v >= 1000 else f"{v:11.4g}" for v in shown))
            if own.json:
                write_text(own.json, json.dumps({"head": head, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(serve_published(*sys.argv[2:]) if sys.argv[1:2] == ["--published"] else main())
