"""Operators that are no part of PyTorch's public interface: each is tried once, and None where it does not work.

They compute on a CPU. The fast twin that calls one is left where it is missing, for the plain definition.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch import Tensor

Operator = Callable[..., Any]


def tried(get: Callable[[], Operator], call: Callable[[Operator], object]) -> Operator | None:
    """An operator, or None if it is not there or does not take what it is called with.

    Args:
        get: looks it up.
        call: calls it on something small.
    """

    def attempt() -> Operator | None:
        try:
            operator = get()
            call(operator)
        except (AttributeError, TypeError, RuntimeError):  # NotImplementedError is one of the last
            return None
        return operator

    # In a thread of its own, where neither autocast nor whoever counts operations has a say.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(attempt).result()


def _some(*shape: int) -> Tensor:
    return torch.ones(shape)


@cache
def linear_pointwise() -> Operator | None:
    """oneDNN's linear layer, which PyTorch's compiler emits."""
    return tried(
        lambda: torch.ops.mkldnn._linear_pointwise, lambda op: op(_some(4, 2), _some(3, 2), None, "none", [], "")
    )


@cache
def flash_attention() -> Operator | None:
    """Attention that also gives the logarithms of the softmaxes' sums."""
    q = _some(1, 1, 2, 4)
    return tried(lambda: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, lambda op: _pair(op(q, q, q)))


@cache
def flash_attention_backward() -> Operator | None:
    """Its backward pass."""
    q = _some(1, 1, 2, 4)
    return tried(
        lambda: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward,
        lambda op: op(q, q, q, q, q, _some(1, 1, 2), 0.0, False),
    )


@cache
def softmax_backward() -> Operator | None:
    """The gradient of a softmax's argument, from those of its result and the result."""
    return tried(lambda: torch._softmax_backward_data, lambda op: op(_some(2, 2), _some(2, 2), -1, torch.float32))


@cache
def layer_norm_backward() -> Operator | None:
    """The gradients of what LayerNorm reads, its weight and its bias."""
    x, of_row, of_channel = _some(2, 4), _some(2, 1), _some(4)
    return tried(
        lambda: torch.ops.aten.native_layer_norm_backward,
        lambda op: op(x, x, [4], of_row, of_row, of_channel, of_channel, [True, True, True]),
    )


@cache
def gelu_backward() -> Operator | None:
    """The gradient of what GELU reads, into memory that is given."""
    return tried(lambda: torch.ops.aten.gelu_backward, lambda op: op(_some(2), _some(2), grad_input=_some(2)))


def _pair(result: tuple[Tensor, Tensor]) -> None:
    if len(result) != 2:
        raise TypeError("expected two results")
