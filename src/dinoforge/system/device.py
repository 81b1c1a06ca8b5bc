"""The device and precision of a computation, and what a process takes of its machine."""

import ctypes
import os
import platform
import resource
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch

from dinoforge.errors import RecipeError
from dinoforge.system import distributed, machine

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # constants of malloc.h

_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

_MOST_WORKERS_ON_CPU = 8
_MOST_WORKERS, _MOST_THREADS = 32, 4  # on an accelerator; each worker keeps batches in memory

_ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
_EXPANDABLE_SEGMENTS = "expandable_segments:True"
_CU_ATTRIBUTES = (102, 103)  # constants of cuda.h: programs can map memory, and share it by file descriptors

_INSTALLING = "https://pytorch.org/get-started/locally"
_ROOT = Path("/")

T = TypeVar("T")


def resolve_device(name: str) -> torch.device:
    """The device of that name; ``auto`` takes CUDA, then MPS, then the CPU.

    Raises:
        RecipeError: The device is unknown, or not on this machine; the error says why.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"device={name}: expected auto, cuda, cuda:N, mps or cpu") from error
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if not available.get(device.type, False):
        here = ", ".join(k for k, v in available.items() if v)
        why = {"cuda": _why_no_cuda, "mps": _why_no_mps}.get(device.type)
        raise RecipeError(
            f"device={name} is not available here: this PyTorch sees {here}" + (f". {_sentence(why())}" if why else "")
        )
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if device.index is not None and device.index >= count:
        kind = "GPU" if device.type == "cuda" else device.type
        there = f"there are {count} {kind}s" if count > 1 else f"there is one {kind}"
        raise RecipeError(f"device={name}: {there}; the first is {device.type}:0")
    return device


def rank_device(name: str) -> torch.device:
    """The device of this rank: each rank of a machine has a GPU of its own, and all share the CPU.

    A rank that sees a single GPU takes that one: Slurm shows each task its own with ``--gpus-per-task``.

    Raises:
        RecipeError: As ``resolve_device``; or ranks would share one GPU, as far as this one can tell.
    """
    device = resolve_device(name)
    if device.type not in ("cuda", "mps") or distributed.launched_world_size() == 1:
        return device
    ranks = max(distributed.local_world_size(), distributed.local_rank() + 1)  # ranks of this machine
    if device.type == "mps":
        raise RecipeError(
            f"device={name}: a Mac has one GPU, which ranks cannot share: start one process, or set device=cpu"
        )
    count = torch.cuda.device_count()
    if count == 1:
        return torch.device("cuda", 0)
    if device.index is not None:
        if ranks > 1:
            raise RecipeError(
                f"device={name} would put all {ranks} ranks of this machine on one GPU: set device=cuda, and each gets "
                "its own; or start one process"
            )
        return device
    if distributed.local_rank() >= count:
        raise RecipeError(
            f"{ranks} ranks on a machine with {count} GPUs: start as many ranks as there are GPUs, or set device=cpu"
        )
    return torch.device("cuda", distributed.local_rank())


def note_of_fallback(name: str, device: torch.device) -> str | None:
    """A note that ``auto`` took the CPU where a GPU was to be expected, and why; None where there is nothing to say.

    Args:
        name: The name in the recipe.
        device: The device that the name was resolved to.
    """
    if name != "auto" or device.type != "cpu":
        return None
    if has_gpu():
        return f"computes on the CPU, although there is a GPU: {_why_no_cuda()}. device=cpu, if the CPU is meant"
    if build := _gpu_build():
        if sys.platform.startswith("linux"):
            maker = "AMD" if torch.version.hip else "NVIDIA"
            return f"computes on the CPU: this PyTorch is built for {build}, but there is no {maker} GPU here"
        return f"computes on the CPU: {_why_no_cuda()}. device=cpu, if the CPU is meant"
    return f"computes on the CPU: {_why_no_mps()}" if torch.backends.mps.is_built() else None


def note_of_idle_gpus(name: str, device: torch.device) -> str | None:
    """A note that GPUs of this machine stay idle, unless the user chose one; None if all are used.

    Args:
        name: The name in the recipe.
        device: The device of this rank.
    """
    if device.type != "cuda" or name not in ("auto", "cuda"):
        return None
    count, ranks = torch.cuda.device_count(), distributed.local_world_size()
    if distributed.launched_world_size() == 1 and count > 1:
        return f"1 of {count} GPUs is used: start with --nproc auto to use all, or choose one by device=cuda:N"
    if 1 < ranks < count:
        return f"{ranks} of {count} GPUs are used: start {count} ranks to use all"
    return None


def has_gpu(root: Path = _ROOT) -> bool:
    """Whether Linux knows of a GPU that some build of PyTorch computes on: NVIDIA's, or AMD's if this is that build.

    Args:
        root: The root of the file system.
    """
    drivers = [
        "proc/driver/nvidia/version",
        "usr/lib/wsl/lib/libcuda.so.1",
        *(["dev/kfd"] if torch.version.hip else []),
    ]
    if any((root / path).exists() for path in drivers):
        return True
    for device in (root / "sys/bus/pci/devices").glob("*"):
        try:
            maker, kind = ((device / name).read_text(encoding="ascii") for name in ("vendor", "class"))
        except OSError:  # not for us to read
            continue
        if maker.startswith("0x10de") and kind.startswith("0x03"):  # NVIDIA; a display or a 3D controller
            return True
    return False


def _gpu_build() -> str | None:
    """The kind of GPUs that this PyTorch is built for, other than a Mac's."""
    if torch.version.hip:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else None


