"""The state that a run begins with."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from dinoforge.builders.networks import build_state, vit_arguments
from dinoforge.builders.start import initialise
from dinoforge.commands.backbone import RESAMPLING, load
from dinoforge.method.dinov2 import StudentTeacher
from dinoforge.planning.dry_run import Plan
from dinoforge.recipe.schema import Recipe
from dinoforge.runs import checkpoint
from dinoforge.training.parallel import Parallel, wrap
from dinoforge.training.state import TrainState


class Start:
    """Makes states at step 0, laid over the ranks.

    Args:
        plan: of the run.
        say: tells the user.
    """

    parallel: Parallel
    """How the networks of the first state are laid out."""

    def __init__(self, plan: Plan, say: Callable[[str], object]) -> None:
        self.plan, self.say = plan, say

    def state(self, *, images: int, fresh: bool = True) -> TrainState:
        """A state; unless it is ``fresh``, its weights do not matter."""
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
    """Puts the weights that the recipe names into fresh networks; on the meta device, only checks that they fit."""
    if recipe.init.weights is None:
        return
    heads = vit_arguments(recipe)["num_heads"]
    given = load(recipe.init.weights, num_heads=heads)
    if recipe.init.architecture == "file":  # what was assumed about it may have been overridden
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
    """Puts the heads and centres of a run's newest checkpoint into fresh networks; says what it did.

    Raises:
        WeightsError: heads of other sizes, or no whole checkpoint.
    """
    steps = checkpoint.steps(run)
    if not steps:
        return "heads start fresh: there is no checkpoint of a run to take them from"
    theirs = {name: t for name, t in student_teacher.state_dict().items() if ".backbone." not in name}
    checkpoint.load(run, steps[-1], theirs)
    return f"heads and centres of the checkpoint at step {steps[-1]:,}"
