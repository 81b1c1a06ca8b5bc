"""Backbones as files: safetensors with official parameter names and everything needed to use them."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
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
from dinoforge.weights.architecture import architecture_of, misfits
from dinoforge.weights.files import read_sharded, read_tensors
from dinoforge.weights.folder import FILES, INDICES, Beside, file_of_folder, read_beside
from dinoforge.weights.official import official_names

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Backbone(nn.Module):
    """A network and everything needed to use it: from images [B, C, H, W] to cls tokens [B, D].

    Images are normalised, as ``preprocess`` makes them; their sides are multiples of the patch.

    Args:
        network: The vision transformer.
        architecture: The arguments of the vision transformer.
        image: The images that the network expects.
        step: The step of the training run; 0 for fresh weights and other libraries' files.
        notes: Notes on a file of another library: what was assumed, renamed or left out.
        metadata: Metadata of the training run as values of JSON: ``recipe``, ``images``, ``total_steps``; empty if
            unknown.
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
        """Compute normalised cls, register and patch tokens of images [B, C, H, W]."""
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
        """Make of an image the input that the network expects, float32 [C, size, size] on the CPU.

        Args:
            image: A path, encoded bytes, a PIL image, an array [H, W, C] or a tensor [C, H, W]; it becomes pixels by
                the rules of training, see ``dinoforge.data.decode``.
            size: The side in pixels; by default that of the training's global crops.
            center_crop: Whether the centre is cut out by the official rule of evaluation; otherwise the whole image
                is resized to a square.

        Raises:
            ImageError: The image cannot be read.
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
    """Write a backbone to a safetensors file, whose header holds everything but the weights as JSON.

    Raises:
        RunError: There is no space, or the file is not writable.
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
    """Read a backbone of any known layout; the network is in evaluation mode, on the CPU.

    A file with our header says everything. For other files the architecture is read from the tensors (and from the
    ``config.json`` of a Hugging Face folder), and the rest is assumed and told in ``Backbone.notes``; see
    ``weights.official``. Nothing in a file can run code.

    Args:
        path: A safetensors or PyTorch file, or a Hugging Face folder.
        given: Arguments of ``VisionTransformer`` and ``IMAGE_KEYS`` that the user knows; they win over assumptions.

    Raises:
        WeightsError: There is no such file, it is damaged or of no known layout, its weights do not fit, or its header
            contradicts the given arguments.
    """
    given = {key: tuple(v) if isinstance(v, list) else v for key, v in (given or {}).items()}
    file = file_of_folder(path) if path.is_dir() else path
    header, state = ({}, read_sharded(file)) if file.name in INDICES else read_tensors(file)
    if "format" in header and header["format"].startswith("dinoforge-backbone"):
        return _load_own(file, header, state, given)
    # A configuration lies beside weights of this name, and says what tensors cannot.
    beside = read_beside(file, asked=path.is_dir()) if file.name in FILES else Beside(file.parent)
    beside.check_heads(given)
    return _load_foreign(file, state, given, beside)


def _load_own(path: Path, header: Mapping[str, str], tensors: dict[str, Any], given: Mapping[str, Any]) -> Backbone:
    """Make a backbone of a file with our header."""
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
    """Check that images for a network can be made as a header says.

    Raises:
        ValueError: They cannot.
    """
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


def _load_foreign(path: Path, state: dict[str, Any], given: Mapping[str, Any], beside: Beside) -> Backbone:
    """Make a backbone of another library's weights; ``given`` wins over the files beside them."""
    given = {**beside.known, **given}
    try:
        tensors, notes = official_names(state)
        sizes = {key: value for key, value in given.items() if key not in IMAGE_KEYS}
        architecture, assumed = architecture_of(tensors, sizes)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    said, more = beside.hold(architecture, tensors)
    given, notes = {**said, **given}, [*beside.notes, *notes, *more]
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
    """Check that there is one value, or one for each channel."""
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    if len(values) not in (1, chans):
        raise WeightsError(f"{path}: {key}={values}: expected one value, or one for each of {chans} channels")
    return values


def _network(path: Path, architecture: Mapping[str, Any], tensors: Mapping[str, Any]) -> VisionTransformer:
    """Make a network of these weights, without further copies, in evaluation mode."""
    with torch.device("meta"):
        network = VisionTransformer(**architecture)
    if wrong := misfits(tensors, network.state_dict()):
        raise WeightsError(f"{path} does not fit: {'; '.join(wrong)}")
    network.load_state_dict(tensors, assign=True)
    return network.eval().requires_grad_(False)
