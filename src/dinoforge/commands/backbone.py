"""Open a backbone, and show images to it as it knows them."""

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
    """As ``_ways_to_train``, where a backbone is used on images of a size, or of a run's."""
    ways = [] if size is None else [f"eval.size below {size}"]
    return ways + ([] if device.type == "cpu" else ["device=cpu"])


def untrained_network(architecture: Mapping[str, Any], seed: int) -> VisionTransformer:
    """The network with random weights, to compare with; torch's global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # At the small LayerScale that training starts from, an untrained cls token hardly depends on the image.
        fresh = dict(architecture) | ({"layerscale": 1.0} if architecture["layerscale"] else {})
        return VisionTransformer(**fresh).eval()


def load(path: str | Path, **given: Any) -> Backbone:
    """The backbone of a run directory, of its ``teacher.safetensors``, or of a file of another library.

    A torch module: called on images [B, C, H, W] as its ``preprocess`` makes them, it gives cls tokens [B, D];
    ``forward_features`` and ``get_intermediate_layers`` give the others. It is in evaluation mode, without gradients,
    on the CPU.

    Args:
        path: a run; a file in the official, timm's or Hugging Face's layout; a Hugging Face folder.
        given: what a foreign file cannot say: arguments of ``VisionTransformer`` such as ``num_heads=6``; ``mean`` and
            ``std``; and how values become levels: ``range``, ``sixteen_bit``, ``nodata``, ``fill``, ``plane``,
            ``max_pixels``, as the keys of ``data.`` say it.

    Raises:
        WeightsError: there is none, it cannot be read, or it says otherwise.
    """
    path = Path(path).expanduser()
    if path.is_dir() and (file := RunDirectory(path).teacher).exists():
        path = file
    return load_backbone(path, given)


def read_image(
    image: Any, channels: int | None = None, **keys: Any
) -> np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]:
    """The pixels that training sees of an image, before any crop: uint8 [H, W, C].

    Args:
        image: a path, encoded bytes, an array [H, W] or [H, W, C], a tensor [C, H, W] or a PIL image.
        channels: C; by default as many as the image has.
        keys: those of the section ``data`` that say how values become pixels: ``range``, ``sixteen_bit``, ``nodata``,
            ``fill``, ``plane`` and ``max_pixels``. Without ``range`` none is measured.

    Raises:
        ImageError: no readable image, or one that the rules refuse; see ``dinoforge.data.decode``.
        RecipeError: other keys, or values that they cannot have.
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
"""Keys of what a foreign weights file cannot say."""


def open_backbone(model: str | Path | Backbone, keys: Mapping[str, Any]) -> tuple[Backbone, dict[str, Any]]:
    """The backbone, and the keys that say nothing about it; what was assumed about a file is printed."""
    flat = flat_keys(keys)
    said = {key: flat.pop(key) for key in UNSAID if key in flat}
    if isinstance(model, Backbone):
        if said:
            raise RecipeError(f"{', '.join(said)}: give it to load(), which made this backbone")
        return model, flat
    # Checked as part of a recipe that has as many channels as there are values.
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
    """Warn of images whose values would become a few dark levels, since the backbone's file says no range."""
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
    """Images as a backbone knows them: every plane of a file where it was trained on such."""
    return taken_apart(open_source(images), image.plane, image.in_chans)


def eval_settings(settings: Eval, keys: Mapping[str, Any]) -> tuple[Eval, torch.device, torch.dtype]:
    """How images are shown, where the backbone computes, and in which precision."""
    flat = flat_keys(keys)
    where = {key: flat.pop(key) for key in ("device", "precision") if key in flat}
    if other := [key for key in flat if not key.startswith("eval.")]:
        raise RecipeError(
            f"{', '.join(other)}: expected eval.size, eval.crop, device, precision, or one of {', '.join(UNSAID)}"
        )
    # Checked as part of a recipe whose patch divides every size; the backbone's own is checked on use.
    checked, _ = load_recipe("dinov2", flat | where | {"student.patch_size": 1})
    device = devices.resolve_device(checked.device)
    if (note := devices.note_of_fallback(checked.device, device)) and devices.has_gpu():
        print(f"device   {note}", file=sys.stderr)
    given = {key.removeprefix("eval."): getattr(checked.eval, key[5:]) for key in flat}
    return replace(settings, **given), device, devices.resolve_precision(checked.precision, device)


def reading_of(
    image: ImageInput, patch: int, settings: Eval, device: torch.device, precision: torch.dtype
) -> extract.Reading:
    """How images are shown to a backbone with patches of that side, and where it computes."""
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
