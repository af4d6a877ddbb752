"""Which device, which precision, and whether to compile: decided by what the hardware has."""

import contextlib
import ctypes
import importlib.util
import os
import sys
from collections.abc import Callable

import torch
import torch._inductor.config

from utils import UserError, warn

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """Turn `--device` into a device; auto is CUDA, else MPS, else the CPU.

    Raises:
        UserError: The device is not there.
    """
    available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available, "cpu": lambda: True}
    if name == "auto":
        name = next(kind for kind, is_available in available.items() if is_available())
    elif not available[name]():
        raise UserError(f"--device {name}: torch {torch.__version__} finds no such device here; "
                        "use --device auto or cpu")
    if name != "cuda":
        return torch.device(name)
    if local_rank >= torch.cuda.device_count():
        raise UserError(f"process {local_rank} of this machine has no GPU, there are {torch.cuda.device_count()}; "
                        "give torchrun no more --nproc-per-node")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def pick_precision(name: str, device: torch.device) -> str:
    """Turn `--precision` into fp32, bf16 or fp16; auto is the fastest that the hardware computes natively."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    if device.type == "cpu":
        # names torch keeps private; where a version lacks them, fp32 is slow but right
        checks = (getattr(torch.cpu, f"_is_{feature}_supported", None) for feature in ("avx512_bf16", "amx_tile"))
        return "bf16" if any(check is not None and check() for check in checks) else "fp32"
    return "fp32"


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Make the context in which forward and loss are computed; parameters and optimiser stay float32."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=PRECISIONS[precision])


def set_up_backend(device: torch.device, deterministic: bool) -> None:
    """Choose between the fastest algorithms and repeatable ones."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats itself only with this
    torch.use_deterministic_algorithms(deterministic)
    torch._inductor.config.deterministic = deterministic  # or it times reductions, which add in different orders
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = not deterministic
    if device.type == "cpu":
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next one; other C libraries are left alone.

    By itself it gives such large pieces back to the system, and each of their pages costs a fault when it is taken
    again: in every step, for all that the layers leave.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:  # numbers of malloc.h, meanings of mallopt(3)
        mallopt(-4, 0)  # M_MMAP_MAX: large pieces come from the heap, too
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing of the heap is given back


def can_compile(device: torch.device) -> bool:
    """Return whether compiling pays and works by default: on CUDA where Triton is at hand."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def describe(device: torch.device) -> str:
    """Name the device for a person."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.upper()


def compile_or_warn(function: Callable, device: torch.device, probe: Callable[[Callable], None]) -> Callable:
    """Compile a function of forward and loss, and try it; where that fails, warn in one line and go on without.

    Args:
        function: To be compiled.
        device: Where it runs; on CUDA the launches are recorded as CUDA graphs.
        probe: Calls the compiled function once, forward and backward, without a lasting effect.
    """
    try:
        compiled = torch.compile(function, dynamic=False, mode="reduce-overhead" if device.type == "cuda" else None)
        probe(compiled)
        return compiled
    except Exception as error:  # whatever Dynamo, Inductor, Triton or a missing C compiler may raise
        reason = (str(error).strip().splitlines() or [""])[0][:120]
        warn(f"torch.compile failed ({type(error).__name__}: {reason}); going on without it")
        return function
