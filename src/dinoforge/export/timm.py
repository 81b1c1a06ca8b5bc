"""timm's layout: a file for ``timm.create_model(…, checkpoint_path=…)``."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinoforge.export.content import Content, Format, Outputs, completed, library
from dinoforge.system.files import save_tensors

_SIZES = {(384, 12, 6): "small", (768, 12, 12): "base", (1024, 24, 16): "large", (1536, 40, 24): "giant"}
_GIANT_RATIO = 2.66667 * 2  # timm's own: hidden width of both halves of SwiGLU


def call(content: Content) -> tuple[str, dict[str, Any]]:
    """The name of the nearest model that timm has, and the arguments that make ours of it."""
    a, tensors = content.backbone.architecture, content.tensors
    swiglu, registers = "blocks.0.mlp.w3.weight" in tensors, content.backbone.network.num_register_tokens
    kind = (a["embed_dim"], a["depth"], a["num_heads"])
    size = "giant" if swiglu else _SIZES.get(kind, "small")
    size = "small" if size == "giant" and not swiglu else size
    theirs = next(key for key, name in _SIZES.items() if name == size)
    hidden = tensors[f"blocks.0.mlp.{'w12' if swiglu else 'fc1'}.weight"].shape[0]
    ratio = _GIANT_RATIO if swiglu else 4.0
    base: dict[str, Any] = dict(zip(("embed_dim", "depth", "num_heads"), theirs, strict=True))
    base |= {"patch_size": 14, "in_chans": 3, "reg_tokens": 4 if registers else 0, "mlp_ratio": ratio}
    ours = {key: a.get(key, default) for key, default in base.items()} | {
        "reg_tokens": registers,
        "in_chans": content.backbone.network.in_chans,
        "mlp_ratio": ratio if int(a["embed_dim"] * ratio) == hidden else (hidden + 0.5) / a["embed_dim"],
    }
    height, width = content.size
    arguments: dict[str, Any] = {key: value for key, value in ours.items() if value != base[key]}
    arguments |= {"img_size": height if height == width else (height, width), "num_classes": 0}
    if not content.fixed:
        arguments["dynamic_img_size"] = True
    return f"vit_{size}_patch14{'_reg4' if registers else ''}_dinov2", arguments


def _write(content: Content, path: Path) -> list[str]:
    tensors, notes = completed(content)
    del tensors["mask_token"]
    if "register_tokens" in tensors:
        # There, position embeddings are only for patches: that of cls is part of the token.
        tensors["reg_token"] = tensors.pop("register_tokens")
        position = tensors["pos_embed"]
        tensors["cls_token"] = tensors["cls_token"] + position[:, :1]
        tensors["pos_embed"] = position[:, 1:].contiguous()
    tensors = {n.replace(".mlp.w12.", ".mlp.fc1.").replace(".mlp.w3.", ".mlp.fc2."): t for n, t in tensors.items()}
    if path.suffix == ".safetensors":
        save_tensors(tensors, path, {"format": "pt"})
    else:
        torch.save(tensors, path)
    name, arguments = call(content)
    image = content.backbone.image
    said = "".join(f", {key}={value!r}" for key, value in arguments.items())
    return [
        f"timm.create_model({name!r}, checkpoint_path={path.name!r}{said})",
        f"images resized to a square, normalised by mean={image.mean}, std={image.std}",
        *notes,
    ]


def _open(content: Content, path: Path) -> Callable[[Tensor], Outputs]:
    name, arguments = call(content)
    model = library("timm").create_model(name, checkpoint_path=str(path), **arguments).eval()

    def run(images: Tensor) -> Outputs:
        tokens = model.forward_features(images)  # [B, 1+R+N, D]
        return tokens[:, 0], tokens[:, model.num_prefix_tokens :]

    return run


TIMM = Format("timm", (".safetensors", ".pth", ".pt", ".bin"), False, lambda content: (True, 0.0), _write, _open)
