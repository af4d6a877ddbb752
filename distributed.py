"""Ranks and collectives of a run that torchrun, srun or mpirun started as several processes."""

import contextlib
import functools
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from process import stop_signals
from utils import RunError, UserError


@contextlib.contextmanager
def _collective(problem: str = "lost contact with another rank",
                way_out: str = "the saved checkpoint is intact, continue with --resume") -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # gloo's errors have no type of their own, so every collective passes through here
        reason = (str(error).strip().splitlines() or [""])[-1]  # NCCL puts versions and places before it
        raise RunError(f"{problem} ({reason:.200}); {way_out}") from error


@functools.cache
def _gpu_group() -> dist.ProcessGroup | None:
    """Make the group for GPU tensors, at their first collective: NCCL binds the device, which is selected by then."""
    if not dist.is_nccl_available():
        return None  # the default group, gloo
    # if a rank dies, NCCL aborts the others after this time, because they see no closed connection
    return dist.new_group(backend="nccl", timeout=timedelta(minutes=10),
                          device_id=torch.device("cuda", torch.cuda.current_device()))


class World(NamedTuple):
    """This process's place among the ranks; alone it is rank 0 of 1."""

    rank: int = 0
    local_rank: int = 0  # among the ranks of this machine
    size: int = 1
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this rank prints and writes."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place."""
        if self.size > 1:
            with _collective():
                dist.all_reduce(tensor, group=_gpu_group() if tensor.is_cuda else None)
        return tensor

    def max(self, values: list[int]) -> list[int]:
        """Return the largest of each value over all ranks."""
        return [max(column) for column in zip(*self.gather(values), strict=True)]

    def gather(self, value: Any) -> list[Any]:
        """Collect one picklable value of each rank, on every rank."""
        values = [value] * self.size
        if self.size > 1:
            with _collective():
                dist.all_gather_object(values, value)
        return values

    def broadcast(self, tensors: list[Tensor]) -> None:
        """Overwrite tensors by those of rank 0."""
        for tensor in tensors if self.size > 1 else []:
            with _collective():
                dist.broadcast(tensor, src=0, group=_gpu_group() if tensor.is_cuda else None)


def _has_joined() -> bool:
    return dist.is_available() and dist.is_initialized()  # some builds of torch, as for AMD on Windows, lack it


def on_every_rank(function: Callable, only_main: bool = False) -> Callable:
    """Decorate a function that all ranks call together, and that ends all of them if it fails on one.

    The first rank that failed raises its UserError, RunError or OSError; the others exit without a message.
    """
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        world = World(dist.get_rank(), size=dist.get_world_size()) if _has_joined() else World()
        result = error = None
        if world.is_main or not only_main:
            try:
                result = function(*args, **kwargs)
            except (UserError, RunError, OSError) as caught:
                error = caught
        errors = world.gather(error)
        failed = next((rank for rank, found in enumerate(errors) if found is not None), None)
        if failed is not None:
            error = errors[failed]
            raise error if world.rank == failed else SystemExit(2 if isinstance(error, UserError) else 1)
        if only_main and world.size > 1:
            results = [result]
            with _collective():
                dist.broadcast_object_list(results, src=0)
            return results[0]
        return result
    return call


on_main_rank = functools.partial(on_every_rank, only_main=True)  # only rank 0 executes it; all get its result


def start() -> World:
    """Join the other ranks, if there are any."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return World()
    place = ":".join(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT"))
    # let signals end the process: Python's handlers do not run while torch waits for other ranks
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in stop_signals()}
    try:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if not 0 <= rank < size:
            raise ValueError(f"RANK is {rank} and WORLD_SIZE is {size}")
        with _collective(f"cannot meet the other ranks at {place}", "check MASTER_ADDR, and that MASTER_PORT is free"):
            store, *_ = next(dist.rendezvous("env://"))
            # torchrun's store survives a restart, with the addresses of killed ranks: each restart needs its own prefix
            store = dist.PrefixStore(f"life {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
        hosts = World(rank, size=size).gather(socket.gethostname())  # works with every launcher
    except ValueError as error:  # srun and mpirun may set the ranks but no address
        raise UserError(f"RANK and WORLD_SIZE are set, but the ranks cannot meet ({error}); use torchrun, set all of "
                        "RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, or unset RANK for a single process") from error
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return World(rank, hosts[:rank].count(hosts[rank]), size, hosts.count(hosts[rank]))


def stop() -> None:
    """Leave the other ranks, at the end of a run."""
    if _has_joined():
        dist.destroy_process_group()
        _gpu_group.cache_clear()


def sum_gradients(parameters: Sequence[nn.Parameter], world: World) -> None:
    """Sum the gradients over all ranks, in a single all-reduce.

    DistributedDataParallel averages, and needs a forward pass on every rank; in the last batch of an epoch a rank may
    have no image.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    # In the order of the memory, or channels_last gradients would be copied element by element. It is the same on all
    # ranks: autograd gives a gradient the strides of its parameter.
    flat = [parameter.grad.as_strided((parameter.numel(),), (1,)) for parameter in parameters]
    message = world.sum(torch.cat(flat))
    torch._foreach_copy_(flat, message.split([part.numel() for part in flat]))
