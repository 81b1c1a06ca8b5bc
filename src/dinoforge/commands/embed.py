"""Compute features of images."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dinoforge.commands.backbone import (
    eval_settings,
    images_of,
    open_backbone,
    reading_of,
    say_unused_range,
    ways_to_embed,
)
from dinoforge.commands.given import images_and_keys
from dinoforge.data.bad_images import by_reason
from dinoforge.data.preflight import refuse_second_start
from dinoforge.errors import DataError
from dinoforge.features import extract, table
from dinoforge.recipe.schema import Eval
from dinoforge.system import device as devices
from dinoforge.system.out_of_memory import out_of_memory_in_words
from dinoforge.weights.backbone import Backbone


def embed(model: str | Path | Backbone, images: Any = None, **keys: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Compute the cls token of every image, as an array [N, D], in the order of the source.

    Args:
        model: A run directory, a weights file, or the result of ``load``.
        images: The images, as for ``train``.
        keys: The ``eval`` keys, such as ``eval={"size": 224}``; ``device`` and ``precision``; facts that a foreign file
            does not store, such as ``data={"mean": 0.5}``.

    Raises:
        DataError: An image cannot be read. No image is left out, since row n belongs to image n.
        WeightsError: There is no readable backbone.
    """
    refuse_second_start()
    images, keys = images_and_keys(images, keys)
    backbone, keys = open_backbone(model, keys)
    source = images_of(backbone.image, images)
    say_unused_range(backbone.image, source)
    reading = reading_of(backbone.image, backbone.network.patch_size, *eval_settings(Eval(), keys))
    ways = partial(ways_to_embed, reading["device"], reading["size"])
    with devices.in_use(reading["device"]), out_of_memory_in_words(reading["device"], ways):
        found = extract.extract(backbone.network, source, range(len(source)), **reading)
    if found.skipped:
        told = by_reason((0, one.name, one.reason) for one in found.skipped)
        raise DataError(f"{len(found.skipped)} of {len(source)} images cannot be read: {told}")
    return found.cls.numpy()


def write_features(
    model: str | Path | Backbone,
    images: Any,
    out: str | Path,
    *,
    patches: bool = False,
    on_progress: Callable[[int, int], object] = lambda done, total: None,
    **keys: Any,
) -> table.Embedded:
    """Write the names and features of all images to a file; repeating an interrupted call resumes it.

    Args:
        model, images, keys: See ``embed``.
        out: The file: ``….parquet`` with columns ``name``, ``cls`` and, if asked, ``patches``; or ``….npy`` with the
            cls tokens, beside ``….names.txt`` and ``….patches.npy``. Unreadable images get no row; they are listed in
            ``….skipped.txt``.
        patches: Whether patch tokens are written, too.
        on_progress: A function called every few seconds with the number of images done and of all images.

    Raises:
        RunError: ``out`` exists already, was begun with other arguments, or cannot be written.
        ExportError: The kind of file is unknown, or pyarrow is missing.
        DataError: None of the images can be read.
        WeightsError: There is no readable backbone.
    """
    refuse_second_start()
    backbone, keys = open_backbone(model, keys)
    settings, device, precision = eval_settings(Eval(), keys)
    reading = reading_of(backbone.image, backbone.network.patch_size, settings, device, precision)
    meaning = {
        "model": "given" if isinstance(model, Backbone) else str(model),
        "step": backbone.step,
        "size": reading["size"],
        "crop": settings.crop,
        "mean": list(reading["mean"]),
        "std": list(reading["std"]),
    }
    source = images_of(backbone.image, images)
    say_unused_range(backbone.image, source)
    ways = partial(ways_to_embed, device, reading["size"])
    with devices.in_use(device), out_of_memory_in_words(device, ways):
        return table.write_features(
            backbone.network,
            source,
            Path(out),
            patches=patches,
            meaning=meaning,
            on_progress=on_progress,
            **reading,
        )
