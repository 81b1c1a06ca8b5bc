"""DINOv2 pretraining of vision transformers on one's own images.

``train``, ``load``, ``embed``, ``inspect`` and ``read_image`` are imported when they are first used, so that importing
the package costs nothing.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "embed", "inspect", "load", "read_image", "train"]

if TYPE_CHECKING:
    from dinoforge.api import embed, inspect, load, read_image, train


def __getattr__(name: str) -> Any:
    if name in ("embed", "inspect", "load", "read_image", "train"):
        from dinoforge import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
