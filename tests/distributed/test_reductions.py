"""Reductions over ranks: nothing on one process; on two, what one process gets from all the data."""

import sys
from types import ModuleType

import pytest
import torch
import torch.distributed as dist

from dinoforge.system import distributed
from distributed import workers
from distributed.ranks import start
from plain_losses import sinkhorn_knopp

pytestmark = pytest.mark.processes

# One process


def test_one_process_is_not_distributed():
    assert (distributed.is_active(), distributed.rank(), distributed.world_size()) == (False, 0, 1)


@pytest.mark.parametrize(
    "reduce", [distributed.sum_over_ranks, distributed.mean_over_ranks, distributed.logsumexp_over_ranks]
)
def test_on_one_process_reductions_are_identities(reduce):
    x = torch.tensor([1.0, -float("inf"), 1e30], requires_grad=True)
    result = reduce(x)
    assert torch.equal(result, x)
    assert not result.requires_grad
    assert result.data_ptr() != x.data_ptr()  # a new tensor: changing it does not change x


def test_a_process_group_of_one_is_one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        test_one_process_is_not_distributed()
        test_on_one_process_reductions_are_identities(distributed.logsumexp_over_ranks)
    finally:
        dist.destroy_process_group()


# Two processes


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes got, for every task of ``workers.py``."""
    return start(workers.__name__, list(workers.TASKS), 2, tmp_path_factory.mktemp("ranks"))


def test_each_process_knows_its_rank(ranks):
    assert [r["reductions"]["rank"].tolist() for r in ranks] == [[0, 2, 1], [1, 2, 1]]


def test_sums_and_means(ranks):
    for r in ranks:
        assert r["reductions"]["sum"].tolist() == [3.0, 30.0]
        assert r["reductions"]["mean"].tolist() == [1.5, 15.0]


def test_logsumexp(ranks):
    expected = torch.logsumexp(workers.VALUES.double(), dim=0).float()
    assert expected[3] == -float("inf")  # no rank has anything
    for r in ranks:
        torch.testing.assert_close(r["reductions"]["logsumexp"], expected)
        assert r["reductions"]["unchanged"]


@pytest.mark.parametrize("split", workers.SPLITS)
def test_sinkhorn_knopp_balances_the_samples_of_all_ranks(ranks, split):
    together = torch.cat([r["targets"][split] for r in ranks])
    assert [len(r["targets"][split]) for r in ranks] == list(workers.SPLITS[split])
    whole = torch.cat([workers.logits(split, rank) for rank in range(2)])
    torch.testing.assert_close(together, sinkhorn_knopp(whole, 0.3).rows(slice(None)), rtol=1e-4, atol=1e-6)
    apart = [sinkhorn_knopp(workers.logits(split, rank), 0.3).rows(slice(None)) for rank in range(2)]
    if min(workers.SPLITS[split]):  # otherwise one rank has all there is
        assert not torch.allclose(together, torch.cat(apart), atol=0.01)


@pytest.mark.parametrize("split", workers.SPLITS)
def test_the_center_takes_the_mean_of_the_ranks_means(ranks, split):
    center = torch.arange(5.0)
    means = [
        workers.logits(split, rank).mean(0) if count else center for rank, count in enumerate(workers.SPLITS[split])
    ]
    for r in ranks:
        torch.testing.assert_close(r["targets"][f"center_{split}"], 0.9 * center + 0.1 * (means[0] + means[1]) / 2)


@pytest.mark.parametrize("masked", ["1", "01", ""], ids=["one rank without masks", "masks", "no masks"])
@pytest.mark.parametrize("targets", ["centering", "sinkhorn_knopp"])
def test_a_step_is_finite_and_the_same_on_all_ranks(ranks, targets, masked):
    results = [
        {key.partition(".")[2]: value for key, value in r["step"].items() if key.startswith(f"{targets}_{masked}.")}
        for r in ranks
    ]
    assert any(key.startswith("state.student") for key in results[0])
    for key, first in results[0].items():
        assert first.isfinite().all(), key
        assert torch.equal(first, results[1][key]), key  # losses, norms, weights and centres
    assert (results[0]["loss.ibot"] != 0) == bool(masked)
    assert (results[0]["norm.ibot_head"] > 0) == bool(masked)


def test_a_tensor_is_whole_while_the_type_of_sharded_ones_is_imported(monkeypatch):
    # A checkpoint's thread imports it; a step on the main thread may meet it half made.
    monkeypatch.setitem(sys.modules, "torch.distributed.tensor", ModuleType("half made"))
    tensor = torch.ones(2)
    assert distributed.whole(tensor) is tensor
    assert distributed.shards([tensor])[0] is tensor
