"""The door to the arithmetic: the operations that the method and the networks are made of.

Each operation has a definition in ``plain`` and a fast twin for CPUs. Accelerators, compiled or exported graphs, and
callers that ask by ``using`` take the plain definition.
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
    """Select the kernels that compute this thread's operations in the context, including their backward passes."""
    before = _asked.set(kernels)
    try:
        yield
    finally:
        _asked.reset(before)


def _by_fast(x: Tensor) -> bool:
    """Return whether fast twins compute on ``x``."""
    return not torch.compiler.is_compiling() and x.device.type == "cpu" and _asked.get() != "plain"


def norm_linear(x: Tensor, norm: nn.LayerNorm, linear: nn.Linear) -> Tensor:
    """Compute ``linear(norm(x))`` [T, D'], the start of a residual branch.

    Args:
        x: The tokens [T, D].
        norm: The norm over D.
        linear: The linear layer from D to D'.
    """
    if not (_by_fast(x) and private.layer_norm_backward()):
        return plain.norm_linear(x, norm, linear)
    dtype = product_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        out: Tensor = NormLinear.apply(x, norm.weight, norm.bias, norm.eps, linear.weight, linear.bias, dtype)
    return out


def scaled_linear(x: Tensor, linear: nn.Linear, scale: Tensor | None, *, gelu: bool = False) -> Tensor:
    """Compute ``linear(x) * scale`` or ``linear(gelu(x)) * scale`` [T, D]: the end of a branch, or a layer of an MLP.

    Args:
        x: The tokens [T, D'].
        linear: The linear layer from D' to D.
        scale: LayerScale's factors [D]; None for 1.
        gelu: Whether to apply GELU to ``x`` first.
    """
    dtype = product_dtype(x)
    scaled_in_float16 = dtype is torch.float16 and scale is not None  # scaled weights would lose their gradient
    if scaled_in_float16 or not (_by_fast(x) and (private.gelu_backward() or not gelu)):
        return plain.scaled_linear(x, linear, scale, gelu)
    with torch.autocast(x.device.type, enabled=False):
        out: Tensor = ScaledLinear.apply(x.to(dtype), linear.weight, linear.bias, scale, gelu)
    return out


def attention(qkv: Tensor, groups: Groups, num_heads: int) -> Tensor:
    """Compute attention among the tokens of each image [T, D].

    Args:
        qkv: The queries, keys and values of packed tokens [T, 3D].
        groups: The groups of the tokens, which say where images begin.
        num_heads: The number of heads, which divides D.
    """
    twin = _fast_attention(qkv.dtype) if _by_fast(qkv) else None
    if twin is None:
        return plain.attention(qkv, groups, num_heads)
    out: Tensor = twin.apply(qkv, groups, num_heads)
    return out


def _fast_attention(dtype: torch.dtype) -> type[torch.autograd.Function] | None:
    """Return the fast twin of attention; None if this PyTorch lacks the twin's operators."""
    if dtype.itemsize == 2:
        return HalfAttentionOnCpu if private.softmax_backward() else None
    return AttentionOnCpu if private.flash_attention() and private.flash_attention_backward() else None


