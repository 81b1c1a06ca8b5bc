"""The run directory: its files, the images that it belongs to, and how a run is continued.

recipe.yaml           the recipe as resolved
run.json              data, versions, device, precision, threads; a line for each time it was started
metrics.jsonl         one line per logged step
skipped.txt           images that could not be read, each once
images.tsv            sizes and dates of (some of) the files when the run began
non_finite/           batches of steps that were skipped since a loss or gradient was not finite
checkpoints/          everything that continuing needs
teacher.safetensors   the backbone: EMA weights, official names
best.safetensors      the backbone whose k-NN was best while it trained, if images have labels
probes.json           what was measured while it trained
summary.json          how far it is and how fast it was
report.html           a page that shows it
"""

import json
import platform
import shutil
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cv2
import numpy
import PIL
import torch

from dinoforge.data.names import in_table, printable
from dinoforge.data.stamps import Stamp, as_text, from_text, what_changed
from dinoforge.data.summary import DataSummary
from dinoforge.errors import RunError
from dinoforge.recipe.load import dump, load_recipe
from dinoforge.recipe.schema import FREE_KEYS, Recipe, differences
from dinoforge.system.files import is_stranger, write_text, writing_error
from dinoforge.version import __version__


@dataclass(frozen=True)
class DataIdentity:
    """The images that a run is made on."""

    path: str
    images: int
    fingerprint: str


