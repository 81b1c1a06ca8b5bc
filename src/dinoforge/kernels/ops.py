"""The door to the arithmetic: the operations that the method and the networks are made of.

Each has a definition in ``plain`` and a fast twin for CPUs. The plain one is what accelerators take, and graphs that
are compiled or exported, and whoever asks for it by ``using``.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoforge.kernels import cross_entropy as cross_entropies
from dinoforge.kernels import plain, private
from dinoforge.kernels import targets as fast_targets
from dinoforge.kernels.attention import AttentionOnCpu, HalfAttentionOnCpu
from dinoforge.kernels.cross_entropy import LastLayer
from dinoforge.kernels.linear import NormLinear, ScaledLinear
from dinoforge.kernels.precision import last_layer_dtype, product_dtype
from dinoforge.kernels.products import padded
from dinoforge.kernels.residual import AddTo, Take
from dinoforge.kernels.tiles import Scratch, largest_logit
from dinoforge.kernels.types import Groups, Subset, Targets, Term
from dinoforge.system import distributed

__all__ = [
    "Kernels",
    "LastLayer",
    "Scratch",
    "Targets",
    "Term",
    "add_rows",
    "attention",
    "centering",
    "cross_entropy",
    "even_rows",
    "largest_logit",
    "move_towards",
    "norm_linear",
    "scaled_linear",
    "sinkhorn_knopp",
    "take_rows",
    "teacher_logits",
    "using",
]

Kernels = Literal["auto", "fast", "plain"]
"""``auto`` and ``fast`` take the fast twins on a CPU; the recipe's ``fast`` refuses other devices."""

_asked: ContextVar[Kernels] = ContextVar("_asked", default="auto")


@contextmanager
def using(kernels: Kernels) -> Iterator[None]:
    """A context in which operations of this thread, backward passes included, are computed by ``kernels``."""
    before = _asked.set(kernels)
    try:
        yield
    finally:
        _asked.reset(before)


def _by_fast(x: Tensor) -> bool:
    """Whether fast twins compute on ``x``."""
    return not torch.compiler.is_compiling() and x.device.type == "cpu" and _asked.get() != "plain"


def norm_linear(x: Tensor, norm: nn.LayerNorm, linear: nn.Linear) -> Tensor:
    """``linear(norm(x))``: the start of a residual branch.

    Args:
        x: [T, D].
        norm: over D.
        linear: from D to D'.
    """
    if not (_by_fast(x) and private.layer_norm_backward()):
        return plain.norm_linear(x, norm, linear)
    dtype = product_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        out: Tensor = NormLinear.apply(x, norm.weight, norm.bias, norm.eps, linear.weight, linear.bias, dtype)
    return out


def scaled_linear(x: Tensor, linear: nn.Linear, scale: Tensor | None, *, gelu: bool = False) -> Tensor:
    """``linear(x) * scale``, or ``linear(gelu(x)) * scale``: the end of a residual branch, or a layer of an MLP.

    Args:
        x: [T, D'].
        linear: from D' to D.
        scale: LayerScale's factors [D], or None.
        gelu: whether to apply it first.
    """
    dtype = product_dtype(x)
    scaled_in_float16 = dtype is torch.float16 and scale is not None  # by the weights, it would lose their gradient
    if scaled_in_float16 or not (_by_fast(x) and (private.gelu_backward() or not gelu)):
        return plain.scaled_linear(x, linear, scale, gelu)
    with torch.autocast(x.device.type, enabled=False):
        out: Tensor = ScaledLinear.apply(x.to(dtype), linear.weight, linear.bias, scale, gelu)
    return out


def attention(qkv: Tensor, groups: Groups, num_heads: int) -> Tensor:
    """What each token gathers from its image [T, D].

    Args:
        qkv: queries, keys and values of packed tokens [T, 3D].
        groups: which tokens belong together.
        num_heads: of equal width.
    """
    twin = _fast_attention(qkv.dtype) if _by_fast(qkv) else None
    if twin is None:
        return plain.attention(qkv, groups, num_heads)
    out: Tensor = twin.apply(qkv, groups, num_heads)
    return out


def _fast_attention(dtype: torch.dtype) -> type[torch.autograd.Function] | None:
    """The fast twin of attention; None if this PyTorch lacks what it is made of."""
    if dtype.itemsize == 2:
        return HalfAttentionOnCpu if private.softmax_backward() else None
    return AttentionOnCpu if private.flash_attention() and private.flash_attention_backward() else None


