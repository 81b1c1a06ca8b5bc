"""The process group, rank and world size, what becomes of ranks when one fails, and reductions valid on one process."""

import json
import multiprocessing
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeGuard, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from dinoforge.errors import DinoforgeError, LostRankError, RecipeError, RunError, has_launcher, record_failure

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

T = TypeVar("T")
_PATIENCE = timedelta(minutes=30)  # default time that ranks wait for each other, as gloo has it
_LOOK_SECONDS = 1.0  # time between two looks at the other ranks
_GRACE_SECONDS = 5.0  # time in which a rank may end by itself after another has failed, and for farewells


@contextmanager
def process_group(device: torch.device, backend: str = "auto", timeout: timedelta | None = None) -> Iterator[None]:
    """Join the ranks that torchrun, ``dinoforge train --nproc`` or Slurm started beside this one, meanwhile.

    The only place that sets a process group up or takes it down. Nothing to do where this process was started alone,
    or where the caller has a group already.

    A rank that leaves by an exception tells the others, and drops the group without waiting for them. The others are
    given a few seconds; then their processes end with the exit code of ``LostRankError``, wherever they are: with NCCL
    they may be in a kernel that waits for ever. So they do when a rank of their machine was killed.

    Args:
        device: The device of this rank.
        backend: One of ``gloo``, ``nccl`` and ``auto``: gloo for tensors on the CPU, nccl for those on a GPU. What
            ranks tell each other about the run itself is always on the CPU.
        timeout: The time that a rank waits for the others before it fails; None: PyTorch's default.

    Raises:
        RecipeError: Several ranks cannot use the backend or the device, or two of them share a GPU.
        LostRankError: The ranks did not come together.
    """
    if launched_world_size() == 1 or dist.is_initialized():
        yield
        return
    if backend == "nccl" and device.type != "cuda":
        raise RecipeError(f"parallel.backend=nccl needs device=cuda, not {device.type}: expected auto or gloo")
    if device.type not in ("cpu", "cuda"):
        raise RecipeError(f"several ranks need device=cuda or device=cpu, not {device.type}: start one process")
    by_nccl = device.type == "cuda" and backend in ("auto", "nccl")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    patience = timeout or _PATIENCE
    others: _Others | None = None
    try:
        try:
            store, rank, world_size = next(rendezvous("env://", timeout=patience))
            store = PrefixStore(_agreed_name(store, rank, world_size, patience), store)
            places = _places(store, rank, world_size, device)
            others = _Others(store, rank, places, patience)
            others.start()
            if by_nccl:
                _require_own_gpus(places)
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if by_nccl else "gloo",
                store=store,
                rank=rank,
                world_size=world_size,
                timeout=timeout,
                device_id=device if by_nccl else None,  # or else NCCL guesses it where no tensor says
            )
        except (RuntimeError, TimeoutError) as error:
            raise LostRankError(f"the {launched_world_size()} ranks did not come together: {error}") from error
        yield
        others.leave()
    except BaseException as error:
        record_failure(error)  # before anything that may hang
        if others is not None:
            others.warn(error)
        _drop_group(device)
        raise
    dist.destroy_process_group()


@dataclass(frozen=True)
class _Place:
    """The machine, process and GPU of a rank."""

    host: str
    machine: str  # equal for processes that can see each other, and for no others
    process: int
    gpu: str | None

    @classmethod
    def here(cls, device: torch.device) -> "_Place":
        # Machines may share a name, and containers a machine.
        boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
        machine = f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else uuid.getnode()}"
        if namespace.exists():
            machine += f" {namespace.stat().st_ino}"
        gpu = None
        if device.type == "cuda":
            # Tasks that see one GPU each call it 0, so a number alone says little.
            number = f"{machine} {os.environ.get('CUDA_VISIBLE_DEVICES', '')} {device.index}"
            gpu = str(getattr(torch.cuda.get_device_properties(device), "uuid", number))
        return cls(socket.gethostname(), machine, os.getpid(), gpu)


