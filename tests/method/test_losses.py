"""The losses, against loops over their definition and their gradients, against autograd."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dinoforge.kernels import tiles
from dinoforge.kernels.cross_entropy import _chunks
from dinoforge.kernels.cross_entropy import cross_entropy as terms_over
from dinoforge.kernels.tiles import Scratch
from dinoforge.kernels.types import Term
from dinoforge.method.koleo import koleo_loss
from plain_losses import centering, cross_entropy, dino_loss, ibot_loss, sinkhorn_knopp

TEMP = 0.1
DIM, PROTOTYPES = 5, 7


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def bottlenecks(count, seed=0):
    return F.normalize(normal(count, DIM, seed=seed), dim=1)


def teacher(count, seed=10):
    return sinkhorn_knopp(normal(count, PROTOTYPES, seed=seed), 0.3)


def pair(target, logits, temp=TEMP):
    """Cross-entropy of one student row with one row of targets."""
    return -torch.dot(target.to(logits.dtype), torch.log_softmax(logits / temp, dim=0))


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


@pytest.fixture(params=[(1, 4), (12, 120), (1 << 20, 1 << 26)], ids=["one by one", "a few at a time", "all at once"])
def chunks(request, monkeypatch):
    monkeypatch.setattr(tiles, "_ON_CPU", request.param)


# Cross-entropy


def make_term(crops=3, samples=4, sources=((0, 4),), dtype=torch.float32):
    z = F.normalize(normal(crops, samples, DIM), dim=-1).to(dtype).requires_grad_()
    weights = torch.rand(samples, generator=torch.Generator().manual_seed(3))
    return Term(z, teacher(6), tuple(slice(*s) for s in sources), weights, TEMP)


def by_loops(term, w, *, detached=True):
    """The docstring's pseudocode, as a function of float64 leaves of its own unless not ``detached``."""
    z = term.embeddings
    if detached:
        z, w = (x.detach().double().requires_grad_() for x in (z, w))
    probabilities = term.targets.rows(slice(None)).to(w.dtype)
    loss = sum(
        term.weights[i] * pair(probabilities[samples][i], z[c, i] @ w.T, term.temp)
        for c in range(z.shape[0])
        for i in range(z.shape[1])
        for samples in term.sources
    )
    return loss, z, w


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sources", [((0, 4),), ((0, 4), (2, 6))])
@pytest.mark.parametrize("crops", [1, 3])
def test_cross_entropy_and_its_gradients_are_those_of_log_softmax(crops, sources, dtype):
    term = make_term(crops, sources=sources, dtype=dtype)
    w = normal(PROTOTYPES, DIM, seed=1, dtype=dtype).requires_grad_()
    ours, each = cross_entropy([term], w)
    expected, z64, w64 = by_loops(term, w)
    assert ours.dtype is torch.float32
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(each, ours.detach()[None])
    for mine, theirs in zip(gradients(ours, term.embeddings, w), gradients(expected, z64, w64), strict=True):
        assert mine.dtype is dtype
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-5)


def test_terms_add_up():
    first, second = make_term(1), make_term(3, sources=((0, 4), (2, 6)))
    w = normal(PROTOTYPES, DIM, seed=1).requires_grad_()
    total, each = cross_entropy([first, second], w)
    apart = [cross_entropy([term], w)[0] for term in (first, second)]
    torch.testing.assert_close(each, torch.stack(apart).detach())
    assert not each.requires_grad
    torch.testing.assert_close(total, sum(apart))
    torch.testing.assert_close(gradients(total, w), gradients(sum(apart), w))


