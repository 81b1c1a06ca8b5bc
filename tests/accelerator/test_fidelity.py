"""The reference's steps by the branches that an accelerator takes, with the bounds of the CPU's.

Cases of one rank run on an accelerator that is not there. Those of two ranks need gloo, which knows no such device:
they run on the CPU by the kernels that an accelerator takes.
"""

import json
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dinoforge.selfcheck.fake import DEVICE, fake_accelerator
from dinoforge.selfcheck.fidelity import AMPLIFIED, BOUNDS, CASES, HALF_BOUNDS, Errors, run_case, world_size_of

NAMES = sorted(path.parent.name for path in CASES.glob("*/case.json"))
ALONE = [name for name in NAMES if world_size_of(CASES / name) == 1]
TOGETHER = [name for name in NAMES if name not in ALONE]


def test_all_cases_are_here():
    assert (len(ALONE), len(TOGETHER)) == (4, 2)


@pytest.mark.parametrize("least", [None, 1])
@pytest.mark.parametrize("name", ALONE)
def test_steps_agree_with_the_reference(name, least):
    with fake_accelerator():
        errors = run_case(CASES / name, device=DEVICE, least_tokens=least)
    assert errors.within_bounds, errors.worst


@pytest.mark.parametrize("dtype", HALF_BOUNDS)
@pytest.mark.parametrize("name", ALONE)
def test_steps_in_half_precision(name, dtype):
    with fake_accelerator():
        errors = run_case(CASES / name, dtype, device=DEVICE)
    measured = {kind: ratio * BOUNDS[kind] for kind, (ratio, _) in errors.worst.items()}
    assert all(error <= HALF_BOUNDS[dtype][kind] for kind, error in measured.items()), errors.worst
    assert measured["gradient"] > 1e-4  # it was not float32 after all


def as_rank(rank: int, folder: str, mode: str, world_size: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    errors = run_case(Path(folder), mode=mode, kernels="plain")
    if rank == 0:
        Path(out).write_text(json.dumps(errors.worst))
    dist.barrier()
    os._exit(0)  # gloo's threads may abort a process that shuts down


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", TOGETHER)
def test_steps_of_two_ranks_agree_with_the_reference(name, mode, tmp_path):
    out = tmp_path / "errors.json"
    arguments = (str(CASES / name), mode, 2, str(tmp_path / "store"), str(out))
    torch.multiprocessing.spawn(as_rank, args=arguments, nprocs=2)
    errors = Errors({kind: tuple(worst) for kind, worst in json.loads(out.read_text()).items()})
    assert set(errors.worst) >= {"loss", "gradient", "parameter"}
    assert errors.worst["gradient"][0] <= 1, errors.worst  # of the first step
    assert all(ratio <= AMPLIFIED.get(name, 1) for ratio, _ in errors.worst.values()), errors.worst
