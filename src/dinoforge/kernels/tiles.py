"""The last layer in tiles: products with all prototypes, a part of them at a time.

Everything over prototypes is laid out [K, N], prototypes first: so each product of the last layer, forward and
backward, has the long side where matrix libraries are fastest, and a tile of prototypes is one piece of memory that
stays in the cache from the product to the last operation on it.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

_ON_CPU = (1 << 20, 1 << 25)  # elements of a tile (4 MiB, a share of the last-level cache), and bytes of a chunk
_ON_ACCELERATOR = 1 << 25  # elements of a tile: large enough to keep the device busy, and still bounded
_MOST_COLUMNS = 1024
SPARE = 1 / 8  # room that scratch memory has left, so that a few more samples find a place


class Scratch:
    """Memory for large intermediate results, by name, kept from step to step.

    Their sizes change a little with every step, for the number of masked patches does. Allocators that cut large
    blocks from one piece leave ever new gaps then: on the CPU, half a GiB after a few steps.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor, in memory that the next call of the same name takes again."""
        size = math.prod(shape)
        key = (name, dtype, device)
        if key not in self._kept or len(self._kept[key]) < size:
            self._kept.pop(key, None)  # gone before the larger one comes
            self._kept[key] = torch.empty(int(size * (1 + SPARE)), dtype=dtype, device=device)
        return self._kept[key][:size].view(shape)


def columns_at_once(prototypes: int, dtype: torch.dtype) -> int:
    """How many columns (samples) of [K, N] to work on at a time."""
    _, size = _ON_CPU
    if dtype.itemsize == 2:
        size *= 3  # its products lose more by having few columns
    return max(1, min(_MOST_COLUMNS, size // dtype.itemsize // prototypes))


def tiles(prototypes: int, columns: int, device: torch.device) -> Iterator[slice]:
    """Slices of the prototypes of a matrix [prototypes, columns]."""
    elements = _ON_CPU[0] if device.type == "cpu" else _ON_ACCELERATOR
    size = 1 << max(0, (elements // max(columns, 1)).bit_length() - 1)  # a power of two: few shapes of products
    for start in range(0, prototypes, size):
        yield slice(start, min(start + size, prototypes))


def effective_weight(
    weight_g: Tensor, weight_v: Tensor, dtype: torch.dtype, scratch: Scratch, name: str = "weight"
) -> tuple[Tensor, Tensor]:
    """The last layer's effective weight [K, d] in ``dtype``, in scratch memory, and the lengths of ``weight_v`` [K, 1].

    Args:
        weight_g: lengths of the rows [K, 1].
        weight_v: directions of the rows [K, d], of any length.
        dtype: of the products.
        scratch: where to.
        name: of the memory there.
    """
    lengths = weight_v.norm(dim=1, keepdim=True)
    factors = weight_g / lengths
    w = scratch.take(name, tuple(weight_v.shape), dtype, weight_v.device)
    for tile in tiles(len(weight_v), weight_v.shape[1], weight_v.device):
        w[tile].copy_(weight_v[tile] * factors[tile])
    return w, lengths


def largest_logit(weight_g: Tensor, temp: float) -> float | None:
    """What no logit over temperature exceeds in size, since embeddings have length 1; None where asking would wait.

    Args:
        weight_g: lengths of the prototypes [K, 1].
        temp: the temperature.
    """
    return float(weight_g.detach().abs().max()) / temp if weight_g.device.type == "cpu" else None


def add_product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """``out += a @ b`` with a float32 ``out``, whatever the precision of the factors."""
    return out.addmm_(a, b) if a.dtype == out.dtype else out.add_(torch.mm(a, b))
