"""The lines and the bar that a run shows in the terminal."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

Metrics = dict[str, float]

LINE_SECONDS = 10.0


class Display:
    """The terminal: a live bar, or plain lines where the output is no terminal."""

    def __init__(self, console: Console, *, total_steps: int, first_step: int) -> None:
        self.console, self.total_steps = console, total_steps
        self._last_line = float("-inf")
        self._last_shown: tuple[float, float] | None = None  # steps done and when
        self._progress: Progress | None = None
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[rate]}"),
                console=console,
            )
            self._task = self._progress.add_task("", total=total_steps, completed=first_step, rate="starting")

    def __enter__(self) -> Self:
        if self._progress:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._progress:
            self._progress.stop()

    def __call__(self, metrics: Metrics) -> None:
        step, now = int(metrics["step"]), time.monotonic()
        rate = f"{metrics['images_per_second']:.0f} images/s · {self._remaining(step, now)}"
        if self._progress:
            self._progress.update(self._task, completed=step, rate=rate)
        # On a terminal the bar moves in between, so lines may be rarer.
        if now - self._last_line < LINE_SECONDS and step != self.total_steps and "probe.knn" not in metrics:
            return
        self._last_line = now
        text = f"{step:>{len(str(self.total_steps))}}/{self.total_steps}  {describe(metrics)}"
        self.console.print(text if self._progress else f"{text}  {rate}", highlight=False, soft_wrap=True)

    def _remaining(self, step: int, now: float) -> str:
        """Time to go at the speed since the last call."""
        last, self._last_shown = self._last_shown, (step, now)
        if step >= self.total_steps:
            return "done"
        if last is None or step <= last[0]:
            return "…"
        return f"{duration((self.total_steps - step) * (now - last[1]) / (step - last[0]))} to go"


def describe(metrics: Metrics) -> str:
    """One line on one step: every loss term, learning rate, share of time waiting for data, memory, the probe."""
    terms = "  ".join(f"{name} {metrics[name]:.3f}" for name in ("dino_local", "dino_global", "ibot", "koleo"))
    return (
        f"loss {metrics['total']:.3f}  ({terms})  lr {metrics['lr']:.1e}  "
        f"data {metrics['data_wait_share']:.0%}  {metrics['memory_gib']:.1f} GiB{describe_probe(metrics)}"
    )


def describe_probe(metrics: Metrics) -> str:
    """The scores of a probe in per cent, beside those of raw pixels and the untrained network, and its time; ''
    without."""
    if "probe.knn" not in metrics:
        return ""

    def score(method: str) -> str:
        own, pixels, untrained = (100 * metrics[f"probe.{row}{method}"] for row in ("", "pixels.", "untrained."))
        return f"{own:.1f}% (pixels {pixels:.1f}, untrained {untrained:.1f})"

    return f"  knn {score('knn')}  linear {score('linear')}  in {metrics['probe.seconds']:.1f} s"


def duration(seconds: float) -> str:
    """A duration for people: ``40 s``, ``12 min``, ``3 h 05 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