def _why_no_cuda() -> str:
    """The reason, and what to do."""
    build = _gpu_build()
    if build is None:
        return f"this PyTorch ({torch.__version__}) is built without CUDA; {_INSTALLING} has one that is not"
    for variable in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        if os.environ.get(variable) in ("", "-1"):
            return f"{variable}={os.environ[variable]} hides every GPU; unset it to use them"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split("\n")[0].split()).rstrip(".")
    else:
        reason = f"PyTorch for {build} finds none that it can compute on"
    if "no NVIDIA driver" in reason:
        return (
            "no NVIDIA driver is found; install one, or start the container with its GPUs, as docker run --gpus all "
            "does; nvidia-smi then lists them"
        )
    if "too old" in reason:
        return f"{reason}. Or take a PyTorch built for an earlier CUDA, see {_INSTALLING}"
    return f"{reason}; nvidia-smi shows which GPUs there are and whether they work"


def _why_no_mps() -> str:
    if not torch.backends.mps.is_built():
        return "this PyTorch is built without MPS, which only Macs have"
    return "MPS needs a Mac with Apple silicon and macOS 14 or later"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def resolve_precision(name: str, device: torch.device, *, sharded: bool = False) -> torch.dtype:
    """The dtype of matrix products; ``auto`` takes the one in which the device multiplies fastest.

    On CUDA that is bfloat16 from compute capability 8.0, and float16 on 7.0 and 7.5, whose tensor cores know nothing
    else. Before those, and on MPS, it is float32: an Apple GPU has no unit that multiplies half precision much faster,
    and nothing of it has been measured.

    Args:
        name: The name in the recipe.
        device: The device of this rank.
        sharded: Whether weights are sharded over ranks, which the scaling of float16's losses does not allow.

    Raises:
        RecipeError: The recipe asks for float16, which is impossible here.
    """
    if sharded and name == "fp16":
        raise RecipeError("precision=fp16 cannot be sharded: set precision=bf16, or parallel.mode=ddp")
    if name == "fp16" and device.type == "mps" and torch.__version__ < "2.9":
        raise RecipeError(  # its scaler computes in float64, which MPS does not have
            f"precision=fp16 on mps needs PyTorch 2.9, this one is {torch.__version__}: set precision=fp32 or bf16"
        )
    if name != "auto":
        return _PRECISIONS[name]
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= (8, 0):
            return torch.bfloat16
        return torch.float16 if capability >= (7, 0) and not sharded else torch.float32
    if device.type == "cpu":
        has = torch.cpu.get_capabilities()
        return torch.bfloat16 if has.get("amx_bf16") or has.get("avx512_bf16") else torch.float32
    return torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """A context in which matrix products run in ``dtype``."""
    return nullcontext() if dtype is torch.float32 else torch.autocast(device.type, dtype=dtype)


