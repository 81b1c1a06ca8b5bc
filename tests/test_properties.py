"""What holds for every input: properties of the method's parts that fixed cases cannot show.

Further ones stand beside the fixed cases of their module.
"""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from dinoforge.builders.networks import build_student_teacher
from dinoforge.data.batch import Batch, masked_patches
from dinoforge.data.masks import batch_masks
from dinoforge.kernels.types import Kept
from dinoforge.method.dinov2 import StudentTeacher
from dinoforge.models.head import DINOHead
from dinoforge.models.stochastic_depth import KeptSamples
from dinoforge.models.vit import VisionTransformer
from dinoforge.optim.param_groups import parameter_groups, set_hyperparameters
from dinoforge.optim.schedules import Schedules
from dinoforge.recipe.load import load_recipe
from plain_losses import centering, sinkhorn_knopp

seeds = st.integers(0, 2**32 - 1)
shares = st.floats(0, 1)


def uniform(shape, bound, seed):
    return (2 * torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 1) * bound


# Targets


def in_float64(logits, temp, iterations=3):
    """Sinkhorn-Knopp by its definition on logarithms."""
    z = logits.double() / temp
    b = torch.zeros(len(z), 1, dtype=torch.float64)
    for _ in range(iterations):
        a = -torch.logsumexp(z + b, dim=0, keepdim=True)
        b = -torch.logsumexp(z + a, dim=1, keepdim=True)
    return (z + a + b).exp()


@given(shape=st.tuples(st.integers(1, 8), st.integers(1, 8)), seed=seeds, bound=st.floats(1e-3, 8))
@settings(max_examples=40)
def test_prototypes_come_to_equal_mass_at_the_rate_of_the_theorem(shape, seed, bound):
    """An iteration shrinks the spread of log masses by tanh²(Δ/4), where Δ is the largest log cross-ratio of the
    matrix (Franklin and Lorenz, "On the scaling of multidimensional matrices", 1989)."""
    logits = uniform(shape, bound, seed)
    cross = logits[:, None, :, None] + logits[None, :, None, :] - logits[:, None, None, :] - logits[None, :, :, None]
    rate = math.tanh(float(cross.max()) / 4) ** 2

    def spread(iterations):
        masses = sinkhorn_knopp(logits, 1.0, iterations).rows(slice(None)).double().sum(0)
        return float(masses.log().max() - masses.log().min())

    spreads = [spread(iterations) for iterations in range(1, 7)]
    for earlier, later in itertools.pairwise(spreads):
        assert later <= rate * earlier + 1e-4
    assert spread(40) <= rate**39 * spreads[0] + 1e-4


@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    seed=seeds,
    size=st.floats(0, 4).map(lambda exponent: 10**exponent),
    offset=st.floats(-1, 1),
    temp=st.floats(0.01, 2),
)
@settings(max_examples=60)
def test_logits_of_any_size_neither_overflow_nor_lose_the_answer(shape, seed, size, offset, temp):
    """``size`` is the largest |logit / temp|; float32 holds that, and sums with it, to about this much."""
    logits = (uniform(shape, size / 2, seed) + offset * size / 2) * temp
    rounding = 2**-24 * size * 40 + 1e-5
    results = {
        "sinkhorn_knopp": (sinkhorn_knopp(logits, temp), in_float64(logits, temp)),
        "centering": (
            centering(logits, temp, logits.mean(0)),
            torch.softmax((logits.double() - logits.mean(0)) / temp, dim=1),
        ),
    }
    for name, (ours, expected) in results.items():
        rows = ours.rows(slice(None)).double()
        torch.testing.assert_close(rows, expected, rtol=0, atol=rounding, msg=lambda m, name=name: f"{name}: {m}")
        torch.testing.assert_close(rows.sum(1), torch.ones(len(rows)).double(), rtol=0, atol=rounding)


# Masks


