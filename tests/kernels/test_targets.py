"""Teacher logits to targets, against the pseudocode in plain Python."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dinoforge.kernels import targets, tiles
from dinoforge.kernels.tiles import Scratch
from plain_losses import centering, last_layer, sinkhorn_knopp, updated_center


def normal(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def all_rows(result):
    return result.rows(slice(None))


def log_sum_exp(values):
    top = max(values)
    return top + math.log(sum(math.exp(v - top) for v in values))


def two_loops(logits, temp, iterations):
    """The docstring's pseudocode in float64."""
    x = [[v / temp for v in row] for row in logits.double().tolist()]
    samples, prototypes = range(len(x)), range(len(x[0]))
    a, b = [0.0 for _ in prototypes], [0.0 for _ in samples]
    for _ in range(iterations):
        for k in prototypes:
            a[k] = -log_sum_exp([x[n][k] + b[n] for n in samples])
        for n in samples:
            b[n] = -log_sum_exp([x[n][k] + a[k] for k in prototypes])
    return torch.tensor([[math.exp(x[n][k] + a[k] + b[n]) for k in prototypes] for n in samples])


def on_the_matrix(logits, temp, iterations):
    """As SwAV states it: rows and columns of a matrix of probabilities are scaled in turn."""
    q = (logits.double() / temp).exp()
    q = q / q.sum()
    n, k = q.shape
    for _ in range(iterations):
        q = q / q.sum(dim=0, keepdim=True) / k
        q = q / q.sum(dim=1, keepdim=True) / n
    return q * n


seeds = st.integers(0, 2**32)
shapes = st.tuples(st.integers(1, 9), st.integers(1, 9))


@pytest.fixture(params=[1, 12, 1 << 20], ids=["prototypes one by one", "a few prototypes", "all prototypes"])
def chunks(request, monkeypatch):
    monkeypatch.setattr(tiles, "_ON_CPU", (request.param, 1 << 24))


