"""Masks against the distributions of the reference, within sampling error.

`data/block_masks.json` and `data/batch_masks.json` were measured by running facebookresearch/dinov2 (commit b8931f7,
Apache-2.0, unmodified). Random streams differ; both sides are samples, so a mean is compared within five standard
errors of the difference.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dinoforge.data.masks import batch_masks, block_masks, max_num_patches

DATA = Path(__file__).parent / "data"
BLOCKS = json.loads((DATA / "block_masks.json").read_text())
CASES = [(grid, ratio) for grid, case in BLOCKS.items() for ratio, value in case.items() if isinstance(value, dict)]
PERCENTILES = [0, 5, 25, 50, 75, 95, 100]
DRAWS = 4000


def perimeters(masks: np.ndarray) -> np.ndarray:
    """Edges between a masked patch and one that is not, or the border: [M]."""
    padded = np.pad(masks, ((0, 0), (1, 1), (1, 1))).astype(np.int8)
    return sum(np.abs(np.diff(padded, axis=axis)).sum(axis=(1, 2)) for axis in (1, 2))  # type: ignore[return-value]


def assert_same_mean(ours: np.ndarray, mean: float, draws: int) -> None:
    spread = max(float(ours.std()), 1e-3)
    assert abs(ours.mean() - mean) <= 5 * spread * np.sqrt(1 / len(ours) + 1 / draws), (ours.mean(), mean)


def assert_same_percentiles(ours: np.ndarray, expected: list[float], draws: int) -> None:
    """Each percentile but the extremes lies between those of ours five standard errors below and above it."""
    for percentile, value in list(zip(PERCENTILES, expected, strict=True))[1:-1]:
        slack = 5 * np.sqrt(percentile * (100 - percentile) * (1 / draws + 1 / len(ours)))
        low, high = np.percentile(ours, [max(percentile - slack, 0), min(percentile + slack, 100)])
        assert low <= value <= high, (percentile, value, low, high)


@pytest.mark.parametrize(("grid", "ratio"), CASES)
def test_block_masks(grid: str, ratio: str) -> None:
    settings: dict[str, Any] = BLOCKS[grid]
    expected = settings[ratio]
    size, draws = int(grid), expected["draws"]
    assert max_num_patches(settings["image_size"], settings["patch_size"]) == settings["max_num_patches"]
    masks = block_masks(
        (size, size),
        np.full(DRAWS, expected["target"]),
        np.random.default_rng(1),
        min_patches=settings["min_num_patches"],
        max_patches=settings["max_num_patches"],
        min_aspect=settings["aspect"][0],
    )
    counts, edges = masks.sum(axis=(1, 2)), perimeters(masks)
    assert counts.max() <= expected["target"]
    assert_same_mean(counts, expected["count_mean"], draws)
    assert_same_percentiles(counts, expected["count_percentiles_0_5_25_50_75_95_100"], draws)
    assert_same_mean(edges, expected["perimeter_mean"], draws)
    assert_same_percentiles(edges, expected["perimeter_percentiles"], draws)
    assert_same_mean(masks.mean(axis=(1, 2)), expected["mean_rate"], draws)

    middle = slice((size - 1) // 2, size // 2 + 1)
    corners = masks[:, [0, 0, -1, -1], [0, -1, 0, -1]].mean(axis=1)
    assert_same_mean(masks[:, middle, middle].mean(axis=(1, 2)) - corners, expected["centre_minus_corner_rate"], draws)


def test_batch_masks() -> None:
    expected = json.loads((DATA / "batch_masks.json").read_text())
    crops, grid = expected["batch_size"] * expected["global_crops"], expected["grid"]
    batches = [
        batch_masks(
            crops,
            (grid, grid),
            np.random.default_rng(seed),
            kind="block",
            ratio=(0.1, 0.5),
            probability=0.5,
            max_patches=max_num_patches(14 * grid, 14),
        )
        for seed in range(60)
    ]
    assert {int(masks.any(axis=1).sum()) for masks in batches} == set(expected["masked_crops_per_batch"])
    ratios = np.concatenate([masks.mean(axis=1)[masks.any(axis=1)] for masks in batches])
    draws = sum(expected["masked_crops_per_batch"])
    assert_same_mean(ratios, expected["ratio_mean"], draws)
    assert_same_percentiles(ratios, expected["ratio_percentiles_0_5_25_50_75_95_100"], draws)
