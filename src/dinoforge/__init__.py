"""DINOv2 pretraining of vision transformers on one's own images.

The functions below are imported when they are first used, so that importing the package costs nothing. Each command of
the command line has its function in ``dinoforge.commands``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dinoforge.version import __version__

if TYPE_CHECKING:
    from dinoforge.commands.backbone import load, read_image
    from dinoforge.commands.embed import embed
    from dinoforge.commands.inspect import inspect
    from dinoforge.commands.train import train

__all__ = ["__version__", "embed", "inspect", "load", "read_image", "train"]

_ROOMS = {"embed": "embed", "inspect": "inspect", "load": "backbone", "read_image": "backbone", "train": "train"}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"dinoforge.commands.{_ROOMS[name]}"), name)
