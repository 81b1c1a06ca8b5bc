"""Look at images before training."""

from pathlib import Path
from typing import Any

from dinoforge.commands.given import flat_keys
from dinoforge.data.preflight import refuse_second_start
from dinoforge.inspection import page as inspection_pages
from dinoforge.inspection import run as inspections
from dinoforge.inspection.result import Inspection
from dinoforge.system.files import write_text


def inspect(
    images: Any,
    *,
    labels: str | Path | None = None,
    report: str | Path | None = None,
    sample: int = inspections.IMAGES,
    seconds: float = inspections.SECONDS,
    **keys: Any,
) -> Inspection:
    """Inspect a bounded sample of images, and what training would make of them; see docs/inspect.md.

    Args:
        images: The images, as for ``train``.
        labels: A CSV file with names and labels; by default, the names of sub-folders.
        report: An HTML page to write, with crops as the network sees them.
        sample: The maximum number of images to read.
        seconds: The time limit for reading images; listing a folder takes additional time.
        keys: The recipe keys, as for ``train``; recipe ``auto`` chooses the values of all other keys.

    Raises:
        DataError: There are no images, or no folder. Problems of single images are findings instead.
        RecipeError: A key or value is invalid.
        RunError: The page cannot be written.
    """
    refuse_second_start()
    found = inspections.inspect(
        images,
        labels=labels,
        keys=flat_keys(keys),
        images=sample,
        seconds=seconds,
        with_crops=report is not None,
    )
    if report is not None:
        write_text(Path(report), inspection_pages.page(found))
    return found
