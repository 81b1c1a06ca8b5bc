"""The layers of a vision transformer, working on packed tokens.

Crops of several resolutions pass through every linear layer as one sequence of tokens [T, D]. Only attention has to
know which tokens belong together. ``Groups`` holds, for each resolution, the number of images and the number of tokens
per image, in packing order.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoforge.kernels.ops import add_rows, attention, norm_linear, scaled_linear, take_rows
from dinoforge.kernels.types import Groups, Subset
from dinoforge.models.wanted import Narrowing


class PatchEmbed(nn.Module):
    """Maps images [B, C, H, W] to patch tokens [B, H/p · W/p, D]."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """Embed the patches of images [B, C, H, W], row by row."""
        out: Tensor = self.proj(images).flatten(2).transpose(1, 2)
        return out


class Attention(nn.Module):
    """Multi-head self-attention among the tokens of each image; ``project`` applies the output layer."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, proj_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)

    def forward(self, x: Tensor, norm: nn.LayerNorm, groups: Groups) -> Tensor:
        """Attend from each token of ``norm(x)`` [T, D] to the tokens of its image; without the output layer [T, D]."""
        return attention(norm_linear(x, norm, self.qkv), groups, self.num_heads)

    def project(self, x: Tensor, scale: Tensor | None) -> Tensor:
        """Apply the output layer and LayerScale's factors to attention's output [T, D]."""
        return scaled_linear(x, self.proj, scale)


class Mlp(nn.Module):
    """Linear, GELU, linear, with LayerNorm before and LayerScale after."""

    def __init__(self, dim: int, hidden_dim: int, bias: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim, bias=bias)
        self.fc2 = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Tensor, norm: nn.LayerNorm, scale: Tensor | None) -> Tensor:
        """Compute the branch of tokens [T, D], from their ``norm`` to LayerScale's factors ``scale`` [D]."""
        return scaled_linear(norm_linear(x, norm, self.fc1), self.fc2, scale, gelu=True)


class SwiGLU(nn.Module):
    """Gated feed-forward layer (arXiv 2002.05202): two thirds of the hidden width, rounded up to a multiple of 8."""

    def __init__(self, dim: int, hidden_dim: int, bias: bool) -> None:
        super().__init__()
        hidden_dim = (int(hidden_dim * 2 / 3) + 7) // 8 * 8
        self.w12 = nn.Linear(dim, 2 * hidden_dim, bias=bias)
        self.w3 = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Tensor, norm: nn.LayerNorm, scale: Tensor | None) -> Tensor:
        """Compute the branch of tokens [T, D], from their ``norm`` to LayerScale's factors ``scale`` [D]."""
        gate, value = norm_linear(x, norm, self.w12).chunk(2, dim=-1)
        return scaled_linear(F.silu(gate) * value, self.w3, scale)


class LayerScale(nn.Module):
    """A learned factor per channel (arXiv 2103.17239), applied by ``scaled_linear``."""

    def __init__(self, dim: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), initial))


class Block(nn.Module):
    """Pre-norm transformer block on packed tokens [T, D]."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden_dim: int,
        *,
        swiglu: bool,
        layerscale: float,
        qkv_bias: bool,
        proj_bias: bool,
        ffn_bias: bool,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, qkv_bias, proj_bias)
        self.ls1 = LayerScale(dim, layerscale) if layerscale else None
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = (SwiGLU if swiglu else Mlp)(dim, hidden_dim, ffn_bias)
        self.ls2 = LayerScale(dim, layerscale) if layerscale else None

    def forward(
        self,
        x: Tensor,
        groups: Groups,
        keep_attn: Subset | None = None,
        keep_ffn: Subset | None = None,
        narrowing: "Narrowing | None" = None,
    ) -> Tensor:
        """Compute all tokens [T, D], or only those of ``narrowing`` [W, D], which then replaces ``keep_ffn``."""
        if narrowing is not None:
            return self._narrowed(x, groups, narrowing, keep_attn)
        if keep_attn is None:
            x = x + self._project(self._attend(x, groups))
        else:
            x, taken = take_rows(x, keep_attn.rows)
            x = add_rows(x, self._project(self._attend(taken, keep_attn.groups)), keep_attn)
        if keep_ffn is None:
            return x + self._feed_forward(x)
        x, taken = take_rows(x, keep_ffn.rows)
        return add_rows(x, self._feed_forward(taken), keep_ffn)

    def _narrowed(self, x: Tensor, groups: Groups, narrowing: "Narrowing", keep_attn: Subset | None) -> Tensor:
        """Compute only the wanted rows after attention."""
        n = narrowing
        taken = x if keep_attn is None else x[keep_attn.rows]
        attended = self._attend(taken, groups if keep_attn is None else keep_attn.groups)
        x = x[n.wanted]
        branch = self._project(attended[n.attn_rows])
        x = x.index_add(0, n.attn_places, branch.to(x.dtype) * n.attn_scales)
        branch = self._feed_forward(x[n.ffn_places])
        return x.index_add(0, n.ffn_places, branch.to(x.dtype) * n.ffn_scales)

    def _attend(self, x: Tensor, groups: Groups) -> Tensor:
        out: Tensor = self.attn(x, self.norm1, groups)
        return out

    def _project(self, x: Tensor) -> Tensor:
        return self.attn.project(x, self.ls1.gamma if self.ls1 else None)

    def _feed_forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.mlp(x, self.norm2, self.ls2.gamma if self.ls2 else None)
        return out
