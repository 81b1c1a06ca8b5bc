"""Production steps on an accelerator that is not there: the same numbers as on the CPU, and what they cost.

Each budget is what a step takes today. It may be lowered, never raised.
"""

from collections.abc import Iterator
from functools import partial

import pytest
import torch

from dinoforge.builders.data import build_data
from dinoforge.data.batch import Batch, prepare
from dinoforge.data.sources import open_source
from dinoforge.planning import bench as bench_module
from dinoforge.recipe.load import load_recipe
from dinoforge.selfcheck.fake import DEVICE, Counts, DeviceMismatchError, fake_accelerator
from tiny import TINY
from variants import VARIANTS, bench

WAITS = 1  # of the host for the device in a step: whether its loss and gradients are finite
HALF = ["sinkhorn", "separate_heads", "swiglu_registers", "accumulated", "stochastic_depth", "recomputed"]
PAGEABLE = 2**16  # bytes: a larger copy from ordinary memory is waited for


@pytest.fixture
def counts() -> Iterator[Counts]:
    with fake_accelerator(float64=False) as counted:
        yield counted


def weights(bench: bench_module.StepBench) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu() for name, tensor in bench._state.student_teacher.state_dict().items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_step_is_that_of_the_cpu_and_waits_once(name, counts):
    """No operand is left behind, nothing is float64, and the weights after three steps are the CPU's."""
    ours, theirs = bench(DEVICE, **VARIANTS[name]), bench(torch.device("cpu"), **VARIANTS[name])
    start = weights(ours)
    for _ in range(3):
        batch = ours.batch().pin_memory()
        counts.clear()
        ours.step(batch)
        assert len(counts.waits) <= WAITS, counts.waits
        assert [copy for copy in counts.pageable if copy[0] > PAGEABLE] == []
        theirs.step(theirs.batch())
    expected = weights(theirs)
    for key, tensor in weights(ours).items():
        moved = (expected[key] - start[key]).norm()
        assert (tensor - expected[key]).norm() <= 1e-2 * moved + 1e-6 * expected[key].norm(), key
    assert any(not torch.equal(start[key], tensor) for key, tensor in expected.items())


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", HALF)
def test_a_step_in_half_precision_waits_once(name, precision):
    # PyTorch's scaler computes in float64 but on MPS.
    with fake_accelerator(float64=precision is torch.float16) as counts:
        ours = bench(DEVICE, precision, **VARIANTS[name])
        ours.warm_up()
        counts.clear()
        assert ours.step(ours.batch().pin_memory())
    assert len(counts.waits) <= WAITS, counts.waits
    assert [copy for copy in counts.pageable if copy[0] > PAGEABLE] == []


def test_large_batches_of_indices_come_from_page_locked_memory(counts):
    """Stochastic depth and masks name rows by 64-bit numbers, of which a real batch has more than 64 KiB."""
    ours = bench(
        DEVICE,
        **{"train.batch_size_per_gpu": 256, "student.drop_path_rate": 0.3, "crops.global_crops_size": 64},
        **{"ibot.mask_sample_probability": 1.0, "student.depth": 1},
    )
    batch = ours.batch().pin_memory()
    counts.clear()
    ours.step(batch)
    assert len(batch.masked) * 8 > PAGEABLE
    assert max((size for size, _ in counts.pageable), default=0) <= PAGEABLE


@pytest.mark.parametrize("device", ["workers", "train"])
def test_preparing_a_batch_waits_for_nothing(device, counts, solar_cells):
    recipe, _ = load_recipe("small", TINY | {"augment.device": device, "student.in_chans": 3, "data.mean": [0.5] * 3})
    batch = build_data(recipe, open_source(solar_cells))[0]
    assert isinstance(batch, Batch)
    settings = {"mean": recipe.data.mean, "std": recipe.data.std}
    expected = prepare(batch, device=torch.device("cpu"), **settings)
    counts.clear()
    prepared = prepare(batch.pin_memory(), device=DEVICE, **settings)
    assert counts.waits == []
    assert [copy for copy in counts.pageable if copy[0] > PAGEABLE] == []
    for crops in ("global_crops", "local_crops"):
        assert getattr(prepared, crops).device == DEVICE
        torch.testing.assert_close(getattr(prepared, crops).cpu(), getattr(expected, crops))


def test_a_measured_step_needs_no_float64_there(counts, monkeypatch):
    """Diagnostics, gradient norms, update ratios: all of it under a device without float64."""
    ours = bench(DEVICE)
    results = []

    make_step = ours._stepper

    def measured(*given):
        results.append(make_step(*given, measure=True))
        return results[0]

    monkeypatch.setattr(ours, "_stepper", measured)
    ours.step(ours.batch().pin_memory())
    values = results[0].values()
    assert values["diag.effective_rank"] > 1
    assert {"diag.patch_similarity", "diag.update_ratio.backbone", "diag.kl.ibot"} <= values.keys()


# --- the accelerator itself ---


def test_it_refuses_what_a_real_one_would(counts):
    x = torch.ones(3, device=DEVICE)
    with pytest.raises(DeviceMismatchError, match="expected all tensors on one device"):
        x + torch.ones(3)
    assert (x + torch.tensor(2.0)).cpu().tolist() == [3.0] * 3  # a number may come from anywhere
    with pytest.raises(TypeError, match="float64"):
        x.double()
    network = torch.nn.Linear(3, 2)
    with pytest.raises(DeviceMismatchError):
        network(x)
    assert network.to(DEVICE)(x).device == DEVICE


def test_it_counts_what_a_real_one_would_wait_for(counts):
    x = torch.arange(5.0).pin_memory().to(DEVICE, non_blocking=True)
    assert (counts.waits, counts.pageable) == ([], [])
    for wait in (
        x.sum().item,
        x.cpu,
        x.nonzero,
        x.tolist,
        lambda: x[x > 2],
        lambda: bool(x[0] > 1),
        partial(torch.repeat_interleave, x, x.long()),
        lambda: torch.tensor(1.0, device=DEVICE),
        lambda: torch.zeros(4).to(DEVICE),
    ):
        counts.clear()
        wait()
        assert len(counts.waits) == 1, counts.waits
    counts.clear()
    torch.repeat_interleave(x, x.long(), output_size=10)
    torch.zeros(4).to(DEVICE, non_blocking=True)
    assert counts.waits == []
    assert [size for size, _ in counts.pageable] == [16]


def test_it_knows_autocast_and_gradients(counts):
    network = torch.nn.Linear(3, 2).to(DEVICE)
    x = torch.ones(4, 3, device=DEVICE)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert torch.is_autocast_enabled(DEVICE.type)
        assert network(x).dtype is torch.bfloat16
        with torch.autocast(DEVICE.type, enabled=False):
            assert network(x).dtype is torch.float32
    assert not torch.is_autocast_enabled(DEVICE.type)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.nn.functional.linear(torch.ones(1, 3), torch.ones(1, 3)).dtype is torch.bfloat16
    network(x).sum().backward()
    assert network.weight.grad.cpu().tolist() == [[4.0] * 3] * 2
