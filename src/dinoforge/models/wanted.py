"""The tokens that can reach a loss: all others are left out of the last block."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dinoforge.kernels.types import Groups, Kept
from dinoforge.system.transfer import to_device


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
