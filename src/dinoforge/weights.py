"""Backbones as files: safetensors with official parameter names and everything needed to use them."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dinoforge import __version__
from dinoforge.errors import WeightsError
from dinoforge.files import write_atomically
from dinoforge.models.layouts import architecture_of, misfits, official_names
from dinoforge.models.vit import VisionTransformer

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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
    notes: tuple[str, ...] = ()  # of a foreign file: what was assumed, renamed or left out


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


def load_backbone(path: Path, given: Mapping[str, Any] | None = None) -> Backbone:
    """Reads a backbone of any known layout; the network is in evaluation mode, on the CPU.

    A file with our header says everything. Of others, the architecture is read from the tensors (and the
    ``config.json`` of a Hugging Face folder), the rest is assumed and told in ``Backbone.notes``; see
    ``dinoforge.models.layouts``. Nothing in a file can run code.

    Args:
        path: safetensors or PyTorch file, or a Hugging Face folder.
        given: arguments of ``VisionTransformer`` that are known; they win over what would be assumed.

    Raises:
        WeightsError: no such file, damaged, no known layout, or weights that do not fit.
    """
    if path.is_dir():
        return _load_folder(path, given or {})
    header, state = _read(path)
    if "format" in header and header["format"].startswith("dinoforge-backbone"):
        return _load_own(path, header, state)
    return _load_foreign(path, state, given or {})


def _load_folder(path: Path, given: Mapping[str, Any]) -> Backbone:
    names = ("model.safetensors", "pytorch_model.bin")
    file = next((path / name for name in names if (path / name).is_file()), None)
    if file is None:
        raise WeightsError(
            f"{path} has no teacher.safetensors, which a run writes with its first checkpoint, and no "
            f"{' or '.join(names)}, as Hugging Face's folders have"
        )
    known: dict[str, Any] = {}
    if (path / "config.json").is_file():
        try:
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
            known["num_heads"] = int(config["num_attention_heads"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise WeightsError(f"{path / 'config.json'} is no configuration of a Dinov2 model: {error}") from error
    _, state = _read(file)
    return _load_foreign(file, state, known | dict(given))


def _read(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Header and contents of a safetensors or PyTorch file."""
    try:
        with path.open("rb") as opened:
            start = opened.read(2)
        if start in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05"):  # zip archive, pickle
            return {}, _read_pickle(path)
        with safe_open(path, framework="pt") as file:
            header: dict[str, str] = file.metadata() or {}
            return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except FileNotFoundError as error:
        raise WeightsError(f"there is no file {path}") from error
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path} is not a readable safetensors file: {error}") from error


def _read_pickle(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever damaged bytes make it stumble over
        raise WeightsError(
            f"{path} is damaged, or holds more than tensors and plain values and could run code "
            f"({type(error).__name__}): nothing of it was run. Save the state dict alone"
        ) from error
    if not isinstance(state, dict):
        raise WeightsError(f"{path}: expected a dictionary of tensors, got {type(state).__name__}")
    return state


def _load_own(path: Path, header: Mapping[str, str], tensors: dict[str, Any]) -> Backbone:
    if header["format"] != "dinoforge-backbone-1":
        raise WeightsError(f"{path} has the format {header['format']}: a newer dinoforge wrote it")
    try:
        architecture = json.loads(header["architecture"])
        image = json.loads(header["image"])
        image = ImageInput(**image | {"mean": tuple(image["mean"]), "std": tuple(image["std"])})
        network = _network(path, architecture, tensors)
        return Backbone(network, architecture, image, int(header["step"]))
    except (KeyError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise WeightsError(f"{path}: weights and header do not fit each other: {error}") from error


def _load_foreign(path: Path, state: dict[str, Any], given: Mapping[str, Any]) -> Backbone:
    try:
        tensors, notes = official_names(state)
        architecture, assumed = architecture_of(tensors, given)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    try:
        network = _network(path, architecture, {name: t.float() for name, t in tensors.items()})
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise WeightsError(f"{path}: {error}") from error
    if kinds := {str(t.dtype).removeprefix("torch.") for t in tensors.values()} - {"float32"}:
        notes.append(f"converted to float32 from {', '.join(sorted(kinds))}")
    chans = architecture["in_chans"]
    mean, std = (IMAGENET_MEAN, IMAGENET_STD) if chans == 3 else ((0.5,), (0.25,))
    assumed.append(f"assumed mean={mean}, std={std} ({'ImageNet' if chans == 3 else 'not three channels'})")
    image = ImageInput(architecture["image_size"], chans, mean, std, "full", 178_956_970)
    return Backbone(network, architecture, image, 0, (*notes, *assumed))


def _network(path: Path, architecture: Mapping[str, Any], tensors: Mapping[str, Any]) -> VisionTransformer:
    with torch.device("meta"):
        network = VisionTransformer(**architecture)
    if wrong := misfits(tensors, network.state_dict()):
        raise WeightsError(f"{path} does not fit: {'; '.join(wrong)}")
    network.load_state_dict(tensors, assign=True)
    return network.eval().requires_grad_(False)
