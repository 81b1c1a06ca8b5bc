"""The KoLeo regulariser, which spreads features."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dinoforge.data.batch import Share
from dinoforge.system import distributed


def koleo_loss(x: Tensor, eps: float = 1e-8) -> Tensor:
    """Minus the mean logarithm of each feature's distance to its nearest neighbour in the batch.

        for i in range(B):
            loss -= log(min(distance(x[i], x[j]) for j in range(B) if j != i)) / B

    Source: "Spreading vectors for similarity search" (arXiv 1806.03198), equation 2, as in DINOv2, section 4.

    Args:
        x: features [B, D]; normalised here. With fewer than two there is no neighbour and the loss is 0, which
            the plan of a run says before it starts.
        eps: added to each coordinate's difference and to the distance, as in the reference.
    """
    if len(x) < 2:
        return x.float().sum() * 0  # stays in the graph, so that ranks of any batch have the same one
    # In half precision neighbours of a batch are at distance 0.
    with torch.autocast(x.device.type, enabled=False):
        x = F.normalize(x.float(), dim=-1, eps=eps)
        with torch.no_grad():
            similarity = x @ x.T
            nearest = similarity.fill_diagonal_(-torch.inf).argmax(dim=1)
        distance = F.pairwise_distance(x, x[nearest], eps=eps)
        return -torch.log(distance + eps).mean()


def koleo_loss_among(x: Tensor, everyone: Tensor, first: int, group_size: int | None = None) -> Tensor:
    """The same with neighbours sought among the images of all ranks and micro-batches.

    Its value is the loss of all; its gradient is this part's share of that loss's, times the number of parts, because
    gradients are averaged over parts. It includes what other images' distances to these say.

    Args:
        x: features of this part [B, D].
        everyone: features of the global batch [G, D], without a gradient; ``x`` takes the place of its own rows.
        first: place of the first of its own rows.
        group_size: seek neighbours among so many consecutive images; it divides G. None: among all.
    """
    rows = torch.cat([everyone[:first], x.float(), everyone[first + len(x) :]])
    groups = rows.split(group_size or len(rows))
    loss = torch.stack([koleo_loss(group) for group in groups]).mean()
    return loss.detach() + (loss - loss.detach()) * (len(everyone) / len(x))


def koleo_of_views(
    cls: Tensor, share: Share, neighbours: Tensor | None, scope: str = "rank", group_size: int | None = None
) -> Tensor:
    """The sum over views, each by itself, since two crops of one image should be close.

    Args:
        cls: The student's cls tokens of the global crops that a batch has [V·B, D], crop-major.
        share: What the batch is of a larger one, whose loss is the sum over its parts.
        neighbours: The cls tokens of both views of the images of all ranks [2, G, D]; None: ask the other ranks.
        scope: Where neighbours are sought: ``rank`` is among the images of this batch, ``global`` among those of all
            ranks, ``groups`` among ``group_size`` consecutive ones of these.
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
    return torch.stack(losses).sum() * (len(own) / share.images)
