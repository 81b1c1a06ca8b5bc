"""The layers of a vision transformer, working on packed tokens.

Crops of several resolutions go through every linear layer as one sequence of tokens [T, D]; only attention has to
know which tokens belong together. ``Groups`` says so: for each resolution, the number of images and the tokens of
each, in the order in which they are packed.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dinoforge.products import linear as multiply
from dinoforge.products import padded, pieces
from dinoforge.transfer import to_device

# The fewest (but for the last) and the most tokens that a CPU works on at a time: many for the speed of products, which
# gain less in half precision, and few for the cache and for memory.
_ROWS = (512, 2048)
_HALF_ROWS = (128, 1024)

Groups = tuple[tuple[int, int], ...]  # (images, tokens per image) of each resolution


class Kept(NamedTuple):
    """The images of a group that a residual branch keeps (stochastic depth).

    images: their indices, on the CPU.
    scale: images / images kept, which keeps the expectation of the branch; of the whole group, if this is a part of it.
    """

    images: Tensor
    scale: float


@dataclass(frozen=True)
class Subset:
    """The images of a batch that one residual branch keeps (stochastic depth).

    rows: packed indices of their tokens [T'].
    groups: the groups that these tokens form.
    scales: per group, see ``Kept``.
    """

    rows: Tensor
    groups: Groups
    scales: tuple[float, ...]


def subset_of(kept: list[Kept], groups: Groups, device: torch.device) -> Subset:
    """The subset that keeps ``kept[g]`` of each group ``g``."""
    rows, start = [], 0
    for (indices, _), (images, tokens) in zip(kept, groups, strict=True):
        rows.append((start + indices[:, None] * tokens + torch.arange(tokens)).flatten())
        start += images * tokens
    return Subset(
        rows=to_device(torch.cat(rows), device),
        groups=tuple((len(indices), tokens) for (indices, _), (_, tokens) in zip(kept, groups, strict=True)),
        scales=tuple(scale for _, scale in kept),
    )


class PatchEmbed(nn.Module):
    """Images [B, C, H, W] to patch tokens [B, H/p · W/p, D]."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.proj(images).flatten(2).transpose(1, 2)
        return out


class Attention(nn.Module):
    """Multi-head self-attention among the tokens of each image; ``project`` is its last layer."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, proj_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)

    def forward(self, x: Tensor, norm: nn.LayerNorm, groups: Groups) -> Tensor:
        """What each token of ``norm(x)`` [T, D] gathers from its image, before the last layer [T, D]."""
        qkv = norm_linear(x, norm, self.qkv)  # [T, 3D]
        if _on_cpu(qkv):
            kind = _HalfAttentionOnCpu if qkv.dtype.itemsize == 2 else _AttentionOnCpu
            attended: Tensor = kind.apply(qkv, groups, self.num_heads)
            return attended
        parts = []
        for part, (images, tokens) in zip(_split(qkv, groups), groups, strict=True):
            out = F.scaled_dot_product_attention(*_heads(part, images, tokens, self.num_heads))
            parts.append(out.transpose(1, 2).reshape(part.shape[0], qkv.shape[1] // 3))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def project(self, x: Tensor, scale: Tensor | None) -> Tensor:
        return scaled_linear(x, self.proj, scale)


def _split(x: Tensor, groups: Groups) -> tuple[Tensor, ...]:
    parts: tuple[Tensor, ...] = x.split([images * tokens for images, tokens in groups])
    return parts


def _heads(qkv: Tensor, images: int, tokens: int, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """[B·N, 3D] to queries, keys and values, each [B, heads, N, D/heads]."""
    width = qkv.shape[1] // (3 * num_heads)  # there may be no images, of which -1 would not know it
    by_kind: Tensor = qkv.view(images, tokens, 3, num_heads, width).permute(2, 0, 3, 1, 4)
    return by_kind[0], by_kind[1], by_kind[2]


class _AttentionOnCpu(torch.autograd.Function):
    """PyTorch's attention for CPUs on all groups, which is fast in float32.

    The result is one tensor, which the next layer keeps anyway.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, groups: Groups, num_heads: int) -> Tensor:
        out = qkv.new_empty(len(qkv), qkv.shape[1] // 3)  # [T, D]
        sums: list[Tensor] = []  # logarithms of the softmaxes' sums
        for part, into, (images, tokens) in zip(_split(qkv, groups), _split(out, groups), groups, strict=True):
            q, k, v = _heads(part, images, tokens, num_heads)
            attended, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)
            into.view(images, tokens, num_heads, q.shape[-1]).copy_(attended.transpose(1, 2))
            sums.append(log_sums)
        ctx.save_for_backward(qkv, out, *sums)
        ctx.groups, ctx.num_heads = groups, num_heads
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        qkv, out, *sums = ctx.saved_tensors
        grad = torch.empty_like(qkv)
        parts = zip(*(_split(x, ctx.groups) for x in (qkv, out, grad_outputs[0], grad)), sums, ctx.groups, strict=True)
        for qkv_part, out_part, grad_out, into, log_sums, (images, tokens) in parts:
            shape = (images, tokens, ctx.num_heads, out.shape[1] // ctx.num_heads)
            given, attended = (x.view(shape).transpose(1, 2) for x in (grad_out, out_part))
            gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                given, *_heads(qkv_part, images, tokens, ctx.num_heads), attended, log_sums, 0.0, False
            )
            for to, gradient in zip(_heads(into, images, tokens, ctx.num_heads), gradients, strict=True):
                to.copy_(gradient)
        return grad, None, None


