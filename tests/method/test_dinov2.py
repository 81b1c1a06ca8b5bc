"""The two networks and the losses between them."""

import contextlib
import dataclasses
import functools
import itertools

import pytest
import torch
from torch import nn

from dinoforge.builders.lengths import RunLength, build_schedules
from dinoforge.builders.networks import build_drop_path_rates, build_optimizer, build_state, build_student_teacher
from dinoforge.data.batch import Batch, masked_patches
from dinoforge.health.numbers import Diagnostics, effective_rank, patch_similarity
from dinoforge.method.koleo import koleo_loss
from dinoforge.models.stochastic_depth import draw_kept_samples
from dinoforge.optim.schedules import Hyperparameters
from dinoforge.training.loop import train
from dinoforge.training.pieces import pieces
from dinoforge.training.step import Stepper
from plain_losses import centering, dino_loss, ibot_loss
from small_networks import TEMP, make, make_batch, make_recipe, make_step

TERMS = ("dino_global", "dino_local", "ibot", "koleo")
KEYS = {
    "dino_global": "dino.global_loss_weight",
    "dino_local": "dino.local_loss_weight",
    "ibot": "ibot.loss_weight",
    "koleo": "dino.koleo_loss_weight",
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads that wait for each other take longer than these small networks."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def terms_of(networks, batch=None):
    losses = networks(batch or make_batch(), teacher_temp=TEMP)
    return {name: float(value.detach()) for name, value in vars(losses).items()}


# Teacher


def test_the_teacher_starts_as_the_student():
    networks = build_student_teacher(make_recipe({"ibot.separate_head": True}))
    student, teacher = networks.student.state_dict(), networks.teacher.state_dict()
    assert list(student) == list(teacher)
    assert {name.split(".")[0] for name in student} == {"backbone", "dino_head", "ibot_head"}
    for name, value in student.items():
        assert torch.equal(value, teacher[name])
        assert value.data_ptr() != teacher[name].data_ptr()


def test_the_teacher_gets_no_gradient_and_the_student_all():
    networks = make({"ibot.separate_head": True})
    networks(make_batch(), teacher_temp=TEMP).total.backward()
    assert not any(p.requires_grad or p.grad is not None for p in networks.teacher.parameters())
    for name, parameter in networks.student.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_a_forward_pass_moves_no_parameter():
    networks = make()
    before = {name: p.clone() for name, p in networks.named_parameters()}
    networks(make_batch(), teacher_temp=TEMP).total.backward()
    assert all(torch.equal(p, before[name]) for name, p in networks.named_parameters())


# Terms


def test_the_terms_are_the_losses_of_the_networks_outputs():
    networks = make({"ibot.separate_head": True, "dino.loss_weight": 0.5, "ibot.loss_weight": 2.0})
    batch = make_batch()
    ours = networks(batch, teacher_temp=TEMP)

    student, teacher = networks.student, networks.teacher
    center = torch.zeros(8)
    tokens = teacher.backbone(batch.global_crops)
    cls_targets = centering(teacher.dino_head(tokens.cls), TEMP, center)
    patch_targets = centering(teacher.ibot_head(tokens.patches[batch.masks]), TEMP, center)
    global_tokens = student.backbone(batch.global_crops, batch.masks)
    local_tokens = student.backbone(batch.local_crops)
    dino_global, dino_local = dino_loss(
        student.dino_head.embed(global_tokens.cls),
        student.dino_head.embed(local_tokens.cls),
        student.dino_head.last_layer.weight(),
        cls_targets,
        local_crops_number=3,
        student_temp=0.1,
    )
    ibot = ibot_loss(
        student.ibot_head.embed(global_tokens.patches[batch.masks]),
        student.ibot_head.last_layer.weight(),
        patch_targets,
        batch.masks,
        0.1,
    )
    koleo = koleo_loss(global_tokens.cls[:4]) + koleo_loss(global_tokens.cls[4:])
    expected = {
        "dino_global": 0.5 * dino_global,
        "dino_local": 0.5 * dino_local,
        "ibot": 2 * ibot,
        "koleo": 0.1 * koleo,
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(ours, name), value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.total, sum(expected.values()), rtol=1e-4, atol=1e-5)


@functools.cache
def all_on():
    return terms_of(make())


SUBSETS = [set(s) for n in range(1, 4) for s in itertools.combinations(TERMS, n)]


@pytest.mark.parametrize("off", SUBSETS, ids=lambda off: "without " + " ".join(sorted(off)))
def test_a_term_that_is_off_is_zero_and_changes_no_other(off):
    assert all(abs(all_on()[name]) > 1e-3 for name in TERMS)
    networks = make(recipe=make_recipe({KEYS[name]: 0.0 for name in off}))
    # Without heads, the same random numbers fall on other parameters: take all that are there from the whole.
    whole = make().state_dict()
    networks.load_state_dict({name: whole[name] for name in networks.state_dict()})
    losses = networks(make_batch(), teacher_temp=TEMP)
    for name in TERMS:
        value = float(getattr(losses, name).detach())
        assert value == (0.0 if name in off else pytest.approx(all_on()[name], rel=1e-4)), name
    assert float(losses.total.detach()) == pytest.approx(
        sum(all_on()[name] for name in TERMS if name not in off), rel=1e-4
    )
    losses.total.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in networks.student.parameters())


