"""CPU operators outside PyTorch's public interface: each is tried once, and is None if it does not work.

If an operator is missing, the plain definition replaces the fast twin that calls it.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import torch
from torch import Tensor

Operator = Callable[..., Any]


def tried(get: Callable[[], Operator], call: Callable[[Operator], object]) -> Operator | None:
    """Look up an operator and try it; None if it does not exist or refuses the arguments.

    Args:
        get: A function that looks the operator up.
        call: A function that calls the operator on small inputs.
    """

    def attempt() -> Operator | None:
        try:
            operator = get()
            call(operator)
        except (AttributeError, TypeError, RuntimeError):  # NotImplementedError is a RuntimeError
            return None
        return operator

    # In a separate thread, which neither autocast nor counters of operations affect.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(attempt).result()


def _some(*shape: int) -> Tensor:
    return torch.ones(shape)


@cache
def linear_pointwise() -> Operator | None:
    """Return oneDNN's linear layer, which PyTorch's compiler emits."""
    return tried(
        lambda: torch.ops.mkldnn._linear_pointwise, lambda op: op(_some(4, 2), _some(3, 2), None, "none", [], "")
    )


@cache
def flash_attention() -> Operator | None:
    """Return the attention that also gives the logarithms of the softmax sums."""
    q = _some(1, 1, 2, 4)
    return tried(lambda: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, lambda op: _pair(op(q, q, q)))


@cache
def flash_attention_backward() -> Operator | None:
    """Return the backward pass of ``flash_attention``."""
    q = _some(1, 1, 2, 4)
    return tried(
        lambda: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward,
        lambda op: op(q, q, q, q, q, _some(1, 1, 2), 0.0, False),
    )


@cache
def softmax_backward() -> Operator | None:
    """Return the backward pass of softmax, which takes the output's gradient and the output."""
    return tried(lambda: torch._softmax_backward_data, lambda op: op(_some(2, 2), _some(2, 2), -1, torch.float32))


@cache
def layer_norm_backward() -> Operator | None:
    """Return the backward pass of LayerNorm, which gives the gradients of input, weight and bias."""
    x, of_row, of_channel = _some(2, 4), _some(2, 1), _some(4)
    return tried(
        lambda: torch.ops.aten.native_layer_norm_backward,
        lambda op: op(x, x, [4], of_row, of_row, of_channel, of_channel, [True, True, True]),
    )


@cache
def gelu_backward() -> Operator | None:
    """Return the backward pass of GELU, which writes the input's gradient into given memory."""
    return tried(lambda: torch.ops.aten.gelu_backward, lambda op: op(_some(2), _some(2), grad_input=_some(2)))


def _pair(result: tuple[Tensor, Tensor]) -> None:
    if len(result) != 2:
        raise TypeError("expected two results")
