"""The figures of a report, each as a function from a run to a matplotlib figure, and all of them as files.

Matplotlib's object interface only: no window, no global state.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dinoforge.errors import DataError, DinoforgeError, WeightsError
from dinoforge.report import analysis
from dinoforge.report.charts import Chart, charts_of, curve, smoothed
from dinoforge.report.learned import Learned, PatchMap, bright
from dinoforge.report.run import ReportedRun
from dinoforge.system.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#3b82c4", "#d9822b", "#3f9b5b", "#b5485d", "#8466b8", "#80756b", "#c06aa8", "#7f8c28")  # as in the page
_GREY = "#8a919b"


def probes(run: ReportedRun, *, smooth: bool = True) -> Figure:
    """Probes against raw pixels and the untrained network, over time."""
    return _curves(run, "probes", smooth)


def losses(run: ReportedRun, *, smooth: bool = True) -> Figure:
    """Every loss term and gradient norm."""
    return _curves(run, "losses", smooth)


def health(run: ReportedRun, *, smooth: bool = True) -> Figure:
    """Curves that tell collapse from health: effective rank, entropies, prototype use, …"""
    return _curves(run, "health", smooth)


def schedules(run: ReportedRun) -> Figure:
    """Learning rates, weight decay, momentum and temperature."""
    return _curves(run, "schedules", smooth=False)


def speed(run: ReportedRun, *, smooth: bool = True) -> Figure:
    """Images per second, waiting for data, memory."""
    return _curves(run, "speed", smooth)


def crops(run: ReportedRun) -> Figure:
    """Crops of images of the first step, as cut and as the network got them, with the masked patches."""
    seen = run.seen
    count = len(seen[0].before)
    figure = _figure(0.9 * count, 1.9 * len(seen), pictures=True)
    grid = figure.subplots(2 * len(seen), count, squeeze=False)
    for i, one in enumerate(seen):
        rows = masks = one.masks.shape[1]
        for j in range(count):
            for k, crop in enumerate((one.before[j], one.after[j])):
                axes = _picture(grid[2 * i + k, j], analysis.displayed(crop, run.shown_channels))
                if k == 1 and j < 2:
                    side = crop.shape[-1]
                    cover = np.kron(one.masks[j].numpy(), np.ones((side // rows, side // masks)))
                    overlay = np.dstack([np.full((*cover.shape, 3), 0.5), 0.88 * cover])
                    axes.imshow(overlay)
    return figure


def pca(run: ReportedRun) -> Figure:
    """Images, and their patch features as colours in one common basis."""
    found = run.learned
    figure = _figure(1.6 * len(found.maps), 3.2, pictures=True)
    grid = figure.subplots(2, len(found.maps), squeeze=False)
    colours = found.colours.clone()
    if found.hides:
        colours[~found.foreground] = 0.1
    for column, (m, part) in enumerate(zip(found.maps, _parts(found, colours), strict=True)):
        _picture(grid[0, column], analysis.displayed(m.image, run.shown_channels))
        _picture(grid[1, column], part.view(*m.grid, 3).numpy())
    return figure


def attention(run: ReportedRun) -> Figure:
    """Attention of the cls token in the last block, per head."""
    maps = run.learned.maps
    heads = len(maps[0].attention)
    figure = _figure(1.3 * (1 + heads), 1.3 * len(maps), pictures=True)
    for row, m in zip(figure.subplots(len(maps), 1 + heads, squeeze=False), maps, strict=True):
        _picture(row[0], analysis.displayed(m.image, run.shown_channels))
        for axes, head in zip(row[1:], m.attention, strict=True):
            _picture(axes, head.view(m.grid).numpy(), cmap="viridis", vmin=0, vmax=float(bright(head)))
    return figure


def similarity(run: ReportedRun, image: int = 0, row: int | None = None, column: int | None = None) -> Figure:
    """Cosine similarity of the patches of all shown images to one patch.

    Args:
        run: The run.
        image: Which of the shown images, from 0.
        row, column: Row and column of the patch; by default those of the middle.

    Raises:
        DataError: There is no such image or patch; see also ``ReportedRun.learned``.
    """
    found = run.learned
    if not 0 <= image < len(found.maps):
        raise DataError(f"image {image}: expected 0 to {len(found.maps) - 1}")
    rows, columns = found.maps[image].grid
    row, column = rows // 2 if row is None else row, columns // 2 if column is None else column
    if not (0 <= row < rows and 0 <= column < columns):
        raise DataError(f"patch {row}, {column}: the image has {rows} × {columns} patches")
    before = sum(len(m.tokens) for m in found.maps[:image])
    values = analysis.similarity(found.tokens, before + row * columns + column)
    figure = _figure(1.6 * len(found.maps), 3.2, pictures=True)
    grid = figure.subplots(2, len(found.maps), squeeze=False)
    for i, (m, part) in enumerate(zip(found.maps, _parts(found, values), strict=True)):
        _picture(grid[0, i], analysis.displayed(m.image, run.shown_channels))
        axes = _picture(grid[1, i], part.view(m.grid).numpy(), cmap="viridis", vmin=float(values.min()), vmax=1)
        if i == image:
            axes.plot(column, row, "s", markersize=5, markerfacecolor="none", markeredgecolor="#e0201a")
    return figure


def neighbours(run: ReportedRun) -> Figure:
    """Images with their nearest neighbours: good examples, then bad ones."""
    found = run.learned
    if not found.neighbours:
        raise DataError(f"{run.name}: neighbours need at least four readable images")
    count = 1 + len(found.neighbours[0].rows)
    figure = _figure(1.1 * count, 1.4 * len(found.neighbours), pictures=True)
    figure.subplots_adjust(hspace=0.25)
    for row, n in zip(figure.subplots(len(found.neighbours), count, squeeze=False), found.neighbours, strict=True):
        for axes, i, value in zip(row, [n.query, *n.rows], [None, *n.similarities], strict=True):
            _picture(axes, analysis.displayed(found.shown[i], run.shown_channels))
            label = found.labels[i] if found.labels else ""
            title = label if value is None else f"{label} {value:.3f}".strip()
            axes.set_title(_plain(title), fontsize=7, color="#b3382c" if _differs(found, n.query, i) else "black")
    return figure


def embedding(run: ReportedRun) -> Figure:
    """The images in the plane, near where their features are alike, coloured by label."""
    found = run.learned
    if found.positions is None:
        raise DataError(f"{run.name}: the map needs at least four readable images")
    figure = _figure(5, 4)
    axes = figure.subplots()
    x, y = found.positions.T.numpy()
    if found.labels is None:
        axes.scatter(x, y, s=12, color=COLOURS[0])
    else:
        labels = np.array(found.labels)
        names, counts = np.unique(labels, return_counts=True)
        ranked = names[np.argsort(-counts, kind="stable")]
        for colour, name in zip(COLOURS, ranked, strict=False):
            own = labels == name
            axes.scatter(x[own], y[own], s=12, color=colour, label=_plain(str(name)))
        rest = np.isin(labels, ranked[len(COLOURS) :])
        if rest.any():
            axes.scatter(x[rest], y[rest], s=12, color=_GREY, label=f"{len(ranked) - len(COLOURS)} further labels")
        axes.legend(fontsize=7, frameon=False)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_title(found.projection, fontsize=8, loc="left")
    return figure


FIGURES: dict[str, Callable[[ReportedRun], Figure]] = {
    "probes": probes,
    "losses": losses,
    "health": health,
    "schedules": schedules,
    "speed": speed,
    "crops": crops,
    "pca": pca,
    "attention": attention,
    "similarity": similarity,
    "neighbours": neighbours,
    "embedding": embedding,
}


def write(run: ReportedRun, folder: Path) -> tuple[list[Path], list[str]]:
    """Writes each figure as PNG and SVG.

    Returns:
        The files, and why others are missing.

    Raises:
        DinoforgeError: The package matplotlib is missing.
        RunError: A file cannot be written.
    """
    written: list[Path] = []
    missing: list[str] = []
    for name, make in FIGURES.items():
        try:
            figure = make(run)
        except (DataError, WeightsError) as error:
            missing.append(f"{name}: {error}")
            continue
        for ending in ("png", "svg"):
            path = folder / f"{name}.{ending}"
            write_atomically(path, partial(figure.savefig, format=ending, dpi=200))
            written.append(path)
    return written, missing


def _figure(width: float, height: float, *, pictures: bool = False) -> Figure:
    """An empty figure.

    Args:
        width, height: Size in inches.
        pictures: Whether the figure is a grid of pictures, close together, instead of axes with labels.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DinoforgeError("figures need matplotlib: pip install 'dinoforge[plot]'") from error
    figure = Figure(figsize=(max(width, 3), max(height, 2)), layout=None if pictures else "constrained")
    if pictures:
        figure.subplots_adjust(0.01, 0.01, 0.99, 0.96, wspace=0.04, hspace=0.08)
    return figure


