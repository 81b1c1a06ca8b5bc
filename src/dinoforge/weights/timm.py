"""timm's layout, in both directions: names of tensors, ``config.json``, and the arguments of ``timm.create_model``."""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dinoforge.errors import WeightsError
from dinoforge.weights.configs import (
    OTHER_OUTPUTS,
    TAKE_BOTH,
    contradictions,
    numbers,
    side_of,
    whole_number,
    wrong_grid,
)
from dinoforge.weights.words import short

# Names of tensors


def from_timm(named: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """Rename timm's tensors to official names; others stay as they are.

    Args:
        named: The weights of a vision transformer.
        notes: The list to which notes on the changes are added.
    """
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


def to_timm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename official tensors to timm's names, without the mask token, which timm does not have."""
    result = {
        name.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2."): tensor
        for name, tensor in tensors.items()
        if name != "mask_token"
    }
    if "register_tokens" in result:
        # timm has position embeddings for patches only: that of cls is part of the token.
        result["reg_token"] = result.pop("register_tokens")
        position = result["pos_embed"]
        result["cls_token"] = result["cls_token"] + position[:, :1]
        result["pos_embed"] = position[:, 1:].contiguous()
    return result


# What config.json and create_model say of the network

# timm's plain vision transformers, whose activation is the exact GELU and whose epsilon is 1e-6.
_PLAIN = re.compile(r"(?:vit_\w+?_patch\d+(?:_reg\d+)?_dinov2|vit_(?:tiny|small|base|large)_patch\d+_\d+)")
_HELD = {
    "img_size": "image_size",
    "patch_size": "patch_size",
    "in_chans": "in_chans",
    "embed_dim": "embed_dim",
    "depth": "depth",
    "num_heads": "num_heads",
    "qkv_bias": "qkv_bias",
    "reg_tokens": "num_register_tokens",
}
_NO_EFFECT = frozenset(
    """num_classes global_pool dynamic_img_size dynamic_img_pad drop_rate pos_drop_rate patch_drop_rate proj_drop_rate
    attn_drop_rate drop_path_rate weight_init fix_init init_values mlp_ratio class_token no_embed_class""".split()
)
_SIZES = {(384, 12, 6): "small", (768, 12, 12): "base", (1024, 24, 16): "large", (1536, 40, 24): "giant"}
_GIANT_RATIO = 2.66667 * 2  # timm's own: the hidden width of both halves of SwiGLU


def is_config(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is one of timm's."""
    return "model_type" not in config and isinstance(config.get("architecture"), str)


def arguments_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Read from a ``config.json`` the arguments of ``VisionTransformer`` that tensors cannot say: the number of heads.

    Args:
        config: The content of timm's ``config.json``.

    Raises:
        WeightsError: The configuration is of another kind of model, or gives no whole number of heads.
    """
    name = config["architecture"]
    if not _PLAIN.fullmatch(name):
        raise WeightsError(
            f"it says architecture={name!r}: expected one of timm's DINOv2 or plain vision transformers, such as "
            "'vit_small_patch14_dinov2'. Others may have another activation or epsilon, which this network has not"
        )
    heads = _model_args(config).get("num_heads")
    return {} if heads is None else {"num_heads": whole_number("num_heads", heads)}


def hold(config: Mapping[str, Any], architecture: Mapping[str, Any]) -> None:
    """Hold a ``config.json`` of timm against the weights beside it and against our network.

    Args:
        config: A configuration that ``arguments_of`` has accepted.
        architecture: The arguments of ``VisionTransformer`` that the tensors imply.

    Raises:
        WeightsError: Outputs would not be those of the model that the configuration describes.
    """
    said = _model_args(config)
    plain = {key: value for key, value in said.items() if key != "img_size"}
    wrong = contradictions(plain, {theirs: architecture[ours] for theirs, ours in _HELD.items() if theirs in plain})
    wrong += wrong_grid(said, "img_size", architecture)
    if patch := re.search(r"_patch(\d+)", config["architecture"]):
        stated = said.get("patch_size", int(patch[1]))
        if side_of(stated) != architecture["patch_size"]:
            wrong.append(f"patches of {stated} pixels, but the weights have {architecture['patch_size']}")
    if wrong:
        raise WeightsError(f"it says {'; '.join(dict.fromkeys(wrong))}. {TAKE_BOTH}")
    others = {key: value for key, value in said.items() if key not in {*_HELD, *_NO_EFFECT}}
    if cannot := [f"{key}={short(value)}" for key, value in others.items() if value]:
        raise WeightsError(f"its model_args say {', '.join(cannot)}, which is not known here. {OTHER_OUTPUTS}")


def model_of(
    architecture: Mapping[str, Any], tensors: Mapping[str, Tensor], size: tuple[int, int], *, fixed: bool
) -> tuple[str, dict[str, Any]]:
    """Describe a backbone by the nearest model of timm and the arguments of ``timm.create_model`` that make it equal.

    Args:
        architecture: The arguments of its ``VisionTransformer``.
        tensors: The weights under official names.
        size: Height and width in pixels of the images that its position embeddings are for.
        fixed: Whether they are meant for that size only.

    Returns:
        The name of the model, and the arguments.
    """
    swiglu = "blocks.0.mlp.w3.weight" in tensors
    registers = tensors["register_tokens"].shape[1] if "register_tokens" in tensors else 0
    kind = (architecture["embed_dim"], architecture["depth"], architecture["num_heads"])
    name = "giant" if swiglu else _SIZES.get(kind, "small")
    name = "small" if name == "giant" and not swiglu else name
    theirs = next(sizes for sizes, known in _SIZES.items() if known == name)
    hidden = tensors[f"blocks.0.mlp.{'w12' if swiglu else 'fc1'}.weight"].shape[0]
    ratio = _GIANT_RATIO if swiglu else 4.0
    base: dict[str, Any] = dict(zip(("embed_dim", "depth", "num_heads"), theirs, strict=True))
    base |= {"patch_size": 14, "in_chans": 3, "reg_tokens": 4 if registers else 0, "mlp_ratio": ratio}
    dim = architecture["embed_dim"]
    ours = {key: architecture.get(key, default) for key, default in base.items()} | {
        "reg_tokens": registers,
        "in_chans": tensors["patch_embed.proj.weight"].shape[1],
        "mlp_ratio": ratio if int(dim * ratio) == hidden else (hidden + 0.5) / dim,
    }
    height, width = size
    arguments: dict[str, Any] = {key: value for key, value in ours.items() if value != base[key]}
    arguments |= {"img_size": height if height == width else (height, width), "num_classes": 0}
    if not fixed:
        arguments["dynamic_img_size"] = True
    return f"vit_{name}_patch14{'_reg4' if registers else ''}_dinov2", arguments


def image_values(config: Mapping[str, Any]) -> dict[str, tuple[float, ...]]:
    """Read from a ``config.json`` the mean and standard deviation of images on the range 0..1, where it says them.

    Raises:
        WeightsError: They are no numbers, or a standard deviation is not above 0.
    """
    cfg = config.get("pretrained_cfg")
    if not isinstance(cfg, Mapping):
        return {}
    values = {key: numbers(cfg, key) for key in ("mean", "std") if key in cfg}
    if not all(0 < value < math.inf for value in values.get("std", ())):
        raise WeightsError(f"it says std={values['std']}: expected numbers above 0")
    return values


def _model_args(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments of the model that a ``config.json`` gives."""
    said = config.get("model_args") or {}
    if not isinstance(said, Mapping):
        raise WeightsError(f"its model_args are no object, but {short(said)}")
    return said
