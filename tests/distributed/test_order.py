"""Sixty-four ranks, of which some are played one by one: all ask for the same collectives in the same order.

A rank that asks for another collective than the others, or for one more, makes real ranks wait for ever.
"""

import json
import subprocess
import sys

import pytest

from dinoforge.system import distributed
from distributed import order
from programs import environment

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """Collectives by rank and kind. Ranks have processes of their own: DTensors remember the groups of others."""
    folder = tmp_path_factory.mktemp("order")
    started = [
        subprocess.Popen(
            [sys.executable, "-m", order.__name__, str(rank), str(folder / f"{rank}.json")],
            env=environment(),
            stderr=subprocess.PIPE,
        )
        for rank in order.MASKED
    ]
    for process in started:
        _, errors = process.communicate(timeout=280)
        assert process.returncode == 0, errors.decode()
    return {rank: json.loads((folder / f"{rank}.json").read_text()) for rank in order.MASKED}


@pytest.mark.parametrize("kind", order.KINDS)
def test_all_ranks_ask_for_the_same_collectives(kind, seen):
    first, *others = order.MASKED
    expected = seen[first][kind]
    for rank in others:
        for number, (ours, theirs) in enumerate(zip(seen[rank][kind], expected, strict=False)):
            assert ours == theirs, f"number {number} of rank {rank}"
        assert len(seen[rank][kind]) == len(expected), f"rank {rank}"
    groups = {tuple(part) for collective in expected for part in collective[1:] if isinstance(part[0], str)}
    sizes = {size for _, size in groups}
    assert order.WORLD in sizes
    assert (groups >= {("mesh_replicate", 8), ("mesh_shard", 8)}) == kind.startswith("hsdp")


def test_a_collective_that_is_left_out_is_seen(monkeypatch):
    keys = order.KINDS["ddp, sinkhorn_knopp"]
    every = order.collectives_of(63, keys)
    monkeypatch.setattr(distributed, "sum_over_ranks", lambda x: x.detach().clone())
    assert len(order.collectives_of(63, keys)) < len(every)