@given(
    crops=st.integers(0, 40),
    grid=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    ratio=st.tuples(shares, shares).map(sorted),
    probability=shares,
    largest=st.none() | st.floats(0.5, 200),
    smallest=st.integers(1, 16),
    seed=seeds,
)
@settings(max_examples=150)
def test_block_masks_of_a_batch_keep_below_their_targets(crops, grid, ratio, probability, largest, smallest, seed):
    masks = batch_masks(
        crops,
        grid,
        np.random.default_rng(seed),
        kind="block",
        ratio=ratio,
        probability=probability,
        max_patches=largest,
        min_patches=smallest,
    )
    patches, chosen = grid[0] * grid[1], int(crops * probability)
    assert masks.shape == (crops, patches)
    assert masks.dtype == bool
    counts = np.sort(masks.sum(axis=1))
    assert not counts[: crops - chosen].any()
    # Each target lies in its own bin of the range; in order of size, masks stay below the bins' upper ends.
    ends = ratio[0] + (ratio[1] - ratio[0]) * np.arange(1, chosen + 1) / max(chosen, 1)
    assert (counts[crops - chosen :] <= patches * ends + 1e-9).all()


@given(crops=st.integers(0, 40), side=st.integers(8, 20), low=st.floats(0.25, 1), probability=shares, seed=seeds)
def test_every_chosen_crop_gets_a_block(crops, side, low, probability, seed):
    """Where a first block of 4 or more patches is easy to place."""
    masks = batch_masks(
        crops, (side, side), np.random.default_rng(seed), kind="block", ratio=(low, 1), probability=probability
    )
    assert masks.any(axis=1).sum() == int(crops * probability)


@given(
    crops=st.integers(0, 40),
    grid=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    ratio=st.tuples(shares, shares).map(sorted),
    probability=shares,
    seed=seeds,
)
def test_bernoulli_masks_of_a_batch_keep_their_ratio(crops, grid, ratio, probability, seed):
    masks = batch_masks(
        crops, grid, np.random.default_rng(seed), kind="bernoulli", ratio=ratio, probability=probability
    )
    patches, chosen, (low, high) = grid[0] * grid[1], int(crops * probability), ratio
    assert masks.shape == (crops, patches)
    assert masks.any(axis=1).sum() <= chosen
    if low == 1:
        assert masks.all(axis=1).sum() == chosen
    # The mean over the bins is the middle of the range. Variance: of the patches, and of each ratio in its bin.
    middle, bin_width = (low + high) / 2, (high - low) / max(chosen, 1)
    variance = chosen * patches * middle * (1 - middle) + chosen * (patches * bin_width) ** 2 / 12
    assert abs(masks.sum() - chosen * patches * middle) <= 6 * math.sqrt(variance) + 6


# Stochastic depth


@given(
    images=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    kept=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    kind=st.sampled_from(["attn", "ffn"]),
    swiglu=st.booleans(),
    seed=seeds,
)
@settings(max_examples=25)
def test_the_mean_over_all_subsets_is_the_network_without_stochastic_depth(images, kept, kind, swiglu, seed):
    torch.manual_seed(seed)
    network = VisionTransformer(
        embed_dim=8, depth=1, num_heads=2, patch_size=4, image_size=8, ffn_layer="swiglu" if swiglu else "mlp"
    )
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.4)
    if kind == "attn":  # what follows the branch has to be linear
        nn.init.zeros_(network.blocks[0].ls2.gamma)
    network.norm = nn.Identity()
    crops = [torch.randn(images[0], 3, 8, 8), torch.randn(images[1], 3, 4, 4)]

    def tokens(subsets=None):
        every = [Kept(torch.arange(count), 1.0) for count in images]
        branches = {"attn": every, "ffn": every} | ({kind: subsets} if subsets else {})
        encoded = network.encode(crops, [None, None], [KeptSamples(**branches)])
        return torch.cat([torch.cat([t.cls, t.patches.flatten(1)], dim=1).flatten() for t in encoded])

    choices = [itertools.combinations(range(n), min(k, n)) for n, k in zip(images, kept, strict=True)]
    with torch.no_grad():
        outputs = []
        for subsets in itertools.product(*choices):
            pairs = zip(subsets, images, strict=True)
            outputs.append(tokens([Kept(torch.tensor(subset), count / len(subset)) for subset, count in pairs]))
        torch.testing.assert_close(torch.stack(outputs).mean(0), tokens(), rtol=1e-4, atol=1e-4)


# Parameter groups