def take_rows(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Take some rows of ``x`` for a residual branch.

    Args:
        x: The tokens [T, D].
        rows: Distinct indices [T'].

    Returns:
        The residual stream [T, D], which only ``add_rows`` may read, and the rows [T', D].
    """
    if not _by_fast(x):
        return plain.take_rows(x, rows)
    stream, taken = Take.apply(x, rows)
    return stream, taken


def add_rows(x: Tensor, branch: Tensor, subset: Subset) -> Tensor:
    """Add a branch computed on a subset of the images, scaled so that its expectation is that of the whole branch.

    Args:
        x: The residual stream [T, D].
        branch: The branch's output for the rows of the subset [T', D].
        subset: The images that the branch keeps.
    """
    if not _by_fast(x):
        return plain.add_rows(x, branch, subset)
    out: Tensor = AddTo.apply(x, branch, subset)
    return out


def even_rows(x: Tensor) -> Tensor:
    """Pad ``x`` [N, D] with zero rows to one of few sizes, on a CPU, where each new size costs time."""
    return F.pad(x, (0, 0, 0, padded(len(x)) - len(x))) if _by_fast(x) else x


@torch.no_grad()
def teacher_logits(
    embeddings: Tensor, weight_g: Tensor, weight_v: Tensor, temp: float, *, scratch: Scratch, name: str = "teacher"
) -> Tensor:
    """Compute the teacher's logits over temperature, prototypes first [K, N], in the precision of the product.

    Args:
        embeddings: The normalised teacher bottlenecks [N, d].
        weight_g, weight_v: The parameters of the teacher's last layer [K, 1], [K, d].
        temp: The teacher's temperature.
        scratch: The scratch memory that may hold the logits.
        name: The name of the logits' block in ``scratch``. The next logits of this name overwrite the block.
    """
    if _by_fast(embeddings):
        return fast_targets.teacher_logits(embeddings, weight_g, weight_v, temp, scratch=scratch, name=name)
    dtype = last_layer_dtype(embeddings)
    with torch.autocast(embeddings.device.type, enabled=False):
        return plain.teacher_logits(embeddings, weight_g, weight_v, temp, dtype)


@torch.no_grad()
def centering(logits: Tensor, center: Tensor, temp: float) -> Targets:
    """Compute targets by centering: ``softmax((logits - center) / temp)``.

    Args:
        logits: The teacher's logits, already over temperature [K, N]; see ``teacher_logits``. The targets may overwrite
            them.
        center: The running mean of earlier logits [K].
        temp: The teacher's temperature, which divides the centre.

    Source: DINO (arXiv 2104.14294), section 3.1.
    """
    if _by_fast(logits):
        return fast_targets.centering(logits, center, temp)
    with torch.autocast(logits.device.type, enabled=False):
        return plain.centering(logits, center, temp)


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, iterations: int = 3, largest: float | None = None) -> Targets:
    """Compute targets by Sinkhorn-Knopp: a balanced assignment of the samples of all ranks to prototypes.

    Each iteration scales the matrix ``exp(logits)`` so that all prototypes have equal mass, and then so that all
    samples have equal mass. Samples come last, so each sample's probabilities sum to one. As pseudocode, with N samples
    on all ranks:

        for i in range(iterations):
            for k in range(K): u[k] = 1 / sum(exp(logits[k, n]) * v[n] for n in range(N))
            for n in range(N): v[n] = 1 / sum(exp(logits[k, n]) * u[k] for k in range(K))

    The constant masses 1/K and 1/N cancel.

    Args:
        logits: The teacher's logits over temperature for the samples of this rank [K, n]; see ``teacher_logits``. n may
            be 0 on some ranks. The targets may overwrite the logits.
        iterations: The number of iterations; 3 in SwAV (arXiv 2006.09882, section 3.1) and DINOv2 (arXiv 2304.07193,
            section 4).
        largest: An upper bound on the absolute values of the logits of all ranks, the same on all ranks; None if there
            is no known bound.
    """
    if _by_fast(logits):
        return fast_targets.sinkhorn_knopp(logits, iterations, largest)
    with torch.autocast(logits.device.type, enabled=False):
        return plain.sinkhorn_knopp(logits, iterations)


def cross_entropy(
    terms: Sequence[Term], weight_g: Tensor, weight_v: Tensor, scratch: Scratch, layer: LastLayer | None = None
) -> tuple[Tensor, Tensor]:
    """Compute weighted cross-entropies of student logits against teacher targets.

    Logits exist for a few samples at a time, so memory does not grow with the number of samples times K. Under autocast
    to bfloat16, products run in bfloat16; sums, softmax and loss are float32.

    Args:
        terms: The terms, at least one.
        weight_g, weight_v: The parameters of the student's weight-normed last layer [K, 1], [K, d].
        scratch: The scratch memory, kept between calls.
        layer: The state that this call shares with the other calls of the step; the sums of all calls must get the same
            gradient. The weights may get their gradient from the last call only.

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
        moved: The tensors to move. Of sharded tensors, this rank's part is moved.
        target: Tensors of the same shapes, sharded alike.
        share: The share of the way, from 0 to 1.
    """
    torch._foreach_lerp_(distributed.shards(list(moved)), distributed.shards(list(target)), share)
