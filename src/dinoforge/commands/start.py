"""Make the state that a run begins with."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from dinoforge.builders.networks import build_state, vit_arguments
from dinoforge.builders.resolved import ResolvedRun
from dinoforge.builders.start import initialise
from dinoforge.commands.backbone import RESAMPLING, load
from dinoforge.method.dinov2 import StudentTeacher
from dinoforge.recipe.schema import Recipe
from dinoforge.runs import checkpoint
from dinoforge.training.parallel import Parallel, wrap
from dinoforge.training.state import TrainState


class Start:
    """Makes states at step 0, distributed over the ranks.

    Args:
        plan: The plan of the run.
        say: Prints a message to the user.
    """

    parallel: Parallel
    """How the networks of the first state are distributed."""

    def __init__(self, plan: ResolvedRun, say: Callable[[str], object]) -> None:
        self.plan, self.say = plan, say

    def state(self, *, images: int, fresh: bool = True) -> TrainState:
        """Make a state at step 0.

        Args:
            images: The number of images in the data.
            fresh: Whether the weights are used. False if a checkpoint will replace them.
        """
        recipe = self.plan.recipe
        return build_state(
            recipe,
            self.plan.device,
            images=images,
            precision=self.plan.precision,
            initialise=lambda networks: take_weights(networks, recipe, self.say) if fresh else None,
            lay_out=self._lay_out,
        )

    def _lay_out(self, networks: StudentTeacher) -> None:
        settings = self.plan.recipe.parallel
        parallel = wrap(
            networks,
            self.plan.mode,
            self.plan.device,
            activation_checkpointing=settings.activation_checkpointing,
            shard_ranks=settings.shard_ranks,
            some_frozen=self.plan.schedules.freeze_backbone_steps > 0,
            timeout=timedelta(minutes=settings.timeout_minutes),
        )
        if not hasattr(self, "parallel"):
            self.parallel = parallel


def take_weights(networks: StudentTeacher, recipe: Recipe, say: Callable[[str], object]) -> None:
    """Load the recipe's ``init.weights`` into fresh networks; on the meta device, only check that the weights fit.

    Args:
        networks: The fresh networks, changed in place.
        recipe: The recipe.
        say: Prints a message to the user.

    Raises:
        WeightsError: The weights cannot be read, or do not fit.
    """
    if recipe.init.weights is None:
        return
    heads = vit_arguments(recipe)["num_heads"]
    given = load(recipe.init.weights, num_heads=heads)
    if recipe.init.architecture == "file":  # the recipe may override assumptions about the file
        network = vit_arguments(recipe)
        rule = {key: network[key] for key in RESAMPLING if any(n.startswith(f"assumed {key}") for n in given.notes)}
        given = load(recipe.init.weights, num_heads=heads, **rule)
    notes = [*given.notes, *initialise(networks, given.network, recipe.init.in_chans)]
    if recipe.init.heads == "run":
        there = next(iter(networks.parameters())).device.type != "meta"
        notes.append(heads_of_run(networks, Path(recipe.init.weights)) if there else "heads of its checkpoint")
    for note in (f"from {recipe.init.weights}", *notes):
        say(f"init     {note}")


def heads_of_run(student_teacher: StudentTeacher, run: Path) -> str:
    """Load the heads and centres of a run's newest checkpoint into fresh networks.

    Args:
        student_teacher: The fresh networks, changed in place.
        run: The run directory.

    Returns:
        A phrase that says what was loaded.

    Raises:
        WeightsError: The heads have other sizes, or the checkpoint is incomplete.
    """
    steps = checkpoint.steps(run)
    if not steps:
        return "heads start fresh: there is no checkpoint of a run to take them from"
    theirs = {name: t for name, t in student_teacher.state_dict().items() if ".backbone." not in name}
    checkpoint.load(run, steps[-1], theirs)
    return f"heads and centres of the checkpoint at step {steps[-1]:,}"
