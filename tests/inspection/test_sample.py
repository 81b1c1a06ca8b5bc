"""Which images are looked at."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dinoforge.inspection.sample import FIRST, places


@given(count=st.integers(1, 3000), limit=st.integers(1, 500))
def test_as_many_as_may_be_each_once(count, limit):
    found = places(count, limit)
    assert len(set(found)) == len(found)
    assert set(found) <= set(range(count))
    assert len(found) == min(count, limit) or count > limit >= len(found) >= 0.9 * limit


@given(count=st.integers(1, 500))
def test_all_of_them_where_there_are_no_more(count):
    assert sorted(places(count, 500)) == list(range(count))


def test_those_of_a_run_come_first():
    expected = np.unique(np.linspace(0, 99_999, FIRST).round().astype(int)).tolist()
    assert places(100_000, 512)[:FIRST] == expected


def test_neighbours_are_among_them():
    found = set(places(1_000_000, 512))
    assert sum(place + 1 in found for place in found) > 200


def test_any_first_part_is_spread_over_all():
    order = places(100_000, 1024)
    for number in (64, 200, 700):
        gaps = np.diff(sorted([0, *order[:number], 99_999]))
        assert gaps.max() < 100_000 / number * 6
