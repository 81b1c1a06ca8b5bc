"""The length and the schedules of a run, in steps."""

import math
from dataclasses import dataclass, replace

from dinoforge.errors import RecipeError
from dinoforge.optim.schedules import Schedules, sqrt_scaled_lr
from dinoforge.recipe.schema import Recipe, parse_length


@dataclass(frozen=True)
class RunLength:
    """The length of a run, in steps and in passes over the user's images."""

    steps: int
    batch_size: int  # over all ranks
    images: int

    @property
    def epochs(self) -> float:
        """The number of passes over the images."""
        return self.steps * self.batch_size / self.images


def with_batch_cut(recipe: Recipe, *, world_size: int) -> Recipe:
    """Return the recipe with the ``train.batch_size_per_gpu`` that follows from ``train.batch_size``.

    Args:
        recipe: The recipe.
        world_size: The number of ranks.

    Raises:
        RecipeError: The global batch cannot be cut into equal parts.
    """
    train = recipe.train
    parts = world_size * train.accumulate
    if train.batch_size is not None:
        if train.batch_size % parts:
            near = max(1, round(train.batch_size / parts)) * parts
            raise RecipeError(
                f"train.batch_size={train.batch_size} cannot be cut evenly over {world_size} ranks × "
                f"{train.accumulate} micro-batches (train.accumulate): the nearest that can is {near}"
            )
        recipe = replace(recipe, train=replace(train, batch_size_per_gpu=train.batch_size // parts))
    images, group = recipe.train.batch_size_per_gpu * parts, recipe.dino.koleo_group_size
    if group is not None and images % group:
        raise RecipeError(f"dino.koleo_group_size={group} does not divide the batch of {images} images")
    return recipe


def in_one(recipe: Recipe, batch_size: int) -> Recipe:
    """Return the recipe for one rank that takes the global batch of ``batch_size`` at once; the data is the same."""
    train = replace(recipe.train, batch_size=batch_size, batch_size_per_gpu=batch_size, accumulate=1)
    return replace(recipe, train=train)


def run_length(recipe: Recipe, *, images: int, world_size: int = 1) -> RunLength:
    """Compute a run's length: ``train.steps``, else ``train.epochs`` of the images, else ``optim.epochs`` nominal ones.

    Args:
        recipe: The recipe.
        images: The number of images in the data.
        world_size: The number of ranks.

    Raises:
        RecipeError: The batch is larger than the data.
    """
    parts = world_size * recipe.train.accumulate
    batch_size = recipe.train.batch_size_per_gpu * parts
    if batch_size > images:
        raise RecipeError(
            f"the batch of {batch_size} images is larger than the data ({images} images): set "
            + (
                f"train.batch_size_per_gpu to {max(images // parts, 1)} or less"
                if recipe.train.batch_size is None  # otherwise train.batch_size takes precedence
                else f"train.batch_size to {max(images // parts, 1) * parts} or less"
            )
            + (f", on {images} ranks or fewer" if images < parts else "")
        )
    if recipe.train.steps is not None:
        steps = recipe.train.steps
    elif recipe.train.epochs is not None:
        steps = math.ceil(recipe.train.epochs * images / batch_size)
    else:
        steps = math.ceil(recipe.optim.epochs * recipe.train.OFFICIAL_EPOCH_LENGTH)
    return RunLength(steps, batch_size, images)


def build_schedules(recipe: Recipe, length: RunLength) -> Schedules:
    """Build the schedules of a run.

    Args:
        recipe: The recipe.
        length: The length of the run.

    Raises:
        RecipeError: A warm-up or freeze is at least as long as the run.
    """
    o, t = recipe.optim, recipe.teacher

    def steps_of(key: str, text: str | None, official_epochs: float) -> int:
        if text is None:
            steps = round(official_epochs * recipe.train.OFFICIAL_EPOCH_LENGTH)
            key = f"{key}_epochs={official_epochs:g} (of {recipe.train.OFFICIAL_EPOCH_LENGTH} steps each)"
        else:
            steps = parse_length(text).steps(
                length.steps, length.images / length.batch_size, recipe.train.OFFICIAL_EPOCH_LENGTH
            )
            key = f"{key}_length={text}"
        if steps >= length.steps and steps > 0:
            raise RecipeError(
                f"{key} is {steps:,} steps, but the run has only {length.steps:,}: make the run longer, or give a "
                f"share of it, such as {key.split('_epochs=')[0].split('_length=')[0]}_length=10%"
            )
        return steps

    return Schedules(
        total_steps=length.steps,
        lr=sqrt_scaled_lr(o.base_lr, length.batch_size) if o.scaling_rule == "sqrt_wrt_1024" else o.base_lr,
        min_lr=o.min_lr,
        warmup_steps=steps_of("optim.warmup", o.warmup_length, o.warmup_epochs),
        weight_decay=o.weight_decay,
        weight_decay_end=o.weight_decay_end,
        momentum=t.momentum_teacher,
        final_momentum=t.final_momentum_teacher,
        warmup_teacher_temp=t.warmup_teacher_temp,
        teacher_temp=t.teacher_temp,
        teacher_temp_steps=steps_of(
            "teacher.warmup_teacher_temp", t.warmup_teacher_temp_length, t.warmup_teacher_temp_epochs
        ),
        freeze_last_layer_steps=steps_of(
            "optim.freeze_last_layer", o.freeze_last_layer_length, o.freeze_last_layer_epochs
        ),
        freeze_by_gradient=o.freeze_last_layer == "gradient",
        freeze_backbone_steps=steps_of("optim.freeze_backbone", o.freeze_backbone_length or "0%", 0),
        frozen_momentum=t.frozen_momentum_teacher,
    )
