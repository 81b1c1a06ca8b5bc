"""The architecture that a backbone's tensors imply, and tensors that do not fit one."""

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dinoforge.errors import WeightsError
from dinoforge.models.vit import SIZES
from dinoforge.weights.words import listed


def architecture_of(tensors: Mapping[str, Tensor], given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Derive the arguments of ``VisionTransformer`` from tensors, and say in notes what had to be assumed.

    Args:
        tensors: The weights under official names.
        given: Arguments that are known from elsewhere and win over assumptions.

    Raises:
        WeightsError: Tensors that tell the architecture are missing or have another shape.
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
    """Say how tensors do not fit a state dict: which are missing, unexpected, or of another shape.

    Args:
        tensors: The tensors.
        expected: The state dict.

    Returns:
        A text for each kind of misfit, with its first few entries and the number of others; none where all fit.
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
