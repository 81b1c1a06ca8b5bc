"""A step in pieces: the losses, gradients and centres of any pieces are those of the whole batch."""

import dataclasses
import itertools
from contextlib import nullcontext

import pytest
import torch

from dinoforge.builders.layout import turn_tokens
from dinoforge.builders.networks import build_optimizer
from dinoforge.data.batch import masked_patches
from dinoforge.models.stochastic_depth import draw_kept_samples
from dinoforge.optim.schedules import Hyperparameters
from dinoforge.recipe.schema import Parallel
from dinoforge.training.pieces import crops_in_turn, pieces
from small_networks import TEMP, make, make_batch, make_recipe, make_step


def in_pieces(networks, batch, parts, least, kept=None):
    """The summed losses, the student's gradients, and how many pieces there were."""
    summed, count = None, 0
    every = pieces(networks, batch, teacher_temp=TEMP, kept=[kept] * parts, least_tokens=least, autocast=nullcontext)
    for piece in every:
        count += 1
        named = {f.name: getattr(piece, f.name) for f in dataclasses.fields(piece)}
        given = {name: named[name] for name in ("targets", "kept", "neighbours")}
        losses = networks(piece.batch, teacher_temp=TEMP, **given)
        losses.total.backward()
        values = torch.stack([value.detach() for value in vars(losses).values()])
        summed = values if summed is None else summed + values
    return summed, {name: p.grad for name, p in networks.student.named_parameters()}, count


TARGETS = list(itertools.product(["centering", "sinkhorn_knopp"], repeat=2))


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("targets", TARGETS, ids=["-".join(pair) for pair in TARGETS])
@pytest.mark.parametrize(("scope", "group"), [("global", None), ("groups", 2)])
def test_any_pieces_are_the_whole(separate, targets, scope, group):
    """Micro-batches, crops in turn, and both, against one forward pass of the definition."""
    changes = {
        "ibot.separate_head": separate,
        **dict(zip(("dino.targets", "ibot.targets"), targets, strict=True)),
        "ibot.center_mean": "patches",
        "dino.koleo_scope": scope,
        "dino.koleo_group_size": group,
        "train.batch_size_per_gpu": 4,
    }
    batch = make_batch()
    batch.masks[1] = False  # one micro-batch has fewer masked crops than the other
    batch = dataclasses.replace(batch, masked=masked_patches(batch.masks))
    whole = make(changes)
    losses = whole(batch, teacher_temp=TEMP)
    losses.total.backward()
    expected = {name: p.grad for name, p in whole.student.named_parameters()}
    for parts, least, count in ((1, 1, 4), (2, None, 2), (4, None, 4), (2, 1, 8)):
        networks = make(changes)
        values, gradients, pieces_seen = in_pieces(networks, batch, parts, least)
        assert pieces_seen == count
        torch.testing.assert_close(values, torch.stack(list(vars(losses).values())), rtol=1e-4, atol=1e-6)
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
        for name, center in whole.named_buffers():
            torch.testing.assert_close(networks.get_buffer(name), center, rtol=1e-4, atol=1e-6)


def test_stochastic_depth_drops_the_same_images_in_turn():
    kept = draw_kept_samples([0.5, 0.5], [8, 12], torch.Generator().manual_seed(0))
    batch = make_batch()
    at_once, in_turn = (in_pieces(make(), batch, 1, least, kept) for least in (None, 1))
    assert (at_once[2], in_turn[2]) == (1, 4)
    torch.testing.assert_close(in_turn[0], at_once[0], rtol=1e-4, atol=1e-6)
    for name, gradient in at_once[1].items():
        torch.testing.assert_close(in_turn[1][name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_crops_are_seen_at_once_if_only_local_ones_read_the_dino_head():
    ends = []
    for least in (None, 1):
        recipe = make_recipe({"dino.global_loss_weight": 0, "ibot.separate_head": True})
        networks = make(recipe=recipe)
        optimizer = build_optimizer(recipe, networks)
        hyper = Hyperparameters(1e-2, 1e-2, 0.04, 0.9, TEMP, last_layer_frozen=False)
        make_step(networks, optimizer, make_batch(), hyper, clip_grad=3.0, least_tokens=least)
        ends.append(networks.student.state_dict())
    at_once, in_turn = ends
    assert all(torch.equal(in_turn[name], value) for name, value in at_once.items())


@pytest.mark.parametrize(
    ("overrides", "local", "turns"),
    [
        ({}, 3, 4),
        ({}, 0, 2),
        ({"dino.local_loss_weight": 0}, 3, 2),
        ({"dino.loss_weight": 0}, 3, 2),
        ({"dino.loss_weight": 0, "ibot.separate_head": True}, 3, 1),
    ],
)
def test_turns_are_taken_and_end_as_all_crops_at_once_do(overrides, local, turns):
    ends = []
    for least, expected in ((None, 1), (1, turns)):
        recipe = make_recipe(overrides)
        networks = make(recipe=recipe)
        calls = []
        networks.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        optimizer = build_optimizer(recipe, networks)
        for group in optimizer.param_groups:
            group["eps"] = 1e-4  # with a tiny one, a first step is the sign of each gradient, also where that is noise
        hyper = Hyperparameters(1e-2, 1e-2, 0.04, 0.9, TEMP, last_layer_frozen=False)
        result = make_step(networks, optimizer, make_batch(local=local), hyper, clip_grad=3.0, least_tokens=least)
        assert len(calls) == expected
        ends.append(networks.student.state_dict() | vars(result.losses))
    at_once, in_turn = ends
    for name, value in at_once.items():
        torch.testing.assert_close(in_turn[name], value, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("local", "least", "expected"),
    [
        (8, None, [((0, 1), 0, 8)]),
        (8, 1, [((), 0, 4), ((), 4, 8), ((0,), 8, 8), ((1,), 8, 8)]),
        (3, 1, [((), 0, 3), ((0,), 3, 3), ((1,), 3, 3)]),  # halves would make no turn smaller than a global crop
        (1, 1, [((), 0, 1), ((0,), 1, 1), ((1,), 1, 1)]),
        (0, 1, [((0,), 0, 0), ((1,), 0, 0)]),
        # Of two images, half of the local crops has 4 · 2 · 5 = 40 tokens, and a global one 2 · 17 = 34.
        (8, 65, [((0,), 0, 4), ((1,), 4, 8)]),
        (6, 32, [((), 0, 6), ((0,), 6, 6), ((1,), 6, 6)]),
        (6, 35, [((0,), 0, 3), ((1,), 3, 6)]),
        (8, 34, [((), 0, 4), ((), 4, 8), ((0,), 8, 8), ((1,), 8, 8)]),
        (7, 34, [((), 0, 7), ((0,), 7, 7), ((1,), 7, 7)]),
        (2, 30, [((0,), 0, 1), ((1,), 1, 2)]),
        (8, 100, [((0, 1), 0, 8)]),
    ],
)
def test_which_crops_are_seen_together(local, least, expected):
    turns = crops_in_turn(make(), 2, local, (17, 5), least)
    assert [(crops.views, crops.local.start, crops.local.stop) for crops in turns] == expected


def test_crops_take_turns_in_one_process_on_a_cpu():
    def chosen(device="cpu", mode="none", **settings):
        return turn_tokens(Parallel(**settings), torch.device(device), mode) is not None

    assert chosen()
    assert not chosen("cuda")
    assert not chosen(mode="ddp")
    assert not chosen(activation_checkpointing=True)
    assert chosen("cuda", "fsdp", crops_in_turn=True)
    assert not chosen(crops_in_turn=False)
