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
    """What images are, and what training would make of them, from a bounded sample; see docs/inspect.md.

    Args:
        images: as for ``train``.
        labels: a CSV file with names and labels; by default the names of sub-folders.
        report: an HTML page to write, with crops as the network sees them.
        sample: images that are looked at, at most.
        seconds: that looking may take; listing a folder comes on top.
        keys: recipe keys, as for ``train``; what they do not say is as recipe ``auto`` chooses it.

    Raises:
        DataError: no images, or no folder. What is wrong with some of them is a finding.
        RecipeError: a key or value that cannot be.
        RunError: the page cannot be written.
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