@given(
    depth=st.integers(1, 45),
    decay=st.floats(0.3, 1),
    patch=st.floats(0, 2),
    registers=st.integers(0, 2),
    lr=st.floats(0, 1),
    last_layer_lr=st.floats(0, 1),
)
@settings(max_examples=25)
def test_learning_rates_by_layer(depth, decay, patch, registers, lr, last_layer_lr):
    with torch.device("meta"):
        sizes = {"embed_dim": 2, "num_heads": 1, "patch_size": 2, "image_size": 4, "num_register_tokens": registers}
        networks = {
            "backbone": VisionTransformer(depth=depth, **sizes),
            "dino_head": DINOHead(2, prototypes=3, bottleneck_dim=2, nlayers=2, hidden_dim=2),
        }
    groups = parameter_groups(networks, depth=depth, layerwise_decay=decay, patch_embed_lr_mult=patch)
    optimizer = torch.optim.AdamW(groups, lr=0.0)
    set_hyperparameters(optimizer, lr=lr, last_layer_lr=last_layer_lr, weight_decay=0.1)
    rates = {(g["module"], name): g["lr"] for g in optimizer.param_groups for name in g["names"]}
    assert len(rates) == sum(len(list(network.parameters())) for network in networks.values())
    embeddings = {"cls_token", "pos_embed", "mask_token", "register_tokens"}
    for (module, name), rate in rates.items():
        first, _, rest = name.partition(".")
        if module == "dino_head":
            expected = last_layer_lr if first == "last_layer" else lr
        elif first == "blocks":
            expected = lr * decay ** (depth - int(rest.partition(".")[0]))
        elif first == "patch_embed":
            expected = lr * decay ** (depth + 1) * patch
        else:
            assert first in embeddings | {"norm"}
            expected = lr * (decay ** (depth + 1) if first in embeddings else 1)
        assert rate == pytest.approx(expected, rel=1e-9), (module, name)


# Moving average


RECIPE = {
    "student.arch": "vit_custom",
    "student.embed_dim": 8,
    "student.depth": 1,
    "student.num_heads": 2,
    "student.patch_size": 4,
    "student.layerscale": 1.0,
    "crops.global_crops_size": 12,
    "crops.local_crops_size": 8,
    "crops.local_crops_number": 2,
    "augment.blur_kernel": 3,
    **{f"{loss}.head_n_prototypes": 5 for loss in ("dino", "ibot")},
    **{f"{loss}.head_hidden_dim": 6 for loss in ("dino", "ibot")},
    **{f"{loss}.head_bottleneck_dim": 4 for loss in ("dino", "ibot")},
}


@functools.cache
def networks_of(targets: str, separate_head: bool) -> StudentTeacher:
    torch.manual_seed(0)
    recipe, _ = load_recipe("dinov2", RECIPE | {"train.centering": targets, "ibot.separate_head": separate_head})
    return build_student_teacher(recipe)


def randomise(networks: StudentTeacher, seed: int) -> None:
    torch.manual_seed(seed)
    for parameter in networks.parameters():
        nn.init.normal_(parameter, std=0.3)
    for buffer in networks.buffers():
        nn.init.zeros_(buffer)


@given(momenta=st.lists(shares | st.sampled_from([0.0, 1.0]), min_size=1, max_size=4), seed=seeds)
@settings(max_examples=40)
def test_the_moving_average(momenta, seed):
    networks = networks_of("centering", separate_head=False)
    randomise(networks, seed)
    student = {name: p.detach().clone() for name, p in networks.student.named_parameters()}
    for momentum in momenta:
        before = {name: p.detach().clone() for name, p in networks.teacher.named_parameters()}
        networks.update_teacher(momentum)
        for name, teacher in networks.teacher.named_parameters():
            if momentum in (0.0, 1.0):
                assert torch.equal(teacher, student[name] if momentum == 0 else before[name])
            expected = momentum * before[name].double() + (1 - momentum) * student[name].double()
            torch.testing.assert_close(teacher.double(), expected, rtol=1e-6, atol=1e-6)
            low, high = torch.minimum(before[name], student[name]), torch.maximum(before[name], student[name])
            assert ((low - 1e-6 <= teacher) & (teacher <= high + 1e-6)).all()
    assert all(torch.equal(p, student[name]) for name, p in networks.student.named_parameters())


# Schedules


@st.composite
def schedules(draw):
    total = draw(st.integers(1, 120))
    return Schedules(
        total_steps=total,
        lr=draw(st.floats(1e-3, 1)),
        min_lr=draw(st.floats(0, 1e-3)),
        warmup_steps=draw(st.integers(0, total)),
        weight_decay=draw(shares),
        weight_decay_end=draw(shares),
        momentum=draw(shares),
        final_momentum=draw(shares),
        warmup_teacher_temp=draw(st.floats(0.01, 0.1)),
        teacher_temp=draw(st.floats(0.01, 0.1)),
        teacher_temp_steps=draw(st.integers(0, total)),
        freeze_last_layer_steps=draw(st.integers(0, 2 * total)),
        freeze_by_gradient=draw(st.booleans()),
    )


