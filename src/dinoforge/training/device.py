"""Where and how precisely to compute."""

import ctypes
import os
import resource
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from dinoforge import distributed
from dinoforge.errors import RecipeError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h

_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """The device of that name; ``auto`` takes CUDA, then MPS, then the CPU.

    Raises:
        RecipeError: unknown, or not on this machine.
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
        raise RecipeError(f"device={name} is not available here: this PyTorch sees {here}")
    return device


def rank_device(name: str) -> torch.device:
    """The device of this rank: each rank of a machine has a GPU of its own, and all share the CPU.

    Raises:
        RecipeError: as ``resolve_device``; or fewer GPUs than ranks.
    """
    device = resolve_device(name)
    if device.type != "cuda" or device.index is not None or distributed.launched_world_size() == 1:
        return device
    if distributed.local_rank() >= torch.cuda.device_count():
        raise RecipeError(
            f"{distributed.local_world_size()} ranks on a machine with {torch.cuda.device_count()} GPUs: start as many "
            "ranks as there are GPUs, or set device=cpu"
        )
    return torch.device("cuda", distributed.local_rank())


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products; ``auto`` takes bfloat16 where the device multiplies faster in it."""
    if name != "auto":
        return _PRECISIONS[name]
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.type == "cpu":
        has = torch.cpu.get_capabilities()
        fast = bool(has.get("amx_bf16") or has.get("avx512_bf16"))
    else:
        fast = False
    return torch.bfloat16 if fast else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[None]:
    """A context in which matrix products run in ``dtype``."""
    return nullcontext() if dtype is torch.float32 else torch.autocast(device.type, dtype=dtype)


def keep_freed_memory(device: torch.device) -> None:
    """Has the C library keep the memory of freed tensors for the next ones, on a CPU under Linux with glibc.

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
    """Of this process: ranks that share a machine share its processors."""
    number = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, number // distributed.local_world_size())


def peak_memory_gib(device: torch.device) -> float:
    """Most memory used so far: of the device, or of this process on the CPU."""
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
