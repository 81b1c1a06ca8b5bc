"""How ranks are laid out is decided before they start; the global batch is cut evenly or refused."""

import dataclasses

import pytest
import torch

from dinoforge.builders.layout import choose_mode
from dinoforge.builders.lengths import run_length, with_batch_cut
from dinoforge.cli import ranks
from dinoforge.cli.main import main
from dinoforge.data.batch import Batch, masked_patches
from dinoforge.errors import RecipeError
from dinoforge.method.koleo import koleo_loss, koleo_loss_among
from dinoforge.recipe.load import load_recipe
from dinoforge.system.device import number_of_ranks


@pytest.mark.parametrize(
    ("keys", "world_size", "per_rank"),
    [
        ({"train.batch_size": 64}, 1, 64),
        ({"train.batch_size": 64}, 4, 16),
        ({"train.batch_size": 64, "train.accumulate": 2}, 4, 8),
        ({"train.batch_size_per_gpu": 10, "train.accumulate": 2}, 4, 10),
    ],
)
def test_the_global_batch_is_cut(keys, world_size, per_rank):
    recipe = with_batch_cut(load_recipe("small", keys)[0], world_size=world_size)
    assert recipe.train.batch_size_per_gpu == per_rank
    length = run_length(recipe, images=1000, world_size=world_size)
    assert length.batch_size == per_rank * world_size * recipe.train.accumulate == keys.get("train.batch_size", 80)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"train.batch_size": 64}, "64 cannot be cut evenly over 3 ranks × 1 .* the nearest that can is 63"),
        ({"train.batch_size": 1}, "the nearest that can is 3"),
        (
            {"train.batch_size": 6, "dino.koleo_scope": "groups", "dino.koleo_group_size": 4},
            "koleo_group_size=4 does not divide the batch of 6",
        ),
    ],
)
def test_a_batch_that_cannot_be_cut(keys, words):
    with pytest.raises(RecipeError, match=words):
        with_batch_cut(load_recipe("small", keys)[0], world_size=3)


@pytest.mark.parametrize(
    "keys",
    [
        {"dino.koleo_scope": "groups"},
        {"dino.koleo_group_size": 4},
        {"dino.koleo_scope": "groups", "dino.koleo_group_size": 1},
        {"parallel.shard_ranks": 2},
        {"parallel.mode": "fsdp", "precision": "fp16"},
        {"train.accumulate": 0},
    ],
)
def test_contradictions(keys):
    with pytest.raises(RecipeError):
        load_recipe("small", keys)


@pytest.mark.parametrize(
    ("mode", "parameters", "device_bytes", "world_size", "nodes", "chosen"),
    [
        ("auto", 10**9, 80e9, 1, 1, "none"),
        ("auto", 10**9, 80e9, 8, 1, "ddp"),  # 20 GB of 80
        ("auto", 3 * 10**9, 80e9, 8, 1, "fsdp"),
        ("auto", 3 * 10**9, 80e9, 16, 2, "hsdp"),
        ("auto", 3 * 10**9, None, 8, 1, "ddp"),
        ("fsdp", 10, 80e9, 8, 1, "fsdp"),
        ("hsdp", 10, None, 4, 1, "hsdp"),
    ],
)
def test_sharded_only_if_it_would_not_fit(mode, parameters, device_bytes, world_size, nodes, chosen):
    recipe = load_recipe("small", {"parallel.mode": mode})[0]
    given = {"parameters": parameters, "device_bytes": device_bytes, "world_size": world_size, "nodes": nodes}
    assert choose_mode(recipe, **given) == chosen


@pytest.mark.parametrize("locals_number", [0, 3])
def test_parts_of_a_batch_are_its_images_in_turn(locals_number):
    images = 6
    masks = torch.rand(2 * images, 9, generator=torch.Generator().manual_seed(0)) < 0.3
    masks[1] = False
    batch = Batch(
        global_crops=torch.arange(2 * images * 2.0).view(-1, 2),
        local_crops=torch.arange(locals_number * images * 2.0).view(-1, 2),
        masks=masks,
        masked=masked_patches(masks),
        indices=torch.arange(10, 10 + images),
        skipped=((3, "c.png", "broken"),),
    )
    parts = batch.split(3)
    assert [part.indices.tolist() for part in parts] == [[10, 11], [12, 13], [14, 15]]
    for number, part in enumerate(parts):
        of_images = slice(2 * number, 2 * number + 2)
        for name in ("global_crops", "local_crops", "masks"):
            whole = getattr(batch, name)
            expected = whole.unflatten(0, (-1, images))[:, of_images].flatten(0, 1) if len(whole) else whole
            assert torch.equal(getattr(part, name), expected), name
        assert torch.equal(part.masked, masked_patches(part.masks))  # in the order of the patches
    assert [part.skipped for part in parts] == [batch.skipped, (), ()]
    assert batch.split(1) == [batch]


@pytest.mark.parametrize("group", [None, 4])
def test_koleo_among_all_has_the_gradient_of_the_whole(group):
    """The mean over parts of each part's gradient is that of the loss of all."""
    everyone = torch.randn(8, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    groups = everyone.split(group or 8)
    whole = torch.stack([koleo_loss(g) for g in groups]).mean()
    (expected,) = torch.autograd.grad(whole, everyone)
    gradients = []
    for first in (0, 2, 4, 6):
        own = everyone[first : first + 2].detach().requires_grad_()
        loss = koleo_loss_among(own, everyone.detach(), first, group)
        torch.testing.assert_close(loss, whole)
        gradients.append(torch.autograd.grad(loss, own)[0] / 4)
    torch.testing.assert_close(torch.cat(gradients), expected)


def test_the_number_of_ranks():
    assert number_of_ranks("3") == 3
    assert number_of_ranks("auto") == max(1, torch.cuda.device_count())
    for text in ("0", "-1", "two", "1.5"):
        with pytest.raises(RecipeError, match="--nproc: expected"):
            number_of_ranks(text)


def test_ranks_are_started_with_what_the_user_said(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    started = []
    monkeypatch.setattr(ranks, "launch", lambda arguments, **how: started.append((arguments, how)) or 7)
    said = ["train", "photos", "--recipe", "auto", "--out", "run", "--labels", "labels.csv", "--dry-run"]
    assert main([*said, "--nproc", "2", "--restarts", "5", "train.steps=9"]) == 7
    assert started == [([*said, "train.steps=9"], {"ranks": 2, "restarts": 5})]


def test_keys_of_the_cut_may_change_between_starts():
    from dinoforge.recipe.schema import FREE_KEYS, differences

    recipe = load_recipe("small")[0]
    cut = dataclasses.replace(
        recipe,
        train=dataclasses.replace(recipe.train, batch_size=32, batch_size_per_gpu=16, accumulate=2),
        parallel=dataclasses.replace(recipe.parallel, mode="fsdp"),
    )
    assert differences(recipe, cut, ignore=FREE_KEYS) == {}