@pytest.mark.parametrize("name", TERMS)
@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_a_weight_scales_its_term_alone(name, factor):
    weight = factor * (0.1 if name == "koleo" else 1.0)
    terms = terms_of(make({KEYS[name]: weight}))
    for other in TERMS:
        assert terms[other] == pytest.approx(all_on()[other] * (factor if other == name else 1), rel=1e-4)


def test_the_weight_of_dino_scales_both_its_terms():
    terms = terms_of(make({"dino.loss_weight": 0.5, "dino.local_loss_weight": 0.5}))
    assert terms["dino_global"] == pytest.approx(all_on()["dino_global"] * 0.5, rel=1e-4)
    assert terms["dino_local"] == pytest.approx(all_on()["dino_local"] * 0.25, rel=1e-4)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize(("dino", "ibot"), list(itertools.product(["centering", "sinkhorn_knopp"], repeat=2)))
def test_all_targets_work_together(dino, ibot, separate):
    networks = make({"dino.targets": dino, "ibot.targets": ibot, "ibot.separate_head": separate})
    buffers = {name for name, _ in networks.named_buffers()}
    assert ("dino_center" in buffers) == (dino == "centering")
    assert ("ibot_center" in buffers) == (ibot == "centering")
    losses = networks(make_batch(), teacher_temp=TEMP)
    losses.total.backward()
    assert all(value.isfinite() for value in vars(losses).values())
    assert all(p.grad.isfinite().all() for p in networks.student.parameters())


def test_targets_of_one_loss_do_not_change_the_other():
    plain, other = terms_of(make()), terms_of(make({"dino.targets": "sinkhorn_knopp"}))
    assert other["dino_global"] != pytest.approx(plain["dino_global"], rel=1e-4)
    assert other["ibot"] == pytest.approx(plain["ibot"], rel=1e-6)


