"""Steps of every kind of recipe, small enough to take a fraction of a second."""

import torch

from dinoforge.planning.bench import StepBench
from dinoforge.recipe.load import load_recipe
from tiny import TINY

STEPS = 1000  # so that the middle of the run is past every warm-up
VARIANTS = {
    "sinkhorn": {},
    "centering": {"train.centering": "centering"},
    "swiglu_registers": {"student.ffn_layer": "swiglu", "student.num_register_tokens": 3},
    "separate_heads": {"ibot.separate_head": True, "train.centering": "centering"},
    "stochastic_depth": {"student.drop_path_rate": 0.4},
    "in_turn": {"parallel.crops_in_turn": True, "train.batch_size_per_gpu": 128, "ibot.separate_head": True},
    "accumulated": {"train.accumulate": 2, "student.drop_path_rate": 0.4},
    "global_koleo": {"dino.koleo_scope": "global", "train.accumulate": 2},
    "recomputed": {"parallel.activation_checkpointing": True, "student.drop_path_rate": 0.4},
    "no_local_crops": {"crops.local_crops_number": 0},
    "frozen_layer": {"optim.freeze_last_layer": "gradient", "optim.freeze_last_layer_length": "90%"},
}


def bench(device: torch.device, precision: torch.dtype = torch.float32, **keys: object) -> StepBench:
    """Steps of ``small`` at the size of ``TINY``, with these keys."""
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    recipe, _ = load_recipe("small", TINY | {"train.steps": STEPS, "precision": names[precision]} | keys)
    return StepBench(recipe, device, precision)
