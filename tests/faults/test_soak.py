"""The short form of ``make soak``."""

import pytest

from faults import soak  # type: ignore[import-not-found]

pytestmark = pytest.mark.processes


def test_killed_runs_end_as_those_left_alone(tmp_path, capsys):
    assert soak.soak(tmp_path, kills=6, seed=0, steps=90) == []
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert len(lines) >= 6
    assert {line[0] for line in lines} == {"kill"}
    assert any(line[2] == "writing" and line[-1].endswith(".partial") for line in lines)  # a checkpoint was cut short


def test_a_difference_is_found(tmp_path):
    """Or else the soak would prove nothing."""
    images = soak.make_images(tmp_path / "images")
    for name, seed in (("one", 0), ("other", 1)):
        soak.subprocess.run(
            [*soak.command(images, tmp_path / name, 0, 6), f"train.seed={seed}"],
            check=True,
            stdout=soak.subprocess.DEVNULL,
        )
    found = soak.differences(tmp_path / "one", tmp_path / "other", 6)
    assert any(text.startswith("tensor teacher.backbone.") for text in found)
    assert any(text.startswith("metrics of step") for text in found)
    assert soak.differences(tmp_path / "one", tmp_path / "one", 6) == []
