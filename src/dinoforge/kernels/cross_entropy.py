"""Cross-entropy between teacher targets and student logits on a CPU, without ever storing all logits."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dinoforge.kernels.precision import last_layer_dtype
from dinoforge.kernels.products import linear, padded
from dinoforge.kernels.tiles import (
    Scratch,
    add_product,
    columns_at_once,
    effective_weight,
    largest_logit,
    tiles,
)
from dinoforge.kernels.types import Term

_SAFE_EXPONENT = 40.0  # sums and products of exponentials up to this do not overflow


@dataclass(frozen=True)
class _Piece:
    """Samples of a term as columns of a chunk: n = crops · samples of them, crop-major.

    Args:
        number: The number of the term.
        term: The term.
        samples: The samples of each of the term's crops.
        columns: The columns of the chunk.
    """

    number: int
    term: Term
    samples: slice
    columns: slice

    @property
    def z(self) -> Tensor:
        """The embeddings of the columns over temperature [n, d]."""
        return self.term.embeddings[:, self.samples].flatten(0, 1) / self.term.temp

    @property
    def weights(self) -> Tensor:
        """The weights of the columns [n]."""
        return self.term.weights[self.samples].repeat(len(self.term.embeddings))

    def agreement(self, logits: Tensor, tile: slice) -> Tensor:
        """Sum target times logit over a tile of prototypes [n], for logits [k, N] of all the chunk's columns."""
        own = logits[:, self.columns]
        if len(self.term.embeddings) == 1:
            parts = [self.term.targets.agreement(own, tile, samples) for samples in self.sources]
            return sum(parts[1:], start=parts[0])
        return (self._per_crop(own) * self._mixed(tile)).sum(dim=0).flatten()

    def subtract_targets(self, gradient: Tensor, tile: slice) -> None:
        """Subtract the targets from a matrix [k, N] over a tile of prototypes and all the chunk's columns."""
        own = gradient[:, self.columns]
        if len(self.term.embeddings) == 1:
            for samples in self.sources:
                self.term.targets.subtract_from(own, tile, samples)
        else:
            self._per_crop(own).sub_(self._mixed(tile))

    @property
    def sources(self) -> list[slice]:
        """The slices of the targets' samples."""
        return [slice(s.start + self.samples.start, s.start + self.samples.stop) for s in self.term.sources]

    def _per_crop(self, own: Tensor) -> Tensor:
        """View [k, n] as [k, crops, g]."""
        shaped: Tensor = own.unflatten(1, (len(self.term.embeddings), -1))
        return shaped

    def _mixed(self, tile: slice) -> Tensor:
        """Sum the targets that the crops share [k, 1, g]."""
        first, *others = self.sources
        mixed = self.term.targets.tile(tile, first)
        for more in others:
            mixed += self.term.targets.tile(tile, more)
        return mixed[:, None]


@dataclass
class LastLayer:
    """The state of the student's weight-normed last layer in a step that calls ``cross_entropy`` several times.

    The first call computes the effective weight. All calls add to one gradient, which the last call returns. So neither
    is computed again or stored twice. Between the calls, no other code may use the scratch memory called ``name``.

    Args:
        calls: The number of calls to come.
        name: The name of the weight's block in scratch memory.
    """

    calls: int = 1
    name: str = "weight"
    weight: Tensor = field(init=False)  # the effective weight [K, d], in scratch memory
    lengths: Tensor = field(init=False)  # the lengths of the rows of ``weight_v`` [K, 1]
    gradient: Tensor | None = field(init=False, default=None)  # the gradient of the effective weight [K, d]
    begun: bool = field(init=False, default=False)  # whether a call was made


def _kind(numbered: tuple[int, Term]) -> tuple[int, int]:
    _, term = numbered
    return len(term.embeddings), len(term.sources)