def take_rows(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` for the residual stream, which ``add_rows`` reads and nothing else, and some of its rows for a branch.

    Args:
        x: [T, D].
        rows: distinct indices [T'].
    """
    if not _by_fast(x):
        return plain.take_rows(x, rows)
    stream, taken = Take.apply(x, rows)
    return stream, taken


def add_rows(x: Tensor, branch: Tensor, subset: Subset) -> Tensor:
    """Adds a branch that saw a subset of the images, scaled so that its expectation is the whole branch's.

    Args:
        x: the residual stream [T, D].
        branch: of the subset's rows [T', D].
        subset: what the branch saw.
    """
    if not _by_fast(x):
        return plain.add_rows(x, branch, subset)
    out: Tensor = AddTo.apply(x, branch, subset)
    return out


def even_rows(x: Tensor) -> Tensor:
    """``x`` [N, D] with rows of zeros up to a number that comes again, where each new number costs a CPU time."""
    return F.pad(x, (0, 0, 0, padded(len(x)) - len(x))) if _by_fast(x) else x


@torch.no_grad()
def teacher_logits(
    embeddings: Tensor, weight_g: Tensor, weight_v: Tensor, temp: float, *, scratch: Scratch, name: str = "teacher"
) -> Tensor:
    """Logits over temperature, prototypes first [K, N], in the precision of the product.

    Args:
        embeddings: normalised teacher bottlenecks [N, d].
        weight_g, weight_v: of the teacher's last layer [K, 1], [K, d].
        temp: the teacher's temperature.
        scratch: whose memory ``name`` the logits may take.
        name: of logits that are not needed beside others of this name.
    """
    if _by_fast(embeddings):
        return fast_targets.teacher_logits(embeddings, weight_g, weight_v, temp, scratch=scratch, name=name)
    dtype = last_layer_dtype(embeddings)
    with torch.autocast(embeddings.device.type, enabled=False):
        return plain.teacher_logits(embeddings, weight_g, weight_v, temp, dtype)


@torch.no_grad()
def centering(logits: Tensor, center: Tensor, temp: float) -> Targets:
    """``softmax((logits - center) / temp)``; the targets may take the memory of the logits.

    Args:
        logits: of the teacher, over temperature [K, N], see ``teacher_logits``; not to be read again.
        center: running mean of earlier logits [K].
        temp: the teacher's temperature, for the centre.

    Source: DINO (arXiv 2104.14294), section 3.1.
    """
    if _by_fast(logits):
        return fast_targets.centering(logits, center, temp)
    with torch.autocast(logits.device.type, enabled=False):
        return plain.centering(logits, center, temp)


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, iterations: int = 3, largest: float | None = None) -> Targets:
    """Balanced assignment of the samples of all ranks to prototypes; the targets may take the memory of the logits.

    Each iteration scales the matrix ``exp(logits)`` so that all prototypes have equal mass, then so that all samples
    have; the last word is the samples', so each sample's probabilities sum to one. As pseudocode, with N samples on
    all ranks:

        for i in range(iterations):
            for k in range(K): u[k] = 1 / sum(exp(logits[k, n]) * v[n] for n in range(N))
            for n in range(N): v[n] = 1 / sum(exp(logits[k, n]) * u[k] for k in range(K))

    The constant masses 1/K and 1/N cancel.

    Args:
        logits: of the teacher, over temperature [K, n], the samples of this rank, see ``teacher_logits``; n may be 0
            on some; not to be read again.
        iterations: 3 in SwAV (arXiv 2006.09882, section 3.1) and DINOv2 (arXiv 2304.07193, section 4).
        largest: what no logit of any rank exceeds in size, the same on all ranks; None if that is not known.
    """
    if _by_fast(logits):
        return fast_targets.sinkhorn_knopp(logits, iterations, largest)
    with torch.autocast(logits.device.type, enabled=False):
        return plain.sinkhorn_knopp(logits, iterations)


def cross_entropy(
    terms: Sequence[Term], weight_g: Tensor, weight_v: Tensor, scratch: Scratch, layer: LastLayer | None = None
) -> tuple[Tensor, Tensor]:
    """Weighted cross-entropies of student logits against teacher targets.

    Logits exist for a few samples at a time, so memory does not grow with the number of samples times K. Under autocast
    to bfloat16 the products run in it; sums, softmax and loss are float32.

    Args:
        terms: what is held against what; at least one.
        weight_g, weight_v: of the student's weight-normed last layer [K, 1], [K, d].
        scratch: keeps memory between calls.
        layer: what this call has in common with others of the step, whose sums get the same gradient; the weights may
            get theirs from the last one.

    Returns:
        The sum of the terms, and each term [len(terms)] without a gradient.
    """
    embeddings = terms[0].embeddings
    if _by_fast(embeddings):
        return cross_entropies.cross_entropy(terms, weight_g, weight_v, scratch, layer)
    dtype = last_layer_dtype(embeddings)
    with torch.autocast(embeddings.device.type, enabled=False):
        return plain.cross_entropy(terms, weight_g, weight_v, dtype)


@torch.no_grad()
def move_towards(moved: Iterable[Tensor], target: Iterable[Tensor], share: float) -> None:
    """Move tensors a share of the way towards others, in place: ``moved += share * (target - moved)``.

    Args:
        moved: Moved in place; of sharded ones, this rank's part.
        target: Of the same shapes, sharded alike.
        share: From 0 to 1.
    """
    torch._foreach_lerp_(distributed.shards(list(moved)), distributed.shards(list(target)), share)