class RunDirectory:
    """The folder of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.teacher = path / "teacher.safetensors"
        self.metrics = path / "metrics.jsonl"
        self.skipped = path / "skipped.txt"
        self.summary = path / "summary.json"
        self.report = path / "report.html"
        self.non_finite = path / "non_finite"
        self.best = path / "best.safetensors"
        self.probes = path / "probes.json"
        self.stamps = path / "images.tsv"
        self._recipe = path / "recipe.yaml"
        self._info = path / "run.json"
        self._summary_lock = threading.Lock()  # a checkpoint's thread writes it, too

    @property
    def exists(self) -> bool:
        return self._recipe.is_file() and self._info.is_file()

    def require_free_or_same(self, recipe: Recipe, data: DataIdentity, *, batch_size: int) -> None:
        """Raise RunError unless the folder is new, or holds the run of this recipe on these images.

        Args:
            recipe: The recipe to run.
            data: The images.
            batch_size: Images of a step over all ranks; the number of ranks may differ from the one before.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path} is a file, not a folder: choose another place with --out")
        if not self.exists:
            there = sorted(entry.name for entry in self.path.iterdir()) if self.path.is_dir() else []
            if others := [name for name in there if not (is_stranger(name) or _is_beginning(name))]:
                raise RunError(
                    f"{self.path} holds something else than a run, such as {printable(others[0])}: choose an empty or "
                    "new folder with --out"
                )
            return
        way_out = f"Start another run with --out, or delete {self.path} if you no longer need it."
        changed = differences(self.recipe(), recipe, ignore=FREE_KEYS)
        if changed:
            lines = "\n".join(f"  {key}: {old} there, {new} now" for key, (old, new) in changed.items())
            raise RunError(f"{self.path} holds a run of another recipe:\n{lines}\n{way_out}")
        before = self.batch_size()
        if before != batch_size:
            raise RunError(
                f"{self.path} holds a run with {before} images in a step over all ranks and micro-batches, now there "
                f"are {batch_size}: set train.batch_size={before}, so that they are cut to fit.\n{way_out}"
            )
        there = self.info()["data"]
        if there["fingerprint"] != data.fingerprint:
            raise RunError(
                f"{self.path} holds a run on other images: {there['images']} in {there['path']} there, "
                f"{data.images} in {data.path} now, or with other names.\n{way_out}"
            )

    def recipe(self) -> Recipe:
        """The recipe that the run was started with."""
        return load_recipe(self._recipe)[0]

    def info(self) -> dict[str, Any]:
        return _read_json(self._info)

    def batch_size(self) -> int:
        """Images of a step over all ranks."""
        info, train = self.info(), self.recipe().train
        return int(info.get("batch_size", train.batch_size_per_gpu))

    def ranks(self) -> int:
        """The number of ranks of the last start."""
        return int(self.info()["starts"][-1].get("ranks", 1))

    def read_summary(self) -> dict[str, Any]:
        """The summary so far; empty before the first."""
        return _read_json(self.summary) if self.summary.exists() else {}

    def write_summary(self, values: dict[str, Any]) -> None:
        """Update the summary with values."""
        with self._summary_lock:
            write_text(self.summary, json.dumps(self.read_summary() | values, indent=2) + "\n")

    def record_start(
        self,
        recipe: Recipe,
        data: DataIdentity,
        *,
        base: str,
        look: DataSummary,
        device: torch.device,
        precision: torch.dtype,
        step: int,
        ranks: int,
        mode: str,
        batch_size: int,
    ) -> None:
        """Record what the run is, and that it was started now at ``step``.

        Args:
            recipe: The recipe, as resolved.
            data: The images.
            base: The recipe of the package that the run's was first made from.
            look: What a look at some of the images found.
            device, precision: The device, and its dtype of matrix products.
            step: Steps done before.
            ranks, mode: Number of ranks, and how the networks are laid over them.
            batch_size: Images of a step over all ranks.
        """
        start = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "step": step,
            "device": _device_name(device),
            "precision": str(precision).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "ranks": ranks,
            "parallel": mode,
            "versions": {
                "dinoforge": __version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "opencv": cv2.__version__,
                "numpy": numpy.__version__,
                "pillow": PIL.__version__,
            },
        }
        before = self.info() if self._info.exists() else {}
        starts = [*before.get("starts", []), start]
        looked = {"sampled": look.sampled, "widths": look.widths, "heights": look.heights, "modes": dict(look.modes)}
        info = {"base": base} | before  # a run is continued by its own recipe.yaml, too
        info |= {
            "data": vars(data) | {"look": looked},
            "seed": recipe.train.seed,
            "batch_size": batch_size,
            "starts": starts,
        }
        write_text(self._info, json.dumps(info, indent=2) + "\n")
        write_text(self._recipe, dump(recipe))

    def compare_stamps(self, now: Mapping[str, Stamp]) -> str | None:
        """Say which files were replaced since the run began; the first time, record what they are."""
        if self.stamps.exists():
            return what_changed(from_text(self.stamps.read_text(encoding="utf-8", errors="replace")), now)
        if now:
            write_text(self.stamps, as_text(now))
        return None

    def list_skipped(self, images: Iterable[tuple[str, str]], *, first: bool = False) -> None:
        """Append printable names and reasons to the list of unreadable images; ``first`` begins the list anew."""
        lines = [f"{in_table(name)}\t{in_table(printable(reason))}\n" for name, reason in images]
        try:
            if lines or (first and self.skipped.exists()):
                with self.skipped.open("w" if first else "a", encoding="utf-8") as file:
                    file.writelines(lines)
        except OSError as error:
            raise writing_error(self.skipped, error) from error

    def require_space(self, needed: int) -> None:
        """Raise RunError if the disk has less than ``needed`` bytes free."""
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise RunError(
                f"{self.path} has {free / 2**20:,.0f} MiB free, and the checkpoints of this run need about "
                f"{needed / 2**20:,.0f} MiB: free some, lower checkpoint.keep_last, or choose another --out"
            )


def _is_beginning(name: str) -> bool:
    """Whether a name is that of what a run leaves when it is killed before its recipe is written."""
    return name in ("run.json", "recipe.yaml", ".writable") or name.startswith(".lock") or name.endswith(".partial")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {path}: {error}") from error
    return values


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        return f"cpu ({torch.cpu.get_capabilities().get('cpu_name') or platform.machine()})"
    return str(device)


def check_writable(folder: Path) -> None:
    """Raise RunError where a run could not write."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except FileExistsError as error:
        raise RunError(f"{folder} is a file, not a folder: choose another place with --out") from error
    except OSError as error:
        raise writing_error(folder, error) from error
