"""Sizes of matrix products.

The numbers of masked patches and of images that stochastic depth keeps are new in every step. For products in half
precision oneDNN builds a kernel for each new shape, and keeps a thousand of them: about a megabyte each, and up to a
twentieth of the time of a step. With few shapes it does so once. In float32 nothing is built, and padding would only
round otherwise.
"""

from collections.abc import Iterator

import torch


def padded(count: int, dtype: torch.dtype, multiple: int = 32) -> int:
    """The number of rows or columns to multiply where ``count`` are wanted: more in half precision, else the same."""
    return -(-count // multiple) * multiple if dtype.itemsize == 2 else count


def pieces(count: int, largest: int) -> Iterator[tuple[slice, int]]:
    """Cuts ``count`` things into pieces of few sizes: ``largest``, a power of two, its half, and its quarter.

    Returns:
        Each piece and its size, which the last piece may have to be padded to.
    """
    smallest = max(largest // 4, 1)
    start = 0
    while start < count:
        left = count - start
        size = next((size for size in (largest, largest // 2) if 0 < size <= left), smallest)
        yield slice(start, min(start + size, count)), size
        start += size
