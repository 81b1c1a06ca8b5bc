"""Masks: the patch tokens of the student that the mask token replaces (iBOT, arXiv 2111.07832; DINOv2, section 4).

Masks are bool arrays over the patch grid, True where a token is masked. Every function is pure in its generator.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

MaskKind = Literal["block", "bernoulli"]

TRIES_PER_BLOCK = 10


def max_num_patches(image_size: int, patch_size: int) -> float:
    """Compute the largest block of the reference: half of the patches, rounded as its training script rounds.

    Its expression is evaluated from left to right, so it is not exactly half: 98 / 14 gives 21 of 49 patches.

    Args:
        image_size: The edge of a global crop in pixels.
        patch_size: The edge of a patch in pixels.
    """
    return 0.5 * image_size // patch_size * image_size // patch_size


def block_mask(
    grid: tuple[int, int],
    target: int,
    rng: np.random.Generator,
    *,
    min_patches: int = 4,
    max_patches: float,
    min_aspect: float = 0.3,
) -> npt.NDArray[np.bool_]:
    """Draw one block-wise mask, bool [h, w], of at most `target` patches; see `block_masks`."""
    masks = block_masks(
        grid, np.array([target]), rng, min_patches=min_patches, max_patches=max_patches, min_aspect=min_aspect
    )
    first: npt.NDArray[np.bool_] = masks[0]
    return first


def block_masks(
    grid: tuple[int, int],
    targets: npt.NDArray[np.int64],
    rng: np.random.Generator,
    *,
    min_patches: int = 4,
    max_patches: float,
    min_aspect: float = 0.3,
) -> npt.NDArray[np.bool_]:
    """Draw block-wise masks: rectangles are added until the target is met or none can be placed (BEiT, algorithm 1).

    For one mask, in pseudocode::

        while remaining > 0:
            allowed = min(remaining, max_patches)
            try up to ten times:
                area, aspect = uniform(min_patches, allowed), log_uniform(min_aspect, 1 / min_aspect)
                height, width = round(sqrt(area * aspect)), round(sqrt(area / aspect))
                place it uniformly; accept if smaller than the grid both ways, and 1 <= new patches <= allowed
            stop if none was accepted

    All masks advance together, one try each. `area` is uniform between the two bounds whichever is larger, so a
    remainder below `min_patches` is still filled.

    Args:
        grid: The patch grid (h, w).
        targets: The number of patches to mask in each mask, [M].
        rng: The generator.
        min_patches: The smallest area of a block that is asked for.
        max_patches: The most patches that one block may add.
        min_aspect: The smallest height / width; the largest is its inverse.

    Returns:
        Masks, bool [M, h, w]; their count never exceeds the target and may fall short of it.
    """
    height, width = grid
    rows, columns = np.arange(height), np.arange(width)
    masks = np.zeros((len(targets), height, width), dtype=bool)
    remaining = targets.astype(np.int64)  # [M]
    tries = np.zeros(len(targets), dtype=np.int64)  # [M], failed ones since the last block
    while True:
        active = np.flatnonzero((remaining > 0) & (tries < TRIES_PER_BLOCK))  # [A]
        if not len(active):
            return masks
        for_area, for_aspect, for_top, for_left = rng.random((4, len(active)))
        allowed = np.minimum(remaining[active], max_patches)
        area = min_patches + (allowed - min_patches) * for_area
        aspect = np.exp(np.log(min_aspect) * (1 - 2 * for_aspect))
        block_height = np.rint(np.sqrt(area * aspect)).astype(np.int64)
        block_width = np.rint(np.sqrt(area / aspect)).astype(np.int64)
        top = np.floor(for_top * (height - block_height + 1)).astype(np.int64)
        left = np.floor(for_left * (width - block_width + 1)).astype(np.int64)
        in_rows = (rows >= top[:, None]) & (rows < (top + block_height)[:, None])  # [A, h]
        in_columns = (columns >= left[:, None]) & (columns < (left + block_width)[:, None])  # [A, w]
        new = in_rows[:, :, None] & in_columns[:, None, :] & ~masks[active]  # [A, h, w]
        gain = new.sum(axis=(1, 2))
        accepted = (block_height < height) & (block_width < width) & (gain >= 1) & (gain <= allowed)
        winners = active[accepted]
        masks[winners] |= new[accepted]
        remaining[winners] -= gain[accepted]
        tries[active] += 1
        tries[winners] = 0


def bernoulli_mask(grid: tuple[int, int], ratio: float, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """Draw a mask, bool [h, w], of which each patch is masked independently with probability `ratio`."""
    mask: npt.NDArray[np.bool_] = rng.random(grid) < ratio
    return mask


def batch_masks(
    n_crops: int,
    grid: tuple[int, int],
    rng: np.random.Generator,
    *,
    kind: MaskKind,
    ratio: Sequence[float],
    probability: float,
    max_patches: float | None = None,
    min_patches: int = 4,
    min_aspect: float = 0.3,
) -> npt.NDArray[np.bool_]:
    """Draw the masks of a batch of global crops.

    Of n crops, int(n · probability) are masked. The range of ratios is cut into that many equal bins and each masked
    crop draws uniformly in a bin of its own, so that every batch covers the range evenly; then crops are shuffled.
    Block masks aim at int(N · ratio) of the N patches; Bernoulli masks take each patch with that ratio.

    Args:
        n_crops: The number of global crops in the whole batch, over all ranks.
        grid: The patch grid (h, w), N = h · w.
        rng: The generator.
        kind: The kind of masks, ``block`` (the reference's) or ``bernoulli``.
        ratio: The smallest and largest ratio of masked patches; equal for one fixed ratio.
        probability: The share of the crops that are masked at all.
        max_patches: The most patches that one block may add; None for no limit but the target.
        min_patches: The smallest block area that is asked for.
        min_aspect: The smallest height / width of a block.

    Returns:
        Masks, bool [n_crops, N].
    """
    assert kind in ("block", "bernoulli"), kind
    height, width = grid
    n_masked = int(n_crops * probability)
    low, high = ratio
    ratios = low + (high - low) * (np.arange(n_masked) + rng.random(n_masked)) / max(n_masked, 1)  # [M]
    masks = np.zeros((n_crops, height, width), dtype=bool)
    if kind == "bernoulli":
        for index in range(n_masked):
            masks[index] = bernoulli_mask(grid, ratios[index], rng)
    else:
        masks[:n_masked] = block_masks(
            grid,
            (height * width * ratios).astype(np.int64),
            rng,
            min_patches=min_patches,
            max_patches=height * width if max_patches is None else max_patches,
            min_aspect=min_aspect,
        )
    return masks[rng.permutation(n_crops)].reshape(n_crops, height * width)
