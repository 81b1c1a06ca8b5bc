"""Runs as one self-contained HTML page."""

import base64
import html
import io
import json
import math
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from dinoforge.data.sources import Source, printable
from dinoforge.errors import DinoforgeError
from dinoforge.report.analysis import Seen, displayed, false_colour, resized
from dinoforge.report.charts import charts_of, curve
from dinoforge.report.learned import Learned, bright
from dinoforge.report.run import ReportedRun
from dinoforge.report.verdict import Measured

DIRECTIONS = 64  # leading directions of the patch features that the page keeps for similarity maps
LISTED = 50  # skipped images
_SHOWN = 256  # pixels along the longer side of a shown image
_THUMBNAIL = 56

Json = dict[str, Any]


def page(runs: Sequence[ReportedRun]) -> str:
    """The HTML of one run, or of several side by side."""
    content = {
        "runs": [_content(run, alone=len(runs) == 1) for run in runs],
        "charts": [asdict(chart) for chart in charts_of([run.metrics for run in runs])],
        "made": time.strftime("%Y-%m-%d %H:%M"),
    }
    here = files("dinoforge.report")

    def text(*place: str) -> str:
        return here.joinpath(*place).read_text(encoding="utf-8")

    values = {
        "TITLE": html.escape(" and ".join(printable(run.name) for run in runs)),
        "STYLE": text("uplot", "uPlot.min.css") + text("page.css"),
        "PLOTS": text("uplot", "uPlot.iife.min.js"),
        "PLOTS_LICENSE": text("uplot", "LICENSE"),
        "SCRIPT": text("page.js"),
        # "<" cannot then end the script, whatever a file is called.
        "DATA": json.dumps(_finite(content), allow_nan=False).replace("<", "\\u003c"),
    }
    return re.sub(r"@([A-Z_]+)@", lambda mark: values[mark[1]], text("page.html"))  # nothing put in is replaced again


def _content(run: ReportedRun, *, alone: bool) -> Json:
    missing = list(run.missing)
    verdict = run.verdict
    result: Json = {
        "name": printable(run.name),
        "recipe": {key: _value(value) for key, value in run.recipe.items()},
        "base": run.base,
        "differences": [[key, _value(there), _value(here)] for key, (there, here) in run.differences.items()],
        "info": run.info,
        "summary": {k: v for k, v in run.summary.items() if not isinstance(v, dict | list)},
        "curves": {key: curve(run.metrics, key) for key in run.metrics if key != "step"},
        "logged": len(run.metrics.get("step", ())),
        "verdict": {
            "answer": verdict.answer,
            "sentence": verdict.sentence,
            "measured": [_row(m) for m in verdict.measured],
            "best": verdict.best,
            "speed": verdict.speed,
            "limits": verdict.limits,
            "rate": verdict.images_per_second,
            "wait": verdict.data_wait,
        },
        "findings": run.findings,
        "groups": list(run.groups),
        "masks": run.masks,
        "checkpoints": list(run.checkpoints),
        "skipped": list(run.skipped[:LISTED]),
        "skippedCount": len(run.skipped),
        "commands": _commands(run),
    }
    if not run.metrics:
        missing.append("There are no curves: the run has not logged a step yet.")
    if alone and run.data is not None:
        try:
            result["seen"] = [_seen(seen, run.data.source, run.data.grid[1], run.shown_channels) for seen in run.seen]
            if run.backbone is not None:
                result["learned"] = _learned(run.learned, run.shown_channels)
                missing += run.learned.missing
        except DinoforgeError as error:
            missing.append(f"Pictures are left out: {error}.")
        if said := false_colour(run.data.channels, run.shown_channels):
            missing.append(f"Pictures are in false colour: {said}. The key report.channels chooses others.")
    result["missing"] = missing
    return result


def _value(value: Any) -> str:
    """A value of a recipe as YAML has it."""
    return value if isinstance(value, str) else json.dumps(value)


def _row(m: Measured) -> Json:
    return {name: getattr(m, name) for name in ("by", "trained", "step", "best", "best_step", "pixels", "untrained")}


