"""Rank, world size and reductions that are valid on one process."""

import torch
import torch.distributed as dist
from torch import Tensor


def is_active() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    return dist.get_rank() if is_active() else 0


def world_size() -> int:
    return dist.get_world_size() if is_active() else 1


def sum_over_ranks(x: Tensor) -> Tensor:
    """``x`` summed over ranks; a new tensor, outside of autograd."""
    x = x.detach().clone()
    if is_active():
        dist.all_reduce(x)
    return x


def mean_over_ranks(x: Tensor) -> Tensor:
    """``x`` averaged over ranks; a new tensor, outside of autograd."""
    return sum_over_ranks(x) / world_size()


def logsumexp_over_ranks(x: Tensor) -> Tensor:
    """``log Σ exp x`` over ranks, element by element; outside of autograd.

    A rank with nothing to add passes -inf.
    """
    if not is_active():
        return x.detach().clone()
    top = x.detach().clone()
    dist.all_reduce(top, op=dist.ReduceOp.MAX)
    top.clamp_(min=torch.finfo(top.dtype).min)  # -inf - -inf would be NaN where no rank has anything
    total = (x.detach() - top).exp()
    dist.all_reduce(total)
    return total.log() + top


def average_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Replaces each gradient by its mean over ranks; nothing to do on one process."""
    if not is_active():
        return
    for parameter in parameters:
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= world_size()
