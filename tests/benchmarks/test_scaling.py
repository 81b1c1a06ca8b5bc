"""The benchmark of several ranks runs, and counts as it says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent.parent / "benchmarks" / "scaling.py"
TINY = (
    "student.embed_dim=48 student.depth=2 student.num_heads=2 crops.local_crops_number=2 dino.head_hidden_dim=64 "
    "dino.head_n_prototypes=64"
)


def test_one_line_of_json():
    command = [sys.executable, str(SCRIPT), "--batch", "4", "--steps", "2", "--json", *TINY.split()]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=280)
    (line,) = result.stdout.splitlines()
    one, equal_work, equal_batch = json.loads(line)
    assert [(row["ranks"], row["images"]) for row in (one, equal_work, equal_batch)] == [(1, 4), (2, 8), (2, 4)]
    assert equal_work["efficiency"] == pytest.approx(one["step_s"] / equal_work["step_s"])
    assert equal_batch["efficiency"] == pytest.approx(one["step_s"] / equal_batch["step_s"] / 2)
    assert all(row["communication"] < 1 for row in (equal_work, equal_batch))
