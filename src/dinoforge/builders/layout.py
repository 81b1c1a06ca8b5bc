"""Choose how the networks of a recipe are distributed over ranks and computed in pieces."""

import torch

from dinoforge.errors import RecipeError
from dinoforge.method.dinov2 import StudentTeacher
from dinoforge.recipe import schema
from dinoforge.recipe.schema import Recipe
from dinoforge.system import distributed
from dinoforge.training.parallel import Mode, copies_and_shards, shard_count

_BYTES = 4 * 5
"""Bytes per student parameter: its value, the teacher's value, its gradient and AdamW's two moments, in float32."""

_TURN_TOKENS = 3072
"""Minimum number of tokens per turn. Each turn reads all weights, which does not pay off for fewer tokens."""


def choose_mode(recipe: Recipe, *, parameters: int, device_bytes: int | None, world_size: int, nodes: int) -> Mode:
    """Choose the mode that ``parallel.mode`` means for these ranks.

    ``auto`` shards if weights, gradients and moments would take more than half of a device's memory. On several
    machines, it shards inside each machine (hsdp).

    Args:
        recipe: The recipe.
        parameters: The number of the student's parameters.
        device_bytes: The memory of one device, in bytes; None where ranks share the machine's memory, as on the CPU.
        world_size: The number of ranks.
        nodes: The number of machines.
    """
    if world_size == 1:
        return "none"
    if recipe.parallel.mode != "auto":
        return recipe.parallel.mode
    if device_bytes is None or parameters * _BYTES < device_bytes / 2:
        return "ddp"
    return "hsdp" if nodes > 1 else "fsdp"


def turn_tokens(settings: schema.Parallel, device: torch.device, mode: Mode) -> int | None:
    """Return the minimum number of tokens per turn, if crops take turns; None if they do not.

    By default, crops take turns on a CPU, where more and smaller products cost little. They do not in modes where the
    gradients that wait for the last turn could take the memory that turns save.
    """
    in_turn = settings.crops_in_turn
    if in_turn is None:
        in_turn = device.type == "cpu" and mode == "none" and not settings.activation_checkpointing
    return _TURN_TOKENS if in_turn else None


def mode_here(recipe: Recipe, student_teacher: StudentTeacher, device: torch.device) -> Mode:
    """Choose the mode for this machine's devices and ranks, by ``choose_mode``.

    Raises:
        RecipeError: These ranks, or their backend, cannot run the mode.
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
    """Explain that a single process ignores the recipe's ``parallel.mode``; None if there is nothing to explain."""
    wanted = recipe.parallel.mode
    if mode != "none" or wanted == "auto":
        return None
    return (
        f"trains in one process, where parallel.mode={wanted} means nothing: start several ranks by --nproc or torchrun"
    )
