"""A run as one self-contained HTML page."""

import base64
import html
import io
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dinoforge.data.batch import normalize
from dinoforge.data.crops import whole
from dinoforge.data.decode import decode
from dinoforge.data.loader import TrainingData
from dinoforge.data.sources import Source, printable
from dinoforge.errors import DataError, ImageError
from dinoforge.features import embed
from dinoforge.report import figures
from dinoforge.weights import Backbone

EXAMPLES = 6  # images with crops and with maps
SAMPLE = 300  # images among which neighbours are looked for
MAX_SIDE = 24  # patches along an image: what bounds attention's memory
DIRECTIONS = 64  # of the patch features that the page keeps for similarity maps
MAX_POINTS = 1000  # of a curve

Json = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """What a report is made from. None, or an empty mapping, is what the run does not have (yet)."""

    name: str
    recipe: Mapping[str, Any]
    recipe_differences: Mapping[str, tuple[Any, Any]]  # from the recipe called ``base``: (there, here)
    base: str
    info: Json
    summary: Json
    metrics: dict[str, list[float | None]]
    skipped: list[str] = field(default_factory=list)
    data: TrainingData | None = None
    backbone: Backbone | None = None
    missing: tuple[str, ...] = ()  # sentences


def page(runs: Sequence[Run]) -> str:
    """The HTML of one run, or of several side by side."""
    content = {
        "runs": [_content(run, pictures=len(runs) == 1) for run in runs],
        "made": time.strftime("%Y-%m-%d %H:%M"),
    }
    # "<" cannot then end the script, whatever a file is called.
    data = json.dumps(content, allow_nan=False).replace("<", "\\u003c")
    here = files("dinoforge.report")
    text = (here / "page.html").read_text(encoding="utf-8")
    title = " and ".join(run.name for run in runs)
    for mark, value in (
        ("STYLE", (here / "page.css").read_text(encoding="utf-8")),
        ("SCRIPT", (here / "page.js").read_text(encoding="utf-8")),
        ("TITLE", html.escape(title)),
        ("DATA", data),  # last: nothing in it is replaced
    ):
        text = text.replace(f"@{mark}@", value, 1)
    return text


def _content(run: Run, *, pictures: bool) -> Json:
    missing = list(run.missing)
    result: Json = {
        "name": printable(run.name),
        "recipe": {k: str(v) for k, v in run.recipe.items()},
        "differences": [[k, str(old), str(new)] for k, (old, new) in run.recipe_differences.items()],
        "base": run.base,
        "info": _finite(run.info),
        "summary": _finite(run.summary),
        "curves": _thinned(run.metrics),
        "skipped": run.skipped[:50],
        "skippedCount": len(run.skipped),
    }
    if not run.metrics:
        missing.append("There are no curves: the run has not logged a step yet.")
    if pictures and run.data is not None:
        try:
            result["seen"] = _seen(run.data)
            if run.backbone is not None:
                result |= _learned(run.backbone, run.data.source, missing)
        except DataError as error:
            missing.append(f"Pictures are left out: {error}.")
        if run.data.channels > 3:
            missing.append(f"Of the {run.data.channels} channels, pictures show the first three as red, green, blue.")
    result["missing"] = missing
    return result


def _seen(data: TrainingData) -> list[Json]:
    """The first images of the run's first step."""
    found = (figures.seen_crops(data, 0, place) for place in range(min(EXAMPLES, data.batch_size)))
    return [
        {
            "name": printable(data.source.name(seen.index)),
            "before": [picture(crop) for crop in seen.before],
            "after": [picture(crop) for crop in seen.after],
            "masks": seen.masks.flatten(1).int().tolist(),
            "side": data.grid[0],
        }
        for seen in found
        if seen is not None
    ]


