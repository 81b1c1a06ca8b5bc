"""The lines of ``dinoforge selfcheck`` about what belongs on one device."""

from contextlib import nullcontext

import pytest

from dinoforge.features import extract
from dinoforge.health import numbers
from dinoforge.selfcheck import placement
from dinoforge.selfcheck.settings import Settings


@pytest.fixture
def lines(tmp_path):
    def look():
        return {line.name.partition(": ")[2]: line for line in placement.check(Settings("cpu", None, True, tmp_path))}

    return look


def test_all_is_well(lines):
    found = lines()
    assert list(found) == ["a step", "train, with a probe", "embed", "eval knn", "report"]
    assert {line.status for line in found.values()} == {"ok"}, found
    assert found["a step"].values["waits"] == 1


def test_a_backbone_that_is_left_on_the_cpu_fails(lines, monkeypatch):
    monkeypatch.setattr(placement, "_RECIPES", {"one": {}})
    monkeypatch.setattr(extract, "placed", lambda network, device: nullcontext())
    found = lines()
    failed = {name for name, line in found.items() if line.status == "FAIL"}
    assert {"embed", "eval knn"} <= failed, found
    assert "one device" in found["embed"].text


def test_float64_on_the_device_fails(lines, monkeypatch):
    monkeypatch.setattr(placement, "_RECIPES", {"one": {}})
    rank = numbers.effective_rank
    monkeypatch.setattr(numbers, "effective_rank", lambda x: rank(x.double().float()))
    assert "float64" in lines()["train, with a probe"].text


def test_a_step_that_waits_again_fails(lines, monkeypatch):
    from dinoforge.training import step

    clip = step.clip_gradients

    def waiting(*arguments):
        norms = clip(*arguments)
        assert all(float(norm) > 0 for norm in norms.values())
        return norms

    monkeypatch.setattr(placement, "_RECIPES", {"one": {}})
    monkeypatch.setattr(step, "clip_gradients", waiting)
    line = lines()["a step"]
    assert line.status == "FAIL"
    assert line.values["waits"] == 3
    assert any("item" in detail for detail in line.details)
