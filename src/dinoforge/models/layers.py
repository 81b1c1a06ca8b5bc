"""The layers of a vision transformer, working on packed tokens.

Crops of several resolutions go through every linear layer as one sequence of tokens [T, D]; only attention has to
know which tokens belong together. ``Groups`` says so: for each resolution, the number of images and the tokens of
each, in the order in which they are packed.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Groups = tuple[tuple[int, int], ...]  # (images, tokens per image) of each resolution


@dataclass(frozen=True)
class Subset:
    """The images of a batch that one residual branch keeps (stochastic depth).

    rows: packed indices of their tokens [T'].
    groups: the groups that these tokens form.
    scales: per group, images / images kept, which keeps the expectation of the branch.
    """

    rows: Tensor
    groups: Groups
    scales: tuple[float, ...]


def subset_of(kept: list[Tensor], groups: Groups, device: torch.device) -> Subset:
    """The subset that keeps the images ``kept[g]`` (indices on the CPU) of each group ``g``."""
    rows, start = [], 0
    for indices, (images, tokens) in zip(kept, groups, strict=True):
        rows.append((start + indices[:, None] * tokens + torch.arange(tokens)).flatten())
        start += images * tokens
    return Subset(
        rows=torch.cat(rows).to(device, non_blocking=True),
        groups=tuple((len(indices), tokens) for indices, (_, tokens) in zip(kept, groups, strict=True)),
        scales=tuple(images / len(indices) for indices, (images, _) in zip(kept, groups, strict=True)),
    )


class PatchEmbed(nn.Module):
    """Images [B, C, H, W] to patch tokens [B, H/p · W/p, D]."""

    def __init__(self, patch_size: int, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.proj(images).flatten(2).transpose(1, 2)
        return out


class Attention(nn.Module):
    """Multi-head self-attention among the tokens of each image."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, proj_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)

    def forward(self, x: Tensor, groups: Groups) -> Tensor:
        qkv = self.qkv(x)  # [T, 3D]
        sizes = [images * tokens for images, tokens in groups]
        attended = [self._attend(part, *group) for part, group in zip(qkv.split(sizes), groups, strict=True)]
        out: Tensor = self.proj(attended[0] if len(attended) == 1 else torch.cat(attended))
        return out

    def _attend(self, qkv: Tensor, images: int, tokens: int) -> Tensor:
        dtype = qkv.dtype
        if qkv.device.type == "cpu" and dtype in (torch.bfloat16, torch.float16):
            qkv = qkv.float()  # attention's backward pass on the CPU is several times slower in half precision
        q, k, v = qkv.view(images, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)  # each [B, heads, N, D/heads]
        with torch.autocast("cpu", enabled=False):
            out = F.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).reshape(images * tokens, -1).to(dtype)  # [B·N, D]


class Mlp(nn.Module):
    """Linear, GELU, linear."""

    def __init__(self, dim: int, hidden_dim: int, bias: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim, bias=bias)
        self.fc2 = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class SwiGLU(nn.Module):
    """Gated feed-forward layer (arXiv 2002.05202): two thirds of the hidden width, rounded up to a multiple of 8."""

    def __init__(self, dim: int, hidden_dim: int, bias: bool) -> None:
        super().__init__()
        hidden_dim = (int(hidden_dim * 2 / 3) + 7) // 8 * 8
        self.w12 = nn.Linear(dim, 2 * hidden_dim, bias=bias)
        self.w3 = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        out: Tensor = self.w3(F.silu(gate) * value)
        return out


class LayerScale(nn.Module):
    """A learned factor per channel (arXiv 2103.17239)."""

    def __init__(self, dim: int, initial: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), initial))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


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
        self.ls1 = LayerScale(dim, layerscale) if layerscale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = (SwiGLU if swiglu else Mlp)(dim, hidden_dim, ffn_bias)
        self.ls2 = LayerScale(dim, layerscale) if layerscale else nn.Identity()

    def forward(
        self, x: Tensor, groups: Groups, keep_attn: Subset | None = None, keep_ffn: Subset | None = None
    ) -> Tensor:
        if keep_attn is None:
            x = x + self._attn_branch(x, groups)
        else:
            x = _add_to(x, self._attn_branch(x[keep_attn.rows], keep_attn.groups), keep_attn)
        if keep_ffn is None:
            return x + self._ffn_branch(x)
        return _add_to(x, self._ffn_branch(x[keep_ffn.rows]), keep_ffn)

    def _attn_branch(self, x: Tensor, groups: Groups) -> Tensor:
        out: Tensor = self.ls1(self.attn(self.norm1(x), groups))
        return out

    def _ffn_branch(self, x: Tensor) -> Tensor:
        out: Tensor = self.ls2(self.mlp(self.norm2(x)))
        return out


def _add_to(x: Tensor, residual: Tensor, subset: Subset) -> Tensor:
    """Adds a branch that saw a subset of the images, scaled so that its expectation is the whole branch's."""
    sizes = [images * tokens for images, tokens in subset.groups]
    parts = zip(subset.rows.split(sizes), residual.split(sizes), subset.scales, strict=True)
    for rows, part, scale in parts:
        x = x.index_add(0, rows, part.to(x.dtype), alpha=scale)
    return x
