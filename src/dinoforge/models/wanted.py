"""The tokens that a loss reads: the last block leaves out all others."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dinoforge.kernels.types import Groups, Kept
from dinoforge.system.transfer import to_device


@dataclass(frozen=True)
class Narrowing:
    """The tokens wanted from the last block, and the subset of them that each of its branches keeps.

    Args:
        wanted: The packed rows [W].
        attn_rows: For the attention branch: the kept rows, as indices into the branch's rows [n].
        attn_places: The places of the kept rows in ``wanted`` [n].
        attn_scales: The factors that preserve the branch's expectation [n, 1].
        ffn_places, ffn_scales: The same for the feed-forward branch, which sees only wanted rows.
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
    """Build the ``Narrowing`` of the last block to the rows ``wanted`` [W].

    Args:
        wanted: The packed rows, on the CPU.
        groups: The groups of all tokens.
        attn, ffn: The images that the two branches keep, as for ``subset_of``; None: all.
        device: The device of the result.
    """
    attn_rows, attn_places, attn_scales = _kept_among(wanted, groups, attn)
    _, ffn_places, ffn_scales = _kept_among(wanted, groups, ffn)
    parts = (wanted, attn_rows, attn_places, attn_scales, ffn_places, ffn_scales)
    return Narrowing(*(to_device(part, device) for part in parts))


def _kept_among(wanted: Tensor, groups: Groups, kept: list[Kept] | None) -> tuple[Tensor, Tensor, Tensor]:
    """For the wanted rows whose images are kept: their rows in the branch, places in ``wanted``, and factors."""
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
