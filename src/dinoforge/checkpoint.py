"""Checkpoints of a run: everything that continuing needs, in one file per step."""

import re
import zipfile
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
        WeightsError: the file is damaged (a changed byte is found by its checksum) or is no checkpoint.
    """
    path = folder_of(run) / f"step_{step:08d}.pt"
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            if damaged := archive.testzip():
                raise WeightsError(f"the checkpoint {path} is damaged: the checksum of {damaged} is wrong")
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except WeightsError:
        raise
    except Exception as error:  # the readers raise whatever damaged bytes make them stumble over
        raise WeightsError(f"cannot read the checkpoint {path} ({type(error).__name__})") from error
    if not isinstance(state, dict) or "step" not in state:
        raise WeightsError(f"{path} is no checkpoint of a run")
    return state


def load_newest(run: Path, device: torch.device) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest state that can be read, and what is wrong with those that are newer.

    Damaged files are set aside as ``….damaged``: they must not count among the checkpoints that are kept.

    Returns:
        The state, None if there is no checkpoint yet; and a sentence on each damaged one.

    Raises:
        WeightsError: there are checkpoints, and none can be read.
    """
    damage = []
    for step in reversed(steps(run)):
        try:
            state = load(run, step, device)
        except WeightsError as error:
            damage.append(str(error))
            continue
        for bad in (s for s in steps(run) if s > step):
            path = folder_of(run) / f"step_{bad:08d}.pt"
            path.replace(path.with_name(path.name + ".damaged"))
        return state, damage
    if damage:
        raise WeightsError(
            f"{'; '.join(damage)}. No other checkpoint is left: restore one, or delete {folder_of(run)} to start anew"
        )
    return None, []


def prune(run: Path, *, keep_last: int, keep_every: int | None) -> None:
    """Deletes checkpoints except the newest ``keep_last`` and those at multiples of ``keep_every``."""
    for step in steps(run)[:-keep_last]:
        if keep_every is None or step % keep_every:
            (folder_of(run) / f"step_{step:08d}.pt").unlink(missing_ok=True)
