"""Run a saved batch again."""

from functools import partial
from pathlib import Path
from typing import Literal

import torch

from dinoforge.builders.lengths import build_schedules, run_length
from dinoforge.builders.networks import build_drop_path_rates, build_state
from dinoforge.commands.start import take_weights
from dinoforge.errors import RunError, WeightsError
from dinoforge.kernels import ops
from dinoforge.recipe.schema import Recipe
from dinoforge.runs import checkpoint
from dinoforge.runs import replay as replays
from dinoforge.runs.directory import RunDirectory
from dinoforge.system import device as devices
from dinoforge.system.out_of_memory import out_of_memory_in_words
from dinoforge.training.pieces import kept_samples


def replay(
    model: str | Path, batch: str | Path, *, precision: Literal["recipe", "fp32"] = "recipe"
) -> tuple[replays.Findings, replays.SavedBatch, int]:
    """Run a saved batch again, with the weights of the newest checkpoint that is not later than the batch.

    Args:
        model: The run directory.
        batch: A file in the run's folder ``non_finite``.
        precision: The precision of the forward pass; ``recipe``: the run's precision.

    Returns:
        The findings, the batch, and the step of the checkpoint. Without a checkpoint, the step is 0 and the weights are
        those that the run started with.

    Raises:
        RunError: The directory holds no run.
        WeightsError: The batch cannot be read, or does not fit the run.
    """
    run = RunDirectory(Path(model))
    if not run.exists:
        raise RunError(f"{model} is no run directory: it has no recipe.yaml and run.json")
    recipe = run.recipe()
    device = devices.resolve_device(recipe.device)
    ways = ["CUDA_VISIBLE_DEVICES= in front of the command, which computes on the CPU if the recipe says device=auto"]
    with devices.in_use(device, allow_tf32=recipe.allow_tf32), out_of_memory_in_words(device, lambda: ways):
        return _replay(run, recipe, device, Path(batch), precision)


def _replay(
    run: RunDirectory, recipe: Recipe, device: torch.device, batch: Path, precision: Literal["recipe", "fp32"]
) -> tuple[replays.Findings, replays.SavedBatch, int]:
    saved = replays.load_batch(batch)
    dtype = torch.float32 if precision == "fp32" else _precision_of(run, recipe, saved.step, device)
    images = run.info()["data"]["images"]
    state = build_state(recipe, device, images=images, precision=dtype)
    steps = [step for step in checkpoint.steps(run.path) if step <= saved.step]
    if steps:
        checkpoint.load(run.path, steps[-1], state.tensors())
    else:
        take_weights(state.student_teacher, recipe, lambda text: None)
    expected = (recipe.student.in_chans, recipe.crops.global_crops_size)
    came = tuple(saved.batch.global_crops.shape[1:3])
    if came != expected:
        raise WeightsError(f"{batch} is of another run: channels and size of its crops are {came}, not {expected}")

    length = run_length(recipe, images=images, world_size=run.ranks())
    schedules = build_schedules(recipe, length)
    rates = build_drop_path_rates(recipe)
    (kept,) = kept_samples(
        state.student_teacher, saved.batch, rates, seed=recipe.train.seed, number=saved.number, rank=saved.rank
    )
    with ops.using(recipe.parallel.kernels):
        findings = replays.find(
            state.student_teacher,
            saved.batch.to(device),
            schedules(min(saved.step, length.steps - 1)),
            kept=kept,
            autocast=partial(devices.autocast, device, dtype),
        )
    return findings, saved, steps[-1] if steps else 0


def _precision_of(run: RunDirectory, recipe: Recipe, step: int, device: torch.device) -> torch.dtype:
    """Return the precision of the run at a step; ``auto`` may mean another one here than on the run's devices."""
    starts = [start for start in run.info()["starts"] if start["step"] <= step]
    if recipe.precision != "auto" or not starts:
        return devices.resolve_precision(recipe.precision, device)
    dtype: torch.dtype = getattr(torch, starts[-1]["precision"])
    return dtype
