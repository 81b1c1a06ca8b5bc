"""Residual branches on some of the images, without copying the other images."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dinoforge.kernels.types import Subset


class Take(torch.autograd.Function):
    """Returns ``x, x[rows]`` for distinct rows; the backward pass needs no second gradient of the size of ``x``.

    The backward pass adds to the first result's gradient in place. This is sound because the residual stream has a
    single reader: the addition of the branch, which returns the incoming gradient unchanged.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rows)
        return x.view_as(x), x.index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        grad, grad_rows = grad_outputs
        return grad.contiguous().index_add_(0, rows, grad_rows), None


class AddTo(torch.autograd.Function):
    """Adds a branch computed on a subset of the images, scaled so that its expectation is that of the whole branch.

    ``index_add`` would keep the branch's output for its backward pass, which needs only the shape.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, subset: Subset) -> Tensor:
        ctx.subset, ctx.dtype = subset, branch.dtype
        out = x.clone()
        for rows, part, scale in _scaled_parts(subset, branch):
            out.index_add_(0, rows, part.to(x.dtype), alpha=scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad,) = grad_outputs
        of_branch = grad.new_empty(len(ctx.subset.rows), grad.shape[1], dtype=ctx.dtype)
        for rows, part, scale in _scaled_parts(ctx.subset, of_branch):
            part.copy_(grad.index_select(0, rows).mul_(scale))
        return grad, of_branch, None


def _scaled_parts(subset: Subset, branch: Tensor) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Iterate over the groups: the packed row indices, the branch's rows, and the group's factor."""
    sizes = [images * tokens for images, tokens in subset.groups]
    return zip(subset.rows.split(sizes), branch.split(sizes), subset.scales, strict=True)