# Sinkhorn-Knopp


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("iterations", [1, 2, 3, 10])
@pytest.mark.parametrize("shape", [(6, 4), (3, 9), (1, 5), (5, 1)])
def test_sinkhorn_knopp_is_its_pseudocode(shape, iterations):
    logits = normal(*shape)
    ours = all_rows(sinkhorn_knopp(logits, 0.3, iterations)).double()
    torch.testing.assert_close(ours, two_loops(logits, 0.3, iterations).double(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours, on_the_matrix(logits, 0.3, iterations), rtol=1e-4, atol=1e-6)


@given(shape=shapes, seed=seeds, temp=st.floats(0.02, 2), iterations=st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_targets_of_a_sample_sum_to_one(shape, seed, temp, iterations):
    logits = normal(*shape, seed=seed)
    center = normal(shape[1], seed=seed + 1)
    for result in (sinkhorn_knopp(logits, temp, iterations), centering(logits, temp, center)):
        rows = all_rows(result)
        assert rows.ge(0).all()
        torch.testing.assert_close(rows.sum(1), torch.ones(shape[0]), rtol=0, atol=1e-4)


@given(shape=shapes, seed=seeds, shift=st.floats(-50, 50))
@settings(max_examples=30, deadline=None)
def test_a_constant_on_all_logits_changes_nothing(shape, seed, shift):
    logits = normal(*shape, seed=seed)
    torch.testing.assert_close(
        all_rows(sinkhorn_knopp(logits + shift, 0.5)), all_rows(sinkhorn_knopp(logits, 0.5)), rtol=1e-3, atol=1e-4
    )


@given(shape=shapes, seed=seeds)
@settings(max_examples=20, deadline=None)
def test_a_constant_on_a_prototype_or_sample_changes_nothing_once_balanced(shape, seed):
    logits = normal(*shape, seed=seed, scale=0.5)
    moved = logits + normal(1, shape[1], seed=seed + 1) + normal(shape[0], 1, seed=seed + 2)
    torch.testing.assert_close(
        all_rows(sinkhorn_knopp(moved, 1.0, 300)), all_rows(sinkhorn_knopp(logits, 1.0, 300)), rtol=1e-3, atol=1e-3
    )


@given(shape=shapes, seed=seeds)
@settings(max_examples=30, deadline=None)
def test_the_order_of_samples_and_prototypes_is_free(shape, seed):
    logits = normal(*shape, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    samples, prototypes = (torch.randperm(size, generator=generator) for size in shape)
    ours = all_rows(sinkhorn_knopp(logits[samples][:, prototypes], 0.4))
    expected = all_rows(sinkhorn_knopp(logits, 0.4))[samples][:, prototypes]
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_logits_far_from_zero(offset):
    logits = (normal(8, 5) * 64).round() / 64  # exact, also with the offset
    assert torch.equal(logits + offset - offset, logits)
    torch.testing.assert_close(
        all_rows(sinkhorn_knopp(logits + offset, 1.0)), two_loops(logits, 1.0, 3), rtol=0, atol=0.01
    )


def teacher_logits(z, w, temp):
    return targets.teacher_logits(z, *last_layer(w), temp, scratch=Scratch())


@pytest.mark.usefixtures("chunks")
def test_teacher_logits_are_products_over_temperature():
    z, w = normal(6, 3), normal(5, 3, seed=1)
    logits = teacher_logits(z, w, 0.2)
    torch.testing.assert_close(logits, (z @ w.T / 0.2).T, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = teacher_logits(z, w, 0.2)
    assert half.dtype is torch.bfloat16
    torch.testing.assert_close(half.float(), logits, rtol=0.03, atol=0.1)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("make", [targets.sinkhorn_knopp, lambda x: targets.centering(x, torch.zeros(50), 0.2)])
def test_targets_of_half_precision_logits(make):
    half = (10 * normal(50, 20)).bfloat16()
    expected, ours = make(half.float()), make(half.clone())
    rows = all_rows(ours)
    assert rows.dtype is torch.float32
    torch.testing.assert_close(rows.sum(dim=1), torch.ones(20), rtol=1e-5, atol=0)
    torch.testing.assert_close(rows, all_rows(expected), rtol=2**-6, atol=1e-4)


def test_scratch_memory_is_taken_again_and_grows():
    scratch, cpu = Scratch(), torch.device("cpu")
    first = scratch.take("a", (3, 16), torch.float32, cpu)
    assert scratch.take("a", (6, 9), torch.float32, cpu).data_ptr() == first.data_ptr()  # 54 ≤ 48 + 48 // 8
    assert scratch.take("b", (3, 16), torch.float32, cpu).data_ptr() != first.data_ptr()
    assert scratch.take("a", (3, 16), torch.bfloat16, cpu).dtype is torch.bfloat16
    assert scratch.take("a", (10, 10), torch.float32, cpu).shape == (10, 10)
    assert scratch.take("a", (0, 10), torch.float32, cpu).shape == (0, 10)


def test_targets_take_the_memory_of_the_logits():
    z, w = normal(6, 3), normal(5, 3, seed=1)
    for make in (lambda x: targets.sinkhorn_knopp(x), lambda x: targets.centering(x, torch.zeros(5), 0.2)):
        logits = teacher_logits(z, w.requires_grad_(), 0.2)
        result = make(logits)
        assert result.scaled.data_ptr() == logits.data_ptr()
        assert not result.rows(slice(None)).requires_grad


def test_some_rows_are_those_of_all():
    result = sinkhorn_knopp(normal(6, 4), 0.2)
    torch.testing.assert_close(result.rows(slice(1, 4)), all_rows(result)[1:4], rtol=0, atol=0)
    torch.testing.assert_close(result.tile(slice(2, 3), slice(1, 4)).T, all_rows(result)[1:4, 2:3], rtol=0, atol=0)


def test_no_samples():
    empty = torch.zeros(0, 4)
    for result in (sinkhorn_knopp(empty, 0.1), centering(empty, 0.1, torch.zeros(4))):
        assert all_rows(result).shape == (0, 4)


# Centering


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_centering_is_the_softmax_of_centered_logits(scale):
    logits, center = normal(9, 6, scale=scale), normal(6, seed=1)
    expected = torch.softmax((logits.double() - center) / 0.05, dim=1)
    rounding = 4 * 2**-24 * float(logits.abs().max()) / 0.05
    torch.testing.assert_close(all_rows(centering(logits, 0.05, center)).double(), expected, rtol=0, atol=rounding)


def test_the_center_is_a_running_mean():
    center, expected = torch.zeros(4), torch.zeros(4)
    for step in range(5):
        logits = normal(6, 4, seed=step)
        expected = 0.9 * expected + 0.1 * sum(logits) / 6
        center = updated_center(center, logits, 0.9)
    torch.testing.assert_close(center, expected)


def test_the_center_stays_without_samples():
    center = normal(4)
    torch.testing.assert_close(updated_center(center, torch.zeros(0, 4), 0.9), center)
