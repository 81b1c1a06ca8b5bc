"""Open a backbone, and read images the way it was trained on them."""

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dinoforge.builders.data import image_input
from dinoforge.commands.given import OF_VALUES, flat_keys
from dinoforge.data.decode import decode
from dinoforge.data.image_input import IMAGE_KEYS, ImageInput
from dinoforge.data.planes import taken_apart
from dinoforge.data.sources import Source, open_source
from dinoforge.data.survey import measure_range
from dinoforge.data.values import plane_of
from dinoforge.errors import ImageError, RecipeError
from dinoforge.features import extract
from dinoforge.models.vit import VisionTransformer
from dinoforge.planning import auto
from dinoforge.recipe.load import load_recipe
from dinoforge.recipe.schema import Eval, flatten
from dinoforge.runs.directory import RunDirectory
from dinoforge.system import device as devices
from dinoforge.weights.backbone import Backbone, load_backbone


def ways_to_embed(device: torch.device, size: int | None = None) -> list[str]:
    """List ways to save memory when a backbone computes features, in the order to try them.

    Args:
        device: The device of the backbone.
        size: The side of the images in pixels; None if the caller cannot choose it.
    """
    ways = [] if size is None else [f"eval.size below {size}"]
    return ways + ([] if device.type == "cpu" else ["device=cpu"])


def untrained_network(architecture: Mapping[str, Any], seed: int) -> VisionTransformer:
    """Build the network with random weights, for comparison; torch's global random state does not change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # With the small LayerScale at the start of training, an untrained cls token hardly depends on the image.
        fresh = dict(architecture) | ({"layerscale": 1.0} if architecture["layerscale"] else {})
        return VisionTransformer(**fresh).eval()


def load(path: str | Path, **given: Any) -> Backbone:
    """Load the backbone of a run directory, of its ``teacher.safetensors``, or of another library's file.

    The backbone is a torch module. Its call takes images [B, C, H, W] from its ``preprocess`` and returns cls tokens
    [B, D]; ``forward_features`` and ``get_intermediate_layers`` return the other tokens. It is in evaluation mode,
    without gradients, on the CPU.

    Args:
        path: A run directory; a file in the official, timm's or Hugging Face's layout; or a Hugging Face folder.
        given: Facts that a foreign file does not store: arguments of ``VisionTransformer`` such as ``num_heads=6``;
            ``mean`` and ``std``; and the keys of the section ``data`` that say how values become levels: ``range``,
            ``sixteen_bit``, ``nodata``, ``fill``, ``plane`` and ``max_pixels``.

    Raises:
        WeightsError: There is no backbone, it cannot be read, or it contradicts ``given``.
    """
    path = Path(path).expanduser()
    if path.is_dir() and (file := RunDirectory(path).teacher).exists():
        path = file
    return load_backbone(path, given)


def read_image(
    image: Any, channels: int | None = None, **keys: Any
) -> np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]:
    """Read the pixels that training sees of an image, before any crop: uint8 [H, W, C].

    Args:
        image: A path, encoded bytes, an array [H, W] or [H, W, C], a tensor [C, H, W] or a PIL image.
        channels: The number of channels C; by default, the image's own number.
        keys: The keys of the section ``data`` that say how values become pixels: ``range``, ``sixteen_bit``,
            ``nodata``, ``fill``, ``plane`` and ``max_pixels``. Without ``range``, no range is measured.

    Raises:
        ImageError: The image cannot be read, or the rules refuse it; see ``dinoforge.data.decode``.
        RecipeError: A key is not one of these, or has an invalid value.
    """
    said = {name.removeprefix("data."): value for name, value in flat_keys(keys).items()}
    if other := [name for name in said if name not in OF_VALUES]:
        raise RecipeError(f"{', '.join(other)}: expected {', '.join(OF_VALUES)}")
    if said.get("plane") == "each":
        raise RecipeError(
            "plane='each' makes several images of a file, and this is one image: give the number of a plane from 0, "
            "or 'max'"
        )
    if said.get("range") is not None:
        said["range"] = np.ravel(said["range"]).tolist()
    if isinstance(said.get("plane"), int):
        said["plane"] = str(said["plane"])
    pairs = {"student.in_chans": max(len(said.get("range") or ()) // 2, 1), "data.mean": 0.5, "data.std": 0.5}
    checked, _ = load_recipe(auto.BASE, {f"data.{name}": value for name, value in said.items()} | pairs)
    if isinstance(image, str | Path):
        path = image
        try:
            image = Path(path).read_bytes()
        except OSError as error:
            raise ImageError(f"{path} cannot be read: {error.strerror}") from error
    pixels: np.ndarray[Any, Any] = decode(image, channels=channels, **image_input(checked).decoding)
    return pixels


RESAMPLING = ("interpolate_antialias", "interpolate_offset")
UNSAID = (
    "student.num_heads",
    *(f"student.{key}" for key in RESAMPLING),
    *(f"data.{key}" for key in IMAGE_KEYS),
)
"""The keys of the facts that a foreign weights file does not store."""


def open_backbone(model: str | Path | Backbone, keys: Mapping[str, Any]) -> tuple[Backbone, dict[str, Any]]:
    """Open the backbone, and return it with the keys that do not concern it; print the assumptions about its file.

    Args:
        model: A run directory, a weights file, or the result of ``load``.
        keys: The caller's keys; the keys in ``UNSAID`` describe the backbone.

    Raises:
        RecipeError: A key or value is invalid, or a key describes a backbone that is already loaded.
        WeightsError: There is no readable backbone.
    """
    flat = flat_keys(keys)
    said = {key: flat.pop(key) for key in UNSAID if key in flat}
    if isinstance(model, Backbone):
        if said:
            raise RecipeError(f"{', '.join(said)}: give it to load(), which made this backbone")
        return model, flat
    # The keys are checked as part of a recipe with one channel for each value.
    plain = {"data.mean": 0.5, "data.std": 0.5}
    values = [len(v) for key in plain if isinstance(v := said.get(key), list | tuple)]
    if isinstance(v := said.get("data.range"), list | tuple):
        values.append(len(v) // 2)
    checked, _ = load_recipe("dinov2", plain | {"student.in_chans": max(values, default=1)} | said)
    known = flatten(checked)
    backbone = load(model, **{key.split(".")[1]: known[key] for key in said})
    for note in backbone.notes:
        print(f"weights  {note}", file=sys.stderr)
    return backbone, flat


def say_unused_range(image: ImageInput, source: Source) -> None:
    """Warn if images would be squeezed into a few dark levels, because the backbone's file stores no range."""
    if image.range is not None or image.sixteen_bit == "minmax":
        return
    plane = plane_of(image.plane)
    found = measure_range(
        source, channels=image.in_chans, max_pixels=image.max_pixels, nodata=image.nodata, plane=plane
    )
    if found is not None:
        low, high = found.found
        print(
            f"values   {found.kind}, {low:,.5g} to {high:,.5g} in {found.images} sampled images, but this backbone's "
            f"file says no range for them: {found.key} spreads them over all levels",
            file=sys.stderr,
        )


