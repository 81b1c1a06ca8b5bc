"""Which patch tokens of the student are replaced by the mask token (iBOT, arXiv 2111.07832; DINOv2, section 4).

Masks are bool arrays over the patch grid, True where a token is masked. Every function is pure in its generator.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

MaskKind = Literal["block", "bernoulli"]

TRIES_PER_BLOCK = 10


def max_num_patches(image_size: int, patch_size: int) -> float:
    """Largest block of the reference: half of the patches, rounded as its training script rounds.

    Evaluated from left to right as written there, so it is not exactly half: 98 / 14 gives 21 of 49 patches.

    Args:
        image_size: Edge of a global crop, pixels.
        patch_size: Edge of a patch, pixels.
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
    """Draw one block-wise mask, bool [h, w], of at most `target` patches. Arguments as for `block_masks`."""
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
        grid: Patches (h, w).
        targets: Patches to mask in each, [M].
        rng: Source of randomness.
        min_patches: Smallest area that is asked for.
        max_patches: Most patches that one block may add.
        min_aspect: Smallest height / width; the largest is its inverse.

    Returns:
        bool [M, h, w]; the count never exceeds the target and may fall short of it.
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
    """Mask each patch independently with probability `ratio`.

    Returns:
        bool [h, w].
    """
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
    crop draws uniformly in its own, so that every batch covers the range evenly; then crops are shuffled. Block masks
    aim at int(N · ratio) of the N patches; Bernoulli masks take each patch with that ratio.

    Args:
        n_crops: Global crops in the whole batch, over all ranks.
        grid: Patches (h, w), N = h · w.
        rng: Source of randomness.
        kind: ``block`` (the reference) or ``bernoulli``.
        ratio: Smallest and largest ratio of masked patches; equal for one fixed ratio.
        probability: Share of the crops that are masked at all.
        max_patches: Most patches that one block may add; None: no limit but the target.
        min_patches: Smallest block area that is asked for.
        min_aspect: Smallest height / width of a block.

    Returns:
        bool [n_crops, N].
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
