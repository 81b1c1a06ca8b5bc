"""Linear layers by rows: how many at a time, so that they stay in a CPU's cache between two operations."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoforge.kernels.products import linear as multiply
from dinoforge.kernels.products import padded, pieces

# The fewest (but for the last) and the most tokens to work on at a time: many for the speed of products, which
# gain less in half precision, and few for the cache and for memory.
_ROWS = (512, 2048)
_HALF_ROWS = (128, 1024)


def few_rows(x: Tensor, dtype: torch.dtype) -> Iterator[slice]:
    """Rows to work on at a time, by products in ``dtype``."""
    if len(x):
        least, most = _HALF_ROWS if dtype.itemsize == 2 else _ROWS
        for rows, _ in pieces(len(x), most, least):
            yield rows
    else:
        yield slice(0, 0)


def _more_rows(x: Tensor) -> Tensor:
    """A piece of ``few_rows``, in half precision with rows of zeros up to the size of such pieces."""
    if x.dtype.itemsize != 2:
        return x
    more = padded(len(x), _HALF_ROWS[0]) - len(x)
    return F.pad(x, (0, 0, 0, more)) if more else x


def linear_rows(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    rows = _more_rows(x)
    result = multiply(rows, weight, bias, place=out if rows is x else None)
    if result is not out:
        out.copy_(result[: x.shape[0]])


def product(x: Tensor, weight: Tensor) -> Tensor:
    return multiply(_more_rows(x), weight.T)[: x.shape[0]]


def gradient_of_weight(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of a weight [D', D] from those of its output [T, D'] and what it read [T, D]."""
    grad, x = _more_rows(grad), _more_rows(x)
    # In half precision oneDNN is faster this way round; in float32 MKL, where the product is higher than wide.
    return (x.T @ grad).T if grad.dtype.itemsize == 2 or grad.shape[1] < x.shape[1] else grad.T @ x


def added(sums: list[Tensor | None], parts: list[Tensor | None]) -> list[Tensor | None]:
    """Adds each part to its sum, where there is one yet."""
    return [part if a is None or part is None else a.add_(part) for a, part in zip(sums, parts, strict=True)]
