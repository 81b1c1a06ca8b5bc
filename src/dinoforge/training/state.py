"""The state of a run between two steps."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dinoforge.data.bad_images import BadImages
from dinoforge.method.dinov2 import StudentTeacher


@dataclass
class TrainState:
    """Everything that changes during training: exactly what a checkpoint holds."""

    student_teacher: StudentTeacher
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    bad_images: BadImages
    step: int = 0  # steps done or skipped
    seconds: float = 0.0  # time spent in steps, over all starts of the run
    skipped_steps: int = 0  # steps skipped because their loss or gradients were not finite
    skipped_in_a_row: int = 0  # skipped steps since the last step that was not skipped
    rollbacks: int = 0
    passed_over: int = 0  # batches that rollbacks left out: step n takes batch n + passed_over
    overflows: int = 0  # steps whose gradients were too large for float16 at the step's loss scale
    overflows_in_a_row: int = 0  # overflows since the last normal step

    @property
    def next_batch(self) -> int:
        """The number of the batch that the next step takes."""
        return self.step + self.passed_over

    def count(self, *, seconds: float, finite: bool, overflowed: bool) -> None:
        """Count a step that was made, or skipped because a loss or gradient is not finite.

        Args:
            seconds: The duration of the step, including the wait for data.
            finite: False if the step was skipped.
            overflowed: Whether gradients were too large for float16.
        """
        self.step += 1
        self.seconds += seconds
        if not finite:
            self.skipped_steps += 1
            self.skipped_in_a_row += 1
            return
        self.skipped_in_a_row = 0
        self.overflows += overflowed
        self.overflows_in_a_row = self.overflows_in_a_row + 1 if overflowed else 0

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor by name, without a copy: writing to a tensor changes the state."""
        named: dict[str, Tensor] = dict(self.student_teacher.state_dict())
        for group in self.optimizer.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                for key, tensor in self.optimizer.state[parameter].items():
                    named[f"optimizer.{group['module']}.{name}.{key}"] = tensor
        return named

    def values(self) -> dict[str, Any]:
        """Return everything but the tensors, as JSON values."""
        return {name: getattr(self, name) for name in _NUMBERS} | {
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "bad_images": self.bad_images.state_dict(),
        }

    def load_values(self, values: Mapping[str, Any]) -> None:
        """Restore the result of ``values``."""
        for name in _NUMBERS:
            setattr(self, name, values.get(name, 0))  # checkpoints of earlier versions lack some of the names
        if self.scaler and values["scaler"]:
            self.scaler.load_state_dict(values["scaler"])
        self.bad_images.load_state_dict(values["bad_images"])

    def go_back(self, values: Mapping[str, Any]) -> None:
        """Restore an earlier result of ``values``, but keep the counters, and continue with batches not seen yet."""
        next_batch, rollbacks, skipped = self.next_batch, self.rollbacks, self.skipped_steps
        overflows = self.overflows
        known = self.bad_images.state_dict()
        self.load_values(values)
        self.passed_over = next_batch - self.step
        self.rollbacks, self.skipped_steps, self.skipped_in_a_row = rollbacks + 1, skipped, 0
        self.overflows, self.overflows_in_a_row = overflows, 0
        self.bad_images.load_state_dict(known)


_NUMBERS = (
    *("step", "seconds", "skipped_steps", "skipped_in_a_row", "rollbacks", "passed_over"),
    *("overflows", "overflows_in_a_row"),
)
