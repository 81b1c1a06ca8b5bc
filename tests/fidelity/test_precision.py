"""The reference's steps in half precision and under ``torch.compile``: how far they are from its float32."""

import os
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from dinoforge.selfcheck.fidelity import world_size_of
from fidelity import check

CASES = sorted(path.parent.name for path in check.CASES.glob("*/case.json"))
RUNS = [
    pytest.param(name, marks=pytest.mark.processes) if world_size_of(check.CASES / name) > 1 else name for name in CASES
]

# A case takes 5 to 25 s to compile, so here are two that hold every layer that blocks may have.
COMPILED = ["centering_shared_head", "sinkhorn_separate_heads_swiglu_registers"]


@pytest.mark.parametrize("dtype", check.HALF_BOUNDS, ids=str)
@pytest.mark.parametrize("name", RUNS)
def test_steps_in_half_precision(name, dtype):
    errors = check.check(check.CASES / name, dtype).worst
    measured = {kind: ratio * check.BOUNDS[kind] for kind, (ratio, _) in errors.items()}
    assert all(error <= check.HALF_BOUNDS[dtype][kind] for kind, error in measured.items()), errors
    assert measured["gradient"] > check.HALF_LEAST[dtype]  # it was not float32 after all


@pytest.fixture
def compiler(require_system):
    """What inductor needs to compile for the CPU."""
    require_system(shutil.which(os.environ.get("CXX", "g++")) or "/usr/bin/g++", "g++")
    require_system(Path(sysconfig.get_path("include"), "Python.h"), "python3-dev")
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def compile_blocks(student_teacher):
    for networks in (student_teacher.student, student_teacher.teacher):
        for block in networks.backbone.blocks:
            block.compile()


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_steps_keep_the_bounds_of_float32(name):
    errors = check.run_case(check.CASES / name, prepare=compile_blocks)
    assert errors.within_bounds, errors.worst
    assert counters["stats"]["unique_graphs"] >= 2  # the student's and the teacher's: it was compiled
    assert not counters["graph_break"]
