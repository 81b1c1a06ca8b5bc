"""Backbones as files: safetensors with official parameter names and everything needed to use them."""

import argparse
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dinoforge.data.batch import normalize
from dinoforge.data.crops import whole
from dinoforge.data.decode import MAX_PIXELS, decode
from dinoforge.data.image_input import IMAGE_KEYS, ImageInput
from dinoforge.data.sources import RawImage
from dinoforge.errors import ImageError, WeightsError
from dinoforge.models.vit import Tokens, VisionTransformer
from dinoforge.system.files import save_tensors, write_atomically
from dinoforge.version import __version__
from dinoforge.weights.architecture import architecture_of, described, listed, misfits
from dinoforge.weights.foreign_configs import arguments_of, hold, image_rule, is_timm, timm_image_rule
from dinoforge.weights.official import official_names

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Backbone(nn.Module):
    """A network together with what has to be known to use it: cls tokens [B, D] of images [B, C, H, W].

    Images are normalised, as ``preprocess`` makes them; their sides are multiples of the patch.

    Args:
        network: the vision transformer.
        architecture: its arguments.
        image: how an image has to be made for it.
        step: of the training run; 0 for fresh weights and foreign files.
        notes: of a foreign file: what was assumed, renamed or left out.
        metadata: of the training run, as JSON has it: ``recipe``, ``images``, ``total_steps``; empty if unknown.
    """

    def __init__(
        self,
        network: VisionTransformer,
        architecture: Mapping[str, Any],
        image: ImageInput,
        step: int,
        notes: Sequence[str] = (),
        *,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.architecture, self.image, self.step = dict(architecture), image, step
        self.notes, self.metadata = tuple(notes), dict(metadata or {})
        self.train(network.training)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_features(images).cls

    def forward_features(self, images: Tensor) -> Tokens:
        """Normalised cls, register and patch tokens of images [B, C, H, W]."""
        tokens: Tokens = self.network(images)
        return tokens

    def get_intermediate_layers(
        self,
        images: Tensor,
        n: int | Sequence[int] = 1,
        *,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Tensor, ...] | tuple[tuple[Tensor, Tensor], ...]:
        """See ``VisionTransformer.get_intermediate_layers``."""
        return self.network.get_intermediate_layers(
            images, n, reshape=reshape, return_class_token=return_class_token, norm=norm
        )

    def preprocess(self, image: str | Path | RawImage, size: int | None = None, *, center_crop: bool = False) -> Tensor:
        """An image as the network expects it, float32 [C, size, size] on the CPU.

        Args:
            image: a path, encoded bytes, a PIL image, an array [H, W, C] or a tensor [C, H, W]; it becomes pixels by
                the rules of training, see ``dinoforge.data.decode``.
            size: side in pixels; by default that of the training's global crops.
            center_crop: the official rule of evaluation; else the whole image is resized to a square.

        Raises:
            ImageError: it cannot be read.
        """
        if isinstance(image, str | Path):
            path = Path(image)
            try:
                image = path.read_bytes()
            except OSError as error:
                raise ImageError(f"{path} cannot be read: {error.strerror}") from error
        expected = self.image
        pixels = decode(image, channels=expected.in_chans, **expected.decoding)
        squared = whole(pixels, size or expected.size, center_crop=center_crop)
        return normalize(squared[None], expected.mean, expected.std)[0]


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
        "metadata": json.dumps(backbone.metadata),
    }
    write_atomically(path, lambda temporary: save_tensors(tensors, temporary, header))


def load_backbone(path: Path, given: Mapping[str, Any] | None = None) -> Backbone:
    """Reads a backbone of any known layout; the network is in evaluation mode, on the CPU.

    A file with our header says everything. Of others, the architecture is read from the tensors (and the
    ``config.json`` of a Hugging Face folder), the rest is assumed and told in ``Backbone.notes``; see
    ``weights.official``. Nothing in a file can run code.

    Args:
        path: safetensors or PyTorch file, or a Hugging Face folder.
        given: arguments of ``VisionTransformer`` and ``IMAGE_KEYS`` that are known; they win over what would be
            assumed.

    Raises:
        WeightsError: no such file, damaged, no known layout, weights that do not fit, or a header that contradicts
            what is given.
    """
    given = {key: tuple(v) if isinstance(v, list) else v for key, v in (given or {}).items()}
    file = _file_of_folder(path) if path.is_dir() else path
    header, state = _read_sharded(file) if file.name in _INDICES else _read(file)
    if "format" in header and header["format"].startswith("dinoforge-backbone"):
        return _load_own(file, header, state, given)
    # Weights of this name have a configuration beside them, which says what tensors cannot.
    beside = _beside(file, asked=path.is_dir()) if file.name in _FILES else _Beside()
    heads = beside.known.get("num_heads")
    if heads is not None and given.get("num_heads", heads) != heads:
        raise WeightsError(
            f"{file.with_name(_CONFIG)} says num_heads={heads}, not {given['num_heads']}: what a file says cannot be "
            "given otherwise"
        )
    return _load_foreign(file, state, given, beside)


