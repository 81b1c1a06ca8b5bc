"""The DINO loss on cls tokens."""

import torch
from torch import Tensor

from dinoforge.losses.cross_entropy import cross_entropy
from dinoforge.losses.targets import Targets


def dino_loss(
    global_embeddings: Tensor,
    local_embeddings: Tensor,
    prototypes: Tensor,
    targets: Targets,
    *,
    local_crops_number: int,
    student_temp: float,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each student crop with the teacher's view of the same image.

    A global crop is held against the teacher's *other* view, a local crop against both. With L local crops there
    are 2 + 2·L pairs for an image; both terms are divided by that number, so together they are a mean over pairs.

        for b in range(B):
            for v in range(2): global_loss += H(teacher[1 - v][b], student_global[v][b]) / B / (2 + 2 * L)
            for l in range(L):
                for v in range(2): local_loss += H(teacher[v][b], student_local[l][b]) / B / (2 + 2 * L)

    Source: DINO (arXiv 2104.14294), equation 3.

    Args:
        global_embeddings: student bottlenecks of the global crops [2B, d], crop-major.
        local_embeddings: of the local crops [L·B, d], crop-major; empty if that term is not wanted.
        prototypes: effective weight of the student's last layer [K, d].
        targets: of the teacher's cls tokens of the global crops [2B], crop-major.
        local_crops_number: L, 0 or more.
        student_temp: the student's temperature.

    Returns:
        The global and the local term.
    """
    batch = len(global_embeddings) // 2
    pairs = 2 + 2 * local_crops_number
    image = torch.arange(batch, device=global_embeddings.device)
    weight = global_embeddings.new_full((), 1 / (batch * pairs), dtype=torch.float32)

    other_view = torch.cat([image + batch, image])[:, None]  # [2B, 1]
    global_loss = cross_entropy(
        global_embeddings, prototypes, targets, other_view, weight.expand(2 * batch), student_temp
    )
    both_views = torch.stack([image, image + batch], dim=1).repeat(len(local_embeddings) // batch, 1)  # [L·B, 2]
    local_loss = cross_entropy(
        local_embeddings, prototypes, targets, both_views, weight.expand(len(local_embeddings)), student_temp
    )
    return global_loss, local_loss
