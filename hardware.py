"""Device, precision, threads and torch.compile."""

import contextlib
import ctypes
import functools
import importlib.metadata
import importlib.util
import logging
import os
import platform
import re
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from distributed import World, on_every_rank, on_main_rank
from utils import UserError, warn

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CPU = torch.device("cpu")
NVIDIA_FILES = ("/dev/nvidia0", "/dev/dxg", "/proc/driver/nvidia/version")  # Linux, WSL, a container


def select(args: Namespace, world: World | None = None, before: dict[str, Any] | None = None
           ) -> tuple[torch.device, str]:
    """Select device, precision and algorithms, the same on all ranks; `before` is the environment of a resumed run."""
    world = world or World()
    device, precision = _select_own(args, world, before or {})
    _refuse_mixed(world.gather(f"{device.type} in {precision}"))
    return device, precision


@on_every_rank
def _select_own(args: Namespace, world: World, before: dict[str, Any]) -> tuple[torch.device, str]:
    is_same = (before.get("ranks"), before.get("hardware", describe(CPU))) == (world.size, describe(CPU))
    if is_same and before["threads"] and before["threads"] <= count_cores():  # the order of sums depends on them
        torch.set_num_threads(before["threads"])
    device = select_device(args.device, world.local_rank)
    if device.type == "mps" and world.size > 1:  # pytorch issue 160732
        raise UserError("torch cannot exchange gradients between Apple GPUs; use one process, or --device cpu")
    set_up_backend(device, getattr(args, "deterministic", False))  # a flag of train.py
    return device, select_precision(args.precision, device)


@on_main_rank
def _refuse_mixed(found: list[str]) -> None:
    if len(set(found)) > 1:  # the loss scale of fp16, for instance, would be in the gradients of some ranks
        raise UserError(f"the ranks have selected {' and '.join(sorted(set(found)))}; choose one with --device and "
                        "--precision")


def select_device(name: str, local_rank: int = 0) -> torch.device:
    """Turn `--device` into a device; auto is CUDA, else MPS, else the CPU."""
    available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available, "cpu": lambda: True}
    if name == "auto":
        name = next(kind for kind, is_available in available.items() if is_available())
        if name == "cpu" and local_rank == 0 and torch.version.cuda and any(map(os.path.exists, NVIDIA_FILES)):
            warn(f"there is an NVIDIA GPU, but torch {torch.__version__} cannot use it, so this runs on the CPU; CUDA "
                 f"{torch.version.cuda} may need a newer driver, see nvidia-smi")
    elif not available[name]():
        raise UserError(f"--device {name}: torch {torch.__version__} finds no such device; use --device auto or cpu")
    if name != "cuda":
        return torch.device(name)
    if local_rank >= torch.cuda.device_count():
        raise UserError(f"rank {local_rank} of this machine has no GPU; there are {torch.cuda.device_count()}, so "
                        "start no more ranks than that (--nproc-per-node)")
    device = torch.device("cuda", local_rank)
    try:
        torch.cuda.set_device(device)
        torch.ones(2, device=device).sum().item()  # it may be full, busy, or older than the build's kernels
    except RuntimeError as error:
        cause = str(error).partition("\n")[0]
        raise UserError(f"{describe(device)} cannot be used ({cause}); torch {torch.__version__} has "
                        f"kernels for {' '.join(torch.cuda.get_arch_list())}, its cu126 build also for older GPUs; or "
                        "use --device cpu") from error
    return device


def select_precision(name: str, device: torch.device) -> str:
    """Turn `--precision` into fp32, bf16 or fp16; auto is the fastest that the hardware computes natively."""
    if device.type == "cuda" and torch.version.hip:  # where the capability is the number of the architecture
        has_bf16 = bool(re.match("gfx(908|90a|94|95|11|12)", torch.cuda.get_device_properties(device).gcnArchName))
    else:
        has_bf16 = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)
    if name == "bf16" and not has_bf16:  # torch emulates it, and does not compile it
        raise UserError(f"--precision bf16: {describe(device)} does not compute it natively, so use fp16")
    if name == "fp16" and device.type == "mps":  # pytorch pull request 186360
        raise UserError("--precision fp16: on MPS, optimizers of torch ignore the loss scale; use bf16 or fp32")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if has_bf16 else "fp16"
    if device.type == "cpu":  # private names; where a torch version lacks them, fp32 is slow but correct
        checks = (getattr(torch.cpu, f"_is_{feature}_supported", None) for feature in ("avx512_bf16", "amx_tile"))
        return "bf16" if any(check is not None and check() for check in checks) else "fp32"
    return "fp32"


