"""Linear layers on a few rows at a time, so that the rows stay in a CPU's cache between two operations."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoforge.kernels.products import linear as multiply
from dinoforge.kernels.products import padded, pieces

# The minimum (except for the last piece) and maximum number of rows to work on at a time. Many rows make products
# faster, though less so in half precision; few rows save cache and memory.
_ROWS = (512, 2048)
_HALF_ROWS = (128, 1024)


def few_rows(x: Tensor, dtype: torch.dtype) -> Iterator[slice]:
    """Iterate over slices of rows to work on at a time, with products in ``dtype``."""
    if len(x):
        least, most = _HALF_ROWS if dtype.itemsize == 2 else _ROWS
        for rows, _ in pieces(len(x), most, least):
            yield rows
    else:
        yield slice(0, 0)


def _more_rows(x: Tensor) -> Tensor:
    """Pad a piece of ``few_rows`` with zero rows to one of few sizes, if it is in half precision."""
    if x.dtype.itemsize != 2:
        return x
    more = padded(len(x), _HALF_ROWS[0]) - len(x)
    return F.pad(x, (0, 0, 0, more)) if more else x


def linear_rows(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Compute ``x @ weight.T + bias`` of a piece of ``few_rows`` into ``out``."""
    rows = _more_rows(x)
    result = multiply(rows, weight, bias, place=out if rows is x else None)
    if result is not out:
        out.copy_(result[: x.shape[0]])


def product(x: Tensor, weight: Tensor) -> Tensor:
    """Compute ``x @ weight`` of a piece of ``few_rows``."""
    return multiply(_more_rows(x), weight.T)[: x.shape[0]]


def gradient_of_weight(grad: Tensor, x: Tensor) -> Tensor:
    """Compute the gradient of a weight [D', D] from the output's gradient [T, D'] and the input [T, D]."""
    grad, x = _more_rows(grad), _more_rows(x)
    # The transposed product is faster by oneDNN in half precision, and by MKL in float32 if D' < D.
    return (x.T @ grad).T if grad.dtype.itemsize == 2 or grad.shape[1] < x.shape[1] else grad.T @ x


def added(sums: list[Tensor | None], parts: list[Tensor | None]) -> list[Tensor | None]:
    """Add each part to its sum in place; the first part becomes the sum."""
    return [part if a is None or part is None else a.add_(part) for a, part in zip(sums, parts, strict=True)]