@pytest.mark.usefixtures("chunks")
def test_gradients_of_the_weight_norm_are_autograds():
    g, v = (1 + normal(PROTOTYPES, 1, seed=4).abs()).requires_grad_(), normal(PROTOTYPES, DIM, seed=1).requires_grad_()
    with torch.no_grad():
        g[0] = 0  # a prototype whose length decay took away still has a gradient
    terms = [make_term(1), make_term(3, sources=((0, 4), (2, 6))), make_term(2)]
    ours, _ = terms_over(terms, g, v, Scratch())
    effective = g * v / v.norm(dim=1, keepdim=True)
    expected = sum(by_loops(term, effective, detached=False)[0] for term in terms)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0)
    inputs = (g, v, *(term.embeddings for term in terms))
    torch.testing.assert_close(gradients(ours, *inputs), gradients(expected, *inputs), rtol=1e-4, atol=1e-5)


@given(
    shapes=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 40)), min_size=1, max_size=5), most=st.integers(1, 50)
)
def test_chunks_hold_each_column_once(shapes, most):
    z = [torch.empty(crops, samples, 1) for crops, samples in shapes]
    numbered = [(i, Term(e, teacher(1), (slice(0, 0),), torch.ones(e.shape[1]), TEMP)) for i, e in enumerate(z)]
    seen = [torch.zeros(samples, dtype=torch.int) for _, samples in shapes]
    for chunk in _chunks(numbered, most):
        filled = 0
        for piece in chunk:
            crops = shapes[piece.number][0]
            seen[piece.number][piece.samples] += 1
            assert piece.columns == slice(filled, filled + crops * (piece.samples.stop - piece.samples.start))
            filled = piece.columns.stop
        assert 0 < filled <= most + max(crops for crops, _ in shapes)
    for (crops, _), each in zip(shapes, seen, strict=True):
        assert torch.all(each == (1 if crops else 0))


def test_logits_of_any_size_do_not_overflow():
    term, w = make_term(), (1e4 * normal(PROTOTYPES, DIM, seed=1)).requires_grad_()
    ours, _ = cross_entropy([term], w)
    expected, z64, w64 = by_loops(term, w)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=0)
    for mine, theirs in zip(gradients(ours, term.embeddings, w), gradients(expected, z64, w64), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-2, atol=1e-2 * float(theirs.abs().max()))


def test_a_factor_on_the_loss_scales_its_gradients():
    term, w = make_term(), normal(PROTOTYPES, DIM, seed=1).requires_grad_()
    plain = gradients(cross_entropy([term], w)[0], term.embeddings, w)
    scaled = gradients(-2.5 * cross_entropy([term], w)[0], term.embeddings, w)
    for a, b in zip(plain, scaled, strict=True):
        torch.testing.assert_close(b, -2.5 * a)


@pytest.mark.parametrize("needs", [(True, False), (False, True), (False, False)])
def test_only_wanted_gradients_are_made(needs):
    term, w = make_term(), normal(PROTOTYPES, DIM, seed=1).requires_grad_(needs[1])
    z = term.embeddings.requires_grad_(needs[0])
    loss, _ = cross_entropy([term], w)
    assert loss.requires_grad == any(needs)
    if any(needs):
        loss.backward()
    assert (z.grad is not None, w.grad is not None) == needs


def test_no_samples_give_zero_loss_and_zero_gradients():
    z, w = torch.zeros(1, 0, DIM).requires_grad_(), normal(PROTOTYPES, DIM, seed=1).requires_grad_()
    loss, _ = cross_entropy([Term(z, teacher(0), (slice(0, 0),), torch.zeros(0), TEMP)], w)
    loss.backward()
    assert loss.item() == 0
    assert z.grad.shape == (1, 0, DIM)
    assert torch.equal(w.grad, torch.zeros_like(w))


@pytest.mark.parametrize(("dtype", "relative"), [(torch.bfloat16, 0.03), (torch.float16, 1e-5)])
def test_autocast_is_close(dtype, relative):
    term, w = make_term(8), normal(PROTOTYPES, DIM, seed=1).requires_grad_()
    expected, _ = cross_entropy([term], w)
    with torch.autocast("cpu", dtype=dtype):
        ours, _ = cross_entropy([term], w)
    assert ours.dtype is torch.float32
    torch.testing.assert_close(ours, expected, rtol=relative, atol=0)
    for mine, theirs in zip(gradients(ours, term.embeddings, w), gradients(expected, term.embeddings, w), strict=True):
        assert mine.dtype is torch.float32
        assert (mine - theirs).norm() <= relative * theirs.norm()


