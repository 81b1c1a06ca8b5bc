"""Attention on a CPU, a few images at a time."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dinoforge.kernels import private
from dinoforge.kernels.products import pieces
from dinoforge.kernels.types import Groups


def split_heads(x: Tensor, groups: Groups) -> tuple[Tensor, ...]:
    """Split packed rows [T, ...] into the rows of each group."""
    parts: tuple[Tensor, ...] = x.split([images * tokens for images, tokens in groups])
    return parts


def heads_of(qkv: Tensor, images: int, tokens: int, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """View [B·N, 3D] as queries, keys and values, each [B, heads, N, D/heads]."""
    width = qkv.shape[1] // (3 * num_heads)  # -1 could not be inferred if there are no images
    by_kind: Tensor = qkv.view(images, tokens, 3, num_heads, width).permute(2, 0, 3, 1, 4)
    return by_kind[0], by_kind[1], by_kind[2]


class AttentionOnCpu(torch.autograd.Function):
    """PyTorch's attention for CPUs, which is fast in float32, applied to each group.

    The backward pass reuses the output, one tensor that the next layer keeps anyway.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, groups: Groups, num_heads: int) -> Tensor:
        flash = private.flash_attention()
        assert flash is not None
        out = qkv.new_empty(len(qkv), qkv.shape[1] // 3)  # [T, D]
        sums: list[Tensor] = []  # logarithms of the softmax sums
        for part, into, (images, tokens) in zip(
            split_heads(qkv, groups), split_heads(out, groups), groups, strict=True
        ):
            q, k, v = heads_of(part, images, tokens, num_heads)
            attended, log_sums = flash(q, k, v)
            into.view(images, tokens, num_heads, q.shape[-1]).copy_(attended.transpose(1, 2))
            sums.append(log_sums)
        ctx.save_for_backward(qkv, out, *sums)
        ctx.groups, ctx.num_heads = groups, num_heads
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        flash_backward = private.flash_attention_backward()
        assert flash_backward is not None
        qkv, out, *sums = ctx.saved_tensors
        grad = torch.empty_like(qkv)
        parts = zip(
            *(split_heads(x, ctx.groups) for x in (qkv, out, grad_outputs[0], grad)), sums, ctx.groups, strict=True
        )
        for qkv_part, out_part, grad_out, into, log_sums, (images, tokens) in parts:
            shape = (images, tokens, ctx.num_heads, out.shape[1] // ctx.num_heads)
            given, attended = (x.view(shape).transpose(1, 2) for x in (grad_out, out_part))
            gradients = flash_backward(
                given, *heads_of(qkv_part, images, tokens, ctx.num_heads), attended, log_sums, 0.0, False
            )
            for to, gradient in zip(heads_of(into, images, tokens, ctx.num_heads), gradients, strict=True):
                to.copy_(gradient)
        return grad, None, None


class HalfAttentionOnCpu(torch.autograd.Function):
    """Attention by products in half precision, a few images at a time, so that their scores stay in the cache.

    PyTorch's attention is no faster in half precision than in float32, and its backward pass is several times slower.
    Scores are rounded to half precision; softmax computes in float32. Only the input is kept: the backward pass
    recomputes the scores.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, groups: Groups, num_heads: int) -> Tensor:
        ctx.save_for_backward(qkv)
        ctx.groups, ctx.num_heads = groups, num_heads
        out = qkv.new_empty(len(qkv), qkv.shape[1] // 3)  # [T, D]
        for rows, shape in _few_images(groups, num_heads):
            q, k, v = _stacked_heads(qkv[rows], 3, *shape)
            attended = _by_token(_scores(q, k) @ v, *shape)
            into = out[rows].view(-1, *attended.shape[1:])
            into.copy_(attended[: len(into)])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        of_softmax = private.softmax_backward()
        assert of_softmax is not None
        (qkv,) = ctx.saved_tensors
        grad = torch.empty_like(qkv)
        for rows, shape in _few_images(ctx.groups, ctx.num_heads):
            q, k, v = _stacked_heads(qkv[rows], 3, *shape)
            (given,) = _stacked_heads(grad_outputs[0][rows], 1, *shape)
            p = _scores(q, k)
            grad_scores = of_softmax(given @ v.mT, p, -1, p.dtype).mul_(q.shape[-1] ** -0.5)
            of_heads = (grad_scores @ k, grad_scores.mT @ q, p.mT @ given)
            into = grad[rows].view(-1, shape[1], 3, shape[2], q.shape[-1])
            for number, gradient in enumerate(of_heads):
                into[:, :, number].copy_(_by_token(gradient, *shape)[: len(into)])
        return grad, None, None


def _few_images(groups: Groups, num_heads: int) -> Iterator[tuple[slice, tuple[int, int, int]]]:
    """Iterate over the rows of a few images at a time, with the shape (images, tokens, heads) to pad them to."""
    start = 0
    for images, tokens in groups:
        at_once = 1 + 2**19 // (num_heads * tokens**2)
        largest = min(1 << at_once.bit_length() - 1, 1 << (images - 1).bit_length())
        for part, size in pieces(images, largest, max(largest // 4, 1)):
            yield slice(start + part.start * tokens, start + part.stop * tokens), (size, tokens, num_heads)
        start += images * tokens


def _stacked_heads(x: Tensor, kinds: int, images: int, tokens: int, num_heads: int) -> Tensor:
    """Copy ``kinds`` vectors per token [b·N, kinds·D] to [kinds, B·heads, N, D/heads], zeros for missing images."""
    x = F.pad(x, (0, 0, 0, images * tokens - len(x)))
    return x.view(images, tokens, kinds, num_heads, -1).permute(2, 0, 3, 1, 4).contiguous().flatten(1, 2)


def _by_token(x: Tensor, images: int, tokens: int, num_heads: int) -> Tensor:
    """View [B·heads, N, d] as [B, N, heads, d]."""
    return x.view(images, num_heads, tokens, -1).transpose(1, 2)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """Compute the attention weights [B·heads, N, N]."""
    return torch.softmax((q * q.shape[-1] ** -0.5) @ k.mT, dim=-1)
