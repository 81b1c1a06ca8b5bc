"""Which metrics a report draws together, on which axes, and what to look for in them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Columns = Mapping[str, Sequence[float | None]]
"""Metrics by name, one value for each logged step, None where a step has none: what ``read_metrics`` returns."""

MOST_POINTS = 1000  # points of a curve in the page


@dataclass(frozen=True)
class Chart:
    """Curves on common axes.

    Args:
        title: What the curves show, with the unit.
        keys: Names of metrics; one that ends in a point stands for all that begin with it.
        hint: What to look for.
        part: The part of the report that the chart belongs to.
        axis: ``zero`` begins at zero; ``share`` goes from 0 to 1; ``percent`` is fitted to shares; ``log`` is for
            values above zero; ``fitted`` is fitted to the values.
        exact: Whether the values are exact, so that smoothing would only distort them.
    """

    title: str
    keys: tuple[str, ...]
    hint: str = ""
    part: Literal["probes", "losses", "schedules", "health", "speed", "other"] = "other"
    axis: Literal["fitted", "zero", "share", "percent", "log"] = "fitted"
    exact: bool = False


CHARTS = (
    *[
        Chart(
            f"{words} probe, accuracy",
            (f"probe.{name}", f"probe.pixels.{name}", f"probe.untrained.{name}"),
            "It learns where the first curve rises above both others.",
            "probes",
            "percent",
            exact=True,
        )
        for name, words in (("knn", "k-NN"), ("linear", "Linear"))
    ],
    Chart("Loss", ("total",), "Falls fast, then slowly; rises a little while temperatures or rates do.", "losses"),
    Chart("Loss terms", ("dino_global", "dino_local", "ibot"), "None should fall to zero or stand still.", "losses"),
    Chart("KoLeo", ("koleo",), "Falls as features spread out.", "losses"),
    Chart("Gradient norms", ("grad_norm.",), "Smooth, without jumps of a power of ten.", "losses", "log"),
    Chart("Learning rate", ("lr", "last_layer_lr"), "As planned.", "schedules", "zero", exact=True),
    Chart("Weight decay", ("weight_decay",), "As planned.", "schedules", "zero", exact=True),
    Chart("Teacher momentum", ("momentum",), "As planned.", "schedules", exact=True),
    Chart("Teacher temperature", ("teacher_temp",), "As planned.", "schedules", exact=True),
    Chart("Effective rank of the features", ("diag.effective_rank",), "Falling to 1 is collapse.", "health", "zero"),
    Chart(
        "Target entropy, share of log K",
        ("diag.target_entropy.",),
        "Near 1 the targets say nothing, near 0 they are all one prototype's.",
        "health",
        "share",
    ),
    Chart(
        "Targets from predictions, KL, share of log K",
        ("diag.kl.",),
        "At 0 from the start nothing is learned.",
        "health",
        "zero",
    ),
    Chart("Prototypes in use, share of K", ("diag.prototype_use.",), "Few in use: K is too large.", "health", "share"),
    Chart("Norm of the features", ("diag.feature_norm",), "Should not run away.", "health", "zero"),
    Chart("Similarity of patches in an image", ("diag.patch_similarity",), "Near 1 all patches are alike.", "health"),
    Chart("Update ratio", ("diag.update_ratio.",), "About 1e-4 to 1e-2 is usual.", "health", "log"),
    Chart("Images per second", ("images_per_second",), "A fall tells of other work on the machine.", "speed", "zero"),
    Chart(
        "Time spent waiting for data", ("data_wait_share",), "Above a fifth, data limits the speed.", "speed", "share"
    ),
    Chart("Memory, GiB", ("memory_gib",), "The peak; it should not grow for ever.", "speed", "zero", exact=True),
    Chart("Seconds of a probe", ("probe.seconds",), "Training waits so long for one.", "speed", "zero", exact=True),
    Chart(
        "Left out",
        ("skipped_images", "skipped_steps", "rollbacks", "overflows"),
        "Unreadable images, steps that were not finite, returns to a checkpoint.",
        "speed",
        "zero",
        exact=True,
    ),
)

_NOT_DRAWN = ("step", "train_seconds")


def charts_of(runs: Sequence[Columns]) -> list[Chart]:
    """The charts for which at least one run has numbers, with their full keys; what no chart knows gets its own."""
    names = list(dict.fromkeys(name for columns in runs for name in columns))
    left = [name for name in names if name not in _NOT_DRAWN]
    found = []
    for chart in CHARTS:
        keys = [n for key in chart.keys for n in names if n == key or (key.endswith(".") and n.startswith(key))]
        left = [name for name in left if name not in keys]
        if chart.title == "Left out" and not any(any(columns.get(k, ())) for columns in runs for k in keys):
            continue
        if keys:
            found.append(Chart(chart.title, tuple(keys), chart.hint, chart.part, chart.axis, chart.exact))
    return found + [Chart(name, (name,)) for name in left]


def curve(columns: Columns, key: str, most: int = MOST_POINTS) -> tuple[list[float], list[float]]:
    """Steps and values of a metric where it has one; of a long curve the extremes of each stretch.

    So a spike is still seen: of every stretch of steps its smallest and its largest value are kept.
    """
    points = [(s, v) for s, v in zip(columns.get("step", ()), columns.get(key, ()), strict=False) if _both(s, v)]
    if len(points) > most:
        inner, kept = points[1:-1], [points[0]]
        stretches = (most - 2) // 2
        for i in range(stretches):
            stretch = inner[i * len(inner) // stretches : (i + 1) * len(inner) // stretches]
            ends = (min(stretch, key=lambda p: p[1] or 0.0), max(stretch, key=lambda p: p[1] or 0.0))
            kept += sorted(set(ends), key=lambda p: p[0] or 0.0)
        points = [*kept, points[-1]]
    return [s for s, _ in points if s is not None], [v for _, v in points if v is not None]


def _both(step: float | None, value: float | None) -> bool:
    return step is not None and value is not None


def smoothed(values: Sequence[float]) -> list[float]:
    """The running mean: each value moves it by a share of the difference that is smaller the more values there are."""
    weight = min(0.5, max(0.05, 15 / len(values))) if values else 1.0
    result: list[float] = []
    for value in values:
        result.append(result[-1] + weight * (value - result[-1]) if result else value)
    return result