# DINO


def dino_by_loops(z_global, z_local, w, targets, crops):
    batch = len(z_global) // 2
    probabilities = targets.rows(slice(None))
    global_logits, local_logits = z_global @ w.T, z_local @ w.T
    pairs = 2 + 2 * crops
    global_loss, local_loss = torch.zeros(()), torch.zeros(())
    for b in range(batch):
        for view in range(2):
            other = probabilities[(1 - view) * batch + b]
            global_loss = global_loss + pair(other, global_logits[view * batch + b]) / batch / pairs
        for crop in range(crops if len(z_local) else 0):
            for view in range(2):
                target = probabilities[view * batch + b]
                local_loss = local_loss + pair(target, local_logits[crop * batch + b]) / batch / pairs
    return global_loss, local_loss


@pytest.mark.parametrize(("batch", "crops"), [(3, 4), (1, 2), (4, 1), (3, 0)])
def test_dino_is_its_pseudocode(batch, crops):
    z_global = bottlenecks(2 * batch).requires_grad_()
    z_local = bottlenecks(crops * batch, seed=1).requires_grad_()
    w = normal(PROTOTYPES, DIM, seed=2).requires_grad_()
    targets = teacher(2 * batch)
    ours = dino_loss(z_global, z_local, w, targets, local_crops_number=crops, student_temp=TEMP)
    expected = dino_by_loops(z_global, z_local, w, targets, crops)
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    if not crops:
        assert ours[1].item() == 0
    inputs = (z_global, z_local, w) if crops else (z_global, w)
    torch.testing.assert_close(gradients(sum(ours), *inputs), gradients(sum(expected), *inputs), rtol=1e-4, atol=1e-6)


def test_the_global_term_keeps_its_share_when_the_local_one_is_left_out():
    z_global, z_local, w, targets = bottlenecks(6), bottlenecks(12, seed=1), normal(PROTOTYPES, DIM), teacher(6)
    both = dino_loss(z_global, z_local, w, targets, local_crops_number=4, student_temp=TEMP)
    without = dino_loss(z_global, z_local[:0], w, targets, local_crops_number=4, student_temp=TEMP)
    assert torch.equal(without[0], both[0])
    assert without[1].item() == 0


def test_the_mean_over_pairs_of_equal_crops_is_the_entropy_of_their_targets():
    # Students that agree with the teacher everywhere: every pair gives the same value, whatever the number of crops.
    logits = normal(1, PROTOTYPES)
    targets = centering(logits.expand(4, -1), TEMP, torch.zeros(PROTOTYPES))
    rows = targets.rows(slice(None))
    entropy = -(rows[0] * rows[0].log()).sum()
    for crops in (0, 1, 5):
        terms = dino_loss(
            logits.expand(4, -1),
            logits.expand(2 * crops, -1),
            torch.eye(PROTOTYPES),
            targets,
            local_crops_number=crops,
            student_temp=TEMP,
        )
        torch.testing.assert_close(sum(terms), entropy, rtol=1e-4, atol=1e-6)


# iBOT


def ibot_by_loops(z, w, targets, masks):
    probabilities, logits = targets.rows(slice(None)), z @ w.T
    loss, position = torch.zeros(()), 0
    for crop in masks:
        masked = int(crop.sum())
        for _ in range(masked):
            loss = loss + pair(probabilities[position], logits[position]) / masked / len(masks)
            position += 1
    return loss


