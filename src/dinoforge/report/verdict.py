"""The answer, from what was measured, to whether a run learns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any, Literal

from dinoforge.report.charts import Columns, curve

Answer = Literal["yes", "partly", "no", "unknown"]

NOISE = 0.01  # difference of accuracy between runs that differ only in rounding, about
DATA_LIMITS = 0.2  # share of the time spent waiting from which data limits a run
_WORDS = {"knn": "k-NN", "linear": "linear probe"}


@dataclass(frozen=True)
class Measured:
    """Accuracies, 0 to 1, of one way to measure, on the same images; None where it was not measured.

    Args:
        by: The way to measure, in words.
        trained: Accuracy of the trained network at ``step``, the last time.
        step: The step of the last measurement; None for the evaluation of a finished network.
        best: Highest accuracy so far, at ``best_step``.
        noise: A difference that is still noise.
    """

    by: str
    trained: float
    step: int | None
    best: float | None
    best_step: int | None
    pixels: float | None
    untrained: float | None
    noise: float = NOISE


@dataclass(frozen=True)
class Verdict:
    answer: Answer
    sentence: str  # why
    measured: tuple[Measured, ...]
    best: str | None  # on the best checkpoint
    speed: str | None  # how fast it is, and what limits it
    limits: Literal["data", "step"] | None
    images_per_second: float | None
    data_wait: float | None  # share of the time


def judge(
    metrics: Columns, summary: Mapping[str, Any], *, checkpoints: Sequence[int] = (), teacher_step: int | None = None
) -> Verdict:
    """Judge a run by its probes; without any, by the result of ``eval knn`` in its summary.

    Args:
        metrics: Columns of ``metrics.jsonl``; see ``Columns``.
        summary: Summary of the run.
        checkpoints: Steps of the checkpoints that are kept.
        teacher_step: Step of ``teacher.safetensors``.
    """
    measured = [m for m in (_probe(metrics, name, words) for name, words in _WORDS.items()) if m]
    evaluated = _evaluated(summary)
    answer, sentence = _answer(measured[0] if measured else evaluated)
    rate, wait = _recent(metrics, "images_per_second", median), _recent(metrics, "data_wait_share", fmean)
    limits: Literal["data", "step"] | None = None if wait is None else "data" if wait > DATA_LIMITS else "step"
    return Verdict(
        answer,
        sentence,
        (*measured, *([evaluated] if evaluated else [])),
        _best(measured, summary.get("best"), checkpoints, teacher_step),
        _speed(rate, wait),
        limits,
        rate,
        wait,
    )


def _probe(metrics: Columns, name: str, words: str) -> Measured | None:
    steps, values = curve(metrics, f"probe.{name}")
    if not values:
        return None

    def reference(kind: str) -> float | None:
        _, found = curve(metrics, f"probe.{kind}.{name}")
        return found[-1] if found else None

    best = max(values)
    return Measured(
        by=words,
        trained=values[-1],
        step=round(steps[-1]),
        best=best,
        best_step=round(steps[values.index(best)]),
        pixels=reference("pixels"),
        untrained=reference("untrained"),
    )


def _evaluated(summary: Mapping[str, Any]) -> Measured | None:
    """The result of ``dinoforge eval knn``; None if there is none, or one that makes no sense."""
    rows = summary.get("knn")
    if not isinstance(rows, Mapping):
        return None

    def number(name: str, key: str) -> float | None:
        row = rows.get(name)
        value = row.get(key) if isinstance(row, Mapping) else None
        return float(value) if isinstance(value, int | float) else None

    trained = number("trained", "mean")
    if trained is None:
        return None
    return Measured(
        by=f"k-NN on {summary.get('n', 0):,} images (dinoforge eval knn)",
        trained=trained,
        step=None,
        best=None,
        best_step=None,
        pixels=number("pixels", "mean"),
        untrained=number("untrained", "mean"),
        noise=max([NOISE, *(sd for name in rows if (sd := number(name, "sd")) is not None)]),
    )


def _answer(m: Measured | None) -> tuple[Answer, str]:
    if m is None:
        return "unknown", (
            "Nothing has measured yet whether it learns: there are no probes, and losses alone do not tell. "
            "`dinoforge eval knn` measures it on images with labels."
        )
    others = {"raw pixels": m.pixels, "the untrained network": m.untrained}
    known = {name: m.trained - value for name, value in others.items() if value is not None}
    above = [name for name, difference in known.items() if difference > m.noise]
    words = []
    for name, difference in known.items():
        points = f"{abs(difference) * 100:.1f} points"
        if abs(difference) <= m.noise:
            words.append(f"{points} {'above' if difference >= 0 else 'below'} {name}, which is within the noise")
        else:
            words.append(f"{points} {'above' if difference > 0 else 'below'} {name}")
    answer: Answer = "unknown" if not known else "yes" if len(above) == len(known) else "partly" if above else "no"
    compared = ": " + "; ".join(words) if words else ", with nothing to compare it to"
    at = "" if m.step is None else f" at step {m.step:,}"
    noise = f" Noise is taken as {m.noise * 100:.1f} points." if "noise" in compared else ""
    return answer, f"By {m.by} it is right on {_percent(m.trained)} of the images{at}{compared}.{noise}"


def _best(measured: Sequence[Measured], saved: Any, checkpoints: Sequence[int], teacher_step: int | None) -> str | None:
    """A sentence on the best probe and where its weights are; ``saved`` is what the summary says of a best backbone."""
    if not measured:
        return None
    m = measured[0]
    best, at = m.best or 0.0, m.best_step or 0
    sentence = f"The best {m.by} result was {_percent(best)}, at step {at:,}."
    if isinstance(saved, Mapping) and saved.get("step") == at and saved.get("file"):
        kept = f"Its backbone is {saved['file']}."
    elif at in checkpoints:
        kept = "A checkpoint of that step is kept."
    elif checkpoints:
        nearest = min(checkpoints, key=lambda step: abs(step - at))
        kept = f"The nearest checkpoint that is kept is of step {nearest:,}; checkpoint.keep_every keeps more of them."
    else:
        kept = "There is no checkpoint yet."
    teacher = "" if teacher_step is None else f" teacher.safetensors is of step {teacher_step:,}."
    return f"{sentence} {kept}{teacher}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _recent(metrics: Columns, key: str, mean: Any) -> float | None:
    """The mean over the second half of a run, when values have settled."""
    _, values = curve(metrics, key)
    return float(mean(values[len(values) // 2 :])) if values else None


def _speed(rate: float | None, wait: float | None) -> str | None:
    if rate is None:
        return None
    speed = f"{rate:,.0f} images per second."
    if wait is None:
        return speed
    if wait > DATA_LIMITS:
        why = ", which limits the speed: `dinoforge bench` says which keys to change."
    else:
        why = "; the step itself limits the speed."
    return f"{speed} {100 * wait:.0f} % of the time goes into waiting for data{why}"
