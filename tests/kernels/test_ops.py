"""Each operation behind the door: its fast twin against its definition, in values and gradients."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dinoforge.kernels import ops, plain
from dinoforge.kernels.types import Subset, Targets, Term

PRECISIONS = [torch.float32, torch.bfloat16]
# Of the norm of a result or a gradient. In float32 the two sum in another order: some roundings of 2^-24, more where
# much cancels. In bfloat16 each rounds what lies between by 2^-9 at other places, three or four times on the way.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}

quick = settings(max_examples=12, deadline=None)
counts = st.integers(0, 300)
groups_of_images = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 40)), min_size=1, max_size=3).map(tuple)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def outcome(
    kernels: ops.Kernels, call: Callable[..., Tensor], leaves: Sequence[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """The value of a call and the gradients of its leaves, for a gradient that is no constant."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    autocast = torch.autocast("cpu", dtype) if dtype is not torch.float32 else nullcontext()
    with ops.using(kernels):
        with autocast:
            value = call(*leaves)
        value.backward(normal(*value.shape, seed=99).to(value.dtype))
    gradients = [leaf.grad for leaf in leaves]
    assert all(gradient is not None for gradient in gradients)
    return [value.detach(), *(gradient for gradient in gradients if gradient is not None)]


def assert_equal(call: Callable[..., Tensor], leaves: Sequence[Tensor], dtype: torch.dtype) -> None:
    fast, plain_ones = (outcome(kernels, call, leaves, dtype) for kernels in ("fast", "plain"))
    for ours, theirs in zip(fast, plain_ones, strict=True):
        assert ours.shape == theirs.shape
        error = (ours.double() - theirs.double()).norm()
        assert error <= TOLERANCE[dtype] * theirs.double().norm() + 1e-12, (error, theirs.double().norm())


def linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer whose parameters are these very tensors, so that gradients reach them."""
    linear = nn.Linear(weight.shape[1], len(weight), bias=bias is not None)
    del linear.weight, linear.bias
    linear.weight, linear.bias = weight, bias
    return linear


def norm_of(weight: Tensor, bias: Tensor) -> nn.LayerNorm:
    norm = nn.LayerNorm(len(weight), eps=1e-6)
    del norm.weight, norm.bias
    norm.weight, norm.bias = weight, bias
    return norm


# Linear layers


@pytest.mark.parametrize("dtype", PRECISIONS)
@given(count=counts, width=st.sampled_from([8, 24]), out=st.sampled_from([8, 40]), has_bias=st.booleans())
@quick
def test_norm_linear(dtype, count, width, out, has_bias):
    def call(x, norm_weight, norm_bias, weight, *bias):
        return ops.norm_linear(x, norm_of(norm_weight, norm_bias), linear_of(weight, *(bias or [None])))

    leaves = [3 * normal(count, width) + 1, 1 + normal(width, seed=1), normal(width, seed=2), normal(out, width)]
    assert_equal(call, [*leaves, *([normal(out, seed=3)] if has_bias else [])], dtype)


@pytest.mark.parametrize("dtype", PRECISIONS)
@given(count=counts, has_bias=st.booleans(), has_scale=st.booleans(), gelu=st.booleans())
@quick
def test_scaled_linear(dtype, count, has_bias, has_scale, gelu):
    def call(x, weight, *rest):
        bias, scale = (rest[0] if has_bias else None), (rest[-1] if has_scale else None)
        return ops.scaled_linear(x, linear_of(weight, bias), scale, gelu=gelu)

    rest = [normal(16, seed=3)] * has_bias + [normal(16, seed=4)] * has_scale
    assert_equal(call, [normal(count, 24), normal(16, 24, seed=1), *rest], dtype)


@pytest.mark.parametrize("kernels", ["fast", "plain"])
def test_the_gradient_of_a_scaled_weight_does_not_overflow_in_float16(kernels):
    """Over 4,096 tokens and times a loss scale of 1,024, that of the unscaled weight would be some 10^6."""
    x, linear = torch.ones(4096, 8), nn.Linear(8, 8)
    scale = torch.full((8,), 1e-5, requires_grad=True)
    with ops.using(kernels), torch.autocast("cpu", torch.float16):
        out = ops.scaled_linear(x, linear, scale)
    (1024 * out.sum()).backward()
    torch.testing.assert_close(linear.weight.grad, torch.full((8, 8), 4096 * 1024 * 1e-5), rtol=2e-2, atol=0)
    assert scale.grad.isfinite().all()


def test_even_rows_are_zeros_below():
    x = normal(33, 4)
    with ops.using("fast"):
        more = ops.even_rows(x)
    assert torch.equal(more, torch.cat([x, torch.zeros(len(more) - 33, 4)]))
    assert len(more) > 33
    with ops.using("plain"):
        assert ops.even_rows(x) is x


# Attention and residual branches


@pytest.mark.parametrize("dtype", PRECISIONS)
@given(groups=groups_of_images, heads=st.integers(1, 3), width=st.sampled_from([4, 16]))
@quick
def test_attention(dtype, groups, heads, width):
    tokens = sum(images * each for images, each in groups)

    def call(qkv):
        return ops.attention(qkv.to(dtype), groups, heads)

    assert_equal(call, [normal(tokens, 3 * heads * width)], dtype)


@pytest.mark.parametrize("dtype", PRECISIONS)
@given(groups=groups_of_images, data=st.data())
@quick
def test_a_branch_of_some_rows(dtype, groups, data):
    rows, kept_groups, scales, start = [], [], [], 0
    for images, tokens in groups:
        kept = data.draw(st.permutations(range(images)))[: data.draw(st.integers(0, images))]
        rows += [start + image * tokens + token for image in kept for token in range(tokens)]
        kept_groups.append((len(kept), tokens))
        scales.append(data.draw(st.floats(0.5, 4)))
        start += images * tokens
    subset = Subset(torch.tensor(rows, dtype=torch.int64), tuple(kept_groups), tuple(scales))

    def call(x, factor):
        stream, taken = ops.take_rows(x * 2, subset.rows)
        return ops.add_rows(stream, (taken * factor).to(dtype), subset)

    assert_equal(call, [normal(start, 6), normal(6, seed=1)], dtype)


# Targets and cross-entropy

prototypes = st.integers(1, 70)


@pytest.mark.parametrize("kind", ["centering", "sinkhorn_knopp", "sinkhorn_knopp, largest known"])
@pytest.mark.parametrize("dtype", PRECISIONS)
@given(k=prototypes, n=st.integers(0, 50), iterations=st.integers(1, 4), temp=st.floats(0.04, 1))
@quick
def test_targets(dtype, kind, k, n, iterations, temp):
    z, g, v, center = (
        F.normalize(normal(n, 8), dim=1),
        normal(k, 1).abs() + 0.5,
        normal(k, 8, seed=1),
        normal(k, seed=2),
    )

    def make(kernels: ops.Kernels) -> Tensor:
        with ops.using(kernels), torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            logits = ops.teacher_logits(z, g, v, temp, scratch=ops.Scratch())
            assert logits.shape == (k, n)
            assert logits.dtype is dtype
            if kind == "centering":
                targets = ops.centering(logits, center, temp)
            else:
                largest = float(g.max()) / temp if "known" in kind else None
                targets = ops.sinkhorn_knopp(logits, iterations, largest)
        return targets.rows(slice(None))

    fast, by_plain = make("fast"), make("plain")
    assert fast.dtype is by_plain.dtype is torch.float32
    for rows in (fast, by_plain):
        torch.testing.assert_close(rows.sum(dim=1), torch.ones(n), rtol=1e-4, atol=0)
    # Probabilities have the relative error of exponentials, which is the absolute one of logits as large as 1 / 0.04;
    # in bfloat16 the logits are the same, and what is kept of the exponentials is rounded to 2^-9.
    torch.testing.assert_close(fast, by_plain, rtol=1e-3 if dtype is torch.float32 else 2**-6, atol=1e-6)


def make_targets(k: int, n: int) -> Targets:
    logits = 3 * normal(k, n, seed=5)
    return Targets(logits.softmax(dim=0), torch.ones(k), torch.ones(n))


def terms_of(embeddings: Sequence[Tensor], sources: Sequence[tuple[slice, ...]], targets: Targets) -> list[Term]:
    return [
        Term(F.normalize(z, dim=-1), targets, where, torch.linspace(0.1, 1, z.shape[1]), 0.1)
        for z, where in zip(embeddings, sources, strict=True)
    ]


@pytest.mark.parametrize("dtype", PRECISIONS)
@given(k=prototypes, crops=st.integers(1, 4), samples=st.integers(0, 20), more=st.integers(0, 30))
@quick
def test_cross_entropy(dtype, k, crops, samples, more):
    targets = make_targets(k, 2 * samples + more)
    both, last = (slice(0, samples), slice(samples, 2 * samples)), slice(2 * samples, 2 * samples + more)
    each: list[Tensor] = []

    def call(g, v, first, second):
        total, values = ops.cross_entropy(terms_of([first, second], [both, (last,)], targets), g, v, ops.Scratch())
        assert total.dtype is torch.float32
        assert not values.requires_grad
        each.append(values)
        return total

    leaves = [normal(k, 1).abs() + 0.5, normal(k, 8, seed=1), normal(crops, samples, 8), normal(1, more, 8, seed=2)]
    assert_equal(call, leaves, dtype)
    torch.testing.assert_close(each[0], each[1], rtol=TOLERANCE[dtype], atol=1e-6)


@pytest.mark.parametrize("at_once", [1, 700, plain.LOGITS])
def test_the_plain_cross_entropy_is_the_same_in_parts(at_once):
    def call(g, v, z):
        (term,) = terms_of([z], [(slice(0, 40), slice(5, 45))], make_targets(50, 50))
        return plain.cross_entropy([term], g, v, torch.float32, at_once)[0]

    leaves = [normal(50, 1).abs() + 0.5, normal(50, 8, seed=1), normal(3, 40, 8)]
    for ours, theirs in zip(
        outcome("plain", call, leaves, torch.float32),
        outcome("fast", lambda g, v, z: _by_log_softmax(g, v, z), leaves, torch.float32),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def _by_log_softmax(g: Tensor, v: Tensor, z: Tensor) -> Tensor:
    """The same loss, by all logits at once and a loop."""
    p = make_targets(50, 50).scaled.T
    log_q = (F.normalize(z, dim=-1) @ (g * F.normalize(v, dim=1)).T / 0.1).log_softmax(dim=-1)
    weights = torch.linspace(0.1, 1, 40)
    return -sum((weights * (p[start : start + 40] * own).sum(dim=1)).sum() for own in log_q for start in (0, 5))


def test_no_logit_is_kept_for_the_backward_pass():
    z, g, v = F.normalize(normal(1, 600, 4), dim=-1).requires_grad_(), torch.ones(900, 1), normal(900, 4)
    kept: list[int] = []

    def count(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x), ops.using("plain"):
        ops.cross_entropy(terms_of([z], [(slice(0, 600),)], make_targets(900, 600)), g, v, ops.Scratch())
    assert kept
    assert max(kept) < 900 * 600


def test_calls_with_one_last_layer_add_up():
    """The fast twin gives the weights all of the gradient in the last call; the plain one each its own."""
    targets = make_targets(30, 24)

    def call(g, v, first, second):
        layer, scratch = ops.LastLayer(2), ops.Scratch()
        totals = []
        for z, source in ((first, slice(0, 10)), (second, slice(10, 24))):
            totals.append(ops.cross_entropy(terms_of([z], [(source,)], targets), g, v, scratch, layer)[0])
        return totals[0] + totals[1]

    leaves = [normal(30, 1).abs() + 0.5, normal(30, 8), normal(2, 10, 8), normal(1, 14, 8)]
    ours, theirs = (outcome(kernels, call, leaves, torch.float32) for kernels in ("fast", "plain"))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# The choice


def test_plain_is_asked_for_inside_of_the_context_alone(monkeypatch):
    seen = []
    monkeypatch.setattr(plain, "attention", lambda *arguments: seen.append(arguments) or arguments[0])
    qkv = normal(4, 24)
    ops.attention(qkv, ((2, 2),), 2)
    assert not seen
    with ops.using("plain"):
        with ops.using("auto"):
            ops.attention(qkv, ((2, 2),), 2)
        assert not seen
        ops.attention(qkv, ((2, 2),), 2)
    assert len(seen) == 1
    ops.attention(qkv.to("meta"), ((2, 2),), 2)  # not a CPU's
    assert len(seen) == 2
