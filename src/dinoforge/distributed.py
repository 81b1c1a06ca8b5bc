"""The process group, rank and world size, and reductions that are valid on one process."""

import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from dinoforge.errors import DinoforgeError, RecipeError, TrainingError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

T = TypeVar("T")
_PATIENCE = timedelta(minutes=30)  # of ranks with each other, where nothing else is said: as gloo has it


@contextmanager
def process_group(device: torch.device, backend: str = "auto", timeout: timedelta | None = None) -> Iterator[None]:
    """The ranks that torchrun, ``dinoforge train --nproc`` or Slurm started beside this one, for as long as needed.

    The only place that sets a process group up or takes it down. Nothing to do where this process was started alone,
    or where the caller has a group already.

    Args:
        device: this rank's.
        backend: ``gloo``, ``nccl`` or ``auto``: gloo for what is on the CPU, nccl for what is on a GPU. What ranks tell
            each other about the run itself is always on the CPU.
        timeout: how long a rank waits for the others before it fails; None: as long as PyTorch does.

    Raises:
        RecipeError: a backend that the device cannot use.
        TrainingError: ranks that do not come together.
    """
    if launched_world_size() == 1 or dist.is_initialized():
        yield
        return
    if backend == "nccl" and device.type != "cuda":
        raise RecipeError(f"parallel.backend=nccl needs device=cuda, not {device.type}: expected auto or gloo")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if backend in ("auto", "nccl") else "gloo"
    else:
        backend = "gloo"
    try:
        store, rank, world_size = next(rendezvous("env://", timeout=timeout or _PATIENCE))
        store = PrefixStore(_agreed_name(store, rank, world_size, timeout or _PATIENCE), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    except (RuntimeError, TimeoutError) as error:
        raise TrainingError(f"the {launched_world_size()} ranks did not come together: {error}") from error
    try:
        yield
    finally:
        dist.destroy_process_group()


def _agreed_name(store: Store, rank: int, world_size: int, patience: timedelta) -> str:
    """A name for what these ranks, and no earlier ones, keep in a store.

    Elastic agents keep their store when they start ranks again, and the addresses of the dead are still in it. How
    often ranks were started does not tell starts apart: agents count for themselves, and one may be new. So each rank
    says something new, until the first one has answered it.

    Raises:
        TimeoutError: not all came.
    """
    deadline = time.monotonic() + patience.total_seconds()
    mine = uuid.uuid4().hex
    missing = set(range(1, world_size)) if rank == 0 else {0}
    name = mine if rank == 0 else ""
    if rank:
        store.set(f"hello {rank}", mine)
    while missing:
        if time.monotonic() > deadline:
            raise TimeoutError(f"rank {rank} waited {patience.total_seconds():.0f} s for rank {min(missing)}")
        if rank == 0:
            for other in missing:  # it may be one that died; who takes its place says hello again
                if store.check([f"hello {other}"]):
                    store.set(f"answer to {store.get(f'hello {other}').decode()}", name)
            missing = {other for other in missing if not store.check([f"{name} has {other}"])}
        elif store.check([f"answer to {mine}"]):
            name = store.get(f"answer to {mine}").decode()
            store.set(f"{name} has {rank}", "")
            missing = set()
        time.sleep(0.02)
    return name


def launched_world_size() -> int:
    """How many ranks were started, before they know each other."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_rank() -> int:
    """This rank's number, before the ranks know each other."""
    return int(os.environ.get("RANK", "0")) if launched_world_size() > 1 else 0


def local_rank() -> int:
    """This rank's number among those of this machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) if launched_world_size() > 1 else 0


def local_world_size() -> int:
    """How many ranks share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if launched_world_size() > 1 else 1


def is_active() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    return dist.get_rank() if is_active() else 0


def world_size() -> int:
    return dist.get_world_size() if is_active() else 1


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether an error says that another rank cannot be reached; gloo has no type for it."""
    signs = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Broken pipe",
        "Connection refused",
        "Timed out waiting",
    )
    return isinstance(error, dist.DistNetworkError | dist.DistBackendError) or any(s in str(error) for s in signs)


def is_first() -> bool:
    """Whether this is the rank that writes and prints."""
    return rank() == 0


def any_over_ranks(flag: bool) -> bool:
    """Whether ``flag`` is true on any rank: how all agree to stop, to save, to skip."""
    if not is_active():
        return flag
    flags = torch.tensor(int(flag))
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags)


def from_first(make: Callable[[], T]) -> T:
    """What ``make`` gives on the first rank, which alone calls it, on every rank; or the error that it raises."""
    if not is_active():
        return make()
    box: list[Any] = [None, None]
    if rank() == 0:
        try:
            box[0] = make()
        except DinoforgeError as error:
            box[1] = error
    dist.broadcast_object_list(box, device=torch.device("cpu"))
    if box[1] is not None:
        raise box[1]
    return cast(T, box[0])


def all_ranks(value: T) -> list[T]:
    """Every rank's ``value``, in the order of ranks; small ones only."""
    if not is_active():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def rows_of_all_ranks(x: Tensor) -> Tensor:
    """``x`` [n, …] of every rank one below the other [W·n, …]; n is the same everywhere; outside of autograd."""
    x = x.detach().contiguous()
    if not is_active():
        return x
    rows = x.new_empty(world_size() * len(x), *x.shape[1:])
    dist.all_gather_single(rows, x)
    return rows


def sum_over_ranks(x: Tensor) -> Tensor:
    """``x`` summed over ranks; a new tensor, outside of autograd."""
    x = x.detach().clone()
    if is_active():
        dist.all_reduce(x)
    return x


def mean_over_ranks(x: Tensor) -> Tensor:
    """``x`` averaged over ranks; a new tensor, outside of autograd."""
    return sum_over_ranks(x) / world_size()


def logsumexp_over_ranks(x: Tensor) -> Tensor:
    """``log Σ exp x`` over ranks, element by element; outside of autograd.

    A rank with nothing to add passes -inf.
    """
    if not is_active():
        return x.detach().clone()
    top = x.detach().clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX)
    top.clamp_(min=torch.finfo(top.dtype).min)  # -inf - -inf would be NaN where no rank has anything
    total = (x.detach() - top).exp()
    dist.all_reduce(total)
    return total.log() + top


def shards(tensors: Sequence[Tensor]) -> list[Tensor]:
    """This rank's part of each tensor that is sharded; the others as they are. They share their memory."""
    return [t.to_local() if _is_sharded(t) else t for t in tensors]


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor put together, on every rank, so every rank has to ask; another as it is."""
    return tensor.full_tensor() if _is_sharded(tensor) else tensor


def _is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether ranks share the tensor. Does not import its type: it takes 0.1 GiB, and who shards has it already."""
    # While another thread imports it, it may lack the type; then there is no tensor of it either.
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())
    return isinstance(tensor, kind)
