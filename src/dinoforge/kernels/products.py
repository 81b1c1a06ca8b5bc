"""Products of a matrix with a linear layer's weight, and their sizes.

The numbers of masked patches, and of images that stochastic depth keeps, differ from step to step. On a CPU, oneDNN
builds a kernel for each new shape of a product, and keeps a thousand kernels. This costs memory, and up to a twentieth
of a step's time. With few shapes, oneDNN builds each kernel once.
"""

import platform
from collections.abc import Iterator

import torch
from torch import Tensor

from dinoforge.kernels import private

# On x86, PyTorch multiplies float32 by MKL, which is 10 to 20 % slower than oneDNN on AMD's processors. PyTorch's
# compiler emits the oneDNN operator used here for a linear layer.
_BY_ONEDNN = platform.machine().lower() in {"x86_64", "amd64"} and torch.backends.mkldnn.is_available()
_ONEDNN_ROWS = 128  # oneDNN takes multiples of this; MKL, which keeps no kernels, takes all other numbers of rows


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, place: Tensor | None = None) -> Tensor:
    """Compute ``x @ weight.T + bias`` [N, D'], without a backward pass.

    Args:
        x: The rows [N, D]; in half precision, N should be ``padded`` if it differs from step to step.
        weight: The weight [D', D], in the precision of ``x``, with any strides.
        bias: The bias [D'], or None.
        place: Memory for the result [N, D']. oneDNN ignores it and allocates new memory.

    Returns:
        The result, in ``place`` or in new memory.
    """
    fits = x.device.type == "cpu" and x.dtype is torch.float32 and x.numel() and x.shape[0] % _ONEDNN_ROWS == 0
    if _BY_ONEDNN and fits and (by_onednn := private.linear_pointwise()) is not None:
        result: Tensor = by_onednn(x, weight, bias, "none", [], "")
        return result
    if bias is None:
        return torch.mm(x, weight.T, out=place)
    return torch.addmm(bias, x, weight.T, out=place)


def padded(count: int, multiple: int = 32) -> int:
    """Round ``count`` rows or columns up to a multiple, so that products have few shapes."""
    return -(-count // multiple) * multiple


def pieces(count: int, largest: int, smallest: int) -> Iterator[tuple[slice, int]]:
    """Cut ``count`` items into pieces of few sizes: ``largest``, its half, its quarter and so on down to ``smallest``.

    Args:
        count: The number of items.
        largest, smallest: The sizes of the largest and the smallest pieces, powers of two.

    Returns:
        An iterator over the pieces and their sizes. The last piece may be shorter than its size, and need padding.
    """
    start, size = 0, largest
    while start < count:
        if size > count - start and size > smallest:
            size //= 2
            continue
        yield slice(start, min(start + size, count)), size
        start += size
