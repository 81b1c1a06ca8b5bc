"""The iBOT loss on masked patch tokens."""

import torch
from torch import Tensor

from dinoforge.data.batch import Share
from dinoforge.kernels.ops import Targets, Term


def ibot_term(
    embeddings: Tensor, targets: Targets, masks: Tensor, share: Share, student_temp: float, weight: float = 1.0
) -> Term:
    """Hold what the student guesses of each masked patch against what the teacher sees, by cross-entropy.

        for c in range(2 * B):
            for n in masked[c]: loss += H(teacher[c][n], student[c][n]) / len(masked[c]) / (2 * B)

    So each masked crop counts alike, however much of it is masked, and crops without a mask count as zero.

    Source: iBOT (arXiv 2111.07832), equation 2.

    Args:
        embeddings: The student's bottlenecks of the masked patches [m, d], in the order of ``masks.flatten()``.
        targets: The teacher's of the masked patches of both global crops of the batch's images.
        masks: The masks of the global crops that the batch has [V·b, N] bool.
        share: What the batch is of a larger one; B is that of the larger one.
        student_temp: The student's temperature.
        weight: The weight of the term in the whole loss.

    Returns:
        The term whose cross-entropy is the loss.
    """
    patches = slice(share.first_patch, share.first_patch + len(embeddings))
    weights = patch_weights(masks, len(embeddings), 2 * share.images, weight)
    return Term(embeddings[None], targets, (patches,), weights, student_temp)


def patch_weights(masks: Tensor, count: int, crops: int, weight: float = 1.0) -> Tensor:
    """``weight / len(masked[c]) / crops`` for each of the ``count`` masked patches [m] of masks [C, N]."""
    per_crop = masks.sum(dim=1)  # [C]
    # m is known from the shapes, so the expansion does not wait for the device.
    return torch.repeat_interleave(weight / per_crop.clamp(min=1).float() / crops, per_crop, output_size=count)