@contextmanager
def in_use(device: torch.device, *, allow_tf32: bool = False) -> Iterator[None]:
    """A context for work on a device; it changes nothing except on CUDA.

    The GPU is the current one, so that nothing, page-locked memory included, makes a context on the first of them
    instead. Products and convolutions of float32 are those of float32, unless TF32 is allowed, which rounds their
    factors to 10 bits: PyTorch allows it to cuDNN by default.

    Args:
        device: The device; ``cuda`` without an index is the current GPU.
        allow_tf32: Whether products and convolutions may use TF32.
    """
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device), _tf32(allow_tf32):
        yield


@contextmanager
def _tf32(allow: bool) -> Iterator[None]:
    """Sets whether cuBLAS and cuDNN may use TF32, and puts back what was set.

    From 2.9 PyTorch has a second set of settings, and raises where the two say different things. The first set writes
    both, but lets convolutions inherit what is set for all of CUDA; so the second has the last word.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PyTorch warns that the older settings may go one day
        ours = _newer([matmul, getattr(cudnn, "conv", None), getattr(cudnn, "rnn", None)])
        newer = [*ours, *_newer([getattr(torch.backends.mkldnn, "matmul", None)])]  # which the first set writes, too
        products, convolutions = _readable(torch.get_float32_matmul_precision), _readable(lambda: cudnn.allow_tf32)
        before = [kind.fp32_precision for kind in newer]
        if not allow:
            torch.set_float32_matmul_precision("highest")
        elif products in (None, "highest"):
            matmul.allow_tf32 = True
        cudnn.allow_tf32 = allow
        for kind in ours:
            if (kind.fp32_precision == "tf32") is not allow:
                kind.fp32_precision = "tf32" if allow else "ieee"
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            if products is not None:
                torch.set_float32_matmul_precision(products)
            if convolutions is not None:
                cudnn.allow_tf32 = convolutions
            for kind, value in zip(newer, before, strict=True):
                if kind.fp32_precision != value:
                    kind.fp32_precision = value


def _newer(kinds: Sequence[Any]) -> list[Any]:
    """The kinds of work whose precision this PyTorch sets by its newer settings."""
    return [kind for kind in kinds if hasattr(kind, "fp32_precision")]


def _readable(get: Callable[[], T]) -> T | None:
    """A setting; None where it was set by both sets in ways that the older one has no word for."""
    try:
        return get()
    except RuntimeError:
        return None


def use_expandable_segments(device: torch.device) -> None:
    """Make PyTorch's allocator grow its blocks on a GPU, before it has made any; a setting of the user stays.

    The number of masked patches, and with it the sizes of tensors, is another in each step: freed blocks of one size
    would lie idle while new ones are made for the next. The setting is the process's and stays. Drivers that cannot
    map memory so, and WSL, where it fails though the driver says otherwise, do without.
    """
    told = any(variable in os.environ for variable in _ALLOCATOR_VARIABLES)
    if device.type != "cuda" or told or torch.cuda.is_initialized() or not _maps_memory(device):
        return
    # By both names: PyTorch 2.7 to 2.10 reads it by the first, and some of them warn of that unless the second is set.
    for variable in _ALLOCATOR_VARIABLES[:2]:
        os.environ[variable] = _EXPANDABLE_SEGMENTS


def allocator_settings() -> str | None:
    """The settings of PyTorch's allocator of GPU memory in the environment."""
    return next((os.environ[variable] for variable in _ALLOCATOR_VARIABLES if os.environ.get(variable)), None)