# Weights of a Hugging Face folder; transformers takes the first that is there.
_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_INDICES = _FILES[1::2]  # of weights in several files
_CONFIG, _PREPROCESSOR = "config.json", "preprocessor_config.json"


def _file_of_folder(path: Path) -> Path:
    file = next((path / name for name in _FILES if (path / name).is_file()), None)
    if file is None:
        there = sorted(each.name for each in path.iterdir())
        raise WeightsError(
            f"{path} has no teacher.safetensors, which a run writes with its first checkpoint, and no "
            f"{' or '.join(_FILES)}, as Hugging Face's folders have; it has {listed(there) if there else 'no files'}"
        )
    return file


@dataclass(frozen=True)
class _Beside:
    """What lies beside the weights of another library."""

    config: Mapping[str, Any] | None = None  # of transformers or timm
    images: Mapping[str, Any] | None = None  # how transformers makes them
    known: Mapping[str, Any] = field(default_factory=dict)  # that tensors cannot say
    notes: tuple[str, ...] = ()


def _beside(file: Path, *, asked: bool) -> _Beside:
    """Reads the configuration beside a file.

    Args:
        file: the weights.
        asked: whether the folder was asked for, so that what is in it belongs to them.
    """
    path, preprocessor = file.with_name(_CONFIG), file.with_name(_PREPROCESSOR)
    images = _json(preprocessor) if preprocessor.is_file() else None
    if not path.is_file():
        return _Beside(
            images=images,
            notes=("no config.json beside the weights: assumed are the exact GELU and an epsilon of 1e-06",),
        )
    config = _json(path)
    if not asked and not {"model_type", "architectures", "architecture", "hidden_size"} & set(config):
        return _Beside(notes=(f"{path} describes no model and is not read",))
    try:
        known = arguments_of(config)
        if is_timm(config):
            known, images = known | timm_image_rule(config), None
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    return _Beside(config, images, known)


def _json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path} is not readable as JSON: {error}") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{path}: expected an object with keys, got {described(config)}")
    return config


