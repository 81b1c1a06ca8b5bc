"""The policy of a run for losses and gradients that are not finite."""

from collections.abc import Callable
from functools import partial

import torch

from dinoforge.builders.resolved import ResolvedRun
from dinoforge.data.batch import Batch
from dinoforge.data.sources import Source, printable
from dinoforge.errors import RunError, TrainingError
from dinoforge.runs import replay
from dinoforge.runs.directory import RunDirectory
from dinoforge.system import device as devices
from dinoforge.system import distributed
from dinoforge.training.loop import StepReport
from dinoforge.training.pieces import kept_samples
from dinoforge.training.state import TrainState

_KEPT_BATCHES = 20
_OVERFLOWS = 8  # overflows in a row, which lower the loss scale 256-fold


class OverflowAlarm:
    """Tells the user when gradients keep overflowing in float16; now and then a step does, and at the start several.

    Args:
        say: Tells the user.
    """

    def __init__(self, say: Callable[[str], object]) -> None:
        self.say = say

    def __call__(self, report: StepReport) -> None:
        state = report.state
        if state.scaler is not None and state.overflows_in_a_row == _OVERFLOWS:
            self.say(
                f"overflow   gradients of {_OVERFLOWS} steps in a row, up to step {state.step:,}, are not finite in "
                f"float16; the loss scale is {state.scaler.get_scale():g} now, and these steps updated nothing. At a "
                "scale of 1 such steps count as not finite. precision=fp32 does not overflow, nor does bf16 where the "
                "GPU has it"
            )


class NonFinitePolicy:
    """Decides what happens after a step that was skipped because its loss or gradients are not finite.

    The batch is kept; after ``train.max_skips`` in a row the run goes back; after ``train.max_rollbacks`` it ends.
    """

    def __init__(
        self,
        run: RunDirectory,
        state: TrainState,
        plan: ResolvedRun,
        source: Source,
        say: Callable[[str], object],
    ) -> None:
        self.run, self.state, self.plan, self.source, self.say = run, state, plan, source, say

    def __call__(self, batch: Batch, terms: dict[str, float]) -> bool:
        """Keep the batch; whether the run is to go back.

        Raises:
            TrainingError: Going back to earlier checkpoints has not helped.
        """
        state, train = self.state, self.plan.recipe.train
        step, number = state.step - 1, state.next_batch - 1
        told = f"loss or gradients are not finite at step {step:,} ({replay.describe_terms(terms)})"
        suffix = f"_rank{distributed.rank()}" if distributed.is_active() else ""
        path = self.run.non_finite / f"batch_{number:08d}{suffix}.safetensors"
        kept = len(list(self.run.non_finite.glob(f"*{suffix}.safetensors"))) if self.run.non_finite.is_dir() else 0
        names = tuple(printable(self.source.name(i)) for i in batch.indices.tolist())
        if kept < _KEPT_BATCHES:
            try:
                replay.save_batch(path, replay.SavedBatch(batch, step, number, names, terms, distributed.rank()))
                told += f"; the batch is {path}"
            except RunError as error:
                told += f"; its batch is not kept: {error}"
        self.say(f"skipped  {told}. Nothing was updated.")
        if state.skipped_in_a_row < train.max_skips:
            return False
        if state.rollbacks < train.max_rollbacks:
            return True
        looked = ""
        if not distributed.is_active():  # a look takes as many passes as it finds reasons for, and ranks go together
            findings = self._look(batch, step, number)
            looked = (
                f" The last batch, looked at again:\n{replay.describe(findings, names)}\n"
                f"{_advice(findings, len(names), self.plan)}"
            )
        raise TrainingError(
            f"{state.skipped_in_a_row} steps in a row, up to step {step:,}, gave losses or gradients that are not "
            f"finite, and {state.rollbacks} rollbacks did not help.{looked}\n"
            f"The checkpoints are from before these steps; the batches are in {self.run.non_finite}, to be looked at "
            f"by: dinoforge replay {self.run.path} --batch FILE"
        )

    def _look(self, batch: Batch, step: int, number: int) -> replay.Findings:
        recipe, networks = self.plan.recipe, self.state.student_teacher
        rates = self.plan.drop_path_rates
        (kept,) = kept_samples(networks, batch, rates, seed=recipe.train.seed, number=number)
        autocast = partial(devices.autocast, self.plan.device, self.plan.precision)
        return replay.find(networks, batch, self.plan.schedules(step), kept=kept, autocast=autocast)


def _advice(findings: replay.Findings, images: int, plan: ResolvedRun) -> str:
    """Which keys to try."""
    if 0 < len(findings.images) < images:
        return "Some images alone do it: look at them, or at data.mean and data.std."
    lower = f"a lower optim.base_lr (now {plan.recipe.optim.base_lr:g}) or a longer optim.warmup_length"
    if plan.precision is torch.float32:
        return f"It is not single images: try {lower}."
    return f"It is not single images: try precision=fp32, {lower}."
