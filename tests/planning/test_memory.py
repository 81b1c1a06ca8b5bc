"""What the estimate of memory advises."""

import re

import pytest
import torch

from dinoforge.builders.networks import build_student_teacher
from dinoforge.planning.memory import estimate, ways_to_save
from dinoforge.recipe.load import load_recipe
from dinoforge.recipe.schema import Recipe
from dinoforge.training.parallel import Mode

CUDA = torch.device("cuda")


def recipe_of(**keys: object) -> Recipe:
    return load_recipe("dinov2", {key.replace("__", "."): value for key, value in keys.items()})[0]


def names(ways: list[str]) -> list[str]:
    return [key for way in ways for key in re.findall(r"[a-z]+\.[a-z_]+(?==)", way)]


def gib(recipe: Recipe, mode: Mode = "none", shards: int = 1) -> float:
    with torch.device("meta"):
        networks = build_student_teacher(recipe)
    parts = estimate(recipe, networks, precision=torch.bfloat16, device=CUDA, mode=mode, shards=shards)
    return sum(parts.values()) / 2**30


def test_ways_to_save_come_in_the_order_of_their_cost():
    assert names(ways_to_save(recipe_of(), ranks=4, mode="ddp")) == [
        "train.batch_size_per_gpu",
        "train.accumulate",
        "parallel.crops_in_turn",
        "parallel.activation_checkpointing",
        "parallel.mode",
    ]


@pytest.mark.parametrize(
    ("keys", "mode"),
    [
        ({"train__batch_size_per_gpu": 32, "train__accumulate": 2}, "none"),
        ({"parallel__crops_in_turn": True}, "none"),
        ({"parallel__activation_checkpointing": True}, "none"),
        ({"parallel__mode": "fsdp"}, "fsdp"),
    ],
)
def test_each_way_says_what_the_run_would_take_with_its_keys(keys: dict[str, object], mode: Mode):
    taken = f"about {gib(recipe_of(**keys), mode, 4 if mode == 'fsdp' else 1):.1f} GiB"
    text = " ".join(f"{key.replace('__', '.')}={str(value).lower()}" for key, value in keys.items())
    ways = ways_to_save(recipe_of(), ranks=4 if mode == "fsdp" else 1, mode="ddp" if mode == "fsdp" else "none")
    (way,) = [way for way in ways if way.startswith(text)]
    assert way.endswith(taken)


def test_the_batch_is_cut_into_equal_parts_and_stays_the_same():
    (cut, *_) = ways_to_save(recipe_of(train__batch_size_per_gpu=15, train__accumulate=2), ranks=1, mode="none")
    assert cut.startswith("train.batch_size_per_gpu=5 train.accumulate=6 ")
    assert "KoLeo compares 5 images at a time" in cut
    (cut, *_) = ways_to_save(recipe_of(dino__koleo_scope="global"), ranks=1, mode="none")
    assert "KoLeo" not in cut


def test_a_global_batch_is_cut_by_accumulation_alone():
    """``train.batch_size`` wins over ``train.batch_size_per_gpu``, which would change nothing."""
    (cut, *_) = ways_to_save(recipe_of(train__batch_size=64), ranks=1, mode="none")
    assert cut.startswith("train.accumulate=2 (the same global batch")


def test_what_is_on_already_is_left_out():
    every = recipe_of(
        train__batch_size_per_gpu=1, parallel__crops_in_turn=True, parallel__activation_checkpointing=True
    )
    assert ways_to_save(every, ranks=1, mode="none") == []
    assert names(ways_to_save(every, ranks=8, mode="ddp")) == ["parallel.mode"]
    assert ways_to_save(every, ranks=8, mode="fsdp") == []


def test_what_would_not_help_is_left_out():
    one_step = recipe_of(train__batch_size_per_gpu=1)  # of too few tokens for turns
    assert "parallel.crops_in_turn" not in names(ways_to_save(one_step, ranks=1, mode="none"))
    on_cpu = ways_to_save(recipe_of(), ranks=1, mode="none", device=torch.device("cpu"), precision=torch.float32)
    assert "parallel.crops_in_turn" not in names(on_cpu)  # they take turns there


def test_a_checkpoint_that_is_written_aside_takes_memory_on_a_cpu_alone():
    on_cpu = ways_to_save(recipe_of(), ranks=1, mode="none", device=torch.device("cpu"), precision=torch.float32)
    assert on_cpu[0].startswith("checkpoint.asynchronous=false: about ")
    assert "checkpoint.asynchronous" not in names(ways_to_save(recipe_of(), ranks=1, mode="none"))


@pytest.mark.parametrize("key", [{"precision": "fp16"}, {"parallel__backend": "gloo"}])
def test_what_cannot_be_sharded_is_not_told_to_be(key: dict[str, object]):
    assert "parallel.mode" not in names(ways_to_save(recipe_of(**key), ranks=8, mode="ddp"))
