"""The names of timm's tensors."""

import torch
from torch import Tensor


def from_timm(named: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    if "reg_token" in named:
        # timm has no position embedding for cls: it is part of the token, so zero beside it gives the same sum.
        named = {"register_tokens" if k == "reg_token" else k: t for k, t in named.items()}
        if "pos_embed" in named:
            position = named["pos_embed"]
            named["pos_embed"] = torch.cat([torch.zeros_like(position[:, :1]), position], dim=1)
        notes.append("timm's layout: the position embedding of cls is part of cls_token")
    first, second = named.get("blocks.0.mlp.fc1.weight"), named.get("blocks.0.mlp.fc2.weight")
    if first is not None and second is not None and first.shape[0] == 2 * second.shape[1]:
        named = {k.replace(".mlp.fc1.", ".mlp.w12.").replace(".mlp.fc2.", ".mlp.w3."): t for k, t in named.items()}
        notes.append("timm's layout of SwiGLU")
    if "mask_token" not in named and "cls_token" in named:
        named["mask_token"] = torch.zeros(1, named["cls_token"].shape[-1], dtype=named["cls_token"].dtype)
        notes.append("missing: mask_token, set to zero (only pretraining reads it)")
        if "register_tokens" not in named:
            notes.append(
                "no mask_token, as in timm's files; timm resamples position embeddings of other sizes by another rule, "
                "interpolate_antialias=true interpolate_offset=0.0"
            )
    return named
