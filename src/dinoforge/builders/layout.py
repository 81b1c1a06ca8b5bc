"""How the networks of a recipe are laid over ranks and computed in pieces."""

import torch

from dinoforge.errors import RecipeError
from dinoforge.method.dinov2 import StudentTeacher
from dinoforge.recipe import schema
from dinoforge.recipe.schema import Recipe
from dinoforge.system import distributed
from dinoforge.training.parallel import Mode, copies_and_shards, shard_count

_BYTES = 4 * 5
"""Of each parameter of the student: its value, the teacher's, its gradient and AdamW's two moments in float32."""

_TURN_TOKENS = 3072
"""Of a turn at least: each visits all weights, which with fewer tokens costs more time than it is worth."""


def choose_mode(recipe: Recipe, *, parameters: int, device_bytes: int | None, world_size: int, nodes: int) -> Mode:
    """What ``parallel.mode`` means here.

    ``auto`` shards if weights, gradients and moments would take more than half of a device's memory; on several
    machines inside each of them (hsdp).

    Args:
        recipe: the recipe.
        parameters: of the student.
        device_bytes: memory of one device; None where ranks share the machine's, as on the CPU.
        world_size: number of ranks.
        nodes: machines they are on.
    """
    if world_size == 1:
        return "none"
    if recipe.parallel.mode != "auto":
        return recipe.parallel.mode
    if device_bytes is None or parameters * _BYTES < device_bytes / 2:
        return "ddp"
    return "hsdp" if nodes > 1 else "fsdp"


def turn_tokens(settings: schema.Parallel, device: torch.device, mode: Mode) -> int | None:
    """How many tokens a turn has at least, if crops take turns; None if they do not.

    Unless said, they do on a CPU, where more and smaller products cost little; but not where the gradients that wait
    for the last turn may take what is saved.
    """
    in_turn = settings.crops_in_turn
    if in_turn is None:
        in_turn = device.type == "cpu" and mode == "none" and not settings.activation_checkpointing
    return _TURN_TOKENS if in_turn else None


def mode_here(recipe: Recipe, student_teacher: StudentTeacher, device: torch.device) -> Mode:
    """``choose_mode`` on this machine.

    Raises:
        RecipeError: a mode that these ranks, or their backend, cannot run.
    """
    mode = choose_mode(
        recipe,
        parameters=sum(p.numel() for p in student_teacher.student.parameters()),
        device_bytes=torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None,
        world_size=distributed.world_size(),
        nodes=distributed.world_size() // distributed.local_world_size(),
    )
    if mode == "hsdp":
        copies_and_shards(distributed.world_size(), shard_count(mode, recipe.parallel.shard_ranks))
    if mode in ("fsdp", "hsdp") and device.type == "cuda" and recipe.parallel.backend == "gloo":
        raise RecipeError(
            f"parallel.backend=gloo cannot shard what is on a GPU, and parallel.mode is {mode}: set "
            "parallel.backend=auto, or parallel.mode=ddp"
        )
    return mode


def note_of_mode(recipe: Recipe, mode: Mode) -> str | None:
    """Words on a mode that the recipe asks for, and one process cannot have; None if there is nothing to say."""
    wanted = recipe.parallel.mode
    if mode != "none" or wanted == "auto":
        return None
    return (
        f"trains in one process, where parallel.mode={wanted} means nothing: start several ranks by --nproc or torchrun"
    )
