"""Checkpoints of a run: everything that continuing needs, in one file per step."""

import re
from pathlib import Path
from typing import Any

import torch

from dinoforge.errors import WeightsError
from dinoforge.files import write_atomically

_NAME = re.compile(r"step_(\d{8,})\.pt")


def folder_of(run: Path) -> Path:
    return run / "checkpoints"


def save(run: Path, step: int, state: dict[str, Any]) -> Path:
    """Writes the state after ``step`` steps; the file is complete or not there.

    Raises:
        RunError: no space, or not writable.
    """
    path = folder_of(run) / f"step_{step:08d}.pt"
    write_atomically(path, lambda temporary: torch.save(state, temporary))
    return path


def steps(run: Path) -> list[int]:
    """Steps of the checkpoints that a run has, rising."""
    folder = folder_of(run)
    names = [m for p in folder.iterdir() if (m := _NAME.fullmatch(p.name))] if folder.is_dir() else []
    return sorted(int(m[1]) for m in names)


def load(run: Path, step: int, device: torch.device) -> dict[str, Any]:
    """The state after ``step`` steps. Nothing in the file can run code.

    Raises:
        WeightsError: the file is damaged or is no checkpoint.
    """
    path = folder_of(run) / f"step_{step:08d}.pt"
    way_out = "delete this file to continue from the one before it, or from the start if there is none"
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # the unpickler raises whatever damaged bytes make it stumble over
        raise WeightsError(f"cannot read the checkpoint {path} ({type(error).__name__}): {way_out}") from error
    if not isinstance(state, dict) or "step" not in state:
        raise WeightsError(f"{path} is no checkpoint of a run: {way_out}")
    return state


def prune(run: Path, *, keep_last: int, keep_every: int | None) -> None:
    """Deletes checkpoints except the newest ``keep_last`` and those at multiples of ``keep_every``."""
    for step in steps(run)[:-keep_last]:
        if keep_every is None or step % keep_every:
            (folder_of(run) / f"step_{step:08d}.pt").unlink(missing_ok=True)
