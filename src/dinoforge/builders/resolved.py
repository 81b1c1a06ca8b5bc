"""Everything that follows from a recipe for a number of images on this machine, derived once."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from dinoforge.builders.data import image_input
from dinoforge.builders.layout import mode_here
from dinoforge.builders.lengths import RunLength, build_schedules, run_length
from dinoforge.builders.networks import build_drop_path_rates, vit_arguments
from dinoforge.data.image_input import ImageInput
from dinoforge.method.dinov2 import StudentTeacher
from dinoforge.optim.schedules import Schedules
from dinoforge.recipe.schema import Recipe
from dinoforge.system import distributed
from dinoforge.system.device import compute_threads, loader_workers, rank_device, resolve_precision, usable_processors
from dinoforge.training.parallel import Mode


@dataclass(frozen=True, kw_only=True)
class ResolvedRun:
    """A recipe with everything derived from it.

    Args:
        recipe: The recipe, as the user gave it.
        length: The length of the run.
        schedules: The schedules of the run.
        device: The device of this rank.
        precision: The precision of matrix products.
        threads: The number of compute threads.
        num_workers: The number of data workers.
        mode: How the networks are distributed over ranks.
        architecture: The arguments of ``VisionTransformer``.
        image: The image format that the backbone expects.
        drop_path_rates: The rate of stochastic depth of each block of the student.
    """

    recipe: Recipe
    length: RunLength
    schedules: Schedules
    device: torch.device
    precision: torch.dtype
    threads: int
    num_workers: int
    mode: Mode
    architecture: dict[str, Any]
    image: ImageInput
    drop_path_rates: list[float]

    def metadata(self) -> dict[str, Any]:
        """Collect the facts about the run that the file of its backbone stores."""
        return {"recipe": asdict(self.recipe), "images": self.length.images, "total_steps": self.length.steps}


def resolve_run(recipe: Recipe, images: int, networks: StudentTeacher) -> ResolvedRun:
    """Derive everything that follows from a recipe on this machine.

    Args:
        recipe: The recipe, with its batch cut for the ranks.
        images: The number of images in the data.
        networks: The networks of the recipe; they may be on the meta device.

    Raises:
        RecipeError: The recipe does not fit the images or the machine.
    """
    device = rank_device(recipe.device)
    length = run_length(recipe, images=images, world_size=distributed.world_size())
    mode = mode_here(recipe, networks, device)
    processors = usable_processors()
    return ResolvedRun(
        recipe=recipe,
        length=length,
        schedules=build_schedules(recipe, length),
        device=device,
        precision=resolve_precision(recipe.precision, device, sharded=mode in ("fsdp", "hsdp")),
        threads=compute_threads(device, processors, recipe.train.threads),
        num_workers=loader_workers(device, processors, recipe.train.num_workers),
        mode=mode,
        architecture=vit_arguments(recipe),
        image=image_input(recipe),
        drop_path_rates=build_drop_path_rates(recipe),
    )
