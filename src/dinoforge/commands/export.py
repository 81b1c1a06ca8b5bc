"""Write a backbone for another library."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dinoforge.commands.backbone import UNSAID, images_of, open_backbone
from dinoforge.data.batch import normalize
from dinoforge.data.crops import resize
from dinoforge.data.decode import decode
from dinoforge.data.preflight import refuse_second_start
from dinoforge.data.sources import printable
from dinoforge.errors import DataError, ImageError, RecipeError
from dinoforge.export import make as exports
from dinoforge.features import extract
from dinoforge.runs.directory import RunDirectory
from dinoforge.weights.backbone import Backbone


def export(
    model: str | Path | Backbone,
    to: str,
    out: str | Path,
    *,
    size: tuple[int, int] | int | None = None,
    bake: bool = False,
    **keys: Any,
) -> exports.Exported:
    """Write a backbone for another library; ``out`` appears only after that library's outputs were compared with ours.

    Args:
        model: A run directory, a weights file, or the result of ``load``. Outputs are compared on images of the run if
            they still exist, and otherwise on random images.
        to: The format: ``safetensors``, ``official``, ``timm``, ``hf`` or ``onnx``.
        out: The file, or for ``hf`` the folder; it must not exist yet.
        size: The image size in pixels, as (height, width) or one number for both: an additional size to compare at, and
            the size for ``bake``.
        bake: Whether to resample position embeddings to ``size``, so that no library resamples them by its own rule.
        keys: Facts that a foreign file does not store, such as ``student={"num_heads": 6}`` and ``data={"mean": 0.5}``.

    Raises:
        ExportError: The format cannot hold the backbone, a package is missing, or the outputs differ.
        RecipeError: A key is not one of these, or has an invalid value.
        WeightsError: There is no readable backbone.
        RunError: ``out`` exists already or cannot be written.
    """
    refuse_second_start()
    backbone, other = open_backbone(model, keys)
    if other:
        raise RecipeError(f"{', '.join(other)}: export takes only {', '.join(UNSAID)}")
    images, shown = _examples(model, backbone)
    size = (size, size) if isinstance(size, int) else size
    with extract.placed(backbone, torch.device("cpu")):  # the other library computes on the CPU, too
        return exports.make(backbone, to, Path(out), images, shown=shown, size=size, bake=bake)


def _examples(
    model: str | Path | Backbone, backbone: Backbone
) -> tuple[Callable[[tuple[int, int]], torch.Tensor], str]:
    """Make a function from a size to two normalised images [2, C, H, W], of the run or random, and describe them."""
    image = backbone.image
    run = None if isinstance(model, Backbone) else RunDirectory(Path(model))
    if run and run.exists:
        try:
            source = images_of(image, run.info()["data"]["path"])
            pixels = []
            for index in (0, len(source) // 2):
                name = printable(source.name(index))
                pixels.append(decode(source.item(index).image, channels=image.in_chans, **image.decoding))
        except ImageError as error:
            shown = f"random images, because {name} of the run's cannot be read ({error})"
        except DataError as error:
            shown = f"random images, because the run's are not found ({error})"
        else:

            def read(size: tuple[int, int]) -> torch.Tensor:
                resized = torch.stack([torch.from_numpy(resize(p, *size)).permute(2, 0, 1) for p in pixels])
                return normalize(resized, image.mean, image.std)

            return read, "images of the run"
    else:
        shown = "random images"

    def draw(size: tuple[int, int]) -> torch.Tensor:
        return torch.randn(2, image.in_chans, *size, generator=torch.Generator().manual_seed(0))

    return draw, shown
