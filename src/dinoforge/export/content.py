"""The content of every export: weights under official names, for one image size."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinoforge.errors import ExportError
from dinoforge.models.vit import VisionTransformer
from dinoforge.weights.backbone import Backbone

Size = tuple[int, int]  # height and width in pixels
Rule = tuple[bool, float]  # antialias and offset of the resampling of position embeddings for another size
Outputs = tuple[Tensor, Tensor]  # cls tokens [B, D], patch tokens [B, N, D]


@dataclass(frozen=True)
class Content:
    """A backbone prepared for writing.

    Args:
        backbone: The backbone.
        tensors: The weights under official names, on the CPU.
        size: The image size that the position embeddings are for.
        fixed: Whether the position embeddings are for this size only.
    """

    backbone: Backbone
    tensors: dict[str, Tensor]
    size: Size
    fixed: bool

    @property
    def rule(self) -> Rule:
        """The rule by which our network resamples position embeddings."""
        network = self.backbone.network
        return network.interpolate_antialias, network.interpolate_offset


@dataclass(frozen=True)
class Format:
    """A library's format: how its files are written, and how the library reads them.

    Args:
        name: The name of the library.
        suffixes: The suffixes of its file names; none for a folder.
        square: Whether position embeddings have to be a square grid.
        rule: A function that returns the library's rule of resampling position embeddings; None if its files are for
            one size.
        write: A function that writes the file or folder, and returns lines for the user.
        open: A function that opens the file or folder as the library does, and returns its network on normalised images
            [B, C, H, W].
    """

    name: str
    suffixes: tuple[str, ...]
    square: bool
    rule: Callable[[Content], Rule | None]
    write: Callable[[Content, Path], list[str]]
    open: Callable[[Content, Path], Callable[[Tensor], Outputs]]


def make_content(backbone: Backbone, *, fixed: Size | None = None) -> Content:
    """Take a backbone's weights; with ``fixed``, resample position embeddings for images of that size."""
    network = backbone.network
    tensors = {name: t.detach().cpu().contiguous() for name, t in network.state_dict().items()}
    if fixed is None:
        return Content(backbone, tensors, native_size(backbone), fixed=False)
    rows, columns = (side // network.patch_size for side in fixed)
    with torch.no_grad():
        tensors["pos_embed"] = torch.cat(network.position_embeddings(rows, columns), dim=1).cpu()
    return Content(backbone, tensors, fixed, fixed=True)


def native_size(backbone: Backbone) -> Size:
    """Return the image size for which position embeddings need no resampling."""
    side = int(backbone.architecture["image_size"])
    return side, side


def completed(content: Content) -> tuple[dict[str, Tensor], list[str]]:
    """Add zeros for missing biases and ones for missing LayerScale, for libraries that always expect them.

    Returns:
        The weights, and notes on what was added.
    """
    whole = {"qkv_bias": True, "proj_bias": True, "ffn_bias": True, "layerscale": 1.0}
    with torch.device("meta"):
        expected = VisionTransformer(**content.backbone.architecture | whole).state_dict()
    added = {
        name: torch.ones(t.shape) if name.endswith(".gamma") else torch.zeros(t.shape)
        for name, t in expected.items()
        if name not in content.tensors
    }
    notes = ["added, since it always has them: zeros for biases, ones for LayerScale"] if added else []
    return content.tensors | added, notes


def library(name: str) -> Any:
    """Import an optional package.

    Raises:
        ExportError: The package is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ExportError(f"this format needs the package {name}: pip install 'dinoforge[export]'") from error