class _HalfAttentionOnCpu(torch.autograd.Function):
    """Attention by products in half precision, a few images at a time, so that their scores stay in the cache.

    PyTorch's own is no faster in half precision than in float32, and its backward pass several times slower. Scores
    are rounded; softmax itself computes in float32. Only what comes in is kept: the backward pass makes the scores
    again.
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
        (qkv,) = ctx.saved_tensors
        grad = torch.empty_like(qkv)
        for rows, shape in _few_images(ctx.groups, ctx.num_heads):
            q, k, v = _stacked_heads(qkv[rows], 3, *shape)
            (given,) = _stacked_heads(grad_outputs[0][rows], 1, *shape)
            p = _scores(q, k)
            grad_scores = torch._softmax_backward_data(given @ v.mT, p, -1, p.dtype).mul_(q.shape[-1] ** -0.5)
            of_heads = (grad_scores @ k, grad_scores.mT @ q, p.mT @ given)
            into = grad[rows].view(-1, shape[1], 3, shape[2], q.shape[-1])
            for number, gradient in enumerate(of_heads):
                into[:, :, number].copy_(_by_token(gradient, *shape)[: len(into)])
        return grad, None, None


def _few_images(groups: Groups, num_heads: int) -> Iterator[tuple[slice, tuple[int, int, int]]]:
    """Rows of a few images at a time, and the shape (images, tokens, heads) that they are to be padded to."""
    start = 0
    for images, tokens in groups:
        at_once = 1 + 2**19 // (num_heads * tokens**2)
        largest = min(1 << at_once.bit_length() - 1, 1 << (images - 1).bit_length())
        for part, size in pieces(images, largest, max(largest // 4, 1)):
            yield slice(start + part.start * tokens, start + part.stop * tokens), (size, tokens, num_heads)
        start += images * tokens


def _stacked_heads(x: Tensor, kinds: int, images: int, tokens: int, num_heads: int) -> Tensor:
    """``kinds`` vectors of each token [b·N, kinds · D] as [kinds, B·heads, N, D/heads], zeros where images lack."""
    x = F.pad(x, (0, 0, 0, images * tokens - len(x)))
    return x.view(images, tokens, kinds, num_heads, -1).permute(2, 0, 3, 1, 4).contiguous().flatten(1, 2)


def _by_token(x: Tensor, images: int, tokens: int, num_heads: int) -> Tensor:
    """[B·heads, N, d] as [B, N, heads, d], a view."""
    return x.view(images, num_heads, tokens, -1).transpose(1, 2)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """How much each token reads of each other [B·heads, N, N]."""
    return torch.softmax((q * q.shape[-1] ** -0.5) @ k.mT, dim=-1)


class Mlp(nn.Module):
    """Linear, GELU, linear, between the LayerNorm before them and the LayerScale after."""

    def __init__(self, dim: int, hidden_dim: int, bias: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim, bias=bias)
        self.fc2 = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Tensor, norm: nn.LayerNorm, scale: Tensor | None) -> Tensor:
        return scaled_linear(norm_linear(x, norm, self.fc1), self.fc2, scale, gelu=True)


class SwiGLU(nn.Module):
    """Gated feed-forward layer (arXiv 2002.05202): two thirds of the hidden width, rounded up to a multiple of 8."""

    def __init__(self, dim: int, hidden_dim: int, bias: bool) -> None:
        super().__init__()
        hidden_dim = (int(hidden_dim * 2 / 3) + 7) // 8 * 8
        self.w12 = nn.Linear(dim, 2 * hidden_dim, bias=bias)
        self.w3 = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Tensor, norm: nn.LayerNorm, scale: Tensor | None) -> Tensor:
        gate, value = norm_linear(x, norm, self.w12).chunk(2, dim=-1)
        return scaled_linear(F.silu(gate) * value, self.w3, scale)


class LayerScale(nn.Module):
    """A learned factor per channel (arXiv 2103.17239), applied by ``scaled_linear``."""

    def __init__(self, dim: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), initial))


def product_dtype(x: Tensor) -> torch.dtype:
    """In which precision a linear layer multiplies ``x``."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def norm_linear(x: Tensor, norm: nn.LayerNorm, linear: nn.Linear) -> Tensor:
    """``linear(norm(x))``: the start of a residual branch.

    Args:
        x: [T, D].
        norm: over D.
        linear: from D to D'.
    """
    dtype = product_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        out: Tensor = _NormLinear.apply(x, norm.weight, norm.bias, norm.eps, linear.weight, linear.bias, dtype)
    return out