def _read_sharded(index: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """The tensors of all files that an index names, each from the file that it says."""
    shards = _json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
        raise WeightsError(
            f"{index}: expected weight_map, which names the file of each tensor, got {described(shards)}"
        )
    names = sorted(set(shards.values()))
    # By name, not by where links lead: Hugging Face's cache is a folder of links.
    if outside := [name for name in names if _leads_out(name)]:
        raise WeightsError(f"{index} names files outside its folder: {listed(outside)}. They are not read")
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise WeightsError(
            f"{index} names {len(names)} files, of which {len(missing)} are not there: {listed(missing)}. Get them too"
        )
    state: dict[str, Any] = {}
    for name in names:
        _, tensors = _read(index.parent / name)
        state |= {key: value for key, value in tensors.items() if shards.get(key) == name}
    if absent := [f"{key} in {shard}" for key, shard in shards.items() if key not in state]:
        raise WeightsError(f"{index} names tensors that are not there: {listed(absent)}. Get these files again")
    return {}, state


def _leads_out(name: str) -> bool:
    """Whether a path leads out of its folder, by the rules of either kind of system."""
    windows, posix = PureWindowsPath(name), PurePosixPath(name)
    return bool(windows.drive or windows.root or posix.root or ".." in windows.parts or ".." in posix.parts)


def _read(path: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """Header and contents of a safetensors or PyTorch file."""
    try:
        with path.open("rb") as opened:
            start = opened.read(9)
        # Safetensors begin with the length of their header, which may be the numbers that other files begin with.
        if start[8:] != b"{" and (start.startswith(b"PK") or start[:1] == b"\x80"):  # zip archive, pickle
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
        # A Namespace, in which DINO's checkpoints keep their arguments, is a bag of values: making one runs no code
        # that a file could choose, and what is in it has to be allowed by itself.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever damaged bytes make it stumble over
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = (
            f"holds more than tensors and plain values, {named[1]}, and could run code"
            if named
            else "is damaged, or holds more than tensors and plain values and could run code"
        )
        raise WeightsError(
            f"{path} {what} ({type(error).__name__}): nothing of it was run. Save the state dict alone"
        ) from error
    if not isinstance(state, dict):
        raise WeightsError(f"{path}: expected a dictionary of tensors, got {described(state)}")
    return state


def _load_own(path: Path, header: Mapping[str, str], tensors: dict[str, Any], given: Mapping[str, Any]) -> Backbone:
    if header["format"] != "dinoforge-backbone-1":
        raise WeightsError(f"{path} has the format {header['format']}: a newer dinoforge wrote it")
    try:
        architecture = json.loads(header["architecture"])
        said = dict(json.loads(header["image"]))
        image = ImageInput(**said | {key: tuple(said[key]) for key in ("mean", "std", "range") if said.get(key)})
        network = _network(path, architecture, tensors)
        _check_image(image, network)
        metadata = json.loads(header.get("metadata", "{}"))
        backbone = Backbone(network, architecture, image, int(header["step"]), metadata=metadata)
    except (KeyError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise WeightsError(f"{path}: weights and header do not fit each other: {error}") from error
    said = architecture | asdict(image)
    if wrong := [f"{key}={said[key]}, not {value}" for key, value in given.items() if said.get(key, value) != value]:
        raise WeightsError(f"{path} says {'; '.join(wrong)}: what a file says cannot be given otherwise")
    return backbone


def _check_image(image: ImageInput, network: VisionTransformer) -> None:
    """Raises ValueError where a header says what no image for this network can be made by."""
    chans, patch = network.in_chans, network.patch_size
    if image.in_chans != chans or not {len(image.mean), len(image.std)} <= {1, chans}:
        raise ValueError(
            f"images of {image.in_chans} channels with {len(image.mean)} means and {len(image.std)} deviations, for "
            f"weights of {chans} channels"
        )
    if not all(map(math.isfinite, image.mean)) or not all(0 < std < math.inf for std in image.std):
        raise ValueError(f"mean={image.mean}, std={image.std}: expected numbers, std above 0")
    if image.size < 1 or image.size % patch:
        raise ValueError(f"images of {image.size} pixels: expected a multiple of the patch, {patch}")
    if image.sixteen_bit not in ("full", "minmax"):
        raise ValueError(f"sixteen_bit={image.sixteen_bit!r}: expected 'full' or 'minmax'")


def _load_foreign(path: Path, state: dict[str, Any], given: Mapping[str, Any], beside: _Beside) -> Backbone:
    """Weights of another library; ``given`` wins over what lies beside them."""
    given = {**beside.known, **given}
    try:
        tensors, notes = official_names(state)
        sizes = {key: value for key, value in given.items() if key not in IMAGE_KEYS}
        architecture, assumed = architecture_of(tensors, sizes)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    notes = [*beside.notes, *notes]
    said_by = _CONFIG
    try:
        if beside.config is not None:
            notes += hold(beside.config, architecture, tensors)
        said_by = _PREPROCESSOR
        if beside.images is not None:
            rule, other = image_rule(beside.images, architecture["image_size"])
            given, notes = {**rule, **given}, [*notes, *other]
    except WeightsError as error:
        raise WeightsError(f"{path.with_name(said_by)}: {error}") from error
    try:
        network = _network(path, architecture, {name: t.float() for name, t in tensors.items()})
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise WeightsError(f"{path}: {error}") from error
    if kinds := {str(t.dtype).removeprefix("torch.") for t in tensors.values()} - {"float32"}:
        notes.append(f"converted to float32 from {', '.join(sorted(kinds))}")
    chans = architecture["in_chans"]
    usual = (IMAGENET_MEAN, IMAGENET_STD) if chans == 3 else ((0.5,), (0.25,))
    for key, value in zip(("mean", "std"), usual, strict=True):
        if key not in given:
            assumed.append(f"assumed {key}={value} ({'ImageNet' if chans == 3 else 'not three channels'})")
    mean, std = (
        _per_channel(path, key, given.get(key, v), chans) for key, v in zip(("mean", "std"), usual, strict=True)
    )
    image = ImageInput(architecture["image_size"], chans, mean, std, "full", MAX_PIXELS)
    image = replace(image, **{k: v for k, v in given.items() if k in IMAGE_KEYS and k not in ("mean", "std")})
    return Backbone(network, architecture, image, 0, (*notes, *assumed))


def _per_channel(path: Path, key: str, value: float | Sequence[float], chans: int) -> tuple[float, ...]:
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    if len(values) not in (1, chans):
        raise WeightsError(f"{path}: {key}={values}: expected one value, or one for each of {chans} channels")
    return values


def _network(path: Path, architecture: Mapping[str, Any], tensors: Mapping[str, Any]) -> VisionTransformer:
    with torch.device("meta"):
        network = VisionTransformer(**architecture)
    if wrong := misfits(tensors, network.state_dict()):
        raise WeightsError(f"{path} does not fit: {'; '.join(wrong)}")
    network.load_state_dict(tensors, assign=True)
    return network.eval().requires_grad_(False)
