"""Products and their sizes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dinoforge.kernels import products
from dinoforge.kernels.products import linear, padded, pieces


@given(st.integers(0, 5000), st.integers(0, 10), st.integers(0, 4))
def test_pieces_have_few_sizes_and_follow_one_another(count, exponent, halvings):
    largest = 2**exponent
    smallest = max(largest >> halvings, 1)
    seen = 0
    for piece, size in pieces(count, largest, smallest):
        assert size in {largest >> i for i in range(halvings + 1)}
        assert piece.start == seen
        assert 0 < piece.stop - piece.start <= size
        seen = piece.stop
        if piece.stop - piece.start < size:  # only the last is padded, and it is a small one
            assert seen == count
            assert size == smallest
    assert seen == count


@pytest.mark.parametrize(("count", "expected"), [(0, 0), (1, 32), (32, 32), (33, 64)])
def test_padding_rounds_up(count, expected):
    assert padded(count) == expected


@pytest.mark.parametrize("by_onednn", [False, products._BY_ONEDNN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("rows", [0, 5, 128])
def test_linear_is_pytorchs_linear_layer(monkeypatch, by_onednn, dtype, transposed, has_bias, rows):
    monkeypatch.setattr(products, "_BY_ONEDNN", by_onednn)
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((rows, 24), (40, 24), (40,)))
    if transposed:
        weight = weight.T.contiguous().T
    place = torch.full((rows, 40), torch.nan, dtype=dtype)
    result = linear(x, weight, bias if has_bias else None, place=place)
    expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double() if has_bias else None)
    assert result.dtype == dtype
    torch.testing.assert_close(
        result.double(), expected, rtol=8 * torch.finfo(dtype).eps, atol=64 * torch.finfo(dtype).eps
    )
    torch.testing.assert_close(linear(x, weight, bias if has_bias else None), result, rtol=0, atol=0)
