"""What the teacher's features and targets, and the loss terms, of one step say about its health: docs/diagnosis.md.

Nothing here draws random numbers or changes what it reads, so a step gives the same weights with and without it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoforge.kernels.tiles import tiles
from dinoforge.kernels.types import Targets


class Diagnostics:
    """Numbers of one step, filled by ``StudentTeacher.forward``: scalars by name, of the samples of this rank.

    What a step cannot say, such as the entropy of targets that a recipe does without, or how features of different
    images spread where there is one image, is not there.
    """

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}
        self._images: int | None = None  # that are measured
        self._entropy: dict[str, Tensor] = {}  # of the targets of each loss, in nats
        self._log_prototypes: dict[str, float] = {}
        self._cross_entropies: dict[str, Tensor] = {}  # of the calls so far, in nats

    @torch.no_grad()
    def add_features(self, cls: Tensor, patches: Tensor, masks: Tensor) -> None:
        """Measures the teacher's tokens.

        Args:
            cls: of the global crops [2B, D], crop-major.
            patches: those that the student does not see [M, D], in the order of ``masks.flatten()``.
            masks: of the global crops [2B, N] bool.
        """
        cls = cls.float()
        self._images = len(cls) // 2
        self._add("effective_rank", effective_rank(cls[: self._images]))
        self._add("feature_norm", cls.norm(dim=1).mean())
        self._add("patch_similarity", patch_similarity(patches, masks))

    @torch.no_grad()
    def add_targets(self, loss: str, targets: Targets, weights: Tensor | None = None) -> None:
        """Measures the teacher's targets of one loss, ``dino`` or ``ibot``; ``weights`` [N] of samples in its mean."""
        measured = measure_targets(targets)
        if not len(measured.entropy):
            return
        if weights is None:
            weights = torch.ones_like(measured.entropy)
        self._entropy[loss] = torch.dot(weights, measured.entropy) / weights.sum()
        self._log_prototypes[loss] = math.log(len(targets.scaled))
        if len(targets.scaled) > 1:
            self._add(f"target_entropy.{loss}", self._entropy[loss] / self._log_prototypes[loss])
            if loss != "dino" or self._images != 1:  # two crops of one image do not say what depends on the image
                self._add(f"target_information.{loss}", measured.information / self._log_prototypes[loss])
        self._add(f"prototype_use.{loss}", measured.use)

    @torch.no_grad()
    def add_cross_entropies(self, terms: Mapping[str, Tensor]) -> None:
        """KL divergences from mean cross-entropies of pairs in nats: ``dino_global``, ``dino_local``, ``ibot``.

        Those of several calls add up.
        """
        for name, value in terms.items():
            loss = name.partition("_")[0]
            self._cross_entropies[name] = self._cross_entropies.get(name, 0) + value
            if self._log_prototypes.get(loss):
                divergence = self._cross_entropies[name] - self._entropy[loss]
                self._add(f"kl.{name}", divergence / self._log_prototypes[loss])

    def _add(self, name: str, value: Tensor | None) -> None:
        if value is not None:
            self.values[f"diag.{name}"] = value


def effective_rank(features: Tensor) -> Tensor | None:
    """In how many directions features [N, D] spread: ``exp(-sum(p * log(p)))``, p the singular values over their sum.

    1 where all are multiples of one vector, at most min(N, D). None for features that are not finite, and for fewer
    than two, which spread in one direction whatever they are.

    Source: Roy and Vetterli, "The effective rank"; as a measure of collapse: RankMe (arXiv 2210.02885).
    """
    if len(features) < 2 or not torch.isfinite(features).all():
        return None
    try:
        values = torch.linalg.svdvals(features.cpu().double())
    except RuntimeError:  # it does not converge for some matrices, which is no reason to end a run
        return None
    p = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
    rank: Tensor = torch.special.entr(p).sum().exp().float()
    return rank.to(features.device)


def patch_similarity(patches: Tensor, masks: Tensor) -> Tensor | None:
    """Mean cosine of two different patch tokens of a crop: its mean over crops that have at least two; None without.

        for c in crops: similarity += mean(cos(x, y) for x, y in patches[c] if x is not y) / C

    Args:
        patches: [M, D], in the order of ``masks.flatten()``.
        masks: [2B, N] bool.
    """
    if len(patches) < 2:
        return None
    count = masks.sum(dim=1)  # [2B]
    crop = torch.repeat_interleave(count, output_size=len(patches))  # [M]
    unit = F.normalize(patches.float(), dim=1)
    summed = unit.new_zeros(len(masks), unit.shape[1]).index_add_(0, crop, unit)
    own = unit.new_zeros(len(masks)).index_add_(0, crop, unit.square().sum(1))
    has_pairs = count > 1
    if not has_pairs.any():
        return None
    mean = (summed.square().sum(1) - own) / (count * (count - 1)).clamp_min(1)
    return mean[has_pairs].mean()


@dataclass(frozen=True)
class MeasuredTargets:
    """What ``measure_targets`` says."""

    entropy: Tensor  # of each sample's probabilities [N], in nats
    information: Tensor  # how much of the targets depends on the sample: mutual information in nats
    use: Tensor  # estimated share of the prototypes that are in use


def measure_targets(targets: Targets) -> MeasuredTargets:
    """The entropy of each target, what they say about the sample, and how many prototypes are some target's largest.

        information = entropy(mean(targets[n] for n in range(N))) - mean(entropy(targets[n]) for n in range(N))

    That is the divergence from the targets of whoever knows their mean, but not which sample it is about: a student
    has learned something where its own divergence is smaller.

        use = len({argmax(targets[n]) for n in range(N)}) / (K * (1 - (1 - 1 / K)**N))

    The denominator is how many different ones N samples choose on average, if each chooses among all K evenly. So 1
    means that all are used, however few samples there are; it is the share of K where there are many.
    """
    k, n = targets.scaled.shape
    entropy = targets.per_sample.new_zeros(n)
    entropy_of_mean = entropy.new_zeros(())
    top, chosen = torch.full_like(entropy, -1), torch.zeros(n, dtype=torch.int64, device=entropy.device)
    for tile in tiles(k, n, entropy.device):
        p = targets.tile(tile, slice(None))  # [k, N]
        largest, where = p.max(dim=0)
        chosen = torch.where(largest > top, where + tile.start, chosen)
        top = torch.maximum(top, largest)
        entropy_of_mean += torch.special.entr(p.mean(dim=1)).sum()
        entropy -= p.mul_(p.clamp_min(torch.finfo(p.dtype).tiny).log_()).sum(dim=0)
    expected = -k * math.expm1(n * math.log1p(-1 / k)) if k > 1 else 1.0
    distinct = entropy.new_zeros(k).index_fill_(0, chosen, 1).sum()
    return MeasuredTargets(entropy, entropy_of_mean - entropy.mean(), (distinct / max(expected, 1.0)).clamp_max(1))