def _places(store: Store, rank: int, world_size: int, device: torch.device) -> list[_Place]:
    """The place of each rank; waits for all of them."""
    store.set(f"place of {rank}", json.dumps(asdict(_Place.here(device))))
    told = store.multi_get([f"place of {other}" for other in range(world_size)])
    return [_Place(**json.loads(text)) for text in told]


def _require_own_gpus(places: Sequence[_Place]) -> None:
    """Raises RecipeError, on every rank, if two have one GPU: NCCL would fail, or wait for ever."""
    first: dict[str | None, int] = {}
    for rank, place in enumerate(places):
        other = first.setdefault(place.gpu, rank)
        if other != rank:
            raise RecipeError(
                f"ranks {other} and {rank} on {place.host} share one GPU ({place.gpu}): start as many ranks as there "
                "are GPUs, for example by --nproc auto, and give each its own"
            )


class _Others(threading.Thread):
    """Looks every second whether the other ranks are well, and ends this process if one is gone and it does not.

    Args:
        store: A store that all ranks share, and that no earlier ranks have used.
        rank: The number of this rank.
        places: Where each rank runs.
        patience: The time to wait for the others when this rank is done.
    """

    def __init__(self, store: Store, rank: int, places: Sequence[_Place], patience: timedelta) -> None:
        super().__init__(name="watch over the other ranks", daemon=True)
        self._store = store
        self._own_store = store.clone()  # a look must not wait for what the main thread waits for
        self._rank, self._world_size, self._patience = rank, len(places), patience
        here = places[rank].machine
        self._near = {r: p.process for r, p in enumerate(places) if r != rank and p.machine == here}
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(_LOOK_SECONDS):
            if (cause := self._look()) is not None:
                break
        if self._done.wait(_GRACE_SECONDS):
            return
        error = lost_rank(cause)
        record_failure(error)
        if not has_launcher():
            print(f"error on rank {self._rank}: {error}", file=sys.stderr)
        leave_process(error.exit_code)

    def _look(self) -> str | None:
        """Look whether something happened to another rank; None if not."""
        store = self._own_store
        try:
            if store.check(["failed"]):
                return store.get("failed").decode()
            for rank, process in self._near.items():
                if not _is_alive(process) and not store.check([f"{rank} is done"]):
                    return store.compare_set("failed", "", f"rank {rank} was killed").decode()
        except RuntimeError:  # the connection: who keeps the store is gone
            return "the store that all ranks share is gone"
        return None

    def warn(self, error: BaseException) -> None:
        """Tell the other ranks that this one fails."""
        told = f"rank {self._rank} failed ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
        _within_grace(lambda: self._store.compare_set("failed", "", told))
        self._done.set()

    def leave(self) -> None:
        """Wait until all ranks are done: when one process ends, its launcher may end the others."""
        with suppress(RuntimeError):  # nothing is lost any more, so who is not well may end as it will
            self._store.set(f"{self._rank} is done", "")
            self._store.wait([f"{rank} is done" for rank in range(self._world_size)], self._patience)
        self._done.set()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _drop_group(device: torch.device) -> None:
    """Takes the process group down without a word to the other ranks; the ordinary way waits for them with NCCL."""
    if not dist.is_initialized():
        return

    def abort() -> None:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # it is the thread's, and would be the first GPU
        getattr(distributed_c10d, "_abort_process_group", dist.destroy_process_group)()

    _within_grace(abort)


def _within_grace(call: Callable[[], object]) -> None:
    """Calls what may wait for a network or a device that is not well; leaves it alone after some seconds."""

    def try_it() -> None:
        with suppress(RuntimeError):  # this rank fails already, and not for this
            call()

    thread = threading.Thread(target=try_it, daemon=True)
    thread.start()
    thread.join(_GRACE_SECONDS)