def images_of(image: ImageInput, images: Any) -> Source:
    """Open images for a backbone: every plane of a file is an image if the backbone was trained that way."""
    return taken_apart(open_source(images), image.plane, image.in_chans)


def eval_settings(settings: Eval, keys: Mapping[str, Any]) -> tuple[Eval, torch.device, torch.dtype]:
    """Return how images are shown, the device of the backbone, and its precision.

    Args:
        settings: The settings that ``keys`` override.
        keys: The ``eval`` keys, ``device`` and ``precision``.

    Raises:
        RecipeError: A key is not one of these, or has an invalid value.
    """
    flat = flat_keys(keys)
    where = {key: flat.pop(key) for key in ("device", "precision") if key in flat}
    if other := [key for key in flat if not key.startswith("eval.")]:
        raise RecipeError(
            f"{', '.join(other)}: expected eval.size, eval.crop, device, precision, or one of {', '.join(UNSAID)}"
        )
    # The keys are checked with a patch size of 1, which divides every size; use checks the backbone's patch size.
    checked, _ = load_recipe("dinov2", flat | where | {"student.patch_size": 1})
    device = devices.resolve_device(checked.device)
    if (note := devices.note_of_fallback(checked.device, device)) and devices.has_gpu():
        print(f"device   {note}", file=sys.stderr)
    given = {key.removeprefix("eval."): getattr(checked.eval, key[5:]) for key in flat}
    return replace(settings, **given), device, devices.resolve_precision(checked.precision, device)


def reading_of(
    image: ImageInput, patch: int, settings: Eval, device: torch.device, precision: torch.dtype
) -> extract.Reading:
    """Return how images are read for a backbone.

    Args:
        image: The image format that the backbone expects.
        patch: The side of a patch, in pixels.
        settings: How images are shown.
        device: The device of the backbone.
        precision: The precision of its products.

    Raises:
        RecipeError: The size is not a multiple of the patch size.
    """
    size = settings.size or image.size
    if size % patch:
        near = max(patch, round(size / patch) * patch)
        raise RecipeError(
            f"eval.size={size} is not a multiple of the patch size {patch}: the nearest that is, is {near}"
        )
    return extract.Reading(
        size=size,
        channels=image.in_chans,
        mean=image.mean,
        std=image.std,
        center_crop=settings.crop,
        device=device,
        autocast=None if precision is torch.float32 else precision,
        batch_size=64,
        num_workers=0,
        **image.decoding,
    )