@given(s=schedules())
@settings(max_examples=150)
def test_schedules_of_a_run_of_any_length(s):
    hyper = [s(step) for step in range(s.total_steps + 1)]  # the last one is after the run

    lr = [h.lr for h in hyper]
    warmup, rest = lr[: s.warmup_steps], lr[s.warmup_steps :]
    assert warmup == sorted(warmup)
    assert rest == sorted(rest, reverse=True)
    if warmup:
        assert warmup[0] == 0
        assert warmup[-1] == (s.lr if s.warmup_steps > 1 else 0)
    assert rest[0] == pytest.approx(s.lr if s.warmup_steps < s.total_steps else s.min_lr)

    temps = [h.teacher_temp for h in hyper]
    linear = np.linspace(s.warmup_teacher_temp, s.teacher_temp, s.teacher_temp_steps).tolist()
    assert temps[: s.teacher_temp_steps] == pytest.approx(linear, rel=1e-9)
    assert set(temps[s.teacher_temp_steps :]) == {s.teacher_temp}

    for field, first, last in (
        ("weight_decay", s.weight_decay, s.weight_decay_end),
        ("momentum", s.momentum, s.final_momentum),
    ):
        values = [vars(h)[field] for h in hyper]
        assert values[0] == pytest.approx(first)
        # From one end to the other without a turn or a jump: a half cosine's steepest step is the largest.
        steps = [(b - a) * math.copysign(1, last - first) for a, b in itertools.pairwise(values)]
        assert all(-1e-12 <= step <= math.pi / 2 * abs(last - first) / s.total_steps + 1e-12 for step in steps)
    assert (hyper[-1].lr, hyper[-1].weight_decay, hyper[-1].momentum, hyper[-1].teacher_temp) == (
        s.min_lr,
        s.weight_decay_end,
        s.final_momentum,
        s.teacher_temp,
    )

    for step, h in enumerate(hyper):
        frozen = step < s.freeze_last_layer_steps
        assert h.last_layer_lr == (0 if frozen and not s.freeze_by_gradient else h.lr)
        assert h.last_layer_frozen == (frozen and s.freeze_by_gradient)


# Masked patches


@given(
    masked=st.lists(st.integers(0, 9), min_size=1, max_size=3).flatmap(
        lambda counts: st.tuples(
            st.just(counts), st.lists(st.integers(0, 9), min_size=len(counts), max_size=len(counts))
        )
    ),
    targets=st.sampled_from(["centering", "sinkhorn_knopp"]),
    separate_head=st.booleans(),
    seed=seeds,
)
@example(masked=([0, 0], [0, 0]), targets="centering", separate_head=True, seed=0)
@example(masked=([0, 0], [0, 0]), targets="sinkhorn_knopp", separate_head=True, seed=0)
@example(masked=([0], [0]), targets="sinkhorn_knopp", separate_head=False, seed=0)
@settings(max_examples=40)
def test_any_number_of_masked_patches_on_each_crop(masked, targets, separate_head, seed):
    networks = networks_of(targets, separate_head)
    randomise(networks, seed)
    counts = torch.tensor([*masked[0], *masked[1]])
    masks = torch.rand(len(counts), 9).argsort(1).argsort(1) < counts[:, None]
    batch = Batch(
        global_crops=torch.randn(len(counts), 3, 12, 12),
        local_crops=torch.randn(len(counts), 3, 8, 8),
        masks=masks,
        masked=masked_patches(masks),
        indices=torch.arange(len(counts) // 2),
    )
    networks.student.zero_grad()
    losses = networks(batch, teacher_temp=0.05)
    losses.total.backward()
    assert all(value.isfinite() for value in vars(losses).values())
    # Every parameter has a gradient, so that ranks with and without masks exchange the same ones.
    assert all(p.grad is not None and p.grad.isfinite().all() for p in networks.student.parameters())
    any_masked = bool(counts.any())
    assert (float(losses.ibot.detach()) > 0) == any_masked
    if separate_head:
        assert any(bool(p.grad.any()) for p in networks.student.ibot_head.parameters()) == any_masked
    if targets == "centering":
        assert bool(networks.ibot_center.any()) == any_masked
