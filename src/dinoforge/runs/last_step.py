"""The state that the last whole step left, which an error does not take away."""

import traceback
from collections.abc import Callable

import torch
from torch import Tensor

from dinoforge.data.batch import Batch
from dinoforge.errors import DinoforgeError, TrainingError
from dinoforge.runs.lock import LockLostError
from dinoforge.runs.saver import Saver
from dinoforge.system import distributed
from dinoforge.system.out_of_memory import is_out_of_memory
from dinoforge.training.state import TrainState


class LastStep:
    """The state that the last step left, which one process saves if an error ends the next step.

    Args:
        state: State of the run.
    """

    def __init__(self, state: TrainState) -> None:
        self._state = state
        self._step = state.step
        self._centers: list[Tensor] = []
        self._version = self._version_now()

    def remembered(self, prepare: Callable[[Batch], Batch]) -> Callable[[Batch], Batch]:
        """Wrap ``prepare``, with which a step begins, so that it first records the state before the step."""

        def remember(batch: Batch) -> Batch:
            self._step, self._version = self._state.step, self._version_now()
            self._centers = [center.clone() for center in self._state.student_teacher.buffers()]
            return prepare(batch)

        return prepare if distributed.is_active() else remember

    def save_after(self, error: Exception, saver: Saver, say: Callable[[str], object]) -> None:
        """Save the state of the last whole step, if it is still there.

        Errors that a saved state does not help are left alone: another process writes the run, or losses stay
        non-finite, where the checkpoints before are what to go back to.
        """
        state = self._state
        if isinstance(error, LockLostError | TrainingError) or distributed.is_active():  # perhaps of one rank alone
            return
        why = "memory ran out" if is_out_of_memory(error) else f"this happened: {type(error).__name__}"
        if state.step == self._step:  # it came before the step was done
            if self._version_now() != self._version:
                say(f"\nnot saved  {why} while weights were updated. The last checkpoint is still there.")
                return
            for center, before in zip(state.student_teacher.buffers(), self._centers, strict=False):
                center.copy_(before)  # a forward pass moves it
        if is_out_of_memory(error):
            traceback.clear_frames(error.__traceback__)  # they hold what the step has made
            state.optimizer.zero_grad(set_to_none=True)
            if torch.accelerator.is_available():
                torch.accelerator.empty_cache()
        try:
            saver.finish()
        except (DinoforgeError, RuntimeError, MemoryError, OSError) as reason:
            say(f"\nnot saved  {reason}. The last checkpoint is still there.")
        else:
            say(f"\nsaved      step {state.step:,}, the last one before {why}.")

    def _version_now(self) -> int:
        """A number that rises with the first thing that the optimizer changes: its count of steps."""
        return sum(values["step"]._version for values in self._state.optimizer.state.values())