class _NormLinear(torch.autograd.Function):
    """Keeps only ``x``, in the precision of the product, and normalises it again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        eps: float,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        w = weight.to(dtype)
        b = None if bias is None else bias.to(dtype)
        out = x.new_empty(x.shape[0], len(w), dtype=dtype)  # len(x) would be a constant in an exported graph
        moments: list[tuple[Tensor, Tensor]] = []
        for rows in _few_rows(x, dtype):
            normed, mean, rstd = torch.native_layer_norm(x[rows], x.shape[-1:], norm_weight, norm_bias, eps)
            moments.append((mean, rstd))
            _linear(normed.to(dtype), w, b, out=out[rows])
        mean, rstd = (torch.cat(parts) for parts in zip(*moments, strict=True))
        ctx.save_for_backward(x.to(dtype), mean, rstd, norm_weight, norm_bias, weight, bias)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        x, mean, rstd, norm_weight, norm_bias, weight, bias = ctx.saved_tensors
        w = weight.to(grad.dtype)
        grad_x = torch.empty_like(x, dtype=norm_weight.dtype)
        sums: list[Tensor | None] = [None] * 4  # gradients of both weights and both biases
        for rows in _few_rows(x, grad.dtype):
            x_rows, g = x[rows].to(norm_weight.dtype), grad[rows]
            normed = ((x_rows - mean[rows]) * rstd[rows]).mul_(norm_weight).add_(norm_bias).to(g.dtype)
            grad_normed = _product(g, w).to(norm_weight.dtype)
            grad_x[rows], *of_norm = torch.ops.aten.native_layer_norm_backward(
                grad_normed, x_rows, x.shape[-1:], mean[rows], rstd[rows], norm_weight, norm_bias, [True, True, True]
            )
            of_weight = _of_weight(g, normed).to(weight.dtype)
            of_bias = None if bias is None else g.sum(dim=0, dtype=bias.dtype)
            sums = _added(sums, [*of_norm, of_weight, of_bias])
        grad_norm_weight, grad_norm_bias, grad_weight, grad_bias = sums
        return grad_x, grad_norm_weight, grad_norm_bias, None, grad_weight, grad_bias, None


def _on_cpu(x: Tensor) -> bool:
    """Whether a CPU works on ``x``: not a GPU, nor a graph for any number of images that is being exported."""
    return x.device.type == "cpu" and not torch.compiler.is_exporting()


def _few_rows(x: Tensor, dtype: torch.dtype) -> Iterator[slice]:
    """Rows to work on at a time, by products in ``dtype``; on CPUs few, to stay in the cache between two operations."""
    if not _on_cpu(x):
        yield slice(None)
    elif len(x):
        least, most = _HALF_ROWS if dtype.itemsize == 2 else _ROWS
        for rows, _ in pieces(len(x), most, least):
            yield rows
    else:
        yield slice(0, 0)


def _more_rows(x: Tensor) -> Tensor:
    """A piece of ``_few_rows``, in half precision with rows of zeros up to the size of such pieces."""
    if not _on_cpu(x) or x.dtype.itemsize != 2:
        return x
    more = padded(len(x), _HALF_ROWS[0]) - len(x)
    return F.pad(x, (0, 0, 0, more)) if more else x


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    rows = _more_rows(x)
    result = multiply(rows, weight, bias, place=out if rows is x else None)
    if result is not out:
        out.copy_(result[: x.shape[0]])


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return multiply(_more_rows(x), weight.T)[: x.shape[0]]


def _of_weight(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of a weight [D', D] from those of its output [T, D'] and what it read [T, D]."""
    grad, x = _more_rows(grad), _more_rows(x)
    # In half precision oneDNN is faster this way round; in float32 MKL, where the product is higher than wide.
    return (x.T @ grad).T if grad.dtype.itemsize == 2 or grad.shape[1] < x.shape[1] else grad.T @ x


