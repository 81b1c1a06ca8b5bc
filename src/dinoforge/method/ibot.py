"""The iBOT loss on masked patch tokens."""

import torch
from torch import Tensor

from dinoforge.data.batch import Share
from dinoforge.kernels.ops import Targets, Term


def ibot_term(
    embeddings: Tensor, targets: Targets, masks: Tensor, share: Share, student_temp: float, weight: float = 1.0
) -> Term:
    """Compare the student's prediction for each masked patch with the teacher's view of it, by cross-entropy.

        for c in range(2 * B):
            for n in masked[c]: loss += H(teacher[c][n], student[c][n]) / len(masked[c]) / (2 * B)

    Each masked crop has the same weight, however many of its patches are masked. Crops without a mask count as zero.

    Source: iBOT (arXiv 2111.07832), equation 2.

    Args:
        embeddings: The student's bottlenecks of the masked patches [m, d], in the order of ``masks.flatten()``.
        targets: The teacher's targets for the masked patches of both global crops of the batch's images.
        masks: The masks of the global crops that the batch has [V·b, N] bool.
        share: The batch's share of the whole batch; B is the whole batch's.
        student_temp: The student's temperature.
        weight: The weight of the term in the whole loss.

    Returns:
        The term whose cross-entropy is the loss.
    """
    patches = slice(share.first_patch, share.first_patch + len(embeddings))
    weights = patch_weights(masks, len(embeddings), 2 * share.images, weight)
    return Term(embeddings[None], targets, (patches,), weights, student_temp)


def patch_weights(masks: Tensor, count: int, crops: int, weight: float = 1.0) -> Tensor:
    """Compute ``weight / len(masked[c]) / crops`` for each of the ``count`` masked patches [m] of masks [C, N]."""
    per_crop = masks.sum(dim=1)  # [C]
    # The caller knows m from shapes, so the expansion does not wait for the device.
    return torch.repeat_interleave(weight / per_crop.clamp(min=1).float() / crops, per_crop, output_size=count)
