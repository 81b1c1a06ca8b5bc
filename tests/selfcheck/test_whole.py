"""The short form of the whole command, as CI runs it: on this machine it passes."""

import json
import subprocess
import sys

import pytest

from dinoforge.selfcheck.part import PARTS


@pytest.mark.timeout(900)
def test_the_short_form_passes_on_the_cpu():
    command = [sys.executable, "-m", "dinoforge", "selfcheck", "--short", "--nproc", "2", "--device", "cpu", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
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
