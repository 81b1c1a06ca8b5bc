"""One process at a time writes a run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dinoforge.errors import RunError
from dinoforge.runs.lock import LockLostError, RunLock

BEAT = 0.05


def held(run: Path) -> dict:
    return json.loads((run / ".lock").read_text())


HOLD = (
    "import pathlib, signal, sys\n"
    "from dinoforge.runs.lock import RunLock\n"
    "with RunLock(pathlib.Path(sys.argv[1]), print, beat=0.05):\n"
    "    print('held', flush=True)\n"
    "    signal.pause()\n"
)


@pytest.fixture
def holder(tmp_path: Path):
    """Another process that holds the lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_it_is_there_as_long_as_it_is_held(tmp_path):
    said = []
    with RunLock(tmp_path, said.append, beat=BEAT) as lock:
        assert held(tmp_path)["pid"] == os.getpid()
        first = held(tmp_path)["beats"]
        for _ in range(600):
            if held(tmp_path)["beats"] > first:
                break
            time.sleep(0.05)
        assert held(tmp_path)["beats"] > first
        lock.check()
    assert list(tmp_path.iterdir()) == []
    assert said == []


@pytest.mark.processes
def test_a_second_process_is_refused_and_told_by_whom(tmp_path, holder):
    with pytest.raises(RunError, match=rf"is written by process {holder.pid} on .*choose another --out"):
        RunLock(tmp_path, print).__enter__()
    assert held(tmp_path)["pid"] == holder.pid


@pytest.mark.processes
def test_a_process_that_was_killed_leaves_a_lock_that_is_told_and_taken(tmp_path, holder):
    os.kill(holder.pid, signal.SIGKILL)
    # Not collected by its parent yet, so that the system still has its number.
    for _ in range(600):
        if Path(f"/proc/{holder.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.05)
    said = []
    with RunLock(tmp_path, said.append):
        assert held(tmp_path)["pid"] == os.getpid()
    assert len(said) == 1
    assert f"process {holder.pid}" in said[0]
    assert "taken over" in said[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.processes
def test_a_number_that_another_process_has_now_is_no_holder(tmp_path, holder):
    there = held(tmp_path) | {"begun": "1"}
    holder.kill()
    holder.wait()
    (tmp_path / ".lock").write_text(json.dumps(there | {"pid": os.getpid()}))
    with RunLock(tmp_path, print):
        assert held(tmp_path)["begun"] != "1"


@pytest.mark.processes
@pytest.mark.parametrize("change", [{"machine": "another"}, {"machine": None}])
def test_a_process_on_another_machine_is_watched_for_signs_of_life(tmp_path, change, monkeypatch):
    (tmp_path / ".lock").write_text(json.dumps({"token": "1", "beats": 3, "host": "far", "pid": 7} | change))
    said = []
    with RunLock(tmp_path, said.append, beat=BEAT):
        assert held(tmp_path)["pid"] == os.getpid()
    assert ["waiting" in said[0], "taken over" in said[1]] == [True, True]
    # One that lives: its file changes while it is watched.
    code = (
        "import json, pathlib, sys, time\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "for beats in range(100_000):\n"
        "    aside = path.with_name('aside')\n"
        "    aside.write_text(json.dumps({'token': '1', 'beats': beats, 'host': 'far', 'pid': 7}))\n"
        "    aside.rename(path)\n"
        "    time.sleep(0.01)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / ".lock")]) as process:
        try:
            while not (tmp_path / ".lock").exists():
                time.sleep(0.01)
            with pytest.raises(RunError, match="is written by process 7 on far"):
                RunLock(tmp_path, print, beat=1.0).__enter__()
        finally:
            process.kill()


def test_a_lock_that_was_silent_for_long_is_taken_without_waiting(tmp_path):
    (tmp_path / ".lock").write_text(json.dumps({"token": "1", "beats": 3, "host": "far", "pid": 7}))
    os.utime(tmp_path / ".lock", (time.time() - 3600,) * 2)
    said = []
    with RunLock(tmp_path, said.append):
        assert held(tmp_path)["pid"] == os.getpid()
    assert ["taken over" in text for text in said] == [True]


@pytest.mark.parametrize("content", [b"", b"\xff\0", b"[]", b"{}"])
def test_a_damaged_lock_is_one_of_nobody(tmp_path, content):
    (tmp_path / ".lock").write_bytes(content)
    with RunLock(tmp_path, print, beat=BEAT):
        assert held(tmp_path)["pid"] == os.getpid()


def test_who_was_taken_for_gone_stops_without_writing(tmp_path):
    with RunLock(tmp_path, print, beat=BEAT) as lock:
        other = {"token": "2", "beats": 0, "host": "far", "pid": 7}
        aside = tmp_path / "aside"
        for _ in range(600):
            aside.write_text(json.dumps(other))
            aside.rename(tmp_path / ".lock")  # again, since a sign of life may just be on its way
            time.sleep(0.05)
            if lock.is_lost:
                break
        with pytest.raises(LockLostError, match="taken over by process 7 on far"):
            lock.check()
    assert held(tmp_path)["token"] == "2"
