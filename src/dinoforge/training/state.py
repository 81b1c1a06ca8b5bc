"""What a run is between two steps."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dinoforge.data.bad_images import BadImages
from dinoforge.method.dinov2 import StudentTeacher


@dataclass
class TrainState:
    """All that changes while training: what a checkpoint holds, and nothing else."""

    student_teacher: StudentTeacher
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    bad_images: BadImages
    step: int = 0  # steps done, or skipped
    seconds: float = 0.0  # spent in them, over all parts of the run
    skipped_steps: int = 0  # whose loss or gradients were not finite
    skipped_in_a_row: int = 0  # of them, the last ones
    rollbacks: int = 0
    passed_over: int = 0  # batches that rollbacks left out: step n takes batch n + passed_over
    overflows: int = 0  # steps whose gradients were too large for float16 at the loss scale of then
    overflows_in_a_row: int = 0  # of them, the last ones

    @property
    def next_batch(self) -> int:
        """Number of the batch that the next step takes."""
        return self.step + self.passed_over

    def count(self, *, seconds: float, finite: bool, overflowed: bool) -> None:
        """Count a step that was made, or skipped since a loss or gradient is not finite.

        Args:
            seconds: The time that the step took, its wait for data included.
            finite: False if it was skipped.
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
        """Every tensor by name, as it is kept: writing to one changes the state."""
        named: dict[str, Tensor] = dict(self.student_teacher.state_dict())
        for group in self.optimizer.param_groups:
            for name, parameter in zip(group["names"], group["params"], strict=True):
                for key, tensor in self.optimizer.state[parameter].items():
                    named[f"optimizer.{group['module']}.{name}.{key}"] = tensor
        return named

    def values(self) -> dict[str, Any]:
        """Everything else, as JSON has it."""
        return {name: getattr(self, name) for name in _NUMBERS} | {
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "bad_images": self.bad_images.state_dict(),
        }

    def load_values(self, values: Mapping[str, Any]) -> None:
        """Sets what ``values`` gave."""
        for name in _NUMBERS:
            setattr(self, name, values.get(name, 0))  # checkpoints of earlier versions have fewer of them
        if self.scaler and values["scaler"]:
            self.scaler.load_state_dict(values["scaler"])
        self.bad_images.load_state_dict(values["bad_images"])

    def go_back(self, values: Mapping[str, Any]) -> None:
        """Sets what ``values`` gave earlier in this run, but keeps count, and goes on with batches not seen since."""
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