def _added(sums: list[Tensor | None], parts: list[Tensor | None]) -> list[Tensor | None]:
    """Adds each part to its sum, where there is one yet."""
    return [part if a is None or part is None else a.add_(part) for a, part in zip(sums, parts, strict=True)]


def scaled_linear(x: Tensor, linear: nn.Linear, scale: Tensor | None, *, gelu: bool = False) -> Tensor:
    """``linear(x) * scale``, or ``linear(gelu(x)) * scale``: the end of a residual branch, or a layer of an MLP.

    Args:
        x: [T, D'].
        linear: from D' to D.
        scale: LayerScale's factors [D], or None.
        gelu: whether to apply it first.
    """
    dtype = product_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        if dtype is torch.float16 and scale is not None:
            # The gradient of a weight that is not scaled yet, at a scale of 1e-5 and times the loss scale, is beyond
            # float16. The scale is float32, and so is what it multiplies on the way back.
            bias = None if linear.bias is None else linear.bias.to(dtype)
            y = F.gelu(x.to(dtype)) if gelu else x.to(dtype)
            return F.linear(y, linear.weight.to(dtype), bias) * scale
        out: Tensor = _ScaledLinear.apply(x.to(dtype), linear.weight, linear.bias, scale, gelu)
    return out


class _ScaledLinear(torch.autograd.Function):
    """Keeps only ``x`` for the backward pass, which makes the gradient of the factors from that of the weights.

    With y = (x W^T + b) · scale, it is sum(dy · (x W^T + b)) over tokens = sum((dy^T x) · W) over inputs + sum(dy) · b:
    neither the unscaled output nor a second pass over the tokens is needed.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scale: Tensor | None, gelu: bool) -> Tensor:
        ctx.save_for_backward(x, weight, bias, scale)
        ctx.gelu = gelu
        # In half precision the factors are part of the weights: one rounding less, and no pass over the output.
        factors = scale if x.dtype is weight.dtype else None  # of the output
        folded = scale if factors is None else None
        w = (weight if folded is None else weight * folded[:, None]).to(x.dtype)
        b = None if bias is None else (bias if folded is None else bias * folded).to(x.dtype)
        out = x.new_empty(x.shape[0], len(w))  # as above
        for rows in _few_rows(x, x.dtype):
            _linear(F.gelu(x[rows]) if gelu else x[rows], w, b, out=out[rows])
            if factors is not None:
                out[rows] *= factors
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        x, weight, bias, scale = ctx.saved_tensors
        w = (weight if scale is None else weight * scale[:, None]).to(grad.dtype)
        grad_x = torch.empty_like(x)
        sums: list[Tensor | None] = [None] * 2  # of the scaled weight [D, D'] and bias
        for rows in _few_rows(x, x.dtype):
            x_rows, g = x[rows], grad[rows]
            y = F.gelu(x_rows) if ctx.gelu else x_rows
            of_bias = None if bias is None else g.sum(dim=0, dtype=weight.dtype)
            sums = _added(sums, [_of_weight(g, y).to(weight.dtype), of_bias])
            if ctx.gelu:
                torch.ops.aten.gelu_backward(_product(g, w), x_rows, grad_input=grad_x[rows])
            else:
                _linear(g, w.T, None, out=grad_x[rows])
        grad_weight, grad_bias = sums
        assert grad_weight is not None
        if scale is None:
            return grad_x, grad_weight, grad_bias, None, None
        grad_scale = (grad_weight * weight).sum(dim=1)
        if bias is not None and grad_bias is not None:
            grad_scale += grad_bias * bias
            grad_bias = grad_bias * scale
        return grad_x, grad_weight.mul_(scale[:, None]), grad_bias, grad_scale, None


class Block(nn.Module):
    """Pre-norm transformer block on packed tokens [T, D]."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden_dim: int,
        *,
        swiglu: bool,
        layerscale: float,
        qkv_bias: bool,
        proj_bias: bool,
        ffn_bias: bool,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, qkv_bias, proj_bias)
        self.ls1 = LayerScale(dim, layerscale) if layerscale else None
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = (SwiGLU if swiglu else Mlp)(dim, hidden_dim, ffn_bias)
        self.ls2 = LayerScale(dim, layerscale) if layerscale else None

    def forward(
        self,
        x: Tensor,
        groups: Groups,
        keep_attn: Subset | None = None,
        keep_ffn: Subset | None = None,
        narrowing: "Narrowing | None" = None,
    ) -> Tensor:
        """Tokens [T, D], or with ``narrowing`` only the wanted ones [W, D]; what that keeps replaces ``keep_ffn``."""
        if narrowing is not None:
            return self._narrowed(x, groups, narrowing, keep_attn)
        if keep_attn is None:
            x = x + self._project(self._attend(x, groups))
        else:
            x, taken = _Take.apply(x, keep_attn.rows)
            x = _AddTo.apply(x, self._project(self._attend(taken, keep_attn.groups)), keep_attn)
        if keep_ffn is None:
            return x + self._feed_forward(x)
        x, taken = _Take.apply(x, keep_ffn.rows)
        added: Tensor = _AddTo.apply(x, self._feed_forward(taken), keep_ffn)
        return added

    def _narrowed(self, x: Tensor, groups: Groups, narrowing: "Narrowing", keep_attn: Subset | None) -> Tensor:
        """Only what is wanted is computed after attention."""
        n = narrowing
        taken = x if keep_attn is None else x[keep_attn.rows]
        attended = self._attend(taken, groups if keep_attn is None else keep_attn.groups)
        x = x[n.wanted]
        branch = self._project(attended[n.attn_rows])
        x = x.index_add(0, n.attn_places, branch.to(x.dtype) * n.attn_scales)
        branch = self._feed_forward(x[n.ffn_places])
        return x.index_add(0, n.ffn_places, branch.to(x.dtype) * n.ffn_scales)

    def _attend(self, x: Tensor, groups: Groups) -> Tensor:
        out: Tensor = self.attn(x, self.norm1, groups)
        return out

    def _project(self, x: Tensor) -> Tensor:
        return self.attn.project(x, self.ls1.gamma if self.ls1 else None)

    def _feed_forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.mlp(x, self.norm2, self.ls2.gamma if self.ls2 else None)
        return out


