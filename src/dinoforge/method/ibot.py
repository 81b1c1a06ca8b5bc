"""The iBOT loss on masked patch tokens."""

import torch
from torch import Tensor

from dinoforge.kernels.types import Targets, Term


def ibot_term(
    embeddings: Tensor,
    targets: Targets,
    masks: Tensor,
    student_temp: float,
    weight: float = 1.0,
    patches: slice | None = None,
) -> Term:
    """Cross-entropy at each masked patch between what the student guesses and what the teacher sees.

        for c in range(2 * B):
            for n in masked[c]: loss += H(teacher[c][n], student[c][n]) / len(masked[c]) / (2 * B)

    So each masked crop counts alike, however much of it is masked, and crops without a mask count as zero.

    Source: iBOT (arXiv 2111.07832), equation 2.

    Args:
        embeddings: student bottlenecks of the masked ``patches`` [m, d], in the order of ``masks.flatten()``.
        targets: of the teacher's tokens of the same patches [M].
        masks: of the global crops [2B, N] bool.
        student_temp: the student's temperature.
        weight: of the term in the whole loss.
        patches: which of the M masked ones the student's are; None for all.

    Returns:
        What ``cross_entropy`` makes the loss of.
    """
    count = len(targets.per_sample)
    patches = patches or slice(0, count)
    weights = patch_weights(masks, count, weight)[patches]
    return Term(embeddings[None], targets, (patches,), weights, student_temp)


def patch_weights(masks: Tensor, count: int, weight: float = 1.0) -> Tensor:
    """``weight / len(masked[c]) / (2 * B)`` for each of the ``count`` masked patches [M] of masks [2B, N]."""
    per_crop = masks.sum(dim=1)  # [2B]
    # M is known from the shapes, so the expansion does not wait for the device.
    return torch.repeat_interleave(weight / per_crop.clamp(min=1).float() / len(masks), per_crop, output_size=count)
