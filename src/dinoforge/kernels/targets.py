"""Turn teacher logits into targets on a CPU, by centering and Sinkhorn-Knopp.

Both give probabilities of the form ``exp(logits / temp) · u[prototype] · v[sample]``. The exponentials overwrite the
logits, the only matrix that is kept. Readers compute the probabilities, a tile at a time.
"""

import torch
from torch import Tensor

from dinoforge.kernels.precision import exact, last_layer_dtype
from dinoforge.kernels.products import padded
from dinoforge.kernels.tiles import Scratch, effective_weight, tiles
from dinoforge.kernels.types import Targets
from dinoforge.system import distributed

_SAFE_RANGE = 70.0  # sums of exponentials this far apart neither overflow nor underflow in float32 and bfloat16


@torch.no_grad()
def teacher_logits(
    embeddings: Tensor, weight_g: Tensor, weight_v: Tensor, temp: float, *, scratch: Scratch, name: str = "teacher"
) -> Tensor:
    """Compute ``ops.teacher_logits`` in the scratch memory called ``name``."""
    dtype = last_layer_dtype(embeddings)
    w, _ = effective_weight(weight_g, weight_v, dtype, scratch)
    count = padded(len(embeddings))
    z = w.new_zeros(w.shape[1], count)
    z[:, : len(embeddings)] = (embeddings / temp).T
    logits = scratch.take(name, (len(w), count), dtype, w.device)
    with torch.autocast(w.device.type, enabled=False):
        for tile in tiles(len(w), count, w.device):
            torch.mm(w[tile], z, out=logits[tile])
    return logits[:, : len(embeddings)]


@torch.no_grad()
def centering(logits: Tensor, center: Tensor, temp: float) -> Targets:
    """Compute ``ops.centering``; the targets overwrite the logits."""
    per_sample = _exponentiate(logits, -center / temp)
    return Targets(logits, torch.ones_like(center), per_sample)


@torch.no_grad()
def sinkhorn_knopp(logits: Tensor, iterations: int = 3, largest: float | None = None) -> Targets:
    """Compute ``ops.sinkhorn_knopp``; the targets overwrite the logits.

    Exponentials are computed once, relative to each sample's largest logit. Two vectors then scale them. If logits are
    so far apart that exponentials could underflow, the first iteration works on logarithms instead. After this
    iteration, scaling each sample's largest entry to 1 leaves each prototype an entry of at least 1/N.
    """
    k, n = logits.shape
    every = list(tiles(k, n, logits.device))
    if largest is not None and 2 * largest < _SAFE_RANGE:
        v = (_exponentiate_over_largest(logits) - largest).exp_()
    else:
        log_mass = torch.cat([torch.logsumexp(exact(logits[tile]), dim=1) for tile in every])
        v = _exponentiate(logits, -distributed.logsumexp_over_ranks(log_mass))
        iterations -= 1
    u = v.new_ones(k)
    for _ in range(iterations):
        # One vector is divided by its maximum to stay in range, and the other compensates. On one rank, an iteration
        # reads each tile once.
        if distributed.is_active():
            u = torch.cat([torch.mv(exact(logits[tile]), v) for tile in every])
            u = distributed.sum_over_ranks(u).reciprocal_()
            u /= u.amax()
        elif n:
            v /= v.amax()
        mass = torch.zeros_like(v)
        for tile in every:
            part = exact(logits[tile])
            if not distributed.is_active():
                u[tile] = torch.mv(part, v).reciprocal_()
            mass.addmv_(part.T, u[tile])
        v = mass.reciprocal_()
    return Targets(logits, u, v)


def _exponentiate(logits: Tensor, shift: Tensor) -> Tensor:
    """Replace logits [K, N] by ``exp(logits + shift[prototype])``, divided by each sample's largest value.

    Returns:
        The factors [N] that make each sample sum to one.
    """
    k, n = logits.shape
    top = shift.new_full((n,), -torch.inf)
    for tile in tiles(k, n, logits.device):
        torch.maximum(top, (logits[tile] + shift[tile, None]).amax(dim=0), out=top)
    mass = torch.zeros_like(top)
    for tile in tiles(k, n, logits.device):
        # Logits in half precision are shifted in float32 and rounded once, after the exponential.
        part = exact(logits[tile]).add_(shift[tile, None]).sub_(top).exp_()
        if part.dtype != logits.dtype:
            part = logits[tile].copy_(part)
        mass += part.sum(dim=0, dtype=mass.dtype)  # of rounded values, so that each sample sums to one
    return mass.reciprocal_()


def _exponentiate_over_largest(logits: Tensor) -> Tensor:
    """Replace logits [K, N] by ``exp(logits - top[sample])``; return ``top`` [N], the largest logit of each sample."""
    k, n = logits.shape
    every = list(tiles(k, n, logits.device))
    top = torch.stack([logits[tile].amax(dim=0) for tile in every]).amax(dim=0)
    top = top.to(torch.promote_types(top.dtype, torch.float32))
    for tile in every:
        if logits.dtype == top.dtype:
            logits[tile].sub_(top).exp_()
        else:
            logits[tile] = (logits[tile] - top).exp_()
    return top
