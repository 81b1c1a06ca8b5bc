"""timm's format: a file for ``timm.create_model(…, checkpoint_path=…)``."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinoforge.export.content import Content, Format, Outputs, completed, library
from dinoforge.system.files import save_tensors
from dinoforge.weights.timm import model_of, to_timm


def _model(content: Content) -> tuple[str, dict[str, Any]]:
    """Return the name and the arguments of the timm model that takes the weights."""
    return model_of(content.backbone.architecture, content.tensors, content.size, fixed=content.fixed)


def _write(content: Content, path: Path) -> list[str]:
    whole, notes = completed(content)
    tensors = to_timm(whole)
    if path.suffix == ".safetensors":
        save_tensors(tensors, path, {"format": "pt"})
    else:
        torch.save(tensors, path)
    name, arguments = _model(content)
    image = content.backbone.image
    said = "".join(f", {key}={value!r}" for key, value in arguments.items())
    return [
        f"timm.create_model({name!r}, checkpoint_path={path.name!r}{said})",
        f"images resized to a square, normalised by mean={image.mean}, std={image.std}",
        *notes,
    ]


def _open(content: Content, path: Path) -> Callable[[Tensor], Outputs]:
    name, arguments = _model(content)
    model = library("timm").create_model(name, checkpoint_path=str(path), **arguments).eval()

    def run(images: Tensor) -> Outputs:
        tokens = model.forward_features(images)  # [B, 1+R+N, D]
        return tokens[:, 0], tokens[:, model.num_prefix_tokens :]

    return run


TIMM = Format("timm", (".safetensors", ".pth", ".pt", ".bin"), False, lambda content: (True, 0.0), _write, _open)
