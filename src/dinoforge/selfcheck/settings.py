"""The settings of a self-check."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Settings:
    """
    Args:
        device: One of ``auto``, ``cpu``, ``cuda``, ``cuda:N`` and ``mps``.
        nproc: Number of ranks to start, ``auto`` for one on each GPU, or None for no ranks.
        short: Whether to leave out what takes long on a CPU.
        folder: A folder for images, runs and output, which whoever made it empties.
    """

    device: str
    nproc: str | None
    short: bool
    folder: Path

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"folder": str(self.folder)}

    @classmethod
    def from_json(cls, read: dict[str, Any]) -> "Settings":
        return cls(**(read | {"folder": Path(read["folder"])}))
