"""Sizes of matrix products."""

import torch

_MULTIPLE = 32


def padded(count: int, dtype: torch.dtype) -> int:
    """The number of rows or columns to multiply where ``count`` are wanted: more in half precision, else the same.

    The numbers of masked patches and of those that stochastic depth keeps are new in every step. For products in half
    precision oneDNN builds a kernel for each new shape, and keeps a thousand of them: 20 MB and a twentieth of the time
    of a step. With few shapes it does so once. In float32 nothing is built, and padding would only round otherwise.
    """
    return -(-count // _MULTIPLE) * _MULTIPLE if dtype.itemsize == 2 else count
