"""Values to levels: every value of the common types, against plain double precision."""

import math

import numpy as np
import pytest

from dinoforge.data.values import Samples, Scaling, extent, missing, to_levels
from dinoforge.errors import ImageError

EVERY = np.arange(65536, dtype=np.uint16).reshape(256, 64, 4)


def test_every_sixteen_bit_value() -> None:
    assert np.array_equal(to_levels(Samples(EVERY), Scaling()), np.rint(EVERY / 257))


@pytest.mark.parametrize("bits", [9, 10, 12, 14, 15])
def test_every_value_of_fewer_bits(bits: int) -> None:
    top = 2**bits - 1
    values = EVERY.ravel()[: top + 1].reshape(1, -1, 1)
    assert np.array_equal(to_levels(Samples(values, limit=top), Scaling()), np.rint(values / top * 255))


@pytest.mark.parametrize("pair", [(0, 10_000), (0, 4095), (-1000, 3000), (100.5, 20_000.25), (5, 6)])
@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32, np.float64])
def test_ranges_are_exact(pair: tuple[float, float], dtype: type) -> None:
    low, high = pair
    expected = np.rint(np.clip((EVERY.astype(np.float64) - low) / (high - low), 0, 1) * 255)
    assert np.abs(to_levels(Samples(EVERY.astype(dtype)), Scaling(value_range=pair)) - expected).max() == 0


def test_a_range_for_each_channel() -> None:
    pairs = ((0, 1000), (0, 2000), (500, 1000), (0, 65535))
    found = to_levels(Samples(EVERY), Scaling(value_range=pairs))
    for i, pair in enumerate(pairs):
        assert np.array_equal(
            found[:, :, i : i + 1], to_levels(Samples(EVERY[:, :, i : i + 1]), Scaling(value_range=pair))
        )
    with pytest.raises(ImageError, match=r"4 channels.*2 ranges"):
        to_levels(Samples(EVERY), Scaling(value_range=pairs[:2]))


def test_a_mask_is_of_all_channels() -> None:
    valid = np.ones((256, 64), np.bool_)
    valid[0] = False
    samples = Samples(EVERY, valid=valid)
    found = to_levels(samples, Scaling("minmax", fill=9))
    assert (found[0] == 9).all()
    assert found[1, 0, 0] == 0
    gone = missing(samples)
    assert gone is not None
    assert extent(EVERY, gone) == (256, 65535)


def test_input_is_not_written_to() -> None:
    values = np.array([[[1.0], [np.nan]]])
    grey = np.array([[[0], [7]]], np.uint8)
    for array in (values, grey):
        before = array.copy()
        to_levels(Samples(array, nodata=(7,)), Scaling(fill=3))
        assert np.array_equal(array, before, equal_nan=array.dtype.kind == "f")


def test_extremes_of_doubles() -> None:
    huge = np.array([[[-1.7e308], [1.7e308]]])
    assert to_levels(Samples(huge), Scaling(value_range=(0, 1))).ravel().tolist() == [0, 255]
    assert to_levels(Samples(huge), Scaling("minmax")).ravel().tolist() == [0, 255]
    assert not to_levels(Samples(np.full((2, 2, 1), 1e17)), Scaling("minmax")).any()


def test_infinite_values() -> None:
    values = np.array([[[-math.inf], [0.5]]])
    for rule in ("full", "minmax"):
        with pytest.raises(ImageError, match="not finite"):
            to_levels(Samples(values), Scaling(rule))
    assert to_levels(Samples(values), Scaling("minmax", nodata=-math.inf, fill=9)).ravel().tolist() == [9, 0]


def test_no_real_type() -> None:
    with pytest.raises(ImageError, match="complex64"):
        to_levels(Samples(np.zeros((1, 1, 1), np.complex64)), Scaling())
