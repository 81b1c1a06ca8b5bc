"""Write features of a whole data set to a file: names and tokens, in order, resumable, in bounded memory.

Until the file is complete, a folder `.NAME.parts` lies beside it:

plan.json               the backbone, the images, and how they are read; a call with another plan refuses these parts
00000000.safetensors    cls tokens, patch tokens, indices of the images, and the unreadable images

A part is complete or does not exist, and its bytes do not depend on the process that writes it. The file is assembled
from the parts, which are deleted once the file has its name.
"""

import hashlib
import importlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
from numpy.lib.format import open_memmap
from rich import progress
from rich.console import Console
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dinoforge.data.bad_images import by_reason
from dinoforge.data.names import in_table, printable
from dinoforge.data.sources import Source
from dinoforge.errors import DataError, ExportError, RunError
from dinoforge.features.extract import Skipped, stream
from dinoforge.models.vit import VisionTransformer
from dinoforge.system.files import save_tensors, write_atomically, write_text, written_aside

_PART_BYTES = 2**26  # approximate limit on the tokens of a part or a batch
_PART_IMAGES = 512  # the most images in a part; a killed process loses its unfinished part
_BATCH = 64
_LINE_SECONDS = 10.0  # time between lines of progress if the output is no terminal
SUFFIXES = (".parquet", ".npy")


@dataclass(frozen=True)
class Embedded:
    """The written files of features.

    Args:
        path: The file that the user asked for.
        images: The number of images that have a row.
        skipped: The unreadable images, which have no row.
        files: All files, including ``path``.
    """

    path: Path
    images: int
    skipped: list[Skipped]
    files: tuple[Path, ...]


class _Writer(Protocol):
    def __call__(self, path: Path, parts: Iterator["_Part"], layout: "_Layout") -> None: ...


@dataclass(frozen=True)
class _Part:
    """Features of consecutive images."""

    names: list[str]
    cls: Tensor  # [B, D]
    patches: Tensor | None  # [B, N, D]


@dataclass(frozen=True)
class _Layout:
    """The layout of the complete file.

    Args:
        images: The number of rows.
        dim: The width of a token.
        patches: The number of patch tokens of an image; None if they are not wanted.
        meaning: A description of the features, as JSON values.
    """

    images: int
    dim: int
    patches: int | None
    meaning: dict[str, Any]