def _commands(run: ReportedRun) -> list[list[str]]:
    """The next things to do, each with its command."""
    name, data = (shlex.quote(printable(text)) for text in (run.name, run.info.get("data", {}).get("path", "DATA")))
    go_on = ["continue", f"dinoforge train {data} --recipe {name}/recipe.yaml --out {name}"]
    return [
        *([] if run.summary.get("finished") else [go_on]),
        ["evaluate", f"dinoforge eval knn {name} --data {data}"],
        ["", f"dinoforge eval linear {name} --data {data} --labels labels.csv"],
        ["export", f"dinoforge export {name} --to hf --out backbone"],
        ["figures for a paper", f"dinoforge report {name} --figures figures"],
    ]


def _seen(seen: Seen, source: Source, columns: int, channels: Sequence[int] | None) -> Json:
    height, width, _ = seen.image.shape
    return {
        "name": printable(source.name(seen.index)),
        "image": picture(_fitted(seen.image), channels),
        "size": [height, width],
        "boxes": seen.boxes,
        "before": [picture(crop, channels) for crop in seen.before],
        "after": [picture(crop, channels) for crop in seen.after],
        "masks": seen.masks.flatten(1).int().tolist(),
        "columns": columns,
    }


def _fitted(image: npt.NDArray[np.uint8]) -> Tensor:
    """The whole image, its longer side at most ``_SHOWN`` pixels: uint8 [C, h, w]."""
    height, width, _ = image.shape
    scale = min(1.0, _SHOWN / max(height, width))
    return resized(image, max(1, round(height * scale)), max(1, round(width * scale)))


def _learned(learned: Learned, channels: Sequence[int] | None) -> Json:
    maps, start = [], 0
    for m in learned.maps:
        own = slice(start, start + len(m.tokens))
        start = own.stop
        maps.append(
            {
                "name": m.name,
                "image": picture(_fitted(m.image.permute(1, 2, 0).numpy()), channels),
                "rows": m.grid[0],
                "columns": m.grid[1],
                "start": own.start,
                "pca": _bytes((learned.colours[own] * 255).round()),
                "foreground": _bytes(learned.foreground[own]),
                "attention": [_bytes((255 * row / bright(row)).clamp(max=255)) for row in m.attention],
            }
        )
    return {
        "step": learned.step,
        "sampled": len(learned.indices),
        "images": learned.images,
        "hides": learned.hides,
        "maps": maps,
        "patches": _compact(learned.tokens),
        "thumbnails": [picture(shown, channels, _THUMBNAIL) for shown in learned.shown],
        "names": learned.names,
        "labels": learned.labels,
        "positions": None if learned.positions is None else learned.positions.tolist(),
        "projection": learned.projection,
        "neighbours": [asdict(n) for n in learned.neighbours],
        "sameLabel": learned.same_label,
        "byChance": learned.by_chance,
    }


def _compact(tokens: Tensor) -> Json:
    """Patch features [N, D] as bytes, in the leading directions of all of them, which keeps their cosines nearly."""
    unit = torch.nn.functional.normalize(tokens, dim=-1)
    spread, directions = torch.linalg.eigh(unit.T.double() @ unit.double())  # ascending
    kept = unit @ directions[:, -DIRECTIONS:].float()
    scale = float(kept.abs().max()) / 127
    share = float(spread[-DIRECTIONS:].sum() / spread.sum())
    return {"width": kept.shape[-1], "kept": share, "values": _bytes((kept / scale).round() + 128)}


def picture(pixels: Tensor, channels: Sequence[int] | None = None, side: int | None = None) -> str:
    """Encode uint8 [C, h, w] as a JPEG data address.

    Args:
        pixels: The image.
        channels: Those that are shown; see ``dinoforge.report.analysis.displayed``.
        side: Pixels along each side; None: as many as there are.
    """
    file = io.BytesIO()
    shown = Image.fromarray(displayed(pixels, channels))
    if side is not None:
        shown = shown.resize((side, side))
    shown.save(file, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _bytes(values: Tensor) -> str:
    return base64.b64encode(values.to(torch.uint8).contiguous().numpy().tobytes()).decode()


def _finite(value: Any) -> Any:
    """JSON has no numbers that are not finite."""
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
