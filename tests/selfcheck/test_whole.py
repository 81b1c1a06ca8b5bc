"""The short form of the whole command, as CI runs it: on this machine it passes."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from dinoforge.selfcheck.part import PARTS
from selfcheck.living import living


@pytest.fixture
def folder():
    """For temporary files; not pytest's, whose path is so long that no socket can be made in it."""
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


@pytest.mark.timeout(900)
def test_the_short_form_passes_on_the_cpu(folder):
    command = [sys.executable, "-m", "dinoforge", "selfcheck", "--short", "--nproc", "2", "--device", "cpu", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TMPDIR": str(folder)})
    assert not list(folder.iterdir())  # nothing is left
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)  # and nothing beside it
    assert report["passed"], done.stderr
    by_name = {line["name"]: line for line in report["lines"]}
    assert {line["values"]["part"] for line in report["lines"]} == set(PARTS)
    assert all(line["text"] for line in report["lines"])
    assert {line["status"] for line in report["lines"]} == {"ok", "not here"}
    assert by_name["killed, continued"]["values"]["same"]
    assert by_name["ranks: one fails, backward"]["values"]["seconds_until_ended"] < 60
    assert report["environment"]["device"]["device"] == "cpu"
    for expected in ("steps, float32", "train", "embed", "report", "export official", "ranks: FSDP2", "out of memory"):
        assert by_name[expected]["status"] == "ok"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_all_that_it_has_started(number, code, folder):
    command = [sys.executable, "-m", "dinoforge", "selfcheck", "--only", "journey", "--device", "cpu"]
    environment = os.environ | {"TMPDIR": str(folder)}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment) as process:
        try:
            while not (of_train := [text for text in living(str(folder)) if "dinoforge train" in text]):
                assert process.poll() is None
                time.sleep(0.02)
            process.send_signal(number)
            assert process.wait(60) == code
        finally:
            process.kill()
    assert of_train
    assert not living(str(folder))
    assert not list(folder.iterdir())