def _learned(backbone: Backbone, source: Source, missing: list[str]) -> Json:
    network, image = backbone.network, backbone.image
    chosen = np.unique(np.linspace(0, len(source) - 1, min(SAMPLE, len(source))).round().astype(int)).tolist()
    side = min(2 * image.size // network.patch_size, MAX_SIDE)
    kept: list[int] = []
    small: list[Tensor] = []
    large: list[Tensor] = []
    unreadable = 0
    for index in chosen:
        try:
            pixels = decode(
                source.item(index).image,
                channels=image.in_chans,
                sixteen_bit=image.sixteen_bit,
                max_pixels=image.max_pixels,
            )
        except ImageError:
            unreadable += 1
            continue
        kept.append(index)
        small.append(whole(pixels, image.size))
        if len(large) < EXAMPLES:
            large.append(whole(pixels, side * network.patch_size))
    if unreadable:
        missing.append(f"{unreadable} of the {len(chosen)} sampled images cannot be read.")
    if not kept:
        raise DataError(f"none of {len(chosen)} sampled images can be read")
    cls = embed(
        network,
        torch.stack(small),
        size=image.size,
        channels=image.in_chans,
        mean=image.mean,
        std=image.std,
        sixteen_bit=image.sixteen_bit,
        max_pixels=image.max_pixels,
        batch_size=32,
    )
    pairs = [figures.tokens_and_attention(network, normalize(pixels[None], image.mean, image.std)) for pixels in large]
    patches = torch.cat([tokens for tokens, _ in pairs])  # [B, N, D]
    colours, foreground = figures.pca_colours(patches)
    first_patch = 1 + network.num_register_tokens
    labels = source.labels()
    result: Json = {
        "step": backbone.step,
        "sampled": len(kept),
        "images": len(source),
        "side": side,
        "maps": [
            {
                "name": printable(source.name(kept[i])),
                "image": picture(pixels, 256),
                "pca": _bytes((colours[i] * 255).round()),
                "foreground": foreground[i].int().tolist(),
                "attention": [_bytes(255 * row / row.max()) for row in pairs[i][1][0, :, first_patch:]],
            }
            for i, pixels in enumerate(large)
        ],
        "patches": _compact(patches),
        "thumbnails": [picture(pixels, 56) for pixels in small],
        "names": [printable(source.name(i)) for i in kept],
        "labels": None if labels is None else [printable(labels[i]) for i in kept],
    }
    if len(kept) > 3:
        mean, directions = figures.principal_components(cls, 2)
        result["map"] = ((cls - mean) @ directions.T).tolist()
        values, rows = figures.neighbours(cls, range(len(kept)), 5)
        by_closeness = values[:, 0].argsort(descending=True).tolist()
        shown = dict.fromkeys([*by_closeness[:3], *by_closeness[-3:]])  # the closest pairs, and the loneliest images
        result["neighbours"] = [
            {"query": q, "rows": rows[q].tolist(), "similarities": [round(v, 3) for v in values[q].tolist()]}
            for q in shown
        ]
    else:
        missing.append("Neighbours and the map of the data set need at least four readable images.")
    return result


def _compact(patches: Tensor) -> Json:
    """Patch features as bytes, in the leading directions of all of them, which keeps their cosines nearly."""
    unit = torch.nn.functional.normalize(patches, dim=-1)
    _, spread, directions = torch.linalg.svd(unit.flatten(0, 1), full_matrices=False)
    kept = unit @ directions[:DIRECTIONS].T
    scale = float(kept.abs().max()) / 127
    share = float((spread[:DIRECTIONS] ** 2).sum() / (spread**2).sum())
    return {"width": kept.shape[-1], "kept": share, "values": _bytes((kept / scale).round() + 128)}


def picture(pixels: Tensor, side: int | None = None) -> str:
    """uint8 [C, h, w] as a JPEG data address; one channel is grey, of more than three the first three are shown."""
    channels = pixels if len(pixels) >= 3 else pixels[:1]
    array = channels[:3].permute(1, 2, 0).numpy()
    shown = Image.fromarray(array if array.shape[2] == 3 else array[:, :, 0])
    if side is not None:
        shown = shown.resize((side, side))
    file = io.BytesIO()
    shown.save(file, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _bytes(values: Tensor) -> str:
    return base64.b64encode(values.to(torch.uint8).contiguous().numpy().tobytes()).decode()


def _thinned(columns: dict[str, list[float | None]]) -> dict[str, list[float | None]]:
    """Every k-th point and the last, so that a long run's curves stay small."""
    count = len(columns.get("step", []))
    wanted = np.unique(np.linspace(0, count - 1, min(count, MAX_POINTS)).round().astype(int)).tolist()
    return {name: [values[i] for i in wanted] for name, values in columns.items()}


def _finite(value: Any) -> Any:
    """JSON has no numbers that are not finite."""
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
