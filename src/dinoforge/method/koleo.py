"""The KoLeo regulariser, which spreads features."""

import torch
import torch.nn.functional as F
from torch import Tensor


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
