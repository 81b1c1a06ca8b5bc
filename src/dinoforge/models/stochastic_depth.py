"""Stochastic depth: the images that each residual branch keeps."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dinoforge.kernels.types import Groups, Kept, Subset
from dinoforge.system.transfer import to_device


def subset_of(kept: list[Kept], groups: Groups, device: torch.device) -> Subset:
    """Build the subset that keeps ``kept[g]`` of each group ``g``."""
    rows, start = [], 0
    for (indices, _), (images, tokens) in zip(kept, groups, strict=True):
        rows.append((start + indices[:, None] * tokens + torch.arange(tokens)).flatten())
        start += images * tokens
    return Subset(
        rows=to_device(torch.cat(rows), device),
        groups=tuple((len(indices), tokens) for (indices, _), (_, tokens) in zip(kept, groups, strict=True)),
        scales=tuple(scale for _, scale in kept),
    )


@dataclass(frozen=True)
class KeptSamples:
    """The images that the two residual branches of a block keep, per resolution group."""

    attn: list[Kept]
    ffn: list[Kept]

    def of(self, parts: Sequence[tuple[int, slice]]) -> "KeptSamples":
        """Select parts of the groups; a part is the number of a group and a slice of the group's images."""

        def cut(kept: list[Kept]) -> list[Kept]:
            cuts = []
            for group, images in parts:
                indices, scale = kept[group]
                inside = (indices >= images.start) & (indices < images.stop)
                cuts.append(Kept(indices[inside] - images.start, scale))
            return cuts

        return KeptSamples(attn=cut(self.attn), ffn=cut(self.ffn))


def subsets(
    kept: Sequence[KeptSamples] | None, block: int, groups: Groups, device: torch.device
) -> tuple[Subset | None, Subset | None]:
    """Build the subsets that the two branches of a block keep; None: all images."""

    def subset(branch: list[Kept]) -> Subset | None:
        return None if all(scale == 1 for _, scale in branch) else subset_of(branch, groups, device)

    return (None, None) if kept is None else (subset(kept[block].attn), subset(kept[block].ffn))


def drop_path_rates(rate: float, depth: int, uniform: bool) -> list[float]:
    """Compute each block's rate of stochastic depth: the same for all, or rising linearly from 0 to ``rate``."""
    return [rate] * depth if uniform else [rate * i / max(depth - 1, 1) for i in range(depth)]


def draw_kept_samples(
    rates: Sequence[float], batch_sizes: Sequence[int], generator: torch.Generator
) -> list[KeptSamples]:
    """Draw stochastic depth: every residual branch keeps ``max(⌊B·(1 - rate)⌋, 1)`` random images of each group.

    Args:
        rates: The rate of each block, in [0, 1).
        batch_sizes: The number of images in each resolution group.
        generator: A generator on the CPU.

    Source: DINOv2 (arXiv 2304.07193), section 4, "Efficient stochastic depth".
    """

    def draw(rate: float) -> list[Kept]:
        if rate == 0:
            return [Kept(torch.arange(size), 1.0) for size in batch_sizes]
        counts = [max(int(size * (1 - rate)), 1) for size in batch_sizes]
        return [
            Kept(torch.randperm(size, generator=generator)[:count], size / count)
            for size, count in zip(batch_sizes, counts, strict=True)
        ]

    return [KeptSamples(attn=draw(rate), ffn=draw(rate)) for rate in rates]
