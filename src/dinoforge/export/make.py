"""Write exports, and verify each by comparing the library's outputs with ours."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dinoforge.errors import ExportError
from dinoforge.export.content import Content, Format, Outputs, Size, make_content, native_size
from dinoforge.export.hugging_face import HUGGING_FACE
from dinoforge.export.onnx import ONNX
from dinoforge.export.plain import OFFICIAL, SAFETENSORS
from dinoforge.export.timm import TIMM
from dinoforge.system.files import written_aside
from dinoforge.weights.backbone import Backbone

FORMATS = {"safetensors": SAFETENSORS, "official": OFFICIAL, "timm": TIMM, "hf": HUGGING_FACE, "onnx": ONNX}

TOLERANCE = 1e-4
"""The largest allowed difference in float32, for outputs up to 1; for larger outputs, as a share of the largest."""


@dataclass(frozen=True)
class Check:
    """A comparison at one size.

    Args:
        size: The size of the images.
        difference: The largest absolute difference of cls and patch tokens.
        scale: The largest absolute output.
        same_rule: Whether the library resamples position embeddings by our rule; otherwise the difference is reported,
            but no error.
    """

    size: Size
    difference: float
    scale: float
    same_rule: bool


@dataclass(frozen=True)
class Exported:
    """A finished export, and its differences from our outputs.

    Args:
        path: The file or folder.
        library: The name of the library.
        shown: A description of the images of the comparison.
        checks: The comparisons.
        notes: Lines for the user.
    """

    path: Path
    library: str
    shown: str
    checks: tuple[Check, ...]
    notes: tuple[str, ...]


def make(
    backbone: Backbone,
    to: str,
    out: Path,
    images: Callable[[Size], Tensor],
    *,
    shown: str = "given images",
    size: Size | None = None,
    bake: bool = False,
) -> Exported:
    """Write a backbone in a library's format, and compare that library's outputs with ours.

    The file or folder appears under its name only if the outputs agree.

    Args:
        backbone: A backbone in evaluation mode, on the CPU.
        to: The format, a key of ``FORMATS``.
        out: A file or folder that does not exist yet.
        images: A function that returns normalised images [B, C, H, W] of a size, for the comparison.
        shown: A description of the images of the comparison.
        size: An additional size of the comparison; with ``bake``, the only size.
        bake: Whether position embeddings are resampled to ``size``, by default the size of training.

    Raises:
        ExportError: The format or size is unknown, the format cannot hold the network, a package is missing, or
            outputs differ.
        RunError: ``out`` exists or cannot be written.
    """
    target = FORMATS.get(to)
    if target is None:
        raise ExportError(f"unknown format {to!r}: expected {', '.join(FORMATS)}")
    if target.suffixes and out.suffix not in target.suffixes:
        raise ExportError(f"{out}: expected a file name that ends in {' or '.join(target.suffixes)}")
    patch, native = backbone.network.patch_size, native_size(backbone)
    if size and (min(size) < patch or any(side % patch for side in size)):
        near = tuple(max(patch, round(side / patch) * patch) for side in size)
        raise ExportError(
            f"size {_written(size)} is not a multiple of the patch size {patch}: the nearest that is, is "
            f"{_written((near[0], near[1]))}"
        )
    content = make_content(backbone)
    if bake or target.rule(content) is None:
        content = make_content(backbone, fixed=size or native)
        if target.square and content.size[0] != content.size[1]:
            raise ExportError(
                f"{target.name} takes position embeddings of square images only, not of {_written(content.size)}: "
                "choose a square size, timm or onnx"
            )
    with written_aside(out) as aside:
        notes = target.write(content, aside)
        if (rule := backbone.image.rule) and target is not SAFETENSORS:
            notes.append(
                f"values: the network knows levels 0 to 255 as dinoforge.read_image(image, {rule}) gives them; "
                f"{target.name} does not scale values like that, so give it such levels"
            )
        run = target.open(content, aside)
        checks = [_compare(content, target, run, images(s), s) for s in _sizes(content, size)]
        for check in checks:
            if check.same_rule and not check.difference <= TOLERANCE * max(check.scale, 1):
                raise ExportError(
                    f"{target.name} gives other outputs at {_written(check.size)}: they differ by up to "
                    f"{check.difference:.1e}, of outputs up to {check.scale:.1e}. Nothing was written"
                )
    return Exported(out, target.name, shown, tuple(checks), tuple(notes))


def _sizes(content: Content, size: Size | None) -> list[Size]:
    """List the sizes of the comparison: that of the position embeddings, the given, a larger and an oblong size."""
    if content.fixed:
        return [content.size]
    side, patch = content.size[0], content.backbone.network.patch_size
    larger = side + 2 * patch
    return list(dict.fromkeys([content.size, *([size] if size else []), (larger, larger), (side, larger)]))


def _compare(content: Content, target: Format, run: Callable[[Tensor], Outputs], images: Tensor, size: Size) -> Check:
    assert tuple(images.shape[-2:]) == size
    with torch.no_grad():
        tokens = content.backbone.network(images)
        pairs = list(zip((tokens.cls, tokens.patches), run(images), strict=True))
    if wrong := [(list(o.shape), list(t.shape)) for o, t in pairs if o.shape != t.shape]:
        raise ExportError(f"{target.name} gives outputs of shape {wrong[0][1]}, expected {wrong[0][0]}")
    difference = torch.stack([(ours - theirs).abs().max() for ours, theirs in pairs]).max()
    scale = torch.stack([ours.abs().max() for ours, _ in pairs]).max()
    same_rule = size == content.size or content.fixed or target.rule(content) == content.rule
    return Check(size, float(difference), float(scale), same_rule)


def _written(size: Size) -> str:
    return f"{size[0]} × {size[1]}"


def exported_in_words(made: Exported) -> str:
    """Describe an export in lines for a terminal, with the differences from our outputs."""
    lines = [f"{made.path}: the largest difference from {made.library}, of cls and patch tokens, on {made.shown}"]
    for check in made.checks:
        other = "" if check.same_rule else "  position embeddings are resampled by another rule there"
        lines.append(f"  {_written(check.size):<12} {check.difference:.1e}{other}")
    if any(not check.same_rule for check in made.checks):
        lines.append("  For another size without that difference: --bake --size N")
    return "\n".join([*lines, *(f"  {note}" for note in made.notes)])
