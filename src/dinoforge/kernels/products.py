"""Products of a matrix with a linear layer's weight, and their sizes.

The numbers of masked patches and of images that stochastic depth keeps are new in every step. On a CPU oneDNN builds a
kernel for each new shape of a product, and keeps a thousand of them: memory, and up to a twentieth of the time of a
step. With few shapes it does so once.
"""

import platform
from collections.abc import Iterator

import torch
from torch import Tensor

from dinoforge.kernels import private

# PyTorch multiplies float32 by MKL on x86, which on AMD's processors is 10 to 20 % slower than oneDNN. The operator
# here is what its compiler makes of a linear layer.
_BY_ONEDNN = platform.machine().lower() in {"x86_64", "amd64"} and torch.backends.mkldnn.is_available()
_ONEDNN_ROWS = 128  # and multiples; other numbers, which may be new in every step, are MKL's, which keeps nothing


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, place: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``, without a gradient of its own.

    Args:
        x: [N, D]; in half precision, where N is new in every step, ``padded``.
        weight: [D', D] in the precision of ``x``, of any strides.
        bias: [D'], or None.
        place: memory [N, D'] that the result takes, unless oneDNN makes it, which takes memory of its own.

    Returns:
        [N, D'].
    """
    fits = x.device.type == "cpu" and x.dtype is torch.float32 and x.numel() and x.shape[0] % _ONEDNN_ROWS == 0
    if _BY_ONEDNN and fits and (by_onednn := private.linear_pointwise()) is not None:
        result: Tensor = by_onednn(x, weight, bias, "none", [], "")
        return result
    if bias is None:
        return torch.mm(x, weight.T, out=place)
    return torch.addmm(bias, x, weight.T, out=place)


def padded(count: int, multiple: int = 32) -> int:
    """The number of rows or columns to multiply where ``count`` are wanted."""
    return -(-count // multiple) * multiple


def pieces(count: int, largest: int, smallest: int) -> Iterator[tuple[slice, int]]:
    """Cuts ``count`` things into pieces of few sizes: ``largest``, its half, its quarter and so on to ``smallest``.

    Args:
        count: of all.
        largest, smallest: powers of two.

    Returns:
        Each piece and its size, which the last piece may have to be padded to.
    """
    start, size = 0, largest
    while start < count:
        if size > count - start and size > smallest:
            size //= 2
            continue
        yield slice(start, min(start + size, count)), size
        start += size