@dataclass(frozen=True)
class Narrowing:
    """The tokens that are wanted of the last block, and which of them its branches keep.

    wanted: packed rows [W].
    attn_rows, attn_places, attn_scales: rows among those that the branch sees, places in ``wanted``, and the factors
        [n, 1] that keep the expectation.
    ffn_places, ffn_scales: the same for the second branch, which sees only wanted rows.
    """

    wanted: Tensor
    attn_rows: Tensor
    attn_places: Tensor
    attn_scales: Tensor
    ffn_places: Tensor
    ffn_scales: Tensor


def narrowing_to(
    wanted: Tensor, groups: Groups, attn: list[Kept] | None, ffn: list[Kept] | None, device: torch.device
) -> Narrowing:
    """What the last block does for the rows ``wanted`` [W].

    Args:
        wanted: packed rows, on the CPU.
        groups: all tokens.
        attn, ffn: what the branches keep, as for ``subset_of``; None for all.
        device: where to.
    """
    attn_rows, attn_places, attn_scales = _kept_among(wanted, groups, attn)
    _, ffn_places, ffn_scales = _kept_among(wanted, groups, ffn)
    parts = (wanted, attn_rows, attn_places, attn_scales, ffn_places, ffn_scales)
    return Narrowing(*(to_device(part, device) for part in parts))


def _kept_among(wanted: Tensor, groups: Groups, kept: list[Kept] | None) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the branch, places in ``wanted`` and factors of the wanted rows whose images are kept."""
    if kept is None:
        return wanted, torch.arange(len(wanted)), torch.ones(len(wanted), 1)
    total = sum(images * tokens for images, tokens in groups)
    row_of = torch.full((total,), -1)  # packed row -> row of the branch
    scale_of = torch.empty(total)
    start = first = 0
    for (indices, scale), (images, tokens) in zip(kept, groups, strict=True):
        rows = (start + indices[:, None] * tokens + torch.arange(tokens)).flatten()
        row_of[rows] = torch.arange(first, first + len(rows))
        scale_of[rows] = scale
        start, first = start + images * tokens, first + len(rows)
    places = (row_of[wanted] >= 0).nonzero()[:, 0]
    hit = wanted[places]
    return row_of[hit], places, scale_of[hit, None]


class _Take(torch.autograd.Function):
    """``x, x[rows]`` for distinct rows, with a backward pass that needs no second gradient of the size of ``x``.

    The gradient of the first result is added to in place. That is sound because a residual stream has one reader: the
    addition of the branch, which hands the gradient on as it came.
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


class _AddTo(torch.autograd.Function):
    """Adds a branch that saw a subset of the images, scaled so that its expectation is the whole branch's.

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
    """Of each group: the packed rows, those of the branch, and their factor."""
    sizes = [images * tokens for images, tokens in subset.groups]
    return zip(subset.rows.split(sizes), branch.split(sizes), subset.scales, strict=True)
