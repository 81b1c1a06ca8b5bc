"""Our own format, and the official one: a state dict in a ``.pth`` file."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dinoforge.export.content import Content, Format, Outputs, Rule
from dinoforge.models.vit import VisionTransformer
from dinoforge.weights.architecture import architecture_of
from dinoforge.weights.backbone import Backbone, load_backbone, save_backbone


def _write_own(content: Content, path: Path) -> list[str]:
    backbone, (side, _) = content.backbone, content.size
    architecture = backbone.architecture | {"image_size": side}
    with torch.device("meta"):
        network = VisionTransformer(**architecture)
    network.load_state_dict(content.tensors, assign=True)
    image = replace(backbone.image, size=side) if content.fixed else backbone.image
    save_backbone(path, Backbone(network, architecture, image, backbone.step, metadata=backbone.metadata))
    return [f"dinoforge.load({path.name!r})"]


def _write_official(content: Content, path: Path) -> list[str]:
    torch.save(content.tensors, path)
    architecture = content.backbone.architecture
    assumed, _ = architecture_of(content.tensors, {})
    unsaid = {
        key: architecture[key]
        for key in ("num_heads", "interpolate_antialias", "interpolate_offset")
        if architecture.get(key, assumed[key]) != assumed[key]
    }
    said = "".join(f", {key}={value}" for key, value in unsaid.items())
    return [
        f"dinoforge.load({path.name!r}{said}); the file cannot say mean={content.backbone.image.mean}, "
        f"std={content.backbone.image.std}"
    ]


def _open(content: Content, path: Path) -> Callable[[Tensor], Outputs]:
    return _outputs(load_backbone(path))


def _open_official(content: Content, path: Path) -> Callable[[Tensor], Outputs]:
    return _outputs(load_backbone(path, {"num_heads": content.backbone.architecture["num_heads"]}))


def _outputs(backbone: Backbone) -> Callable[[Tensor], Outputs]:
    def run(images: Tensor) -> Outputs:
        tokens = backbone.network(images)
        return tokens.cls, tokens.patches

    return run


def _official_rule(content: Content) -> Rule:
    """Return the rule of the official models, as DINOv2's torch.hub entries build them."""
    return (True, 0.0) if content.backbone.network.num_register_tokens else (False, 0.1)


SAFETENSORS = Format("dinoforge", (".safetensors",), True, lambda content: content.rule, _write_own, _open)
OFFICIAL = Format(
    "the official layout, read back", (".pth", ".pt"), True, _official_rule, _write_official, _open_official
)
