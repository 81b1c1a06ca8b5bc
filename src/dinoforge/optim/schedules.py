"""Schedules: hyper-parameters as functions of the step."""

import math
from dataclasses import dataclass


def cosine(
    step: int, base: float, final: float, total_steps: int, warmup_steps: int = 0, warmup_start: float = 0.0
) -> float:
    """Linear from ``warmup_start`` to ``base`` over the warm-up, then a half cosine to ``final``; ``final`` beyond.

    The warm-up's last step has ``base``, and so has the first after it, as in the reference.
    """
    if step >= total_steps:
        return final
    if step < warmup_steps:
        done = step / (warmup_steps - 1) if warmup_steps > 1 else 0.0
        return (1 - done) * warmup_start + done * base  # in this form both ends are exact
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Hyperparameters:
    """The hyper-parameters of one step."""

    lr: float
    last_layer_lr: float
    weight_decay: float
    momentum: float
    teacher_temp: float
    last_layer_frozen: bool  # frozen by its gradient; where it is frozen by lr, last_layer_lr is 0
    backbone_frozen: bool = False  # only heads learn
    backbone_lr_mult: float = 1.0  # on lr


@dataclass(frozen=True)
class Schedules:
    """The hyper-parameters of a run; ``schedules(step)`` gives those of one step.

    Args:
        total_steps: Length of the run in steps.
        lr, min_lr: Peak and end of the learning rate, after scaling with the batch.
        warmup_steps: Steps in which the learning rate rises from 0 to its peak.
        weight_decay, weight_decay_end: Start and end of the weight decay's cosine.
        momentum, final_momentum: Start and end of the cosine of the teacher's momentum.
        warmup_teacher_temp, teacher_temp, teacher_temp_steps: The teacher's temperature goes linearly from the first to
            the second in so many steps, then stays constant.
        freeze_last_layer_steps: Steps in which the heads' last layer does not move.
        freeze_by_gradient: Whether the last layer is frozen by dropping its gradient, not by a learning rate of 0.
        freeze_backbone_steps: Steps in which only the heads learn. Then the backbone's learning rate rises from 0 to
            that of the heads, over as many steps as the warm-up.
        frozen_momentum: The teacher's momentum in these steps, in which only its heads move; None: as in other steps.
    """

    total_steps: int
    lr: float
    min_lr: float
    warmup_steps: int
    weight_decay: float
    weight_decay_end: float
    momentum: float
    final_momentum: float
    warmup_teacher_temp: float
    teacher_temp: float
    teacher_temp_steps: int
    freeze_last_layer_steps: int
    freeze_by_gradient: bool = False
    freeze_backbone_steps: int = 0
    frozen_momentum: float | None = None

    def __call__(self, step: int) -> Hyperparameters:
        lr = cosine(step, self.lr, self.min_lr, self.total_steps, self.warmup_steps)
        frozen = step < self.freeze_last_layer_steps
        thawed = step - self.freeze_backbone_steps  # steps since
        rising = self.freeze_backbone_steps > 0 and thawed < self.warmup_steps
        momentum = cosine(step, self.momentum, self.final_momentum, self.total_steps)
        if thawed < 0 and self.frozen_momentum is not None:
            momentum = self.frozen_momentum
        return Hyperparameters(
            lr=lr,
            last_layer_lr=0.0 if frozen and not self.freeze_by_gradient else lr,
            weight_decay=cosine(step, self.weight_decay, self.weight_decay_end, self.total_steps),
            momentum=momentum,
            teacher_temp=cosine(
                step,
                self.teacher_temp,
                self.teacher_temp,
                self.teacher_temp_steps,
                self.teacher_temp_steps,
                self.warmup_teacher_temp,
            ),
            last_layer_frozen=frozen and self.freeze_by_gradient,
            backbone_frozen=thawed < 0,
            backbone_lr_mult=0.0 if thawed < 0 else (thawed + 1) / (self.warmup_steps + 1) if rising else 1.0,
        )


def sqrt_scaled_lr(base_lr: float, batch_size: int) -> float:
    """The learning rate for a batch, from that for 1024 images (``scaling_rule: sqrt_wrt_1024``)."""
    return base_lr * math.sqrt(batch_size / 1024)
