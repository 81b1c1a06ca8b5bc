"""Vision transformer with the parameter names of the official DINOv2 weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinoforge.kernels.types import Groups
from dinoforge.models.layers import Block, PatchEmbed
from dinoforge.models.stochastic_depth import KeptSamples, subsets
from dinoforge.models.wanted import narrowing_to

# embed_dim, depth, num_heads; arXiv 2010.11929, 2012.12877 and, for giant, 2304.07193.
SIZES: dict[str, tuple[int, int, int]] = {
    "vit_tiny": (192, 12, 3),
    "vit_small": (384, 12, 6),
    "vit_base": (768, 12, 12),
    "vit_large": (1024, 24, 16),
    "vit_giant2": (1536, 40, 24),
}


@dataclass(frozen=True)
class Tokens:
    """The normalised output tokens of a batch of images of one size."""

    cls: Tensor  # [B, D]
    registers: Tensor  # [B, R, D]
    patches: Tensor  # [B, N, D]


class VisionTransformer(nn.Module):
    """A vision transformer for images whose sides are multiples of the patch size.

    Args:
        embed_dim: The token width D, a multiple of ``num_heads``.
        depth: The number of blocks.
        num_heads: The number of attention heads.
        patch_size: The side of a patch, in pixels.
        image_size: The side, in pixels, of the images that the grid of position embeddings is made for. The grid is
            resampled for other sizes.
        in_chans: The number of image channels.
        mlp_ratio: The hidden width of the feed-forward layers over ``embed_dim``.
        ffn_layer: ``mlp``, or ``swiglu`` (``swiglufused`` is the same).
        layerscale: The initial value of LayerScale; 0 for none.
        qkv_bias, proj_bias, ffn_bias: Whether the layers of attention, its output layer, and the feed-forward layers
            have biases.
        num_register_tokens: The number of register tokens (arXiv 2309.16588), which get no position embedding.
        interpolate_antialias: Whether bicubic resampling of position embeddings is antialiased.
        interpolate_offset: The offset in [0, 1) that is added to the target size before the scale of that resampling
            is computed, as the reference does with 0.1; 0 for none.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        depth: int,
        num_heads: int,
        patch_size: int,
        image_size: int,
        in_chans: int = 3,
        mlp_ratio: float = 4.0,
        ffn_layer: str = "mlp",
        layerscale: float = 1e-5,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        ffn_bias: bool = True,
        num_register_tokens: int = 0,
        interpolate_antialias: bool = False,
        interpolate_offset: float = 0.1,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}")
        if image_size % patch_size:
            raise ValueError(f"image_size {image_size} is not a multiple of patch_size {patch_size}")
        if not 0 <= interpolate_offset < 1:
            raise ValueError(f"interpolate_offset {interpolate_offset} is not in [0, 1)")
        self.embed_dim, self.patch_size, self.in_chans = embed_dim, patch_size, in_chans
        self.num_register_tokens = num_register_tokens
        self.interpolate_antialias, self.interpolate_offset = interpolate_antialias, interpolate_offset

        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + (image_size // patch_size) ** 2, embed_dim))
        self.register_tokens = (
            nn.Parameter(torch.empty(1, num_register_tokens, embed_dim)) if num_register_tokens else None
        )
        self.mask_token = nn.Parameter(torch.zeros(1, embed_dim))
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                int(embed_dim * mlp_ratio),
                swiglu=ffn_layer != "mlp",
                layerscale=layerscale,
                qkv_bias=qkv_bias,
                proj_bias=proj_bias,
                ffn_bias=ffn_bias,
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self._init_weights()

    def _init_weights(self) -> None:
        if self.cls_token.is_meta:  # there is nothing to draw, and normal_ would import PyTorch's compiler
            return
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=1e-6)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor, masks: Tensor | None = None) -> Tokens:
        """Encode images [B, C, H, W]; the mask token replaces the patches where ``masks`` [B, N] is true."""
        (tokens,) = self.encode([images], [masks])
        return tokens

    def encode(
        self,
        crops: Sequence[Tensor],
        masks: Sequence[Tensor | None],
        kept: Sequence[KeptSamples] | None = None,
    ) -> list[Tokens]:
        """Encode several groups of images at once, each group of its own size.

        Args:
            crops: The images of each group [B, C, H, W].
            masks: The masked patches of each group [B, N] bool, or None.
            kept: The images that the residual branches of each block keep; None: all (no stochastic depth).

        Raises:
            ValueError: A side is not a multiple of the patch size, or the number of channels differs.
        """
        x, groups = self._packed(crops, masks)
        for i, block in enumerate(self.blocks):
            x = block(x, groups, *subsets(kept, i, groups, x.device))
        x = self.norm(x)

        first_patch = 1 + self.num_register_tokens
        parts = x.split([images * tokens for images, tokens in groups])
        shaped = [part.view(*group, -1) for part, group in zip(parts, groups, strict=True)]
        return [Tokens(s[:, 0], s[:, 1:first_patch], s[:, first_patch:]) for s in shaped]

    def get_intermediate_layers(
        self,
        images: Tensor,
        n: int | Sequence[int] = 1,
        *,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Tensor, ...] | tuple[tuple[Tensor, Tensor], ...]:
        """Compute the patch tokens [B, N, D] after some blocks, with the official models' interface.

        Args:
            images: The images [B, C, H, W].
            n: The number of last blocks to return, or block numbers from 0. Results are in block order.
            reshape: Whether patch tokens are returned as maps [B, D, H/p, W/p].
            return_class_token: Whether each result is a pair of patch tokens and cls token [B, D].
            norm: Whether the final norm is applied to each result.

        Raises:
            ValueError: A block number is out of range, or the images do not fit.
        """
        depth = len(self.blocks)
        wanted = set(range(depth - n, depth)) if isinstance(n, int) else set(n)
        if not wanted or not wanted <= set(range(depth)):
            raise ValueError(f"n={n}: expected 1 to {depth}, or numbers of blocks from 0 to {depth - 1}")
        x, groups = self._packed([images], [None])
        rows, columns = (side // self.patch_size for side in images.shape[-2:])
        results: list[tuple[Tensor, Tensor]] = []
        for i, block in enumerate(self.blocks):
            x = block(x, groups)
            if i in wanted:
                tokens = (self.norm(x) if norm else x).view(*groups[0], -1)
                patches = tokens[:, 1 + self.num_register_tokens :]
                if reshape:
                    patches = patches.transpose(1, 2).unflatten(2, (rows, columns))
                results.append((patches, tokens[:, 0]))
        return tuple(results) if return_class_token else tuple(patches for patches, _ in results)

    def encode_some(
        self,
        crops: Sequence[Tensor],
        masks: Sequence[Tensor | None],
        patches: Sequence[Tensor | None],
        kept: Sequence[KeptSamples] | None = None,
    ) -> list[tuple[Tensor, Tensor]]:
        """Encode as ``encode`` does, but compute only the cls tokens and some of the patch tokens.

        Args:
            crops, masks, kept: See ``encode``.
            patches: The wanted patch tokens of each group: indices [M] into [B·N], on the CPU; None for none.

        Returns:
            The cls tokens [B, D] and patch tokens [M, D] of each group.
        """
        x, groups = self._packed(crops, masks)
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks[:last]):
            x = block(x, groups, *subsets(kept, i, groups, x.device))

        wanted: list[Tensor] = []  # packed rows
        start = 0
        for (images, tokens), chosen in zip(groups, patches, strict=True):
            wanted.append(start + torch.arange(images) * tokens)
            if chosen is not None:
                count = tokens - 1 - self.num_register_tokens
                wanted.append(start + chosen // count * tokens + 1 + self.num_register_tokens + chosen % count)
            else:
                wanted.append(torch.arange(0))
            start += images * tokens
        keep_attn, _ = subsets(kept, last, groups, x.device)
        attn = kept[last].attn if kept is not None and keep_attn is not None else None
        ffn = kept[last].ffn if kept is not None else None
        narrowing = narrowing_to(torch.cat(wanted), groups, attn, ffn, x.device)
        x = self.norm(self.blocks[last](x, groups, keep_attn, narrowing=narrowing))
        parts = x.split([len(rows) for rows in wanted])
        return list(zip(parts[::2], parts[1::2], strict=True))

    def encode_crops(
        self,
        global_crops: Tensor,
        local_crops: Tensor | None = None,
        masks: Tensor | None = None,
        masked: Tensor | None = None,
        kept: Sequence[KeptSamples] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the cls tokens of all crops and the wanted patch tokens of the global crops, in one pass.

        Args:
            global_crops: The global crops [G, C, H, W]; G may be 0 if there are local crops.
            local_crops: The local crops [L, C, h, w], or None.
            masks: The patches of global crops that the mask token replaces [G, N] bool; None for none.
            masked: The wanted patches of global crops: indices [M] into [G·N], on the CPU.
            kept: The images that residual branches keep, as for ``encode``; only for groups of crops that exist.

        Returns:
            The global cls tokens [G, D], local cls tokens [L, D] and patch tokens [M, D].
        """
        groups = [(global_crops, masks, masked)] if len(global_crops) else []
        if local_crops is not None and len(local_crops):
            groups.append((local_crops, None, None))
        crops, masks_of, wanted = zip(*groups, strict=True)
        tokens = self.encode_some(crops, masks_of, wanted, kept)
        none = tokens[0][0][:0]
        cls, patches = tokens[0] if len(global_crops) else (none, none)
        return cls, tokens[-1][0] if groups[-1][0] is local_crops else none, patches

    def tokens_of(self, sides: Sequence[int]) -> int:
        """Count the tokens of an image of this height and width."""
        rows, columns = (side // self.patch_size for side in sides)
        return 1 + self.num_register_tokens + rows * columns

    def _packed(self, crops: Sequence[Tensor], masks: Sequence[Tensor | None]) -> tuple[Tensor, Groups]:
        """Embed all crops: the packed tokens [T, D], and their groups."""
        embedded = [self._embed(c, m) for c, m in zip(crops, masks, strict=True)]  # each [B, 1+R+N, D]
        return torch.cat([e.flatten(0, 1) for e in embedded]), tuple((e.shape[0], e.shape[1]) for e in embedded)

    def _embed(self, images: Tensor, masks: Tensor | None) -> Tensor:
        """Embed images: cls, register and patch tokens with position embeddings [B, 1+R+N, D]."""
        batch, channels, height, width = images.shape
        if channels != self.in_chans or height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"expected images with {self.in_chans} channels and sides that are multiples of {self.patch_size}, "
                f"got {channels} × {height} × {width}"
            )
        x = self.patch_embed(images)
        if masks is not None:
            x = torch.where(masks[..., None], self.mask_token.to(x.dtype)[None], x)
        position_cls, position_patches = self.position_embeddings(height // self.patch_size, width // self.patch_size)
        tokens = [(self.cls_token + position_cls).expand(batch, -1, -1)]
        if self.register_tokens is not None:
            tokens.append(self.register_tokens.expand(batch, -1, -1))
        return torch.cat([*tokens, x + position_patches], dim=1)

    def position_embeddings(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Compute the position embeddings of the cls token [1, 1, D] and of a grid of patches [1, rows·columns, D]."""
        cls, patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        side = math.isqrt(patches.shape[1])
        if (rows, columns) == (side, side):
            return cls, patches
        grid = patches.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)  # [1, D, side, side]
        # The official weights were trained with the scale that includes the offset, not with the ratio of the sizes.
        offset = self.interpolate_offset
        target = (
            {"scale_factor": ((rows + offset) / side, (columns + offset) / side)}
            if offset
            else {"size": (rows, columns)}
        )
        grid = F.interpolate(grid, mode="bicubic", antialias=self.interpolate_antialias, **target)
        assert grid.shape[-2:] == (rows, columns)
        return cls, grid.permute(0, 2, 3, 1).flatten(1, 2)
