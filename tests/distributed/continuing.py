"""Runs that stop after some steps, on images, with a record of what each step was given.

``test_continuing.py`` runs parts of them on one process, and this script on two.
"""

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console

from dinoforge.commands import run as run_command
from dinoforge.commands import train as train_command
from dinoforge.commands.train import train
from dinoforge.data.batch import Batch
from dinoforge.runs.stopping import Stop
from dinoforge.system import distributed
from distributed import ranks

STEPS = 9
KEYS = {
    "student.arch": "vit_custom",
    "student.embed_dim": 16,
    "student.depth": 2,
    "student.num_heads": 2,
    "student.patch_size": 8,
    "student.drop_path_rate": 0.0,
    "crops.global_crops_size": 32,
    "crops.local_crops_size": 16,
    "crops.local_crops_number": 2,
    **{f"{k}.head_n_prototypes": 32 for k in ("dino", "ibot")},
    **{f"{k}.head_hidden_dim": 16 for k in ("dino", "ibot")},
    **{f"{k}.head_bottleneck_dim": 8 for k in ("dino", "ibot")},
    "dino.koleo_scope": "global",
    "ibot.center_mean": "patches",
    "train.batch_size": 8,
    "train.steps": STEPS,
    "train.num_workers": 0,
    "train.threads": 1,
    "optim.warmup_length": "10%",
    "log.every_steps": 1,
    "precision": "fp32",
}


def make_images(folder: Path, number: int = 20) -> Path:
    """Writes images of noise, one of them unreadable."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for index in range(number):
        Image.fromarray(generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{index:02d}.png")
    (folder / "07.png").write_bytes(b"no image")
    return folder


class _StopAfter(Stop):
    """Stops after so many steps, as if the last rank had got a signal."""

    def __init__(self, steps: int) -> None:
        super().__init__(None, is_program=False)
        self.left = steps

    def __call__(self) -> bool:
        self.left -= 1
        if self.left < 0 and distributed.rank() == distributed.world_size() - 1:
            self.reason = "SIGTERM"
        return self.reason is not None


def go_on(folder: Path, name: str, steps: int, **keys: Any) -> list[list[tuple[int, str, str]]]:
    """Runs some steps of a run; gives what came in each: index, hash of the crops, hash of the masks of each image."""
    seen: list[list[tuple[int, str, str]]] = []
    prepare, stop = run_command.prepare, train_command.Stop

    def record(batch: Batch, **given: Any) -> Batch:
        seen.append(list(map(tuple, _identities(batch))))
        return prepare(batch, **given)

    run_command.prepare, train_command.Stop = record, lambda minutes, is_program: _StopAfter(steps)  # type: ignore[assignment,misc]
    try:
        with suppress(KeyboardInterrupt):
            train(folder / "images", out=folder / name, console=Console(quiet=True), **(KEYS | keys))
    finally:
        run_command.prepare, train_command.Stop = prepare, stop  # type: ignore[misc]
    return seen


def _identities(batch: Batch) -> list[tuple[int, str, str]]:
    count = len(batch.indices)

    def digest(*tensors: Any) -> str:
        return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()

    return [
        (
            int(batch.indices[i]),
            digest(batch.global_crops[i::count], batch.local_crops[i::count]),
            digest(batch.masks[i::count]),
        )
        for i in range(count)
    ]


def ended(folder: Path, name: str, recipe: str = "small", **keys: Any) -> tuple[int, int, str | None]:
    """Runs; gives steps, steps in all, and what stopped it."""
    result = train(folder / "images", recipe, folder / name, console=Console(quiet=True), **keys)
    return result.steps, result.total_steps, result.stopped_by


def two(rank: int, folder: Path) -> dict[str, Any]:
    """The parts on two ranks of the runs ``up`` (begun on one) and ``down`` (finished on one); and three more."""
    labels = folder / "labels.csv"
    probed = KEYS | {"probe.every_steps": 2, "probe.patience": 1, "optim.base_lr": 1e-12, "optim.min_lr": 0}
    timed = {"train.max_minutes": 0.01, "train.threads": 1, "train.num_workers": 0}
    return {
        "probed": ended(folder, "probed", labels=labels, **probed),
        "sharded": ended(folder, "sharded", labels=labels, **probed, **{"parallel.mode": "fsdp"}),
        "timed": ended(folder, "timed", "auto", **timed),
        "up": go_on(folder, "up", 3, **{"parallel.mode": "fsdp"}),
        "down": [
            *go_on(folder, "down", 3, **{"parallel.mode": "ddp"}),
            *go_on(folder, "down", 3, **{"parallel.mode": "fsdp", "train.accumulate": 2}),
        ],
    }


if __name__ == "__main__":
    ranks.serve({"two": two})
