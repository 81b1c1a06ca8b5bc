"""Teacher logits to targets, against the pseudocode in plain Python."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dinoforge.losses import targets
from dinoforge.losses.targets import centering, sinkhorn_knopp, updated_center


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


@pytest.fixture(params=[1, 7, 1 << 21], ids=["rows one by one", "a few rows", "all rows"])
def chunks(request, monkeypatch):
    monkeypatch.setattr(targets, "_ELEMENTS_AT_ONCE", request.param)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_targets_are_computed_in_float32(dtype):
    logits = normal(6, 4).to(dtype)
    for result in (sinkhorn_knopp(logits, 0.2), centering(logits, 0.2, torch.zeros(4))):
        rows = all_rows(result)
        assert rows.dtype is torch.float32
        assert not rows.requires_grad
    torch.testing.assert_close(all_rows(sinkhorn_knopp(logits, 0.2)), two_loops(logits, 0.2, 3), rtol=1e-4, atol=1e-5)


def test_rows_are_read_by_index_or_slice():
    result = sinkhorn_knopp(normal(6, 4), 0.2)
    index = torch.tensor([5, 0, 0, 3])
    torch.testing.assert_close(result.rows(index), all_rows(result)[index], rtol=0, atol=0)
    torch.testing.assert_close(result.rows(slice(1, 4)), all_rows(result)[1:4], rtol=0, atol=0)


def test_reading_rows_does_not_change_the_logits():
    logits = normal(6, 4)
    before = logits.clone()
    result = sinkhorn_knopp(logits, 0.2)
    first = all_rows(result)
    assert torch.equal(all_rows(result), first)
    assert torch.equal(logits, before)


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


def test_the_center_is_kept_in_float32():
    center = updated_center(torch.zeros(4), normal(6, 4).bfloat16(), 0.9)
    assert center.dtype is torch.float32
    torch.testing.assert_close(center, normal(6, 4).bfloat16().float().mean(0) * 0.1)