def write_features(
    network: VisionTransformer,
    source: Source,
    out: Path,
    *,
    patches: bool = False,
    meaning: dict[str, Any] | None = None,
    on_progress: Callable[[int, int], object] = lambda done, total: None,
    **reading: Any,
) -> Embedded:
    """Write the cls token of every image, and its patch tokens if wanted, to a file; continue from existing parts.

    An unreadable image gets no row; ``….skipped.txt`` beside the file lists it with the reason.

    Args:
        network: The backbone.
        source: The images, in the order of the rows.
        out: A file that does not exist yet: ``….parquet``, or ``….npy`` with names and patch tokens in files beside it.
        patches: Whether patch tokens are written.
        meaning: A description of the features, stored in the file if it is ``….parquet``.
        on_progress: A function that is called with the number of images done and of all images, after each part.
        reading: Keywords of ``features.extract.Reading``, except the batch size, which this function chooses.

    Raises:
        RunError: ``out`` exists already, its parts belong to other features, or it cannot be written.
        ExportError: The suffix of ``out`` is unknown, or pyarrow is missing.
        DataError: None of the images can be read.
        WeightsError: Features are not finite.
    """
    write, companions = _writer(out, patches)
    parts = out.with_name(f".{out.name}.parts")
    dim, grid = network.embed_dim, reading["size"] // network.patch_size
    plan = {
        "weights": _sum_of(network),
        "images": source.fingerprint(),
        "reading": {key: value for key, value in sorted(reading.items()) if key not in ("device", "num_workers")},
        "patches": patches,
    }
    plan = json.loads(json.dumps(plan, default=str))
    whole = _claim(parts, out, plan)

    image_bytes = 4 * dim * (grid * grid if patches else 1)
    batch = max(1, min(_BATCH, _PART_BYTES // image_bytes))
    length = batch * max(1, min(_PART_IMAGES, _PART_BYTES // image_bytes) // batch)
    total = len(source)
    count = -(-total // length)
    done = 0 if whole else next((i for i in range(count) if not _file(parts, i).exists()), count)
    if not whole:
        on_progress(min(done * length, total), total)
        indices = range(done * length, total)
        found = stream(network, source, indices, **{**reading, "batch_size": batch})
        for number in range(done, count):
            pieces = [next(found) for _ in range(-(-min(length, total - number * length) // batch))]
            _save_part(_file(parts, number), pieces, dim, grid * grid if patches else None)
            on_progress(min((number + 1) * length, total), total)

    kept, skipped = _summary(parts, count)
    if not kept:
        _remove(parts)
        told = by_reason((0, one.name, one.reason) for one in skipped)
        raise DataError(f"none of the {total} images can be read{': ' * bool(told)}{told}")
    if not whole:
        layout = _Layout(kept, dim, grid * grid if patches else None, (meaning or {}) | {"grid": [grid, grid]})
        with written_aside(out) as aside:
            write(aside, (_load_part(_file(parts, i), source) for i in range(count)), layout)
            if skipped:
                text = "".join(f"{in_table(s.name)}\t{_line(s.reason)}\n" for s in skipped)
                _beside(aside, ".skipped.txt").write_text(text, encoding="utf-8")
    _remove(parts)
    ends = [*companions, *([".skipped.txt"] if skipped else [])]
    return Embedded(out, kept, skipped, (out, *(_beside(out, end) for end in ends)))


def embedded_in_words(result: Embedded) -> str:
    """Describe in lines for a terminal what was written, and which images could not be read."""
    lines = [f"{', '.join(map(str, result.files))}: {result.images:,} images"]
    if result.skipped:
        first = result.skipped[0]
        lines.append(f"{len(result.skipped):,} could not be read and have no row, first {first.name}: {first.reason}")
    return "\n".join(lines)


class Progress:
    """Progress of ``write_features``: a bar on a terminal, or else a line every few seconds."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bar = progress.Progress(
            progress.TextColumn("images"),
            progress.MofNCompleteColumn(),
            progress.BarColumn(bar_width=None),
            progress.TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None)
        self._begun: tuple[float, int] | None = None  # time of the first call, and number of images done by then
        self._last_line = -math.inf

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._bar.stop()
        if kind is KeyboardInterrupt and self._begun:
            self._console.print("Stopped. Run the same command again to continue.")

    def __call__(self, done: int, total: int) -> None:
        self._bar.update(self._task, completed=done, total=total)
        now = time.monotonic()
        started, before = self._begun = self._begun or (now, done)
        if self._console.is_terminal or (now - self._last_line < _LINE_SECONDS and done < total):
            return
        self._last_line = now
        rate = f"  {(done - before) / (now - started):.0f} images/s" if done > before else ""
        self._console.print(f"{done:,}/{total:,} images{rate}", highlight=False)


def _writer(out: Path, patches: bool) -> tuple[_Writer, list[str]]:
    """Return the function that writes this kind of file, and the name endings of the files that it writes beside it."""
    if out.suffix == ".npy":
        return _write_npy, [".names.txt", *([".patches.npy"] if patches else [])]
    if out.suffix != ".parquet":
        raise ExportError(f"{out}: expected a file name that ends in {' or '.join(SUFFIXES)}")
    try:
        importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise ExportError(
            "a .parquet file needs the package pyarrow: pip install 'dinoforge[parquet]', or choose a .npy file"
        ) from error
    return _write_parquet, []


def _remove(parts: Path) -> None:
    """Delete the folder of parts; rename it first, so that no process finds it with only some of its files."""
    gone = parts.with_suffix(".deleted")
    parts.rename(gone)
    shutil.rmtree(gone)


def _claim(parts: Path, out: Path, plan: dict[str, Any]) -> bool:
    """Create the folder of parts, or check that it has this plan; return whether the file is already complete.

    Raises:
        RunError: The file exists already, or the folder holds parts of another plan.
    """
    shutil.rmtree(parts.with_suffix(".deleted"), ignore_errors=True)
    there: dict[str, Any] | None = None
    with suppress(OSError, ValueError):
        there = json.loads((parts / "plan.json").read_text(encoding="utf-8"))
    if out.exists():
        if there == plan:  # a process was killed after it had finished the file, before it deleted the parts
            shutil.rmtree(out.with_name(f".{out.name}.partial"), ignore_errors=True)
            return True
        raise RunError(f"{out} exists: choose another place with --out, or delete it if you no longer need it")
    if there is not None and there != plan:
        other = ", ".join(key for key in plan if there.get(key) != plan[key])
        raise RunError(
            f"{parts} holds a part of other features (different: {other}): choose another place with --out, or delete "
            "it if you no longer need it"
        )
    if there is None:
        write_text(parts / "plan.json", json.dumps(plan))
    return False


def _sum_of(network: VisionTransformer) -> str:
    """Compute the SHA-256 of a network's weights."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).flatten().numpy())
    return digest.hexdigest()


# Parts


def _file(parts: Path, number: int) -> Path:
    return parts / f"{number:08d}.safetensors"


def _save_part(
    file: Path, pieces: Sequence[tuple[list[int], Any, list[Skipped]]], dim: int, patches: int | None
) -> None:
    found = [tokens for _, tokens, _ in pieces if tokens is not None]
    tensors = {
        "index": torch.tensor([i for kept, _, _ in pieces for i in kept], dtype=torch.int64),
        "cls": torch.cat([torch.empty(0, dim), *(tokens.cls for tokens in found)]),
    }
    if patches is not None:
        tensors["patches"] = torch.cat([torch.empty(0, patches, dim), *(tokens.patches for tokens in found)])
    skipped = [[s.name, s.reason] for _, _, unread in pieces for s in unread]
    header = {"skipped": json.dumps(skipped)}
    write_atomically(file, lambda temporary: save_tensors(tensors, temporary, header))


def _load_part(file: Path, source: Source) -> _Part:
    with _opened(file) as part:
        names = [source.name(index) for index in part.get_tensor("index").tolist()]
        patches = part.get_tensor("patches") if "patches" in part.keys() else None  # noqa: SIM118 (not a mapping)
        return _Part(names, part.get_tensor("cls"), patches)


def _summary(parts: Path, count: int) -> tuple[int, list[Skipped]]:
    """Count the rows of all parts, and collect the unreadable images."""
    kept, skipped = 0, []
    for number in range(count):
        with _opened(_file(parts, number)) as part:
            kept += part.get_slice("index").get_shape()[0]
            skipped += [Skipped(*pair) for pair in json.loads(part.metadata()["skipped"])]
    return kept, skipped


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise RunError(f"{file} is damaged ({error}): delete it, and run the same command again") from error


# Files


def _beside(path: Path, end: str) -> Path:
    return path.with_name(path.stem + end)


def _line(text: str) -> str:
    """Escape a text for one cell of a table; ``dinoforge.data.names.original_name`` restores it."""
    return in_table(printable(text))


def _write_npy(path: Path, parts: Iterator[_Part], layout: _Layout) -> None:
    shapes: dict[str, tuple[int, ...]] = {"cls": (layout.images, layout.dim)}
    if layout.patches is not None:
        shapes["patches"] = (layout.images, layout.patches, layout.dim)
    places = {"cls": path, "patches": _beside(path, ".patches.npy")}
    arrays = {key: open_memmap(places[key], "w+", np.float32, shape) for key, shape in shapes.items()}
    row = 0
    with _beside(path, ".names.txt").open("w", encoding="utf-8") as names:
        for part in parts:
            names.writelines(f"{_line(name)}\n" for name in part.names)
            for key, array in arrays.items():
                array[row : row + len(part.names)] = getattr(part, key).numpy()
            row += len(part.names)
    for array in arrays.values():
        array.flush()
    assert row == layout.images


def _write_parquet(path: Path, parts: Iterator[_Part], layout: _Layout) -> None:
    pyarrow = importlib.import_module("pyarrow")
    row = partial(pyarrow.list_, pyarrow.float32())
    columns = {"name": pyarrow.string(), "cls": row(layout.dim)}
    if layout.patches is not None:
        columns["patches"] = row(layout.patches * layout.dim)
    schema = pyarrow.schema(columns, metadata={"dinoforge": json.dumps(layout.meaning)})
    with pyarrow.parquet.ParquetWriter(path, schema, compression="zstd") as file:
        for group in _grouped(parts):
            arrays = [pyarrow.array([_line(name) for part in group for name in part.names], pyarrow.string())]
            for key in list(columns)[1:]:
                values = torch.cat([getattr(part, key) for part in group])
                arrays.append(
                    pyarrow.FixedSizeListArray.from_arrays(
                        pyarrow.array(values.flatten().numpy()), columns[key].list_size
                    )
                )
            file.write_table(pyarrow.Table.from_arrays(arrays, schema=schema))


def _grouped(parts: Iterator[_Part]) -> Iterator[list[_Part]]:
    """Collect parts into row groups of up to ``_PART_BYTES``; a reader reads a row group at once."""
    group: list[_Part] = []
    size = 0
    for part in parts:
        size_of = sum(t.nbytes for t in (part.cls, part.patches) if t is not None)
        if group and size + size_of > _PART_BYTES:
            yield group
            group, size = [], 0
        group.append(part)
        size += size_of
    if group:
        yield group
