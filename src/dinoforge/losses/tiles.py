"""The last layer in tiles: products with all prototypes, a part of them at a time.

Everything over prototypes is laid out [K, N], prototypes first: so each product of the last layer, forward and
backward, has the long side where matrix libraries are fastest, and a tile of prototypes is one piece of memory that
stays in the cache from the product to the last operation on it.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_ON_CPU = (1 << 20, 1 << 24)  # elements of a tile (4 MiB, a share of the last-level cache), and of a chunk of columns
_ON_ACCELERATOR = (1 << 25, 1 << 26)  # large enough to keep the device busy, and still bounded
_MOST_COLUMNS = 1024


def columns_at_once(prototypes: int, device: torch.device) -> int:
    """How many columns (samples) of [K, N] to work on at a time."""
    _, elements = _ON_CPU if device.type == "cpu" else _ON_ACCELERATOR
    return max(1, min(_MOST_COLUMNS, elements // prototypes))


def tiles(prototypes: int, columns: int, device: torch.device) -> Iterator[slice]:
    """Slices of the prototypes of a matrix [prototypes, columns]."""
    elements, _ = _ON_CPU if device.type == "cpu" else _ON_ACCELERATOR
    size = max(1, elements // max(columns, 1))
    for start in range(0, prototypes, size):
        yield slice(start, min(start + size, prototypes))


def product_dtype(x: Tensor) -> torch.dtype:
    """In which precision to multiply: bfloat16 under autocast to it, else that of ``x``.

    float16 has too little range for the gradients before they are scaled, so there it is float32.
    """
    device = x.device.type
    bf16 = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is torch.bfloat16
    return torch.bfloat16 if bf16 else x.dtype


def multiply(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """``out = a @ b`` with a float32 ``out``, whatever the precision of the factors."""
    return torch.mm(a, b, out=out) if a.dtype == out.dtype else out.copy_(torch.mm(a, b))


def multiply_add(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """``out += a @ b`` with a float32 ``out``, whatever the precision of the factors."""
    return out.addmm_(a, b) if a.dtype == out.dtype else out.add_(torch.mm(a, b))
