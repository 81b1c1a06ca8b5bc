"""Exports that are verified when they are made: the target library's outputs beside ours."""

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
"""Largest difference in float32, of outputs up to 1; of larger ones, as a share of the largest."""


@dataclass(frozen=True)
class Check:
    """A comparison at one size."""

    size: Size
    difference: float  # the largest, of cls and patch tokens
    scale: float  # the largest output
    same_rule: bool  # false: the library resamples position embeddings otherwise, so the difference is only told


@dataclass(frozen=True)
class Exported:
    """What was made, and how near it is."""

    path: Path
    library: str
    shown: str  # on which images
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
    """Writes a backbone in a library's format and compares that library's outputs with ours.

    Nothing is at ``out`` unless they agree.

    Args:
        backbone: in evaluation mode, on the CPU.
        to: a key of ``FORMATS``.
        out: file or folder that is not there yet.
        images: normalised images [B, C, H, W] of a size, to compare on.
        shown: what they are.
        size: at which to compare besides the usual ones; with ``bake``, the only one.
        bake: whether position embeddings are made for ``size``, or for the size of training without one.

    Raises:
        ExportError: an unknown format or size, a network that the format cannot hold, a missing package, or outputs
            that differ.
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
    """At which sizes to compare: that of the position embeddings, the given one, a larger and an oblong one."""
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


def exported_in_words(report: Exported) -> str:
    """The report as lines for a terminal."""
    lines = [f"{report.path}: the largest difference from {report.library}, of cls and patch tokens, on {report.shown}"]
    for check in report.checks:
        other = "" if check.same_rule else "  position embeddings are resampled by another rule there"
        lines.append(f"  {_written(check.size):<12} {check.difference:.1e}{other}")
    if any(not check.same_rule for check in report.checks):
        lines.append("  For another size without that difference: --bake --size N")
    return "\n".join([*lines, *(f"  {note}" for note in report.notes)])
