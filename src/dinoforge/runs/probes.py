"""Measuring the teacher while it trains, on labels that training never sees; the best backbone; stopping early."""

import json
import time
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch

from dinoforge.builders.resolved import ResolvedRun
from dinoforge.data.image_input import ImageInput
from dinoforge.errors import RunError, WeightsError
from dinoforge.models.vit import VisionTransformer
from dinoforge.recipe.schema import Probe
from dinoforge.runs.directory import RunDirectory
from dinoforge.system.files import write_text
from dinoforge.training.state import TrainState
from dinoforge.weights.backbone import Backbone, load_backbone, save_backbone

Scores = dict[str, float]
"""By method, ``knn`` and ``linear``: top-1 accuracy, 0 to 1."""


class Probes:
    """Decides when the teacher is measured, and keeps the scores and the best backbone by k-NN.

    Probes are made at every ``probe.every_steps``, at the first logged step after ``probe.every_minutes``, and at the
    last step of a run that had one. Each is listed in ``probes.json`` of the run, with the accuracies of raw pixels
    and of the untrained network, which are measured once. The best backbone is ``best.safetensors``; its header says
    how good it is, so the two are never apart.

    What goes wrong in a probe is told, and training goes on.

    Args:
        run: The run directory to write to.
        state: State of the run.
        plan: What the recipe means here.
        image: What the backbone expects of images.
        measure: Returns the scores of a backbone.
        baselines: Returns the scores of ``pixels`` and ``untrained``.
        fingerprint: Identifies the images and labels of the probe; the baselines of others are measured anew.
        say: Tells the user.
        duplicates: Returns which of the measured images are there twice; None until they are read.
    """

    def __init__(
        self,
        run: RunDirectory,
        state: TrainState,
        plan: ResolvedRun,
        image: ImageInput,
        *,
        measure: Callable[[VisionTransformer], Scores],
        baselines: Callable[[], dict[str, Scores]],
        fingerprint: str,
        say: Callable[[str], object],
        duplicates: Callable[[], Mapping[str, Any] | None] = lambda: None,
    ) -> None:
        self.run, self.state, self.plan, self.image, self.say = run, state, plan, image, say
        self._measure, self._baselines, self._fingerprint = measure, baselines, fingerprint
        self._duplicates = duplicates
        self.settings: Probe = plan.recipe.probe
        self._kept: dict[str, Any] = {}
        if run.probes.exists():
            try:
                kept = json.loads(run.probes.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                kept = {}  # measured anew
            if kept.get("fingerprint") == fingerprint:
                self._kept = kept
        self._kept.setdefault("fingerprint", fingerprint)
        self._kept.setdefault("history", [])
        self.cut(state.step)
        self.best: dict[str, Any] | None = self._read_best()
        self._due = self._next_time()

    @property
    def history(self) -> list[dict[str, float]]:
        """Step, scores and seconds of each probe so far."""
        return cast(list[dict[str, float]], self._kept["history"])

    def cut(self, step: int) -> None:
        """Forgets probes after ``step``, which are made anew; the best backbone stays the best."""
        self._kept["history"] = [probe for probe in self.history if probe["step"] <= step]

    def is_due(self, step: int) -> bool:
        """Whether the number of steps asks for a probe."""
        every = self.settings.every_steps
        return every is not None and step % every == 0

    def should_stop(self) -> bool:
        """Whether the last ``probe.patience`` probes were no better than one before them."""
        patience, best = self.settings.patience, self.best
        return patience is not None and best is not None and self._probes_since(best) >= patience

    def __call__(self, step: int) -> dict[str, float]:
        """Measures if it is time, after so many steps; the numbers for the metrics, or none."""
        last = step == self.plan.length.steps and bool(self.history)
        if not (self.is_due(step) or last or time.monotonic() >= self._due):
            return {}
        started = time.monotonic()
        try:
            # What a probe draws must not move the run's random numbers.
            with torch.random.fork_rng(devices=[]):
                numbers = self._probe(step, started)
        except Exception as error:  # whatever it is, hours of training must not end by it
            self.say(f"probe      failed at step {step:,}: {type(error).__name__}: {error}. Training goes on.")
            numbers = {}
        self._due = self._next_time()
        return numbers

    def _probe(self, step: int, started: float) -> dict[str, float]:
        backbone = self.state.student_teacher.teacher.backbone
        if "baselines" not in self._kept:
            self._kept["baselines"] = self._baselines()
        scores = self._measure(backbone)
        self._tell_duplicates()
        if self.best is None or scores["knn"] > self.best["knn"]:
            self._save_best(backbone, step, scores)
        seconds = round(time.monotonic() - started, 2)
        self.history.append({"step": step, **scores, "seconds": seconds})
        write_text(self.run.probes, json.dumps(self._kept, indent=1) + "\n")
        total = round(sum(probe["seconds"] for probe in self.history), 1)
        self.run.write_summary({"best": self.best, "probe_seconds": total})
        compared = {f"{name}.{method}": v for name, row in self._kept["baselines"].items() for method, v in row.items()}
        return {f"probe.{name}": value for name, value in (scores | compared | {"seconds": seconds}).items()}

    def _tell_duplicates(self) -> None:
        """Keeps and tells once what of the images is there twice: each is told by all others."""
        found = self._duplicates()
        if found is None or self._kept.get("duplicates") is not None:
            return
        self._kept["duplicates"] = found
        if (number := found["exact"] + found["near"]) > 0:
            one, other = found["examples"][0]
            are = "is" if number == 1 else "are"
            self.say(
                f"probe      {number:,} of its {found['tested']:,} images {are} like another one "
                f"({found['exact']:,} equal, {found['near']:,} nearly), such as {one} and {other}: each is told by all "
                "others, so the scores look better than they are"
            )

    def _save_best(self, backbone: VisionTransformer, step: int, scores: Mapping[str, float]) -> None:
        best = {"file": self.run.best.name, "step": step, **scores}
        architecture = self.plan.architecture
        metadata = self.plan.metadata() | {"probe": best | {"fingerprint": self._fingerprint}}
        save_backbone(self.run.best, Backbone(backbone, architecture, self.image, step, metadata=metadata))
        self.best = best

    def _read_best(self) -> dict[str, Any] | None:
        """The scores in the header of the best backbone, if they were measured on the same images."""
        if not self.run.best.exists():
            return None
        try:
            probe: dict[str, Any] = dict(load_backbone(self.run.best).metadata.get("probe", {}))
        except (RunError, WeightsError) as error:
            self.say(f"probe      {error}. The best backbone is looked for anew.")
            return None
        return probe if probe.pop("fingerprint", None) == self._fingerprint else None

    def _probes_since(self, best: Mapping[str, Any]) -> int:
        return sum(probe["step"] > best["step"] for probe in self.history)

    def _next_time(self) -> float:
        minutes = self.settings.every_minutes
        return float("inf") if minutes is None else time.monotonic() + minutes * 60
