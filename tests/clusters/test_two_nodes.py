"""Two ``torchrun`` nodes in network namespaces: one is cut off and brought back."""

import json
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from clusters import nodes
from distributed import continuing

STEPS = 60
KEYS = continuing.KEYS | {"train.steps": STEPS, "checkpoint.every_steps": 5, "parallel.timeout_minutes": 0.2}
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one process, beside its images."""
    folder = tmp_path_factory.mktemp("nodes")
    continuing.make_images(folder / "images")
    subprocess.run([sys.executable, "-m", "dinoforge", *train(folder, "alone")], check=True, capture_output=True)
    return folder / "alone"


def train(folder, run):
    keys = [f"{key}={value}" for key, value in KEYS.items()]
    return ["train", str(folder / "images"), "--out", str(folder / run), "--recipe", "small", *keys]


def lines_of(run):
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def logs_of(folder):
    return "\n".join(f"== {path.name}\n{path.read_text()[-6000:]}" for path in sorted(folder.glob("*.log")))


def wait(condition, what, folder):
    deadline = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < deadline, f"{what}\n{logs_of(folder)}"
        time.sleep(0.05)


def ended_as(alone, run, agents, logs):
    """The agents end by themselves, and the run as the one that nothing happened to."""
    wait(lambda: all(agent.poll() is not None for agent in agents), "it did not end", logs)
    assert [agent.returncode for agent in agents] == [0, 0], logs_of(logs)
    starts = json.loads((run / "run.json").read_text())["starts"]
    assert [start["ranks"] for start in starts] == [2, 2], logs_of(logs)
    assert 0 < starts[1]["step"] < STEPS
    ours, theirs = lines_of(run), lines_of(alone)
    assert [line["step"] for line in ours] == list(range(1, STEPS + 1))
    for a, b in zip(ours, theirs, strict=True):
        assert abs(a["total"] - b["total"]) < 1e-4 * b["total"], a["step"]
    expected = load_file(alone / "teacher.safetensors")
    for name, tensor in load_file(run / "teacher.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)


def test_a_node_is_cut_off_and_brought_back(alone):
    folder, run = alone.parent, alone.with_name("cut")
    with nodes.two_nodes() as pair:
        agents = [node.torchrun(train(folder, run.name), folder / f"cut-{node.number}.log") for node in pair]
        wait(lambda: len(lines_of(run)) >= 10, "no steps", folder)
        pair[1].cut_off()
        log = folder / "cut-1.log"
        wait(lambda: "another rank is gone" in log.read_text(), "nobody noticed", folder)
        pair[1].bring_back()
        ended_as(alone, run, agents, folder)
