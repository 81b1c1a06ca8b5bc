"""Every operation of ``ops``, defined in ordinary PyTorch, for accelerators, compilers and exports.

Products of linear layers follow autocast. Matrices over prototypes are laid out [K, N], prototypes first.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dinoforge.kernels.precision import exact, product_dtype
from dinoforge.kernels.types import Groups, Subset, Targets, Term
from dinoforge.system import distributed

LOGITS = 1 << 25
"""The maximum number of the student's logits that exist at once: enough to keep an accelerator busy."""


def norm_linear(x: Tensor, norm: nn.LayerNorm, linear: nn.Linear) -> Tensor:
    """Define ``ops.norm_linear``."""
    out: Tensor = linear(norm(x))
    return out


def scaled_linear(x: Tensor, linear: nn.Linear, scale: Tensor | None, gelu: bool) -> Tensor:
    """Define ``ops.scaled_linear``."""
    y = F.gelu(x) if gelu else x
    if scale is None:
        return F.linear(y, linear.weight, linear.bias)
    if product_dtype(x) is torch.float16:
        # With the scale folded into the weights, their gradient before the scale of 1e-5 is applied, times the loss
        # scale, would exceed float16. Here the float32 scale multiplies the output, and its gradient in float32.
        return F.linear(y, linear.weight, linear.bias) * scale
    # Folded into the weights: one rounding less in half precision, and no stored output for the scale's gradient.
    return F.linear(y, linear.weight * scale[:, None], None if linear.bias is None else linear.bias * scale)


def attention(qkv: Tensor, groups: Groups, num_heads: int) -> Tensor:
    """Define ``ops.attention``."""
    width = qkv.shape[1] // 3
    outs = []
    for part, (images, tokens) in zip(qkv.split([i * n for i, n in groups]), groups, strict=True):
        by_kind = part.view(images, tokens, 3, num_heads, width // num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = by_kind.unbind(0)  # each [B, heads, N, D/heads]
        outs.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(part.shape[0], width))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def take_rows(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Define ``ops.take_rows``."""
    return x, x.index_select(0, rows)


def add_rows(x: Tensor, branch: Tensor, subset: Subset) -> Tensor:
    """Define ``ops.add_rows``."""
    parts = branch.to(x.dtype).split([images * tokens for images, tokens in subset.groups])
    scaled = torch.cat([part * scale for part, scale in zip(parts, subset.scales, strict=True)])
    # index_add would keep the added rows for its backward pass, which needs only their shape.
    return x.scatter_add(0, subset.rows[:, None].expand_as(scaled), scaled)


def effective_weight(weight_g: Tensor, weight_v: Tensor) -> Tensor:
    """Compute the weight [K, d] of a weight-normed layer."""
    weight: Tensor = weight_v * (weight_g / weight_v.norm(dim=1, keepdim=True))
    return weight


def teacher_logits(z: Tensor, weight_g: Tensor, weight_v: Tensor, temp: float, dtype: torch.dtype) -> Tensor:
    """Define ``ops.teacher_logits``, with products in ``dtype``."""
    return effective_weight(weight_g, weight_v).to(dtype) @ (z / temp).T.to(dtype)


def centering(logits: Tensor, center: Tensor, temp: float) -> Targets:
    """Define ``ops.centering``."""
    return _softmax(logits, -center / temp)


def sinkhorn_knopp(logits: Tensor, iterations: int) -> Targets:
    """Define ``ops.sinkhorn_knopp``."""
    # The first iteration uses logarithms; after it, nothing can overflow or underflow.
    start = _softmax(logits, -distributed.logsumexp_over_ranks(exact(logits).logsumexp(dim=1)))
    p, u, v = exact(start.scaled), start.per_prototype, start.per_sample
    for _ in range(iterations - 1):
        u = distributed.sum_over_ranks(p @ v).reciprocal()
        v = (u @ p).reciprocal()
    return Targets(start.scaled, u, v)


def _softmax(logits: Tensor, shift: Tensor) -> Targets:
    """Compute ``softmax(logits + shift[prototype])`` of each sample, stored in the precision of the logits."""
    scaled = torch.softmax(exact(logits) + shift[:, None], dim=0).to(logits.dtype)
    per_sample = scaled.sum(dim=0, dtype=shift.dtype).reciprocal()  # of rounded values, so that a sample sums to one
    return Targets(scaled, torch.ones_like(shift), per_sample)


def cross_entropy(
    terms: Sequence[Term], weight_g: Tensor, weight_v: Tensor, dtype: torch.dtype, at_once: int = LOGITS
) -> tuple[Tensor, Tensor]:
    """Define ``ops.cross_entropy``, with products in ``dtype`` and at most ``at_once`` logits in memory."""
    w = effective_weight(weight_g, weight_v)
    values = []
    for term in terms:
        crops, samples, _ = term.embeddings.shape
        size = max(1, at_once // (len(w) * max(1, crops)))
        parts = [  # at least one part, so that w gets a gradient
            checkpoint(_cross_entropy, w, z, term, i * size, dtype, use_reentrant=False, preserve_rng_state=False)
            for i, z in enumerate(term.embeddings.split(size, dim=1) if samples else [term.embeddings])
        ]
        values.append(torch.stack(parts).sum().float())
    each = torch.stack(values)
    return each.sum(), each.detach()


def _cross_entropy(w: Tensor, z: Tensor, term: Term, start: int, dtype: torch.dtype) -> Tensor:
    """Compute the weighted cross-entropy of n samples of a term from ``start`` on, for embeddings [C, n, d]."""
    crops, samples, _ = z.shape
    parts = (slice(source.start + start, source.start + start + samples) for source in term.sources)
    first, *others = (term.targets.tile(slice(None), part) for part in parts)
    targets = sum(others, start=first)  # [K, n]
    logits = w.to(dtype) @ (z.flatten(0, 1) / term.temp).T.to(dtype)  # [K, C·n]
    log_q = exact(logits).log_softmax(dim=0).unflatten(1, (crops, samples))
    agreement = (targets[:, None] * log_q).sum(dim=(0, 1))  # [n]
    return -torch.sum(agreement * term.weights[start : start + samples])
