"""Sizes of matrix products."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dinoforge.products import padded, pieces


@given(st.integers(0, 5000), st.integers(0, 10))
def test_pieces_have_three_sizes_and_follow_one_another(count, exponent):
    largest = 2**exponent
    seen = 0
    for piece, size in pieces(count, largest):
        assert size in {largest, max(largest // 2, 1), max(largest // 4, 1)}
        assert piece.start == seen
        assert 0 < piece.stop - piece.start <= size
        seen = piece.stop
        if piece.stop - piece.start < size:  # only the last is padded, and it is a small one
            assert seen == count
            assert size == largest // 4
    assert seen == count


@pytest.mark.parametrize(("dtype", "expected"), [(torch.float32, 33), (torch.bfloat16, 64), (torch.float16, 64)])
def test_only_half_precision_is_padded(dtype, expected):
    assert padded(33, dtype) == expected
