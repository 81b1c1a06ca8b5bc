"""Programs end at their deadline, with all that they have started."""

import os
import time
from pathlib import Path

import pytest

from dinoforge.selfcheck.processes import Ended, Program, run


@pytest.fixture
def module(tmp_path, monkeypatch):
    """``module(code)``: the name of a module that can be run by ``python -m``."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)

    def write(code: str) -> str:
        (tmp_path / "made_up_program.py").write_text(code)
        return "made_up_program"

    return write


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_what_it_printed_and_how_it_ended(module, tmp_path):
    ended = run([module("import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)")], tmp_path, seconds=60)
    assert ended.code == 3
    assert ended.tail() == ("out", "err")
    assert "ended with exit code 3" in ended.told


def test_a_deadline_ends_a_program_and_those_in_sessions_of_their_own(module, tmp_path):
    code = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
"""
    started = time.monotonic()
    ended = run([module(code)], tmp_path, seconds=2)
    assert time.monotonic() - started < 60
    assert ended.code is None
    assert "had not ended" in ended.told
    child = int(ended.output)
    deadline = time.monotonic() + 30
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(child)


def test_what_is_left_of_a_program_that_has_ended_is_killed(module, tmp_path):
    code = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(child.pid, flush=True)
"""
    ended = run([module(code)], tmp_path, seconds=60)
    assert ended.code == 0
    deadline = time.monotonic() + 30
    while alive(int(ended.output)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(int(ended.output))


def test_a_program_of_a_program_goes_with_it_and_its_neighbour_stays(module, tmp_path, monkeypatch):
    name = module("import time; print('here', flush=True); time.sleep(600)")
    with Program([name], tmp_path, seconds=60) as first, Program([name], tmp_path, seconds=60) as second:
        while not (first.output and second.output):
            time.sleep(0.02)
        first.kill()
        assert not first.running
        assert second.running
    assert not second.running


def test_it_is_no_rank_of_whoever_started_the_check(module, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    ended = run(
        [module("import os; print(os.environ.get('RANK'), os.environ.get('WORLD_SIZE'))")], tmp_path, seconds=60
    )
    assert ended.output.split() == ["None", "None"]


def test_words_for_a_signal():
    assert Ended(-9, "", 1.0).told == "was ended by SIGKILL after 1.0 s"
    assert Ended(0, "\n \n", 1.0).tail() == ("(it printed nothing)",)


def test_ranks_are_found_by_number(module, tmp_path):
    code = """
import os, subprocess, sys, time
for rank in (1, 0):
    environment = os.environ | {"RANK": str(rank)}
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], env=environment)
    print(rank, child.pid, flush=True)
time.sleep(600)
"""
    with Program([module(code)], tmp_path, seconds=60) as program:
        while len(program.output.splitlines()) < 2:
            assert program.running
            time.sleep(0.02)
        by_rank = dict(tuple(map(int, row.split())) for row in program.output.splitlines())
        deadline = time.monotonic() + 30
        while program.ranks() != [by_rank[0], by_rank[1]] and time.monotonic() < deadline:
            time.sleep(0.02)  # until both have been started in full
        assert program.ranks() == [by_rank[0], by_rank[1]]
