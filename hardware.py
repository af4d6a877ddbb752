"""Device, precision, threads and torch.compile."""

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from utils import UserError, warn

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def select_device(name: str, local_rank: int = 0) -> torch.device:
    """Turn `--device` into a device; auto is CUDA, else MPS, else the CPU."""
    available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available, "cpu": lambda: True}
    if name == "auto":
        name = next(kind for kind, is_available in available.items() if is_available())
    elif not available[name]():
        raise UserError(f"--device {name}: torch {torch.__version__} finds no such device; use --device auto or cpu")
    if name != "cuda":
        return torch.device(name)
    if local_rank >= torch.cuda.device_count():
        raise UserError(f"rank {local_rank} of this machine has no GPU; there are {torch.cuda.device_count()}, so "
                        "start no more ranks than that (--nproc-per-node)")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def select_precision(name: str, device: torch.device) -> str:
    """Turn `--precision` into fp32, bf16 or fp16; auto is the fastest that the hardware computes natively."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    if device.type == "cpu":  # private names; where a torch version lacks them, fp32 is slow but correct
        checks = (getattr(torch.cpu, f"_is_{feature}_supported", None) for feature in ("avx512_bf16", "amx_tile"))
        return "bf16" if any(check is not None and check() for check in checks) else "fp32"
    return "fp32"


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Return the context for forward and loss; parameters and optimizer state stay float32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=PRECISIONS[precision])


def count_cores() -> int:
    """Count the cores that this process may use; a queue or a container may allow fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def restore_threads(threads: int | None) -> None:
    """Compute with as many CPU threads as an earlier process, since sums depend on them, if there are enough cores."""
    if threads and threads <= count_cores():
        torch.set_num_threads(threads)


def set_up_backend(device: torch.device, deterministic: bool = False) -> None:
    """Select the fastest algorithms, or repeatable ones."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required for deterministic cuBLAS
    torch.use_deterministic_algorithms(deterministic)
    if deterministic or device.type == "cuda":  # the import takes seconds
        from torch._inductor import config
        config.deterministic = deterministic  # otherwise autotuning changes the order of sums
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


def describe(device: torch.device) -> str:
    """Return the name of the device, for display."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def environment(device: torch.device, precision: str, compiled: bool, ranks: int) -> dict[str, Any]:
    """Return what must match for a bitwise-identical continuation."""
    return {"device": device.type, "precision": precision, "compile": compiled, "ranks": ranks,
            "threads": torch.get_num_threads() if device.type == "cpu" else None}


def versions() -> dict[str, str]:
    """Return the versions that results.json records."""
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
            "torchvision": importlib.metadata.version("torchvision")}


def get_rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Return the state of torch's generators; only dropout uses them."""
    state = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state()
    return state


def set_rng_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Restore what `get_rng_state` returned; the state of another device type is left alone."""
    torch.set_rng_state(state["cpu"])
    if device.type in state and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(state[device.type])


def compile_or_warn(function: Callable, device: torch.device, probe: Callable[[Callable], None]) -> Callable | None:
    """Compile forward and loss, on CUDA into CUDA graphs, and try it; where that fails, warn and return None.

    `probe` does with the compiled function what a training step does.
    """
    try:
        compiled = torch.compile(function, dynamic=False, mode="reduce-overhead" if device.type == "cuda" else None)
        for _ in range(3 if device.type == "cuda" else 1):  # on CUDA: warm up, capture, replay
            probe(compiled)
        torch.get_device_module(device).synchronize()  # an error of a kernel appears here, not in the first step
    except Exception as error:  # whatever Dynamo, Inductor, Triton or a missing C compiler may raise
        reason = (str(error).strip().splitlines() or [""])[0][:120]
        warn(f"torch.compile failed ({type(error).__name__}: {reason}); training without it")
        return None
    return compiled
