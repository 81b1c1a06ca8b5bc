"""Backbones in other layouts: their tensors under official names, and the architecture that they imply."""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dinoforge.errors import WeightsError
from dinoforge.models.vit import SIZES

# Wrappers that training engines leave in names.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.")
# Keys of checkpoints under which the weights' moving average lies, and those of what may be either or is not averaged.
_AVERAGED = (
    "teacher",
    "ema",
    "model_ema",
    "state_dict_ema",
    "ema_state_dict",
    "ema_model",
    "teacher_state_dict",
    "target_encoder",
    "shadow",
)
_OTHER = ("student_teacher", "model", "state_dict", "model_state_dict", "module", "student")
# The same of names within one state dict; "network." is that of dinoforge.load's module.
_AVERAGED_PREFIXES = ("teacher.", "teacher_backbone.", "ema_model.", "model_ema.", "ema.", "target_encoder.")
_OTHER_PREFIXES = ("student.", "student_backbone.", "model.", "backbone.", "network.")
_NESTED = 5  # levels of either
# Parts of a checkpoint that are no backbone.
_HEADS = re.compile(
    r"(?:dino_head|ibot_head|head|classifier|dino_loss|ibot_patch_loss|dino_center|ibot_center)(?:\.|$)"
)

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


def official_names(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    """The backbone's tensors under official names, and what was done to them, in words.

    Known are official backbones and training checkpoints (chunked blocks, FSDP's prefixes), timm's and Hugging Face's.
    Of a checkpoint with both, the weights' moving average (teacher, EMA) is taken.

    Raises:
        WeightsError: two entries for one parameter, tensors that are no floating-point numbers, or no tensors.
    """
    notes: list[str] = []
    state = _state_dict(state, notes)
    named = {_WRAPPERS.sub("", name): t for name, t in state.items() if isinstance(name, str) and isinstance(t, Tensor)}
    if named.pop("n_averaged", None) is not None:
        notes.append("an average of the weights, as PyTorch's AveragedModel keeps it")
    named = _below_prefixes(named, notes)
    if any("patch_embeddings." in name for name in named):
        named = _from_hugging_face(named)
        notes.append("Hugging Face's layout")
        if "register_tokens" not in named:
            notes.append(
                "transformers resamples position embeddings of other sizes by another rule, interpolate_offset=0.0"
            )
    if heads := [name for name in named if _HEADS.match(name)]:
        named = {name: t for name, t in named.items() if name not in heads}
        notes.append(f"left out, of heads: {listed(heads)}")
    result: dict[str, Tensor] = {}
    for name, tensor in named.items():
        official = re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", name)
        if official in result:
            raise WeightsError(f"two entries for {official}: the blocks are numbered twice")
        result[official] = tensor
    if not result:
        raise WeightsError(f"no tensors in it: expected the weights of a vision transformer, got {described(state)}")
    if wrong := [name for name, tensor in result.items() if not tensor.is_floating_point()]:
        kinds = sorted({str(result[name].dtype).removeprefix("torch.") for name in wrong})
        raise WeightsError(
            f"tensors of {', '.join(kinds)}: {listed(wrong)}. Expected floating-point numbers; these are of "
            "another network, or quantised, and then the library that did it can put them back"
        )
    return _from_timm(result, notes), notes


def _state_dict(state: Mapping[Any, Any], notes: list[str]) -> Mapping[Any, Any]:
    """The state dict within a checkpoint: that of the moving average if there is one."""
    for _ in range(_NESTED):
        there = [key for key, value in state.items() if isinstance(value, Mapping) and _has_tensors(value)]
        key = next((key for key in (*_AVERAGED, *_OTHER) if key in there), None)
        if key is None:
            break
        averaged = ", the moving average" if key in _AVERAGED else ""
        others = [str(other) for other in state if other != key]
        beside = f"; left out beside it: {listed(others)}" if others else ""
        raw = [f"{other!r} ({type(state[other]).__name__})" for other in _AVERAGED if other in state]
        if key == "student":
            beside += ". These are the raw weights: there is no teacher in it"
        elif not averaged and raw:
            beside += f". {', '.join(raw)} holds no tensors by name, so these may be the raw weights"
        notes.append(f"taken from the key {key!r}{averaged}{beside}")
        state = state[key]
    return state


def _below_prefixes(named: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """The tensors of one network among several whose names have prefixes: of the moving average if there is one."""
    for _ in range(_NESTED):
        prefixes = (*_AVERAGED_PREFIXES, *_OTHER_PREFIXES)
        prefix = next((prefix for prefix in prefixes if any(name.startswith(prefix) for name in named)), None)
        if prefix is None:
            break
        rest = [name for name in named if not name.startswith(prefix)]
        named = {name.removeprefix(prefix): t for name, t in named.items() if name.startswith(prefix)}
        averaged = ", the moving average" if prefix in _AVERAGED_PREFIXES else ""
        if prefix.startswith("student"):
            notes.append(f"taken from below {prefix!r}, the raw weights: there is no teacher in it")
        if rest:
            notes.append(f"left out, not below {prefix!r}{averaged}: {listed(rest)}")
    return named


def _has_tensors(value: Mapping[Any, Any], depth: int = 3) -> bool:
    """Whether a nested mapping holds any; a file may nest it without end."""
    return any(
        isinstance(each, Tensor) or (depth > 0 and isinstance(each, Mapping) and _has_tensors(each, depth - 1))
        for each in value.values()
    )


def _from_hugging_face(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
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


def _from_timm(named: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
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


def architecture_of(tensors: Mapping[str, Tensor], given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The arguments of ``VisionTransformer`` that tensors with official names imply, and what had to be assumed.

    Args:
        tensors: with official names.
        given: arguments that are known from elsewhere; they win over assumptions.

    Raises:
        WeightsError: tensors without which nothing can be said are missing or have another shape.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    needed = {"patch_embed.proj.weight": 4, "pos_embed": 3, "cls_token": 3, "mask_token": 2}
    if wrong := [
        f"{name} {shapes.get(name, 'missing')}" for name, n in needed.items() if len(shapes.get(name, ())) != n
    ]:
        raise WeightsError(f"not a DINOv2 backbone: {', '.join(wrong)}; it has {listed(list(shapes))}")
    dim, channels, patch, width = shapes["patch_embed.proj.weight"]
    positions = shapes["pos_embed"][1] - 1
    side = math.isqrt(max(positions, 0))
    if patch != width or side == 0 or side * side != positions:
        raise WeightsError(f"patches of {patch} × {width} on {positions} positions: expected squares")
    numbers = sorted({int(m[1]) for name in shapes if (m := re.match(r"blocks\.(\d+)\.", name))})
    if gaps := [str(i) for i, number in enumerate(numbers) if number != i]:
        raise WeightsError(
            f"part of the weights is missing: there are blocks {numbers[0]} to {numbers[-1]}, but only {len(numbers)} "
            f"of them; the first that is not there is {gaps[0]}"
        )
    swiglu = "blocks.0.mlp.w3.weight" in shapes
    feed_forward = shapes.get(f"blocks.0.mlp.{'w3' if swiglu else 'fc2'}.weight")
    if feed_forward is None or len(feed_forward) != 2:
        raise WeightsError(f"no feed-forward layer blocks.0.mlp.fc2 or .w3; it has {listed(list(shapes))}")
    hidden = feed_forward[1] * 3 // 2 if swiglu else feed_forward[1]
    ratio = hidden / dim
    ratio = ratio if int(dim * ratio) == hidden else (hidden + 0.5) / dim
    if swiglu and feed_forward[1] == (int(dim * 8 / 3) + 7) // 8 * 8:
        ratio = 4.0
    registers = shapes["register_tokens"][1] if "register_tokens" in shapes else 0
    depth = max(numbers) + 1
    known = {(d, n): heads for d, n, heads in SIZES.values()}
    notes = []
    assumed: dict[str, Any] = {
        "num_heads": known.get((dim, depth), max(dim // 64, 1)),
        "interpolate_antialias": bool(registers),
        "interpolate_offset": 0.0 if registers else 0.1,
    }
    rules = {
        "num_heads": "the known size" if (dim, depth) in known else "64 per head",
        "interpolate_antialias": "registers" if registers else "no registers",
        "interpolate_offset": "registers" if registers else "no registers",
    }
    notes += [f"assumed {key}={value} ({rules[key]})" for key, value in assumed.items() if key not in given]
    architecture = {
        "embed_dim": dim,
        "depth": depth,
        "patch_size": patch,
        "image_size": side * patch,
        "in_chans": channels,
        "mlp_ratio": ratio,
        "ffn_layer": "swiglu" if swiglu else "mlp",
        "layerscale": 1.0 if "blocks.0.ls1.gamma" in shapes else 0.0,
        "qkv_bias": "blocks.0.attn.qkv.bias" in shapes,
        "proj_bias": "blocks.0.attn.proj.bias" in shapes,
        "ffn_bias": f"blocks.0.mlp.{'w3' if swiglu else 'fc2'}.bias" in shapes,
        "num_register_tokens": registers,
        **assumed,
    }
    return architecture | dict(given), notes


def misfits(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """What of ``tensors`` does not fit a state dict: missing, unexpected and otherwise shaped entries, in words.

    The first few of each kind, and how many more there are.
    """
    kinds = (
        [f"missing {name}" for name in expected if name not in tensors],
        [f"unexpected {name}" for name in tensors if name not in expected],
        [
            f"{name} has shape {list(tensors[name].shape)}, expected {list(t.shape)}"
            for name, t in expected.items()
            if name in tensors and tensors[name].shape != t.shape
        ],
    )
    return [listed(kind) for kind in kinds if kind]


def described(value: Any) -> str:
    """The type of something that is no state dict, and the first few of its keys, for a refusal."""
    kind = type(value).__name__
    if not isinstance(value, Mapping):
        return f"a {kind} of {len(value)}" if isinstance(value, list | tuple) else f"a {kind}"
    if not value:
        return f"an empty {kind}"
    return f"a {kind} with the keys {listed([f'{key!s:.60} ({type(each).__name__})' for key, each in value.items()])}"


def listed(names: list[str]) -> str:
    """The first few of them."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
