"""However the global batch is cut into ranks and micro-batches, and the networks are sharded, a step is the same."""

import pytest
import torch

from distributed import layouts, ranks

pytestmark = pytest.mark.processes

CUT = ("centering", "sinkhorn_knopp", "separate heads, groups", "only heads learn at first")


@pytest.fixture(scope="module")
def at_once():
    return {kind: layouts.run(kind, layouts.Layout("none")) for kind in CUT}


@pytest.fixture(scope="module")
def on_two(tmp_path_factory):
    return ranks.start(layouts.__name__, ["two"], 2, tmp_path_factory.mktemp("two"))


OF_IMAGES = ("effective_rank", "target_information.dino")
"""What is measured of several images, and of none where a rank has one."""


def assert_same(ours, theirs, *, images=2):
    """Losses of ten steps within 1e-5, and where they lead to; what was measured is there, but of the first part."""
    of_images = {f"{layouts.MEASURED} diag.{name}" for name in OF_IMAGES}
    assert of_images <= theirs.keys()
    theirs = {name: value for name, value in theirs.items() if images > 1 or name not in of_images}
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        if "diag." in name:
            assert ours[name].isfinite()
        elif name.startswith("state"):
            torch.testing.assert_close(ours[name], expected, rtol=1e-5, atol=2e-6, msg=lambda m, n=name: f"{n}: {m}")
        else:
            bound = 1e-5 if "norm" not in name else 1e-4
            torch.testing.assert_close(ours[name], expected, rtol=bound, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def test_ten_steps_lead_somewhere(at_once):
    for results in at_once.values():
        assert abs(results["9 total"] - results["0 total"]) > 0.01
        assert results["5 ibot"] == 0  # nothing is masked there
        assert all(value.isfinite().all() for value in results.values())


@pytest.mark.parametrize("kind", CUT)
@pytest.mark.parametrize("layout", layouts.ON_ONE)
def test_on_one_rank(at_once, kind, layout):
    assert_same(layouts.run(kind, layouts.ON_ONE[layout]), at_once[kind])


@pytest.mark.parametrize(("kind", "layout"), [c for c in layouts.COMBINATIONS if c[0] in CUT])
def test_on_two_ranks(at_once, on_two, kind, layout):
    for rank in on_two:
        assert_same(rank["two"][f"{kind}: {layout}"], at_once[kind])


@pytest.mark.parametrize("layout", ["ddp", "fsdp"])
def test_two_ranks_are_two_micro_batches(on_two, layout):
    """Also where the cut has a meaning: KoLeo and the centre per part, stochastic depth."""
    in_parts = layouts.run("of the reference", layouts.ON_ONE["accumulated"])
    for rank in on_two:
        assert_same(rank["two"][f"of the reference: {layout}"], in_parts)


def test_the_cut_has_a_meaning_in_the_reference(on_two, at_once):
    theirs = layouts.run("of the reference", layouts.Layout("none"))
    ours = on_two[0]["two"]["of the reference: ddp"]
    assert abs(ours["0 koleo"] / theirs["0 koleo"] - 1) > 0.01


def test_a_step_moves_the_weights_as_far_on_two_ranks(at_once, on_two):
    names = [name for name in at_once["centering"] if "diag.update_ratio" in name]
    assert len(names) == 2  # backbone and head
    for name in names:
        torch.testing.assert_close(
            on_two[0]["two"]["centering: ddp"][name], at_once["centering"][name], rtol=1e-4, atol=0
        )


def test_while_only_heads_learn_the_backbone_stays(at_once):
    norms = [at_once["only heads learn at first"][f"{step} grad_norm.backbone"] for step in range(4)]
    assert norms[:3] == [0, 0, 0]
    assert norms[3] > 0


def test_copies_of_shards_on_four_ranks(tmp_path, at_once):
    for rank in ranks.start(layouts.__name__, ["four"], 4, tmp_path):
        for kind, results in rank["four"].items():
            assert_same(results, at_once[kind])
