"""The files that runs leave behind, and how far two runs are apart."""

import json
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

_UNKNOWN = (float("inf"),) * 3

TERMS = ("total", "dino_local", "dino_global", "ibot", "koleo")


def lines_of(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run, a dictionary for each logged step; without a line that is just being written."""
    try:
        text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    except OSError:
        return []
    return [json.loads(row) for row in text[: text.rfind("\n") + 1].splitlines()]


def step_of(run: Path) -> int:
    """The last step that the metrics tell of."""
    return int(lines[-1]["step"]) if (lines := lines_of(run)) else 0


def saved_steps(run: Path) -> list[int]:
    """The steps of the checkpoints that are whole."""
    return sorted(int(path.name.removeprefix("step_")) for path in (run / "checkpoints").glob("step_*"))


def state_of(run: Path, step: int) -> dict[str, Tensor]:
    """The tensors of a checkpoint."""
    folder = run / "checkpoints" / f"step_{step:08d}"
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def copy_as_of(run: Path, to: Path, step: int) -> None:
    """Copies a run as it was when it wrote the checkpoint of a step, as if it had been killed then."""
    later = {f"step_{saved:08d}" for saved in saved_steps(run) if saved > step}
    shutil.copytree(run, to, ignore=lambda folder, names: (later | {"summary.json"}) & set(names))


@dataclass(frozen=True)
class Apart:
    """The distance between two runs.

    Args:
        same: Whether every tensor of the last checkpoint and every logged loss is bitwise the same.
        loss: Largest relative difference of a logged loss.
        typical: Relative difference of the logged loss at the median step after ``after``.
        weights: ‖a − b‖ of the student's weights, as a share of how far b has moved them since an earlier checkpoint.
        steps: What was logged, in words; empty if both logged the same steps.
    """

    same: bool
    loss: float
    typical: float
    weights: float
    steps: str

    def within(self, *, loss: float, weights: float) -> bool:
        return not self.steps and self.loss <= loss and self.weights <= weights

    @property
    def told(self) -> str:
        if self.steps:
            return self.steps
        return f"losses differ by {self.loss:.1e}, weights by {self.weights:.1e} of their movement"


def apart(ours: Path, theirs: Path, *, step: int, since: int, after: int = 0) -> Apart:
    """Compares two runs of the same recipe.

    Args:
        ours: The directory of a run.
        theirs: The directory of a run that was left alone.
        step: The last step, of which both have a checkpoint.
        since: An earlier step, of which ``theirs`` has a checkpoint.
        after: The step from which ``ours`` went on, if it was disturbed.
    """
    a, b = lines_of(ours), lines_of(theirs)
    logged = [[line["step"] for line in lines] for lines in (a, b)]
    if logged[0] != logged[1]:
        return Apart(False, *_UNKNOWN, f"logged {_range(logged[0])}, the other {_range(logged[1])}")
    losses = [_difference(x, y) for x, y in zip(a, b, strict=True)]
    loss = max(losses, default=0.0)
    typical = statistics.median(losses[i] for i, line in enumerate(b) if line["step"] > after)
    tensors, others = state_of(ours, step), state_of(theirs, step)
    same = loss == 0 and tensors.keys() == others.keys() and all(torch.equal(tensors[k], others[k]) for k in others)
    before = state_of(theirs, since)
    weights = [name for name in others if name.startswith("student.")]
    if not weights or not set(weights) <= tensors.keys():
        return Apart(False, loss, typical, float("inf"), "the checkpoints hold other tensors")
    moved = _norm([others[name] - before[name] for name in weights])
    return Apart(same, loss, typical, _norm([tensors[name] - others[name] for name in weights]) / max(moved, 1e-12), "")


def _difference(x: dict[str, Any], y: dict[str, Any]) -> float:
    """The largest difference of a term between two steps, relative to the sum: a term may be near 0."""
    scale = max(abs(y["total"]), 1e-6)
    differences = [abs(x[term] - y[term]) / scale for term in TERMS]
    return max(d if d == d else float("inf") for d in differences)


def _norm(tensors: list[Tensor]) -> float:
    return float(torch.stack([tensor.double().square().sum() for tensor in tensors]).sum().sqrt())


def _range(steps: list[Any]) -> str:
    return f"{len(steps)} steps from {steps[0]} to {steps[-1]}" if steps else "no step"