def test_targets_use_the_center_of_earlier_steps():
    networks, batch = make(), make_batch()
    with torch.no_grad():
        tokens = networks.teacher.backbone(batch.global_crops)
        logits = networks.teacher.dino_head(tokens.cls)
        patch_logits = networks.teacher.dino_head(tokens.patches[batch.masks])
    assert networks.dino_center.eq(0).all()
    first = terms_of(networks, batch)
    torch.testing.assert_close(networks.dino_center, 0.1 * logits.mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(networks.ibot_center, 0.1 * patch_logits.mean(0), rtol=1e-4, atol=1e-6)
    assert terms_of(networks, batch)["dino_global"] != first["dino_global"]
    torch.testing.assert_close(networks.dino_center, 0.19 * logits.mean(0), rtol=1e-4, atol=1e-6)


def test_temperatures_of_the_student_are_those_of_the_recipe():
    terms = terms_of(make({"dino.student_temp": 0.2}))
    assert terms["dino_global"] != pytest.approx(all_on()["dino_global"], rel=1e-3)
    assert terms["ibot"] == pytest.approx(all_on()["ibot"], rel=1e-5)


# Batches


def test_no_local_crops():
    networks = make({"crops.local_crops_number": 0})
    losses = networks(make_batch(local=0), teacher_temp=TEMP)
    assert float(losses.dino_local.detach()) == 0
    # Its share of the pairs falls to the global term: 2 + 2 · 3 pairs before, 2 now.
    assert float(losses.dino_global.detach()) == pytest.approx(4 * all_on()["dino_global"], rel=1e-4)
    losses.total.backward()
    assert all(p.grad.isfinite().all() for p in networks.student.parameters())


def test_a_single_image():
    losses = make()(make_batch(images=1), teacher_temp=TEMP)
    assert float(losses.koleo.detach()) == 0
    assert all(value.isfinite() for value in vars(losses).values())


def test_the_student_sees_masks_also_without_the_patch_loss():
    networks = make({"ibot.loss_weight": 0.0})
    batch = make_batch()
    bare = dataclasses.replace(batch, masks=torch.zeros_like(batch.masks), masked=batch.masked[:0])
    assert terms_of(networks, batch)["koleo"] != pytest.approx(terms_of(networks, bare)["koleo"], rel=1e-4)


def test_stochastic_depth_touches_the_student_only():
    recipe = make_recipe()
    networks, batch = make(recipe=recipe), make_batch()
    seen = []
    networks.teacher.backbone.norm.register_forward_hook(lambda *args: seen.append(args[-1]))
    kept = draw_kept_samples([0.5, 0.5], [8, 12], torch.Generator().manual_seed(0))
    dropped = networks(batch, teacher_temp=TEMP, kept=kept)
    whole = networks(batch, teacher_temp=TEMP)
    assert torch.equal(seen[0], seen[1])
    assert abs(float((dropped.koleo - whole.koleo).detach())) > 1e-4


def test_losses_are_the_same_under_a_permutation_of_the_images():
    order = torch.tensor([2, 0, 3, 1])
    batch = make_batch()

    def permuted(crops):
        return crops.unflatten(0, (-1, 4))[:, order].flatten(0, 1)

    masks = permuted(batch.masks)
    other = Batch(permuted(batch.global_crops), permuted(batch.local_crops), masks, masked_patches(masks), order)
    ours, theirs = terms_of(make(), batch), terms_of(make(), other)
    assert ours == {name: pytest.approx(value, rel=1e-4) for name, value in theirs.items()}


# Heads


@pytest.mark.parametrize(
    ("overrides", "heads"),
    [
        ({}, {"dino_head"}),
        ({"ibot.separate_head": True}, {"dino_head", "ibot_head"}),
        ({"ibot.separate_head": True, "dino.loss_weight": 0}, {"ibot_head"}),
        ({"dino.loss_weight": 0}, {"dino_head"}),  # shared: the patch loss reads it
        ({"ibot.separate_head": True, "ibot.loss_weight": 0}, {"dino_head"}),
        ({"dino.loss_weight": 0, "ibot.loss_weight": 0}, set()),
        ({"dino.global_loss_weight": 0, "dino.local_loss_weight": 0}, {"dino_head"}),
    ],
)
def test_heads_that_no_loss_reads_are_absent(overrides, heads):
    networks = make(overrides)
    assert set(networks.student.parts) == set(networks.teacher.parts) == {"backbone", *heads}
    networks(make_batch(), teacher_temp=TEMP).total.backward()
    assert all(p.grad is not None for head in heads for p in networks.student.heads[head].parameters())


def test_separate_heads_have_their_own_sizes():
    networks = make(
        {
            "ibot.separate_head": True,
            "ibot.head_n_prototypes": 5,
            "ibot.head_bottleneck_dim": 3,
            "ibot.head_nlayers": 2,
            "ibot.head_hidden_dim": 7,
        }
    )
    widths = {
        name: [tuple(m.weight.shape) for m in head.mlp if isinstance(m, nn.Linear)]
        for name, head in networks.student.parts.items()
        if name != "backbone"
    }
    assert widths == {"dino_head": [(12, 16), (12, 12), (6, 12)], "ibot_head": [(7, 16), (3, 7)]}
    assert networks.student.dino_head.last_layer.weight_v.shape == (8, 6)
    assert networks.student.ibot_head.last_layer.weight_v.shape == (5, 3)
    assert (networks.dino_center.shape, networks.ibot_center.shape) == ((8,), (5,))


def test_cancelling_drops_the_last_layers_gradients_alone():
    networks = make({"ibot.separate_head": True})
    networks(make_batch(), teacher_temp=TEMP).total.backward()
    networks.student.drop_last_layer_gradients()
    for name, parameter in networks.student.named_parameters():
        assert (parameter.grad is None) == (".last_layer." in name), name


# A step


@pytest.mark.parametrize("key", ["dino.loss_weight", "dino.local_loss_weight"])
def test_stochastic_depth_when_the_local_term_is_off(key):
    lengths = {"optim.warmup_length": "0%", "optim.freeze_last_layer_length": "0%"}
    lengths |= {"teacher.warmup_teacher_temp_length": "0%", "train.batch_size_per_gpu": 4}
    recipe = make_recipe({key: 0.0, "student.drop_path_rate": 0.5, "train.steps": 1} | lengths)
    state = build_state(recipe, torch.device("cpu"), images=4)
    reports = []
    train(
        state,
        iter([make_batch()]),
        build_schedules(recipe, RunLength(1, batch_size=4, images=4)),
        Stepper(clip_grad=3.0, drop_path_rates=build_drop_path_rates(recipe)),
        samples_per_step=4,
        prepare=lambda batch: batch,
        hooks=[reports.append],
        is_measured=lambda step: False,
        should_stop=lambda: False,
        on_skipped=lambda skipped: None,
        on_non_finite=lambda *args: pytest.fail("not finite"),
    )
    assert state.step == 1
    assert float(reports[0].result.losses.dino_local.detach()) == 0


def test_a_step_moves_student_then_teacher():
    recipe = make_recipe()
    networks = make(recipe=recipe)
    optimizer = build_optimizer(recipe, networks)
    before = {name: p.clone() for name, p in networks.named_parameters()}
    hyper = Hyperparameters(1e-2, 0.0, 0.04, 0.9, TEMP, last_layer_frozen=False)
    result = make_step(networks, optimizer, make_batch(), hyper, clip_grad=3.0)
    assert set(result.grad_norms) == {"backbone", "dino_head"}
    for name, student in networks.student.named_parameters():
        assert torch.equal(student, before[f"student.{name}"]) == ("last_layer" in name), name
        expected = 0.9 * before[f"teacher.{name}"] + 0.1 * student
        torch.testing.assert_close(networks.teacher.get_parameter(name), expected)
        assert student.grad is None


# Diagnostics


def measured(networks, batch):
    numbers = Diagnostics()
    no_autocast = contextlib.nullcontext
    for piece in pieces(networks, batch, teacher_temp=TEMP, autocast=no_autocast, diagnostics=numbers):
        losses = vars(networks(piece.batch, teacher_temp=TEMP, targets=piece.targets))
        numbers.add_cross_entropies({name: losses[name].detach() * factor for name, factor in piece.to_means.items()})
    return numbers


def test_diagnostics_are_those_of_the_networks_outputs():
    networks = make({"ibot.separate_head": True, "dino.loss_weight": 0.5, "ibot.loss_weight": 2.0})
    batch = make_batch()
    batch.masks[3] = False  # a crop that counts as zero in the loss and not at all in its divergence
    batch = dataclasses.replace(batch, masked=masked_patches(batch.masks))
    numbers = measured(networks, batch)

    student, teacher = networks.student, networks.teacher
    tokens = teacher.backbone(batch.global_crops)
    global_tokens = student.backbone(batch.global_crops, batch.masks)
    local_cls = student.backbone(batch.local_crops).cls
    cls_targets = (teacher.dino_head(tokens.cls) / TEMP).softmax(-1)  # [2B, K]

    def divergence(targets, logits):
        log_p = (logits / 0.1).log_softmax(-1)
        return (targets * (targets.log() - log_p)).sum(-1)

    first, second = cls_targets.chunk(2)
    of_globals = student.dino_head(global_tokens.cls)
    of_locals = student.dino_head(local_cls).chunk(3)
    local = [divergence(targets, logits).mean() for targets in (first, second) for logits in of_locals]
    ibot = []
    for crop, mask in enumerate(batch.masks):
        if mask.any():
            targets = (teacher.ibot_head(tokens.patches[crop, mask]) / TEMP).softmax(-1)
            ibot.append(divergence(targets, student.ibot_head(global_tokens.patches[crop, mask])).mean())
    log_k = torch.tensor(8.0).log()
    expected = {
        "diag.effective_rank": effective_rank(tokens.cls[:4]),
        "diag.feature_norm": tokens.cls.norm(dim=1).mean(),
        "diag.patch_similarity": patch_similarity(tokens.patches[batch.masks], batch.masks),
        "diag.target_entropy.dino": -(cls_targets * cls_targets.log()).sum(-1).mean() / log_k,
        "diag.kl.dino_global": divergence(torch.cat([second, first]), of_globals).mean() / log_k,
        "diag.kl.dino_local": torch.stack(local).mean() / log_k,
        "diag.kl.ibot": torch.stack(ibot).mean() / log_k,
    }
    assert set(numbers.values) - set(expected) == {
        "diag.target_entropy.ibot",
        "diag.target_information.dino",
        "diag.target_information.ibot",
        "diag.prototype_use.dino",
        "diag.prototype_use.ibot",
    }
    for name, value in expected.items():
        torch.testing.assert_close(numbers.values[name], value.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", ["centering", "sinkhorn_knopp"])
def test_a_step_that_is_measured_gives_bitwise_the_same(targets, precision):
    recipe = make_recipe({"train.centering": targets, "ibot.separate_head": True})
    ends = []
    for measure in (False, True):
        torch.manual_seed(7)
        networks = make(recipe=recipe)
        random_state = torch.get_rng_state()
        optimizer = build_optimizer(recipe, networks)
        for step in range(3):
            result = make_step(
                networks,
                optimizer,
                make_batch(seed=step),
                Hyperparameters(1e-2, 1e-2, 0.04, 0.9, TEMP, last_layer_frozen=False),
                clip_grad=3.0,
                autocast=lambda: torch.autocast("cpu", precision, enabled=precision is not torch.float32),
                measure=measure,
            )
        assert torch.equal(torch.get_rng_state(), random_state)
        assert bool(result.diagnostics) == measure
        values = result.values()
        ends.append((networks.state_dict(), {k: v for k, v in values.items() if not k.startswith("diag.")}))
    assert {"diag.update_ratio.backbone", "diag.update_ratio.ibot_head", "diag.kl.dino_local"} <= set(values)
    (plain, terms), (measured, same_terms) = ends
    assert terms == same_terms
    assert all(torch.equal(measured[name], value) for name, value in plain.items())


def test_what_a_recipe_does_without_has_no_number():
    def names(overrides, batch=None):
        numbers = measured(make(overrides), batch or make_batch())
        return {name.removeprefix("diag.") for name in numbers.values}

    features = {"effective_rank", "feature_norm"}
    dino = {"target_entropy.dino", "target_information.dino", "prototype_use.dino", "kl.dino_global", "kl.dino_local"}
    ibot = {"patch_similarity", "target_entropy.ibot", "target_information.ibot", "prototype_use.ibot", "kl.ibot"}
    assert names({}) == features | dino | ibot
    assert names({"ibot.loss_weight": 0}) == features | dino
    assert names({"dino.loss_weight": 0}) == features | ibot
    assert names({"dino.loss_weight": 0, "ibot.loss_weight": 0}) == set()
    assert names({}, make_batch(local=0)) == features | (dino - {"kl.dino_local"}) | ibot
    assert names({}, make_batch(share=0.0)) == features | dino


def test_a_frozen_backbone_changes_neither_losses_nor_the_heads_gradients():
    gradients = []
    for frozen in (False, True):
        networks = make(recipe=make_recipe())
        losses = networks(make_batch(), teacher_temp=TEMP, backbone_frozen=frozen)
        losses.total.backward()
        gradients.append({name: p.grad for name, p in networks.student.named_parameters()} | vars(losses))
    free, held = gradients
    for name, value in free.items():
        if name.startswith("backbone."):
            assert held[name] is None
        else:
            assert torch.equal(held[name], value), name