@pytest.mark.parametrize(
    "masks",
    [
        [[1, 0, 1, 1], [0, 1, 0, 0]],
        [[0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 1], [0, 0, 0, 0]],  # crops without a mask count as zero
        [[1, 1, 1, 1]] * 2,
    ],
)
def test_ibot_is_its_pseudocode(masks):
    masks = torch.tensor(masks, dtype=torch.bool)
    count = int(masks.sum())
    z, w = bottlenecks(count).requires_grad_(), normal(PROTOTYPES, DIM, seed=2).requires_grad_()
    targets = teacher(count)
    ours, expected = ibot_loss(z, w, targets, masks, TEMP), ibot_by_loops(z, w, targets, masks)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients(ours, z, w), gradients(expected, z, w), rtol=1e-4, atol=1e-6)


def test_without_any_masked_patch_ibot_is_zero_and_still_in_the_graph():
    z, w = bottlenecks(0).requires_grad_(), normal(PROTOTYPES, DIM, seed=2).requires_grad_()
    loss = ibot_loss(z, w, teacher(0), torch.zeros(4, 9, dtype=torch.bool), TEMP)
    assert loss.item() == 0
    assert loss.requires_grad
    loss.backward()
    assert torch.equal(w.grad, torch.zeros_like(w))


def test_a_crop_counts_alike_however_much_of_it_is_masked():
    logits, w = normal(1, PROTOTYPES), torch.eye(PROTOTYPES)
    values = []
    for masked in (1, 5):
        masks = torch.zeros(2, 9, dtype=torch.bool)
        masks[0, :masked] = True
        targets = centering(logits.expand(masked, -1), 0.5, torch.zeros(PROTOTYPES))
        values.append(ibot_loss(logits.expand(masked, -1), w, targets, masks, TEMP))
    torch.testing.assert_close(values[0], values[1])


# KoLeo


def koleo_by_loops(x):
    x = x.double()
    x = x / x.norm(dim=1, keepdim=True)
    loss = 0.0
    for i in range(len(x)):
        loss = loss - torch.stack([(x[i] - x[j]).norm() for j in range(len(x)) if j != i]).min().log() / len(x)
    return loss


@given(count=st.integers(2, 9), dim=st.integers(4, 8), seed=st.integers(0, 2**32), scale=st.floats(1e-2, 1e3))
@settings(max_examples=30, deadline=None)
def test_koleo_is_its_pseudocode(count, dim, seed, scale):
    x = normal(count, dim, seed=seed)
    torch.testing.assert_close(koleo_loss(x * scale).double(), koleo_by_loops(x), rtol=1e-3, atol=1e-4)


def test_the_gradient_of_koleo_is_that_of_the_loops():
    x = normal(6, 4).requires_grad_()
    torch.testing.assert_close(
        gradients(koleo_loss(x), x), gradients(koleo_by_loops(x).float(), x), rtol=1e-3, atol=1e-5
    )


def test_a_step_against_the_gradient_of_koleo_spreads_features():
    x = normal(8, 4).requires_grad_()
    (gradient,) = gradients(koleo_loss(x), x)
    assert koleo_loss(x - 0.01 * gradient) < koleo_loss(x)


@pytest.mark.parametrize("count", [0, 1])
def test_without_a_neighbour_koleo_is_zero_and_still_in_the_graph(count):
    x = normal(count, 4).requires_grad_()
    loss = koleo_loss(x)
    assert loss.item() == 0
    loss.backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_koleo_of_equal_features_is_finite():
    x = torch.ones(3, 4).requires_grad_()
    loss = koleo_loss(x)
    loss.backward()
    assert loss.isfinite()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_koleo_is_computed_in_float32(dtype):
    # Neighbours this close are one and the same in half precision once normalised there.
    x = torch.cat([torch.ones(1, 64), torch.ones(1, 64)])
    x[1, 0] = 1 + 2 * torch.finfo(dtype).eps
    half = x.to(dtype)
    assert not torch.equal(half[0], half[1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = koleo_loss(half)
    assert loss.dtype is torch.float32
    torch.testing.assert_close(loss.double(), koleo_by_loops(x), rtol=1e-3, atol=0)


def test_koleo_of_opposite_features():
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    torch.testing.assert_close(koleo_loss(x).double(), koleo_by_loops(x), rtol=1e-3, atol=0)