def _curves(run: ReportedRun, part: str, smooth: bool) -> Figure:
    charts = [chart for chart in charts_of([run.metrics]) if chart.part == part]
    if not charts:
        raise DataError(f"{run.name}: the metrics have nothing for it")
    columns = min(2, len(charts))
    rows = -(-len(charts) // columns)
    figure = _figure(4 * columns, 2.4 * rows)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, chart in zip(grid, charts, strict=False):
        _curve(axes, run, chart, smooth and not chart.exact)
    for axes in grid[len(charts) :]:
        axes.set_axis_off()
    return figure


def _curve(axes: Axes, run: ReportedRun, chart: Chart, smooth: bool) -> None:
    lowest = []
    for colour, key in zip(COLOURS * len(chart.keys), chart.keys, strict=False):
        steps, values = curve(run.metrics, key)
        lowest += values
        smooth_this = smooth and len(values) > 3
        axes.plot(steps, values, color=colour, linewidth=1.2, alpha=0.35 if smooth_this else 1)
        axes.plot(steps, smoothed(values) if smooth_this else values, color=colour, linewidth=1.5, label=_plain(key))
    if chart.axis == "log" and min(lowest) > 0:
        axes.set_yscale("log")
    if chart.axis == "zero":
        axes.set_ylim(bottom=min(0, *lowest, 0))
    if chart.axis == "share":
        axes.set_ylim(0, 1)
    axes.set_title(_plain(chart.title), fontsize=9, loc="left")
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(which="both", labelsize=7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if len(chart.keys) > 1:
        axes.legend(fontsize=7, frameon=False)


def _plain(text: str) -> str:
    """A name as it is: a dollar sign would begin a formula."""
    return text.replace("$", r"\$")


def _picture(axes: Axes, image: Any, **settings: Any) -> Axes:
    axes.imshow(image, **({"cmap": "gray", "vmin": 0, "vmax": 255} if image.ndim == 2 and not settings else settings))
    axes.set_axis_off()
    return axes


def _parts(found: Learned, values: torch.Tensor) -> list[torch.Tensor]:
    """Values of all patches, by image."""
    sizes: list[int] = [_patches(m) for m in found.maps]
    return list(values.split(sizes))


def _patches(m: PatchMap) -> int:
    return m.grid[0] * m.grid[1]


def _differs(found: Learned, query: int, other: int) -> bool:
    return found.labels is not None and found.labels[query] != found.labels[other]