def leave_process(code: int) -> NoReturn:
    """End this process and its data workers at once, without waiting for anything."""
    for worker in multiprocessing.active_children():
        worker.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _agreed_name(store: Store, rank: int, world_size: int, patience: timedelta) -> str:
    """A name for what these ranks, and no earlier ones, keep in a store.

    Elastic agents keep their store when they start ranks again, and the addresses of the dead are still in it. How
    often ranks were started does not tell starts apart: agents count for themselves, and one may be new. So each rank
    says something new, until the first one has answered it.

    Raises:
        TimeoutError: Not all ranks came.
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
    """The number of ranks that a launcher started, before they know each other."""
    return _from_launcher("WORLD_SIZE", 1)


def launched_rank() -> int:
    """This rank's number, before the ranks know each other."""
    return _from_launcher("RANK", 0) if launched_world_size() > 1 else 0


def local_rank() -> int:
    """This rank's number among those of this machine."""
    return _from_launcher("LOCAL_RANK", 0) if launched_world_size() > 1 else 0


def local_world_size() -> int:
    """The number of ranks that share this machine."""
    return _from_launcher("LOCAL_WORLD_SIZE", 1) if launched_world_size() > 1 else 1


def _from_launcher(name: str, default: int) -> int:
    """A number that torchrun or another launcher puts into the environment; what is empty counts as not set."""
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    try:
        return int(text)
    except ValueError:
        raise RunError(f"the environment says {name}={text!r}: expected a number, as torchrun sets it") from None


def set_timeout(group: dist.ProcessGroup, timeout: timedelta) -> None:
    """Set how long the ranks of a group wait for each other from now on."""
    # Versions of PyTorch differ in the name.
    change = getattr(distributed_c10d, "set_timeout", None) or getattr(distributed_c10d, "_set_pg_timeout", None)
    if change is not None:
        change(timeout, group)


def is_active() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    return dist.get_rank() if is_active() else 0


def world_size() -> int:
    return dist.get_world_size() if is_active() else 1


def lost_rank(cause: str | None = None) -> LostRankError:
    """The error of a rank that cannot go on without another one."""
    return LostRankError(
        f"another rank is gone{f': {cause}' if cause else ''}. Run the same command again to continue at the last "
        "checkpoint; torchrun does it by itself with --max-restarts, dinoforge with --nproc"
    )


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether an error says that another rank cannot be reached; gloo has no type for it, and NCCL one for all."""
    signs = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Broken pipe",
        "Connection refused",
        "Timed out waiting",
        "ncclRemoteError",
        "NCCL communicator was aborted",
    )
    return isinstance(error, dist.DistNetworkError) or any(s in str(error) for s in signs)


def is_first() -> bool:
    """Whether this is the rank that writes and prints."""
    return rank() == 0


def any_over_ranks(flag: bool) -> bool:
    """Whether ``flag`` is true on any rank, so that all agree to stop, to save, to skip."""
    if not is_active():
        return flag
    flags = torch.tensor(int(flag))
    dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    return bool(flags)


def from_first(make: Callable[[], T]) -> T:
    """Call ``make`` on the first rank alone; every rank gets its result, or the error that it raises."""
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
    """The ``value`` of every rank, in the order of ranks; for small values only."""
    if not is_active():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def rows_of_all_ranks(x: Tensor) -> Tensor:
    """The rows ``x`` [n, …] of all ranks, one rank below the other [W·n, …]; n is equal on all; outside of autograd."""
    x = x.detach().contiguous()
    if not is_active():
        return x
    rows = x.new_empty(world_size() * len(x), *x.shape[1:])
    dist.all_gather_single(rows, x)
    return rows


def sum_over_ranks(x: Tensor) -> Tensor:
    """The sum of ``x`` over ranks; a new tensor, outside of autograd."""
    x = x.detach().clone()
    if is_active():
        dist.all_reduce(x)
    return x


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean of ``x`` over ranks; a new tensor, outside of autograd."""
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
    """This rank's part of each sharded tensor, and the other tensors as they are; memory is shared with them."""
    return [t.to_local() if _is_sharded(t) else t for t in tensors]


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor, put together on every rank, so that every rank has to call this; another tensor as it is."""
    return tensor.full_tensor() if _is_sharded(tensor) else tensor


def _is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether ranks share the tensor. Does not import its type: it takes 0.1 GiB, and who shards has it already."""
    # While another thread imports it, it may lack the type; then there is no tensor of it either.
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())
    return isinstance(tensor, kind)
