"""A rank that fails and hangs makes its line fail, and nothing is left of it."""

import time
from pathlib import Path

import pytest

from dinoforge.errors import RecipeError
from dinoforge.selfcheck import faults, ranks
from dinoforge.selfcheck.settings import Settings
from selfcheck.living import living


def test_a_rank_that_fails_and_hangs(tmp_path):
    """The last rank goes on no more in the third step; the other waits for it."""
    both = ranks.Ranks(Settings("cpu", "2", True, tmp_path), "cpu", 2)
    line = ranks._fail(both, "hang", 1, "ranks: one hangs", end_seconds=5.0)
    assert line.status == "FAIL"
    assert line.text == "ranks were still there 5 s after one had failed"
    deadline = time.monotonic() + 30
    while living(str(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not living(str(tmp_path))


@pytest.fixture
def sleeper(tmp_path, monkeypatch):
    """A program that never gets as far as the fault."""
    (tmp_path / "sleeper.py").write_text("import time; print('asleep', flush=True); time.sleep(600)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    return ["sleeper"]


def test_ranks_that_never_come_as_far(sleeper, tmp_path):
    line = ranks.ended_by_fault(sleeper, tmp_path, tmp_path / "run", "ranks", 1, start_seconds=2.0)
    assert line.status == "FAIL"
    assert "before one could fail" in line.text
    assert line.details == ("asleep",)


def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, says: str, code: int) -> list[str]:
    """A program in which something went wrong just now."""
    out = tmp_path / "run"
    text = f"""
import pathlib, sys, time
pathlib.Path({str(out)!r}).mkdir()
pathlib.Path({str(out)!r}, "fault").write_text(str(time.time()))
print({says!r})
sys.exit({code})
"""
    (tmp_path / "quick.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    return ["quick"]


@pytest.mark.parametrize(
    ("says", "code", "status"),
    [(faults.MESSAGE, 1, "ok"), ("killed", 1, "FAIL"), (faults.MESSAGE, 0, "FAIL"), (faults.MESSAGE, 4, "FAIL")],
)
def test_it_counts_what_is_said_and_how_it_ends(tmp_path, monkeypatch, says, code, status):
    command = program(tmp_path, monkeypatch, says=says, code=code)
    line = ranks.ended_by_fault(command, tmp_path, tmp_path / "run", "ranks", 1)
    assert line.status == status
    assert 0 <= line.values["seconds_until_ended"] < 60


@pytest.mark.parametrize(
    ("device", "number", "word"), [("cpu", 1, "one process"), ("mps", 2, "one GPU"), ("cuda", 2, "2 GPUs")]
)
def test_ranks_that_cannot_be(device, number, word, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert word in ranks._cannot(device, number)


def test_ranks_that_can_be(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert ranks._cannot("cuda", 4) is None
    assert ranks._cannot("cpu", 7) is None
    assert {number: ranks._shards(number) for number in (2, 3, 4, 6, 8, 9)} == {
        2: None,
        3: None,
        4: 2,
        6: 2,
        8: 2,
        9: 3,
    }


def test_without_nproc_nothing_is_started(tmp_path):
    (line,) = ranks.check(Settings("cpu", None, True, tmp_path))
    assert line.status == "not here"
    assert "--nproc" in line.text


def test_an_unknown_fault():
    with pytest.raises(RecipeError, match="expected a kind of backward, data, hang, memory"):
        faults.train_with(faults.Fault("other", "", "", ()))
