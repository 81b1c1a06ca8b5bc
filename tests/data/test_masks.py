"""What holds for every mask; the distributions are compared in tests/fidelity/test_masks.py."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dinoforge.data.masks import batch_masks, bernoulli_mask, block_mask, max_num_patches

grids = st.tuples(st.integers(1, 20), st.integers(1, 20))
seeds = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize(("image", "patch", "expected"), [(98, 14, 21), (32, 8, 8), (224, 14, 128), (224, 16, 98)])
def test_largest_block_of_the_reference(image: int, patch: int, expected: int) -> None:
    assert max_num_patches(image, patch) == expected


@settings(max_examples=150, deadline=None)
@given(grid=grids, share=st.floats(0, 1), largest=st.floats(0.5, 200), smallest=st.integers(1, 16), seed=seeds)
def test_block_mask_never_exceeds_its_target(
    grid: tuple[int, int], share: float, largest: float, smallest: int, seed: int
) -> None:
    target = int(share * grid[0] * grid[1])
    rng = np.random.default_rng(seed)
    mask = block_mask(grid, target, rng, max_patches=largest, min_patches=smallest)
    assert mask.shape == grid
    assert mask.dtype == bool
    assert mask.sum() <= target


def test_one_fixed_ratio() -> None:
    rng = np.random.default_rng(0)
    masks = batch_masks(200, (14, 14), rng, kind="block", ratio=(0.25, 0.25), probability=1.0)
    assert masks.sum(axis=1).max() == 49
    assert np.median(masks.sum(axis=1)) == 49


def test_bernoulli_masks_each_token_alone() -> None:
    rng = np.random.default_rng(0)
    draws = np.stack([bernoulli_mask((6, 6), 0.3, rng).ravel() for _ in range(4000)])
    assert np.abs(draws.mean(axis=0) - 0.3).max() < 5 * np.sqrt(0.3 * 0.7 / 4000)
    correlation = np.corrcoef(draws.T)[~np.eye(36, dtype=bool)]
    assert np.abs(correlation).max() < 5.5 / np.sqrt(4000)
    masks = batch_masks(2000, (6, 6), rng, kind="bernoulli", ratio=(0.1, 0.5), probability=1.0)
    assert abs(masks.mean() - 0.3) < 0.01


def test_masked_crops_are_anywhere_in_the_batch() -> None:
    rate = np.mean(
        [
            batch_masks(8, (4, 4), np.random.default_rng(seed), kind="bernoulli", ratio=(1, 1), probability=0.5)[:, 0]
            for seed in range(2000)
        ],
        axis=0,
    )
    assert np.abs(rate - 0.5).max() < 0.05


@pytest.mark.parametrize("grid", [(1, 1), (1, 8), (8, 1), (2, 2)])
def test_tiny_grids_end(grid: tuple[int, int]) -> None:
    mask = block_mask(grid, grid[0] * grid[1], np.random.default_rng(0), max_patches=max_num_patches(14, 14))
    assert mask.shape == grid


def test_masks_are_a_function_of_the_generator() -> None:
    first, second = (
        batch_masks(16, (7, 7), np.random.default_rng(3), kind="block", ratio=(0.1, 0.5), probability=0.5)
        for _ in range(2)
    )
    assert np.array_equal(first, second)
