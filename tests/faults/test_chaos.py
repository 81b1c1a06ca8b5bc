"""The short form of the random walk in ``make soak``."""

import pytest

from faults import chaos  # type: ignore[import-not-found]

pytestmark = pytest.mark.processes


def test_a_run_that_much_befalls_ends_as_one_left_alone(tmp_path, capsys):
    assert chaos.walk(tmp_path, events=8, seed=0, steps=150) == []
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("event")]
    assert len(lines) == 8
    assert len({line[11:35] for line in lines}) >= 8  # each of them another one