def _maps_memory(device: torch.device) -> bool:
    """Whether the CUDA driver lets a program map memory piece by piece."""
    if not torch.version.cuda or not sys.platform.startswith("linux") or "microsoft" in platform.release().lower():
        return False
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    number, value = ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(number), device.index or 0):
        return False
    for attribute in _CU_ATTRIBUTES:
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, number) or not value.value:
            return False
    return True


def keep_freed_memory(device: torch.device) -> None:
    """Make the C library keep the memory of freed tensors for the next ones, on a CPU under Linux with glibc.

    It hands large blocks back to the system at once and gets them back page by page, cleared, in every step: on the
    machine of docs/performance.md an eighth of the step's time, or more. The setting is the process's and stays.
    """
    if device.type != "cpu" or not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library, which needs no such advice
        return
    mallopt(_M_MMAP_THRESHOLD, 1 << 30)
    mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def usable_processors() -> int:
    """The number of processors for this process: ranks that share a machine share its processors."""
    return max(1, machine.processors() // distributed.local_world_size())


def loader_workers(device: torch.device, processors: int, wanted: int | None) -> int:
    """The number of processes that make batches: as wanted, but no more than there are processors.

    Where the recipe does not say: on a CPU half of the processors, the others being for the step, and at most 8. On an
    accelerator all but one, which launches its work, and at most 32.

    Args:
        device: The device that computes the step.
        processors: Processors that this rank may use.
        wanted: The number in the recipe; None where it has none.
    """
    if wanted is not None:
        return min(wanted, processors)
    if device.type == "cpu":
        return min(max(1, processors // 2), _MOST_WORKERS_ON_CPU)
    return min(max(1, processors - 1), _MOST_WORKERS)


def compute_threads(device: torch.device, processors: int, wanted: int | None) -> int:
    """The number of threads that compute on the host: as wanted.

    Where the recipe does not say: on a CPU one for each processor. On an accelerator one for each processor that the
    workers would leave if their number was not said either, at most 4: there is little to compute, and threads that
    wait take time from the workers. The number of workers itself has no say, so that it changes no sum's rounding.

    Args:
        device, processors, wanted: As for ``loader_workers``.
    """
    if wanted is not None:
        return wanted
    if device.type == "cpu":
        return processors
    return max(1, min(_MOST_THREADS, processors - loader_workers(device, processors, None)))


def free_memory(device: torch.device) -> float | None:
    """Bytes that this rank can still take on a device, on the CPU its share of main memory; None: unknown."""
    if device.type == "cuda":
        try:
            on_device, _ = torch.cuda.mem_get_info(device)
        except RuntimeError:  # some virtual GPUs do not say
            return None
        return float(on_device + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    if device.type == "mps":
        most = getattr(torch.mps, "recommended_max_memory", None)
        return None if most is None else float(max(most() - torch.mps.driver_allocated_memory(), 0))
    free = machine.free_memory()
    return None if free is None else free / distributed.local_world_size()


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of the device, or on the CPU of this process, GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**30
    if sys.platform.startswith("linux"):
        # Not ru_maxrss, which begins at the size of whatever process started this one.
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
        if "VmHWM" in status:
            return int(status["VmHWM"].split()[0]) / 2**20
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def number_of_ranks(text: str) -> int:
    """Read ``--nproc``: a number, or ``auto`` for one on each GPU.

    Raises:
        RecipeError: The text is neither.
    """
    if text == "auto":
        return max(1, torch.cuda.device_count())
    if not text.isdecimal() or int(text) < 1:
        raise RecipeError(f"--nproc: expected a number from 1, or auto for one for each GPU, got {text!r}")
    return int(text)


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Compute with a number of threads meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
