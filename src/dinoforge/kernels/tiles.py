"""The last layer in tiles: products with all prototypes, a tile of prototypes at a time.

Every matrix over prototypes is laid out [K, N], prototypes first. So each product of the last layer, forward and
backward, has the long side where matrix libraries are fastest. A tile of prototypes is one contiguous block of memory,
which stays in the cache from the product to the last operation on the tile.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

_ON_CPU = (1 << 20, 1 << 25)  # elements of a tile (4 MiB, a share of the last-level cache), and bytes of a chunk
_ON_ACCELERATOR = 1 << 25  # elements of a tile: large enough to keep the device busy, and still bounded
_MOST_COLUMNS = 1024
SPARE = 1 / 8  # spare share of scratch memory, so that a few more samples fit without a new allocation


class Scratch:
    """Memory for large intermediate results, by name, kept from step to step.

    The sizes of these results change a little in every step, as the number of masked patches does. Allocators that cut
    large blocks from one piece would leave new gaps each time: on the CPU, half a GiB after a few steps.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return an uninitialised tensor; the next call with the same name reuses its memory."""
        size = math.prod(shape)
        key = (name, dtype, device)
        if key not in self._kept or len(self._kept[key]) < size:
            self._kept.pop(key, None)  # freed before the larger block is allocated
            self._kept[key] = torch.empty(int(size * (1 + SPARE)), dtype=dtype, device=device)
        return self._kept[key][:size].view(shape)


def columns_at_once(prototypes: int, dtype: torch.dtype) -> int:
    """Compute the number of columns (samples) of [K, N] to work on at a time."""
    _, size = _ON_CPU
    if dtype.itemsize == 2:
        size *= 3  # products in half precision lose more speed with few columns
    return max(1, min(_MOST_COLUMNS, size // dtype.itemsize // prototypes))


def tiles(prototypes: int, columns: int, device: torch.device) -> Iterator[slice]:
    """Iterate over slices of the prototypes of a matrix [prototypes, columns]."""
    elements = _ON_CPU[0] if device.type == "cpu" else _ON_ACCELERATOR
    size = 1 << max(0, (elements // max(columns, 1)).bit_length() - 1)  # a power of two: few shapes of products
    for start in range(0, prototypes, size):
        yield slice(start, min(start + size, prototypes))


def effective_weight(
    weight_g: Tensor, weight_v: Tensor, dtype: torch.dtype, scratch: Scratch, name: str = "weight"
) -> tuple[Tensor, Tensor]:
    """Compute the last layer's effective weight [K, d] in scratch memory, and the lengths of ``weight_v`` [K, 1].

    Args:
        weight_g: The lengths of the effective rows [K, 1].
        weight_v: The directions of the rows [K, d], of any length.
        dtype: The precision of the products, and of the effective weight.
        scratch: The scratch memory that holds the effective weight.
        name: The name of the weight's block in ``scratch``.
    """
    lengths = weight_v.norm(dim=1, keepdim=True)
    factors = weight_g / lengths
    w = scratch.take(name, tuple(weight_v.shape), dtype, weight_v.device)
    for tile in tiles(len(weight_v), weight_v.shape[1], weight_v.device):
        w[tile].copy_(weight_v[tile] * factors[tile])
    return w, lengths


def largest_logit(weight_g: Tensor, temp: float) -> float | None:
    """Bound the absolute values of logits over temperature, for embeddings of length 1; None on accelerators.

    On an accelerator, reading the bound would wait for the device.

    Args:
        weight_g: The lengths of the prototypes [K, 1].
        temp: The temperature.
    """
    return float(weight_g.detach().abs().max()) / temp if weight_g.device.type == "cpu" else None


def add_product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Compute ``out += a @ b`` for a float32 ``out`` and factors of any precision."""
    return out.addmm_(a, b) if a.dtype == out.dtype else out.add_(torch.mm(a, b))
