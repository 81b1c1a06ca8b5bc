"""The names of Hugging Face's tensors."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_HUGGING_FACE = (
    (r"^(?:dinov2|dinov2_with_registers)\.", ""),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.", ""),
    (r"^encoder\.layer\.", "blocks."),
    (r"^layernorm\.", "norm."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.attention\.(?:attention\.query|q_proj)\.", ".attn.qkv.0."),
    (r"\.attention\.(?:attention\.key|k_proj)\.", ".attn.qkv.1."),
    (r"\.attention\.(?:attention\.value|v_proj)\.", ".attn.qkv.2."),
    (r"\.mlp\.weights_in\.", ".mlp.w12."),
    (r"\.mlp\.(?:weights_out|down_proj)\.", ".mlp.w3."),
    (r"\.mlp\.gate_proj\.", ".mlp.w12.0."),
    (r"\.mlp\.up_proj\.", ".mlp.w12.1."),
)


def from_hugging_face(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, tensor in named.items():
        for pattern, replacement in _HUGGING_FACE:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    whole: dict[str, Tensor] = {}
    for name, tensor in renamed.items():
        part = re.fullmatch(r"(.*\.(?:qkv|w12))\.(\d)\.(weight|bias)", name)
        if part is None:
            whole[name] = tensor
            continue
        count = 3 if part[1].endswith("qkv") else 2
        pieces = [renamed.get(f"{part[1]}.{i}.{part[3]}") for i in range(count)]
        present = [piece for piece in pieces if piece is not None]
        if len(present) == count:
            whole[f"{part[1]}.{part[3]}"] = torch.cat(present)
        else:
            whole[name] = tensor  # told as unexpected
    return whole


_RENAMED = (
    ("pos_embed", "embeddings.position_embeddings"),
    ("cls_token", "embeddings.cls_token"),
    ("mask_token", "embeddings.mask_token"),
    ("register_tokens", "embeddings.register_tokens"),
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    ("blocks.", "encoder.layer."),
    (".attn.proj.", ".attention.output.dense."),
    (".ls1.gamma", ".layer_scale1.lambda1"),
    (".ls2.gamma", ".layer_scale2.lambda1"),
    (".mlp.w12.", ".mlp.weights_in."),
    (".mlp.w3.", ".mlp.weights_out."),
)


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official names to those of Hugging Face's files, which every version of transformers reads."""
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith("norm."):
            result[f"layer{name}"] = tensor
            continue
        for official, theirs in _RENAMED:
            name = name.replace(official, theirs)
        if ".attn.qkv." in name:
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                result[name.replace(".attn.qkv.", f".attention.attention.{part}.")] = rows.contiguous()
        else:
            result[name] = tensor
    return result
