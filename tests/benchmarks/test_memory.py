"""The benchmark of memory counts tensors that are alive, and the estimate of the program agrees with it."""

import pytest
import torch

from dinoforge.builders.networks import build_student_teacher
from dinoforge.planning.memory import estimate
from dinoforge.recipe.load import load_recipe
from tiny import TINY


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_what_is_alive_is_counted(benchmark):
    with benchmark.AliveTensors() as tensors:
        a = torch.zeros(1000)
        b = a[:10] + a[10:20]
        del a
        c = torch.zeros(2000)
    assert tensors.peak == 4 * (2000 + len(b))
    assert len(c) == 2000


STOCHASTIC = {"student.drop_path_rate": 0.3}
GATED = {"student.ffn_layer": "swiglufused", "student.num_register_tokens": 4, "ibot.separate_head": True}
FEW_IMAGES = {"student.depth": 12, "student.embed_dim": 256, "train.batch_size_per_gpu": 2}  # weights are most of it
ENOUGH_FOR_TURNS = {"train.batch_size_per_gpu": 48, "ibot.separate_head": True}  # 3,120 tokens in each global crop
MANY_PROTOTYPES = {"dino.head_n_prototypes": 16384}
PLAIN = {"parallel.kernels": "plain"}  # what accelerators take


@pytest.mark.parametrize(
    ("precision", "checkpointed", "keys"),
    [
        ("fp32", False, {}),
        ("bf16", True, {}),
        ("fp32", True, STOCHASTIC),
        ("bf16", False, STOCHASTIC),
        ("bf16", False, GATED),
        ("fp32", False, FEW_IMAGES),
        ("fp32", False, ENOUGH_FOR_TURNS),
        ("bf16", False, MANY_PROTOTYPES),
        ("fp32", False, PLAIN),
        ("bf16", True, PLAIN | MANY_PROTOTYPES),
        ("bf16", False, PLAIN | STOCHASTIC),
        ("fp32", True, PLAIN | STOCHASTIC),
        ("fp32", False, PLAIN | FEW_IMAGES),
        ("bf16", False, PLAIN | GATED | {"dino.head_n_prototypes": 4096, "ibot.head_n_prototypes": 4096}),
    ],
)
def test_the_estimate_is_within_a_tenth(benchmark, one_thread, monkeypatch, precision, checkpointed, keys):
    monkeypatch.setitem(benchmark.NETWORKS, "small", ("small", {"train.batch_size_per_gpu": 16} | keys))
    settings = {"network": "small", "precision": precision, "checkpointed": checkpointed, "mode": "none"}
    result = benchmark.measure(settings | {"process": False})
    assert result["estimated"] == pytest.approx(result["measured"], rel=0.1)


@pytest.mark.parametrize(("mode", "in_turn"), [("ddp", False), ("fsdp", False), ("ddp", True), ("fsdp", True)])
def test_of_two_ranks(benchmark, mode, in_turn):
    settings = {"network": "small", "precision": "bf16", "checkpointed": False, "mode": mode, "in_turn": in_turn}
    result = benchmark.measured_apart(settings | {"process": False})
    assert result["estimated"] == pytest.approx(result["measured"], rel=0.1)


@pytest.mark.parametrize(("keys", "mode"), [({"parallel.activation_checkpointing": True}, "none"), ({}, "ddp")])
def test_what_imports_the_compiler_takes_more(keys, mode):
    def libraries(keys, mode):
        recipe, _ = load_recipe("small", TINY | keys)
        with torch.device("meta"):
            networks = build_student_teacher(recipe)
        cpu = torch.device("cpu")
        return estimate(recipe, networks, precision=torch.float32, device=cpu, mode=mode)["libraries"]

    assert libraries(keys, mode) > libraries({}, "none")
