"""The KoLeo regulariser, which spreads features."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoforge.data.batch import Share
from dinoforge.system import distributed


def koleo_loss(x: Tensor, eps: float = 1e-8) -> Tensor:
    """Compute minus the mean logarithm of each feature's distance to its nearest neighbour in the batch.

        for i in range(B):
            loss -= log(min(distance(x[i], x[j]) for j in range(B) if j != i)) / B

    Source: "Spreading vectors for similarity search" (arXiv 1806.03198), equation 2, as in DINOv2, section 4.

    Args:
        x: The features [B, D], which this function normalises. A single feature has no neighbour, so for B < 2 the
            loss is 0; the plan of a run warns of this case before the run starts.
        eps: A constant added to each coordinate's difference and to the distance, as in the reference.
    """
    if len(x) < 2:
        return x.float().sum() * 0  # stays in the graph, so that all ranks have the same graph
    # In half precision, the distances between neighbours round to 0.
    with torch.autocast(x.device.type, enabled=False):
        x = F.normalize(x.float(), dim=-1, eps=eps)
        with torch.no_grad():
            similarity = x @ x.T
            nearest = similarity.fill_diagonal_(-torch.inf).argmax(dim=1)
        distance = F.pairwise_distance(x, x[nearest], eps=eps)
        return -torch.log(distance + eps).mean()


def koleo_loss_among(x: Tensor, everyone: Tensor, first: int, group_size: int | None = None) -> Tensor:
    """Compute ``koleo_loss`` of one part of the global batch, with neighbours from all ranks and micro-batches.

    The value is the loss of the global batch. The gradient is this part's share of that loss's gradient, times the
    number of parts, because gradients are averaged over parts. It includes the distances of other parts' images to the
    images of this part.

    Args:
        x: The features of this part [B, D].
        everyone: The features of the global batch [G, D], without a gradient; ``x`` replaces this part's rows.
        first: The index of this part's first row in ``everyone``.
        group_size: The number of consecutive images among which neighbours are searched, a divisor of G; None: all.
    """
    rows = torch.cat([everyone[:first], x.float(), everyone[first + len(x) :]])
    groups = rows.split(group_size or len(rows))
    loss = torch.stack([koleo_loss(group) for group in groups]).mean()
    return loss.detach() + (loss - loss.detach()) * (len(everyone) / len(x))


def koleo_of_views(
    cls: Tensor, share: Share, neighbours: Tensor | None, scope: str = "rank", group_size: int | None = None
) -> Tensor:
    """Sum the KoLeo losses of the views; views are kept apart, since two crops of one image should be close.

    Args:
        cls: The student's cls tokens of the global crops that the batch has [V·B, D], crop-major.
        share: The batch's share of the whole batch, whose loss is the sum over its parts.
        neighbours: The cls tokens of both views of the images of all ranks [2, G, D]; None: gather them from the ranks.
        scope: Where neighbours are searched: ``rank``, among the images of this batch; ``global``, among the images of
            all ranks; ``groups``, among ``group_size`` consecutive images of all ranks.
        group_size: See ``scope``.
    """
    size = group_size if scope == "groups" else None
    losses = []
    for view, own in zip(share.views, cls.chunk(len(share.views)), strict=True):  # [B, D]
        if scope == "rank":
            losses.append(koleo_loss(own))
        elif neighbours is None:
            everyone = distributed.rows_of_all_ranks(own.float())
            losses.append(koleo_loss_among(own, everyone, distributed.rank() * len(own), size))
        else:
            first = distributed.rank() * share.images + share.first_image
            losses.append(koleo_loss_among(own, neighbours[view], first, size))
    images = len(cls) // len(share.views)
    return torch.stack(losses).sum() * (images / share.images)
