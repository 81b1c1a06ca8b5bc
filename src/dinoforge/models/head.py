"""The projection head of DINO and iBOT."""

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoforge.kernels.ops import even_rows, scaled_linear


class Prototypes(nn.Module):
    """A weight-normed linear layer without bias: the rows of ``weight_v`` scaled to the lengths ``weight_g``.

    Both are plain parameters, so copying, sharding and compilation need no special case.

    Args:
        dim: The input width d.
        count: The number of prototypes K.
    """

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(count, 1))
        self.weight_v = nn.Parameter(torch.empty(count, dim).uniform_(-(dim**-0.5), dim**-0.5))

    def parts(self) -> tuple[Tensor, Tensor]:
        """Return the factors of the effective weight: ``weight_g`` [K, 1] and ``weight_v`` [K, d], also if sharded."""
        return self.weight_g, self.weight_v

    def weight(self) -> Tensor:
        """Compute the effective weight [K, d]."""
        weight: Tensor = self.weight_v * (self.weight_g / self.weight_v.norm(dim=1, keepdim=True))
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits [N, K] of bottlenecks [N, d]."""
        return F.linear(x, self.weight())


class Mlp(nn.Sequential):
    """Linear layers with GELU between them; the backward pass recomputes GELU instead of storing its output."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute the bottlenecks [N, d] of tokens [N, D], before normalisation."""
        first, *others = (layer for layer in self if isinstance(layer, nn.Linear))
        x = first(x)
        for linear in others:
            x = scaled_linear(x, linear, None, gelu=True)
        return x


class DINOHead(nn.Module):
    """Maps tokens [N, D] to logits over prototypes [N, K]: an MLP, L2 normalisation, a weight-normed last layer.

    Source: DINO (arXiv 2104.14294), section 3.1 and appendix C.

    Args:
        in_dim: The token width D.
        prototypes: The number of prototypes K.
        bottleneck_dim: The width d before the last layer.
        nlayers: The number of linear layers in the MLP; 1 makes it a single linear layer.
        hidden_dim: The width inside the MLP.
    """

    def __init__(self, in_dim: int, *, prototypes: int, bottleneck_dim: int, nlayers: int, hidden_dim: int) -> None:
        super().__init__()
        widths = [in_dim] + [hidden_dim] * (nlayers - 1) + [bottleneck_dim]
        layers: list[nn.Module] = []
        for width_in, width_out in itertools.pairwise(widths):
            linear = nn.Linear(width_in, width_out)
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
            layers += [linear, nn.GELU()]
        layers.pop()
        self.mlp = layers[0] if nlayers == 1 else Mlp(*layers)
        self.last_layer = Prototypes(bottleneck_dim, prototypes)

    def embed(self, x: Tensor) -> Tensor:
        """Compute the normalised bottlenecks [N, d] that the last layer reads."""
        bottleneck = self.mlp(even_rows(x))[: len(x)]
        return F.normalize(bottleneck.float(), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits [N, K] of tokens [N, D]."""
        logits: Tensor = self.last_layer(self.embed(x))
        return logits
