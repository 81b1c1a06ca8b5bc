"""The weights that a run starts with, and the recipe keys that their file sets."""

import inspect
import math
from typing import Any, cast

import torch

from dinoforge.errors import WeightsError
from dinoforge.method.dinov2 import StudentTeacher
from dinoforge.models.layers import Block
from dinoforge.models.vit import VisionTransformer
from dinoforge.recipe.load import load_recipe
from dinoforge.recipe.schema import Recipe, flatten
from dinoforge.weights.architecture import misfits
from dinoforge.weights.backbone import Backbone


def adopted(given: Backbone, recipe: Recipe) -> dict[str, Any]:
    """Collect the recipe values that ``init.architecture: file`` takes from a backbone, by the keys of ``ADOPTED``.

    The values describe the network and its images. Crops are as large as in the run that made the backbone, times
    ``init.enlarge``. For other files, the side of global crops is 224 pixels, or the image size of the position
    embeddings if that is smaller, and the side of local crops is 3/7 of it, as in the reference. With
    ``init.heads: run``, the sizes of the heads and the kinds and temperature of the targets are also taken from that
    run, or else from recipe ``small``.

    Args:
        given: The backbone.
        recipe: The recipe.
    """
    signature = inspect.signature(VisionTransformer).parameters
    network = {n: p.default for n, p in signature.items() if p.default is not p.empty} | given.architecture
    values = {f"student.{key}": network[key] for key in signature if key != "image_size"}
    values |= {"student.arch": "vit_custom"}
    values |= {f"data.{key}": getattr(given.image, key) for key in _OF_IMAGES}
    before = given.metadata.get("recipe") or {}
    sizes = before.get("crops", {})
    whole = sizes.get("global_crops_size", min(network["image_size"], _OFFICIAL_CROPS[0]))
    part = sizes.get("local_crops_size", whole * _OFFICIAL_CROPS[1] / _OFFICIAL_CROPS[0])
    patch = network["patch_size"]
    for key, side in (("global", whole), ("local", part)):
        values[f"crops.{key}_crops_size"] = max(patch, round(side * recipe.init.enlarge / patch) * patch)
    if recipe.init.heads == "run":
        known = flatten(load_recipe("small")[0])
        known |= {
            f"{section}.{key}": v
            for section in ("dino", "ibot", "train", "teacher")
            for key, v in before.get(section, {}).items()
        }
        values |= {key: known[key] for key in _OF_HEADS}
    assert values.keys() <= ADOPTED
    return values


_OF_IMAGES = ("mean", "std", "range", "sixteen_bit", "nodata", "fill", "plane")
_OFFICIAL_CROPS = (224, 96)  # global and local, in pixels
_OF_HEADS = {
    "train.centering",
    "teacher.teacher_temp",
    "ibot.separate_head",
    *(
        f"{section}.{key}"
        for section in ("dino", "ibot")
        for key in ("head_n_prototypes", "head_bottleneck_dim", "head_nlayers", "head_hidden_dim", "targets")
    ),
}
ADOPTED = {
    "student.arch",
    *(f"student.{key}" for key in inspect.signature(VisionTransformer).parameters if key != "image_size"),
    *(f"data.{key}" for key in _OF_IMAGES),
    *(f"crops.{key}_crops_size" for key in ("global", "local")),
    *_OF_HEADS,
}
"""The recipe keys that ``init.architecture: file`` can take from a file."""


def initialise(student_teacher: StudentTeacher, given: VisionTransformer, in_chans: str | None) -> list[str]:
    """Load the weights of a backbone into both backbones; the heads do not change.

    Args:
        student_teacher: The networks.
        given: The backbone to load. If it is for another image size, its position embeddings are resampled by its own
            rule.
        in_chans: How to load filters for another number of input channels. ``repeat``: repeat the given channels in
            turn; ``mean``: use their mean for every channel; both are scaled so that equal channels give the same sum.
            ``fresh``: keep random weights. None: refuse.

    Returns:
        Sentences that say what was reshaped.

    Raises:
        WeightsError: The weights do not fit; nothing was changed.
    """
    student = student_teacher.student.backbone
    tensors, expected = dict(given.state_dict()), student.state_dict()
    notes = []
    old, new = (math.isqrt(n.pos_embed.shape[1] - 1) for n in (given, student))
    if old != new:
        with torch.no_grad():
            tensors["pos_embed"] = torch.cat(given.position_embeddings(new, new), dim=1)
        notes.append(f"pos_embed resampled from {old} × {old} to {new} × {new} patches")
    rules = [(n.interpolate_antialias, n.interpolate_offset) for n in (given, student)]
    if rules[0] != rules[1]:
        notes.append(
            "position embeddings of other sizes: the file has antialias={}, offset={}, ".format(*rules[0])
            + "the recipe {}, {}: see student.interpolate_antialias, student.interpolate_offset".format(*rules[1])
        )
    filters = tensors["patch_embed.proj.weight"]  # [D, C, p, p]
    if filters.shape[1] != student.in_chans and in_chans is not None:
        scale = filters.shape[1] / student.in_chans
        if in_chans == "repeat":
            filters = filters[:, torch.arange(student.in_chans) % filters.shape[1]] * scale
        elif in_chans == "mean":
            filters = filters.mean(dim=1, keepdim=True).repeat(1, student.in_chans, 1, 1) * scale
        else:
            filters = expected["patch_embed.proj.weight"]
        tensors["patch_embed.proj.weight"] = filters
        notes.append(f"input channels from {given.in_chans} to {student.in_chans}: {in_chans}")
    wrong = misfits(tensors, expected)
    heads, wanted = (cast(Block, n.blocks[0]).attn.num_heads for n in (given, student))
    if heads != wanted:
        wrong.append(f"{heads} attention heads, expected {wanted}")
    if wrong:
        raise WeightsError(
            f"init.weights does not fit the recipe: {'; '.join(wrong)}. Set student.* to the architecture of the file"
            + ("" if given.in_chans == student.in_chans else ", or init.in_chans to repeat, mean or fresh")
        )
    if not student.pos_embed.is_meta:
        for networks in (student_teacher.student, student_teacher.teacher):
            networks.backbone.load_state_dict(tensors)
    return notes