def memory_format(device: torch.device | str) -> torch.memory_format:
    """Return the memory format of network and images: the fastest one that the device computes correctly."""
    # on MPS the backward passes of batch norm and pooling are wrong in channels_last (pytorch issues 175189, 175190)
    return torch.contiguous_format if torch.device(device).type == "mps" else torch.channels_last


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Return the context for forward and loss; parameters and optimizer state stay float32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=PRECISIONS[precision])


def count_cores() -> int:
    """Count the cores that this process may use; a queue or a container may allow fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def set_up_backend(device: torch.device, deterministic: bool = False) -> None:
    """Select the fastest algorithms, or repeatable ones."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required for deterministic cuBLAS
    torch.use_deterministic_algorithms(deterministic)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = not deterministic
    elif device.type == "cpu":
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for the next step: otherwise every step page-faults all activations anew."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # constants of malloc.h, see mallopt(3)
        mallopt(-4, 0)  # M_MMAP_MAX: serve large blocks from the heap, too
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never return heap memory


def should_compile(requested: bool | None, device: torch.device) -> bool:
    """Return `--compile` as requested; the default is on for CUDA with Triton."""
    if requested is not None:
        return requested
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


@functools.cache
def processor() -> str:
    """Return the model name of the processor, such as "Apple M2"; or its architecture, if it has none."""
    name = platform.processor()
    with contextlib.suppress(OSError):
        if sys.platform == "linux":
            name = Path("/proc/cpuinfo").read_text().partition("model name\t: ")[2].partition("\n")[0]
        elif sys.platform == "darwin":
            name = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True).stdout
    return " ".join(name.split()) or platform.machine()


def describe(device: torch.device) -> str:
    """Return the name of the device; for a CPU with the instructions that torch uses, which decide the last bits."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()} ({torch.backends.cpu.get_cpu_capability() if device.type == 'cpu' else 'MPS'})"


def environment(device: torch.device, precision: str, compiled: bool, ranks: int) -> dict[str, Any]:
    """Return what must match for a bitwise-identical continuation."""
    is_cuda = device.type == "cuda"
    return {"device": device.type, "hardware": describe(device), "precision": precision, "compile": compiled,
            "ranks": ranks, "threads": torch.get_num_threads() if device.type == "cpu" else None,
            "deterministic": torch.are_deterministic_algorithms_enabled() if is_cuda else None,
            "torch": str(torch.__version__), "cudnn": torch.backends.cudnn.version() if is_cuda else None}


def versions() -> dict[str, Any]:
    """Return the versions that results.json records; cudnn is None in a build without it."""
    return {"python": platform.python_version(), "torch": torch.__version__,
            "torchvision": importlib.metadata.version("torchvision"), "numpy": importlib.metadata.version("numpy"),
            "cudnn": torch.backends.cudnn.version()}


def rng_module(device: torch.device):
    """Return torch's module with `get_rng_state` and `set_rng_state` of a device; only dropout uses that state."""
    return torch if device.type == "cpu" else torch.get_device_module(device)


def compile_or_warn(function: Callable, device: torch.device, probe: Callable[[Callable], None]) -> Callable | None:
    """Compile forward and loss, on CUDA into CUDA graphs, and try it; where that fails, warn and return None.

    `probe` does with the compiled function what a training step does.
    """
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # on a CPU it reports that there is no GPU
    from torch._dynamo.utils import counters  # takes seconds
    from torch._inductor import config

    config.deterministic = torch.are_deterministic_algorithms_enabled()  # or autotuning changes the order of sums
    graphs = device.type == "cuda" and not torch.version.hip  # on AMD GPUs they spoil training (pytorch issue 187715)
    skips = counters["inductor"]["cudagraph_skips"]
    try:
        compiled = torch.compile(function, dynamic=False, mode="reduce-overhead" if graphs else None)
        for _ in range(3 if graphs else 1):  # warm up, capture, replay
            probe(compiled)
        torch.get_device_module(device).synchronize()  # an error of a kernel appears here, not in the first step
    except Exception as error:  # whatever Dynamo, Inductor, Triton or a missing C compiler may raise
        warn(f"torch.compile failed ({type(error).__name__}: {str(error):.200}); training without it")
    else:
        if counters["inductor"]["cudagraph_skips"] > skips:
            warn("compiled, but without CUDA graphs, so small steps are slower; TORCH_LOGS=cudagraphs tells why")
        return compiled
    torch.compiler.reset()  # frees the graphs, now that the error no longer refers to their tensors
    torch.cuda.empty_cache()
    return None