def _chunks(terms: Sequence[tuple[int, Term]], most: int) -> Iterator[list[_Piece]]:
    """Cut the columns of numbered terms into chunks of about equal size, of at most ``most`` columns if crops allow.

    Args:
        terms: The terms with their numbers.
        most: The maximum number of columns in a chunk.
    """
    total = sum(term.embeddings.shape[0] * term.embeddings.shape[1] for _, term in terms)
    # A chunk holds all crops of a sample. The room for them avoids a last chunk of a few columns.
    size = -(-total // max(1, -(-total // most))) + max(len(term.embeddings) for _, term in terms) - 1
    chunk: list[_Piece] = []
    filled = 0
    for number, term in terms:
        crops, samples, _ = term.embeddings.shape
        start = 0 if crops else samples
        while start < samples:
            count = min(max((size - filled) // crops, 0 if chunk else 1), samples - start)
            if count:
                stop = filled + crops * count
                chunk.append(_Piece(number, term, slice(start, start + count), slice(filled, stop)))
                start, filled = start + count, stop
            else:
                yield chunk
                chunk, filled = [], 0
    if chunk:
        yield chunk


class _CrossEntropy(torch.autograd.Function):
    """Computes the gradient in the forward pass, chunk by chunk, while the exponentials of a chunk are in memory."""

    @staticmethod
    def forward(
        ctx: Any,
        weight_g: Tensor,
        weight_v: Tensor,
        terms: Sequence[Term],
        dtype: torch.dtype,
        scratch: Scratch,
        layer: LastLayer,
        *embeddings: Tensor,
    ) -> tuple[Tensor, Tensor]:
        if not layer.begun:
            layer.weight, layer.lengths = effective_weight(weight_g, weight_v, dtype, scratch, layer.name)
            layer.gradient = torch.empty_like(weight_v) if any(ctx.needs_input_grad[:2]) else None
        w, grad_w = layer.weight, layer.gradient
        values = torch.zeros(len(terms), dtype=torch.float32, device=w.device)
        gradients = [
            torch.zeros_like(z) if n else None for z, n in zip(embeddings, ctx.needs_input_grad[6:], strict=True)
        ]
        largest = largest_logit(weight_g, min(term.temp for term in terms))
        most = columns_at_once(len(w), dtype)
        # Fewer and wider products are faster. In float32, separate chunks for each kind of crop round as the reference.
        numbered = list(enumerate(terms))
        kinds = [list(g) for _, g in groupby(numbered, _kind)] if dtype is torch.float32 else [numbered]
        chunks = [chunk for kind in kinds for chunk in _chunks(kind, most)]
        if grad_w is not None and not chunks and not layer.begun:
            grad_w.zero_()
        for number, chunk in enumerate(chunks):
            first = number == 0 and not layer.begun
            _accumulate(chunk, w, values, gradients, grad_w, first=first, largest=largest, scratch=scratch)
        layer.begun, layer.calls = True, layer.calls - 1
        if layer.calls:
            grad_w = None
        else:
            layer.gradient = None
        ctx.save_for_backward(weight_g, weight_v, layer.lengths, grad_w, *gradients)
        ctx.mark_non_differentiable(values)
        return values.sum(), values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        weight_g, weight_v, lengths, grad_w, *gradients = ctx.saved_tensors
        gradients = [None if gradient is None else gradient.mul_(grad_outputs[0]) for gradient in gradients]
        grad_g = None
        if grad_w is not None:
            # The effective weight g v / |v| has the gradients (dw · v) / |v| and g / |v| (dw - (dw · v) v / |v|²).
            grad_g = torch.empty_like(weight_g)
            for tile in tiles(len(weight_v), weight_v.shape[1], weight_v.device):
                v, length, dw = weight_v[tile], lengths[tile], grad_w[tile].mul_(grad_outputs[0])
                along = (dw * v).sum(dim=1, keepdim=True) / length
                grad_g[tile] = along
                dw.sub_(v * (along / length)).mul_(weight_g[tile] / length)
        return grad_g, grad_w, None, None, None, None, *gradients


def cross_entropy(
    terms: Sequence[Term], weight_g: Tensor, weight_v: Tensor, scratch: Scratch, layer: LastLayer | None = None
) -> tuple[Tensor, Tensor]:
    """Compute ``ops.cross_entropy`` and its gradient; only the last call of ``layer`` gives the weights a gradient."""
    embeddings = [term.embeddings for term in terms]
    dtype = last_layer_dtype(embeddings[0])
    with torch.autocast(weight_v.device.type, enabled=False):
        total, each = _CrossEntropy.apply(weight_g, weight_v, terms, dtype, scratch, layer or LastLayer(), *embeddings)
    return total, each


def _accumulate(
    chunk: list[_Piece],
    w: Tensor,
    values: Tensor,
    gradients: Sequence[Tensor | None],
    grad_w: Tensor | None,
    *,
    first: bool,
    largest: float | None,
    scratch: Scratch,
) -> None:
    """Add a chunk's part to the values of its terms, their gradients [C, G, d] and ``grad_w`` [K, d]."""
    filled = chunk[-1].columns.stop
    unused = padded(filled) - filled
    z = torch.cat([piece.z for piece in chunk])  # [n, d]
    z = F.pad(z, (0, 0, 0, unused))
    weights = F.pad(torch.cat([piece.weights for piece in chunk]), (0, unused))  # [n]
    loss, exponentials, scales = _forward(chunk, z, w, largest, scratch)
    loss *= weights
    for piece in chunk:
        values[piece.number] += loss[piece.columns].sum()
    for_terms = any(gradients[piece.number] is not None for piece in chunk)
    if not for_terms and grad_w is None:
        return
    grad_z = torch.zeros_like(z) if for_terms else None
    rows = (z * weights[:, None]).to(w.dtype)
    _backward(chunk, exponentials, scales, rows, w, grad_z, grad_w, first=first)
    for piece in chunk:
        gradient = gradients[piece.number]
        if gradient is not None and grad_z is not None:
            factors = (piece.weights / piece.term.temp)[:, None]
            gradient[:, piece.samples] = (grad_z[piece.columns] * factors).unflatten(0, (len(gradient), -1))


def _forward(
    chunk: list[_Piece], z: Tensor, w: Tensor, largest: float | None, scratch: Scratch
) -> tuple[Tensor, Tensor, list[tuple[slice, Tensor]]]:
    """Compute the cross-entropy of each column.

    Args:
        chunk: The pieces that make up the columns.
        z: The embeddings over temperature [n, d].
        w: The effective weight [K, d].
        largest: An upper bound on the absolute values of the logits; None if there is no known bound.
        scratch: The scratch memory that holds the exponentials.

    Returns:
        The loss [n]; the unnormalised exponentials [K, n], in the precision of ``w``; and for each tile of prototypes
        the factor [n] that turns exponentials into probabilities, times the number of targets.
    """
    rows = z.to(w.dtype)
    exponentials = scratch.take("student", (len(w), len(z)), w.dtype, w.device)
    exact = torch.promote_types(w.dtype, torch.float32)
    safe = largest is not None and largest < _SAFE_EXPONENT
    # Exponentials are taken of logits minus the running maximum of their column; of small logits as they are.
    top = torch.full((len(z),), 0.0 if safe else -torch.inf, dtype=exact, device=w.device)
    mass, agreement = torch.zeros_like(top), torch.zeros_like(top)
    tops: list[tuple[slice, Tensor]] = []
    for tile in tiles(len(w), len(z), w.device):
        logits = linear(w[tile], rows, place=exponentials[tile])  # [k, n]
        for piece in chunk:
            agreement[piece.columns] += piece.agreement(logits, tile)
        if not safe:
            new_top = torch.maximum(top, logits.amax(dim=0))
            mass *= (top - new_top).exp_()
            top = new_top
            logits = logits.sub_(top) if logits.dtype == exact else logits - top
        if logits.dtype == w.dtype:
            logits = torch.exp(logits, out=exponentials[tile])
        else:
            exponentials[tile] = logits.exp_()
        mass += logits.sum(dim=0, dtype=exact)
        tops.append((tile, top))
    targets = torch.zeros_like(top)  # number of targets of each column
    for piece in chunk:
        targets[piece.columns] = len(piece.term.sources)
    loss = targets * (top + mass.log()) - agreement  # targets sum to one
    scales = [(tile, targets * (tile_top - top).exp_() / mass) for tile, tile_top in tops]
    return loss, exponentials, scales


def _backward(
    chunk: list[_Piece],
    exponentials: Tensor,
    scales: list[tuple[slice, Tensor]],
    rows: Tensor,
    w: Tensor,
    grad_z: Tensor | None,
    grad_w: Tensor | None,
    *,
    first: bool,
) -> None:
    """Add the gradient of the unweighted loss to ``grad_z`` [n, d], and that of the weighted loss to ``grad_w`` [K, d].

    The first chunk overwrites ``grad_w`` instead.
    """
    grad_columns = None if grad_z is None else grad_z.T.contiguous()  # [d, n]
    for tile, scale in scales:
        gradient = exponentials[tile] * scale  # d loss / d logits = softmax - targets
        for piece in chunk:
            piece.subtract_targets(gradient, tile)
        gradient = gradient.to(w.dtype)
        if grad_columns is not None:
            add_product(w[tile].T, gradient, out=grad_columns)
        if grad_w is not None and first and rows.dtype == grad_w.dtype:
            torch.mm(gradient, rows, out=grad_w[tile])
        elif grad_w is not None and first:
            grad_w[tile] = gradient @ rows
        elif grad_w is not None:
            add_product(gradient, rows, out=grad_w[tile])
    if grad_z is not None and grad_columns is not None:
        grad_z.copy_(grad_columns.T)
