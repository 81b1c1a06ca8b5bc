"""Metrics of a run: a file of JSON lines, TensorBoard, and an alarm."""

import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dinoforge.errors import RecipeError
from dinoforge.health.rules import Watch
from dinoforge.runs.display import LINE_SECONDS, Metrics
from dinoforge.runs.probes import Probes
from dinoforge.system.device import peak_memory_gib
from dinoforge.system.files import write_text, writing_error
from dinoforge.training.loop import StepReport
from dinoforge.training.state import TrainState

Sink = Callable[[Metrics], None]


class MetricsHook:
    """Computes metrics every ``every_steps`` steps and at the last one, and hands them on.

    Losses and gradient norms are those of that very step, so that a continued run writes what an uninterrupted one
    does; speed and waiting are means since the last time. The display is also told of the first step, and of one at
    least every few seconds, so that slow steps do not leave a user in the dark. Probes are made when it measures.
    """

    def __init__(
        self,
        sinks: list[Sink],
        display: Sink,
        *,
        every_steps: int,
        total_steps: int,
        batch_size: int,
        device: torch.device,
        probes: Probes | None = None,
    ) -> None:
        self.probes = probes
        self.sinks, self.display, self.every_steps, self.total_steps = sinks, display, every_steps, total_steps
        self.batch_size, self.device = batch_size, device
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0
        self._shown = float("-inf")

    def is_due(self, step: int) -> bool:
        """Whether the step that is done next is one whose metrics are handed on."""
        probed = self.probes is not None and self.probes.is_due(step)
        return probed or step % self.every_steps == 0 or step == self.total_steps

    def __call__(self, report: StepReport) -> None:
        self._steps += 1
        self._seconds += report.seconds
        self._waited += report.waited
        step, now = report.state.step, time.monotonic()
        due = self.is_due(step)
        if not due and now - self._shown < LINE_SECONDS:
            return
        hyper = {k: float(v) for k, v in vars(report.hyper).items() if not k.endswith("_frozen")}
        metrics = {
            "step": step,
            **report.result.values(),
            **hyper,
            "images_per_second": self._steps * self.batch_size / self._seconds,
            "data_wait_share": self._waited / self._seconds,
            "memory_gib": peak_memory_gib(self.device),
            "skipped_images": len(report.state.bad_images.skipped),
            "skipped_steps": report.state.skipped_steps,
            "rollbacks": report.state.rollbacks,
            **_of_float16(report.state),
            "train_seconds": report.state.seconds,
            **(self.probes(step) if self.probes and due else {}),
        }
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0
        self._shown = now
        for sink in [*self.sinks, self.display] if due else [self.display]:
            sink(metrics)


def _of_float16(state: TrainState) -> Metrics:
    """The loss scale, and how often gradients overflowed; nothing in other precisions."""
    return {"loss_scale": state.scaler.get_scale(), "overflows": state.overflows} if state.scaler else {}


class JsonLines:
    """The file ``metrics.jsonl``: one object on each line, written at once.

    Lines that the disk does not take, since it is full for a while, are kept and written with the next one.
    """

    def __init__(self, path: Path, *, first_step: int) -> None:
        """Opens the file for what comes after ``first_step`` steps."""
        self.path = path
        self._pending = b""
        self.cut(first_step)

    def cut(self, step: int) -> None:
        """Cuts the lines of steps after ``step``, which are done anew.

        Raises:
            RunError: The file cannot be written.
        """
        if self.path.exists():
            text = self.path.read_text(encoding="utf-8", errors="replace")  # a kill may have torn the last line
            kept = [line for line in text.splitlines() if _step_of(line) <= step]
            write_text(self.path, "".join(f"{line}\n" for line in kept))

    def lines(self) -> list[Metrics]:
        """Read the metrics in the file."""
        text = self.path.read_text(encoding="utf-8") if self.path.exists() else ""
        return [json.loads(line) for line in text.splitlines()]

    def __call__(self, metrics: Metrics) -> None:
        self._pending += json.dumps(metrics).encode() + b"\n"
        with suppress(OSError):  # raised by ``close`` if it lasts
            self._write()

    def close(self) -> None:
        """Raises RunError if lines cannot be written."""
        try:
            self._write()
        except OSError as error:
            raise writing_error(self.path, error) from error

    def _write(self) -> None:
        with self.path.open("ab", buffering=0) as file:
            while self._pending:
                self._pending = self._pending[file.write(self._pending) :]


def _step_of(line: str) -> float:
    """The step of a line; infinite for one that a kill cut short."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


class Alarm:
    """Tells the user once of each fault that the metrics show, in the sentences of ``dinoforge doctor``.

    Args:
        recipe: Values of the recipe by dotted key.
        file: What was logged before; its findings were told then.
        say: Tells the user.
    """

    def __init__(self, recipe: Mapping[str, Any], file: JsonLines, say: Callable[[str], object]) -> None:
        self.recipe, self.file, self.say = recipe, file, say
        self._told: set[str] = set()
        self.cut()

    def cut(self) -> None:
        """Starts from what the file holds now."""
        self._watch = Watch(self.recipe)
        for line in self.file.lines():
            self._told |= {finding.name for finding in self._watch(line)}

    def __call__(self, metrics: Metrics) -> None:
        for finding in self._watch(metrics):
            if finding.name not in self._told:
                self.say(f"diagnosis  at step {finding.step:,}: {finding.sentence}")
                self._told.add(finding.name)


class TensorBoard:
    """Scalars for TensorBoard in ``tensorboard/`` of the run."""

    def __init__(self, folder: Path, *, first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise RecipeError("log.tensorboard=true needs: pip install 'dinoforge[tensorboard]'") from error
        self._open: Callable[[int], Any] = lambda step: SummaryWriter(str(folder), purge_step=step + 1)
        self._writer = self._open(first_step)

    def cut(self, step: int) -> None:
        """Cuts what was written on steps after ``step``."""
        self._writer.close()
        self._writer = self._open(step)

    def __call__(self, metrics: Metrics) -> None:
        for name, value in metrics.items():
            if name != "step":
                self._writer.add_scalar(name, value, int(metrics["step"]))

    def close(self) -> None:
        self._writer.close()


def read_metrics(path: Path) -> tuple[dict[str, list[float | None]], int]:
    """The numbers of a ``metrics.jsonl`` by name, None where a line has no such (finite) number.

    Returns:
        The columns, and how many lines could not be read (a killed run may leave a torn last one).
    """
    lines: list[dict[str, Any]] = []
    unreadable = 0
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict) and isinstance(line.get("step"), int | float):
            lines.append(line)
        else:
            unreadable += 1

    def number(value: Any) -> float | None:
        return float(value) if isinstance(value, int | float) and np.isfinite(value) else None

    names = dict.fromkeys(name for line in lines for name in line)
    columns = {name: [number(line.get(name)) for line in lines] for name in names}
    return {k: v for k, v in columns.items() if any(x is not None for x in v)}, unreadable
