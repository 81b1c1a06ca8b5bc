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
        x: features [B, D]; normalised here. With fewer than two there is no neighbour and the loss is 0.
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
