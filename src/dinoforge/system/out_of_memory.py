"""Errors for a user whose memory has run out."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from dinoforge.errors import OutOfMemoryError
from dinoforge.system.device import free_memory

_SIGNS = (
    "out of memory",  # CUDA where it raises no OutOfMemoryError, MPS, NCCL
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of PyTorch, NumPy or Python says that there is no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


@contextmanager
def out_of_memory_in_words(device: torch.device, ways: Callable[[], Sequence[str]]) -> Iterator[None]:
    """Turn an error for lack of memory into one that says what there was, what was asked for, and what helps.

    Args:
        device: The device that computes.
        ways: Returns what would take less memory, in the order to try it.

    Raises:
        OutOfMemoryError: Memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        helps = ways()
        advice = f"In this order, try: {'; '.join(helps)}" if helps else "Only a smaller network or smaller crops help"
        raise OutOfMemoryError(f"{device} is out of memory. {_what_happened(error, device)}. {advice}") from error


def _what_happened(error: BaseException, device: torch.device) -> str:
    """The amount asked for and the amount there was, as the library says them, without the library's own advice."""
    text = str(error).strip().partition("\n")[0]
    if asked := re.search(r"you tried to allocate (\d+) bytes", text):  # an error about main memory
        free = free_memory(torch.device("cpu"))
        left = "" if free is None else f", and {free / 2**30:.1f} GiB are free"
        return f"{int(asked[1]) / 2**30:.1f} GiB of main memory were asked for{left}"
    sentences = re.split(r"(?<=\.)\s+(?=[A-Z])", text)
    told = [s.rstrip(".") for s in sentences if re.search("Tried to allocate|capacity|max allowed|ALLOC_FAILED", s)]
    return ". ".join(told) or text.rstrip(".") or type(error).__name__
