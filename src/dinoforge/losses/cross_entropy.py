"""Cross-entropy between teacher targets and student logits without ever holding all logits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dinoforge.losses.targets import Targets
from dinoforge.losses.tiles import columns_at_once, multiply, multiply_add, product_dtype, tiles


@dataclass(frozen=True)
class Term:
    """A part of a loss: crops of the student held against targets of the teacher.

        for c in range(C):
            for i in range(G):
                for samples in sources:
                    loss -= weights[i] * dot(targets[samples][i], log_softmax(logits[c, i]))

    with ``logits = embeddings @ prototypes.T / temp``.

    Args:
        embeddings: normalised student bottlenecks [C, G, d]: C crops that share targets.
        targets: of the teacher.
        sources: slices of the targets' samples, each of length G.
        weights: [G].
        temp: the student's temperature.
    """

    embeddings: Tensor
    targets: Targets
    sources: tuple[slice, ...]
    weights: Tensor
    temp: float


class _CrossEntropy(torch.autograd.Function):
    """Computes the gradient in the forward pass, chunk by chunk, since everything it needs is at hand there."""

    @staticmethod
    def forward(
        ctx: Any, prototypes: Tensor, terms: Sequence[Term], dtype: torch.dtype, *embeddings: Tensor
    ) -> tuple[Tensor, Tensor]:
        w = prototypes.to(dtype)
        grad_prototypes = torch.zeros_like(prototypes) if ctx.needs_input_grad[0] else None
        values, gradients = [], []
        for term, needs_gradient in zip(terms, ctx.needs_input_grad[3:], strict=True):
            gradient = torch.zeros_like(term.embeddings) if needs_gradient else None
            values.append(_accumulate(term, w, gradient, grad_prototypes))
            gradients.append(gradient)
        ctx.save_for_backward(grad_prototypes, *gradients)
        each = torch.stack(values)
        ctx.mark_non_differentiable(each)
        return each.sum(), each

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        grad_prototypes, *gradients = (
            None if gradient is None else gradient * grad_outputs[0] for gradient in ctx.saved_tensors
        )
        return grad_prototypes, None, None, *gradients


def cross_entropy(terms: Sequence[Term], prototypes: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted cross-entropies of student logits against teacher targets.

    Logits exist for a few samples at a time; the gradient is computed on the way, so memory does not grow with the
    number of samples times K. Under autocast to bfloat16 the products run in it; sums, softmax and loss are float32.

    Args:
        terms: what is held against what; at least one.
        prototypes: effective weight of the student's last layer [K, d].

    Returns:
        The sum of the terms, and each term [len(terms)] without a gradient.
    """
    embeddings = [term.embeddings for term in terms]
    dtype = product_dtype(embeddings[0])
    with torch.autocast(prototypes.device.type, enabled=False):
        total, each = _CrossEntropy.apply(prototypes, terms, dtype, *embeddings)
    return total, each


def _accumulate(term: Term, w: Tensor, gradient: Tensor | None, grad_prototypes: Tensor | None) -> Tensor:
    """The value of a term; its gradients are added to ``gradient`` [C, G, d] and ``grad_prototypes`` [K, d]."""
    crops, samples, _ = term.embeddings.shape
    at_once = max(1, columns_at_once(len(w), w.device) // max(crops, 1))
    value = term.embeddings.new_zeros((), dtype=torch.float32)
    for start in range(0, samples if crops else 0, at_once):
        chunk = slice(start, min(start + at_once, samples))
        z = term.embeddings[:, chunk].flatten(0, 1) / term.temp  # [n, d], n = crops · g
        targets = [slice(s.start + chunk.start, s.start + chunk.stop) for s in term.sources]
        weights = term.weights[chunk].repeat(crops)  # [n]
        loss, softmax, scales = _forward(z.to(w.dtype), w, term.targets, targets)
        value += torch.dot(weights, loss)
        if gradient is None and grad_prototypes is None:
            continue
        grad_z = torch.zeros_like(z) if gradient is not None else None
        rows = (z * weights[:, None]).to(w.dtype)
        _backward(softmax, scales, rows, w, term.targets, targets, grad_z, grad_prototypes)
        if gradient is not None and grad_z is not None:
            grad_z *= (weights / term.temp)[:, None]
            gradient[:, chunk] = grad_z.unflatten(0, (crops, -1))
    return value


def _forward(
    z: Tensor, w: Tensor, targets: Targets, samples: list[slice]
) -> tuple[Tensor, Tensor, list[tuple[slice, Tensor]]]:
    """Cross-entropy of each column.

    Returns:
        The loss [n]; unnormalised exponentials [K, n]; and per tile of prototypes the factor [n] that makes them
        probabilities, times the number of targets.
    """
    columns = z.T.contiguous()  # [d, n]
    exponentials = z.new_empty(len(w), len(z), dtype=torch.float32)
    top = exponentials.new_full((len(z),), -torch.inf)  # running maximum of each column
    mass, agreement = torch.zeros_like(top), torch.zeros_like(top)
    tops: list[tuple[slice, Tensor]] = []
    for tile in tiles(len(w), len(z), w.device):
        logits = multiply(w[tile], columns, out=exponentials[tile])  # [k, n]
        agreement += (_per_crop(logits, samples) * _mixed(targets, tile, samples)).sum(dim=0).flatten()
        new_top = torch.maximum(top, logits.amax(dim=0))
        mass = mass * (top - new_top).exp_() + logits.sub_(new_top).exp_().sum(dim=0)
        tops.append((tile, new_top))
        top = new_top
    # Targets sum to one.
    loss = len(samples) * (top + mass.log()) - agreement
    scales = [(tile, len(samples) * (tile_top - top).exp_() / mass) for tile, tile_top in tops]
    return loss, exponentials, scales


def _backward(
    exponentials: Tensor,
    scales: list[tuple[slice, Tensor]],
    rows: Tensor,
    w: Tensor,
    targets: Targets,
    samples: list[slice],
    grad_z: Tensor | None,
    grad_prototypes: Tensor | None,
) -> None:
    """Adds the gradients of the unweighted loss to ``grad_z`` [n, d], of the weighted one to ``grad_prototypes``."""
    grad_columns = None if grad_z is None else grad_z.T.contiguous()  # [d, n]
    for tile, scale in scales:
        gradient = exponentials[tile].mul_(scale)  # d loss / d logits = softmax - targets
        _per_crop(gradient, samples).sub_(_mixed(targets, tile, samples))
        gradient = gradient.to(w.dtype)
        if grad_columns is not None:
            multiply_add(w[tile].T, gradient, out=grad_columns)
        if grad_prototypes is not None:
            multiply_add(gradient, rows, out=grad_prototypes[tile])
    if grad_z is not None and grad_columns is not None:
        grad_z.copy_(grad_columns.T)


def _per_crop(matrix: Tensor, samples: list[slice]) -> Tensor:
    """[k, n] as [k, crops, g]."""
    shaped: Tensor = matrix.unflatten(1, (-1, samples[0].stop - samples[0].start))
    return shaped


def _mixed(targets: Targets, tile: slice, samples: list[slice]) -> Tensor:
    """The sum of the targets that crops share [k, 1, g]."""
    mixed = targets.tile(tile, samples[0])
    for more in samples[1:]:
        mixed += targets.tile(tile, more)
    return mixed[:, None]
