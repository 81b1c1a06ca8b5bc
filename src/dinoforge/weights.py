"""Backbones as files: safetensors with official parameter names and everything needed to use them."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dinoforge import __version__
from dinoforge.errors import WeightsError
from dinoforge.files import write_atomically
from dinoforge.models.vit import VisionTransformer


@dataclass(frozen=True)
class ImageInput:
    """How an image has to be made for a backbone."""

    size: int  # side in pixels it was trained at (global crops)
    in_chans: int
    mean: tuple[float, ...]  # on the range 0..1
    std: tuple[float, ...]
    sixteen_bit: str
    max_pixels: int


@dataclass(frozen=True)
class Backbone:
    """A network together with what has to be known to use it."""

    network: VisionTransformer
    architecture: dict[str, Any]  # the arguments of VisionTransformer
    image: ImageInput
    step: int  # of the training run; 0 for fresh weights


def save_backbone(path: Path, backbone: Backbone) -> None:
    """Writes a backbone; what is not weights goes into the file's header as JSON.

    Raises:
        RunError: no space, or not writable.
    """
    tensors = {name: t.detach().cpu().contiguous() for name, t in backbone.network.state_dict().items()}
    header = {
        "format": "dinoforge-backbone-1",
        "dinoforge": __version__,
        "architecture": json.dumps(backbone.architecture),
        "image": json.dumps(asdict(backbone.image)),
        "step": str(backbone.step),
    }
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=header))


def load_backbone(path: Path) -> Backbone:
    """Reads what ``save_backbone`` wrote; the network is in evaluation mode, on the CPU.

    Raises:
        WeightsError: not such a file, damaged, or weights that do not fit its architecture.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except FileNotFoundError as error:
        raise WeightsError(f"there is no file {path}") from error
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is not a readable safetensors file: {error}") from error
    if header.get("format") != "dinoforge-backbone-1":
        raise WeightsError(
            f"{path} has no dinoforge header, so its architecture is unknown: expected the teacher.safetensors of a run"
        )
    try:
        architecture = json.loads(header["architecture"])
        image = json.loads(header["image"])
        image = ImageInput(**image | {"mean": tuple(image["mean"]), "std": tuple(image["std"])})
        step = int(header["step"])
        with torch.device("meta"):
            network = VisionTransformer(**architecture)
        missing = network.load_state_dict(tensors, strict=False, assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise WeightsError(f"{path}: weights and header do not fit each other: {error}") from error
    if missing.missing_keys or missing.unexpected_keys:
        raise WeightsError(
            f"{path}: missing weights {missing.missing_keys or 'none'}, unexpected weights "
            f"{missing.unexpected_keys or 'none'}"
        )
    return Backbone(network.eval().requires_grad_(False), architecture, image, step)
