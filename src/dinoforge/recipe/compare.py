"""The differences of two recipes, in words.

Nothing here imports torch.
"""

import dataclasses
import textwrap
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dinoforge.recipe.schema import Recipe, differences

Part = Literal["method", "augmentation", "sizes and lengths", "running"]

_WIDTH = 116  # columns of the terminal for the table


@dataclass(frozen=True)
class Row:
    """One difference."""

    part: Part
    what: str
    keys: list[str]  # the keys that it comes from
    first: str
    second: str


@dataclass(frozen=True)
class _Aspect:
    """Something that recipes may do differently: the keys that decide it, and what they decide, in words."""

    part: Part
    what: str
    keys: str
    words: Callable[[Recipe], str]


def compare(first: Recipe, second: Recipe) -> list[Row]:
    """The differences of two recipes, method first. Every key that differs stands in a row.

    A key that no sentence shows (because the recipes' other choices leave it without effect, or because it is not
    about the method) gets a row of its own, with its name and its values.
    """
    left = differences(first, second)
    rows: list[Row] = []
    shown: set[str] = set()
    for aspect in _ASPECTS:
        words = aspect.words(first), aspect.words(second)
        keys = [key for key in aspect.keys.split() if key in left]
        if words[0] != words[1]:
            rows.append(Row(aspect.part, aspect.what, keys, *words))
            shown |= {key for key in keys if _shows(aspect, key, first, second)}
    for key, values in left.items():
        if key not in shown:
            part: Part = next((a.part for a in _ASPECTS if key in a.keys.split()), "running")
            rows.append(Row(part, key, [key], *map(_plain, values)))
    parts = typing.get_args(Part)
    return sorted(rows, key=lambda row: parts.index(row.part))


def _shows(aspect: _Aspect, key: str, first: Recipe, second: Recipe) -> bool:
    """Whether the aspect's words would be others if this key alone were the other recipe's."""
    return any(aspect.words(_taking(key, a, b)) != aspect.words(a) for a, b in ((first, second), (second, first)))


def _taking(key: str, recipe: Recipe, other: Recipe) -> Recipe:
    """``recipe`` with one value of ``other``."""
    section, dot, name = key.partition(".")
    if not dot:
        return dataclasses.replace(recipe, **{key: getattr(other, key)})
    changed = dataclasses.replace(getattr(recipe, section), **{name: getattr(getattr(other, section), name)})
    return dataclasses.replace(recipe, **{section: changed})


def differences_json(rows: Sequence[Row], names: tuple[str, str]) -> dict[str, Any]:
    """The table as plain values."""
    return {"recipes": list(names), "differences": [vars(row) for row in rows]}


def differences_text(rows: Sequence[Row], names: tuple[str, str]) -> str:
    """The table as text."""
    if not rows:
        return f"{names[0]} and {names[1]} do the same."
    what = max(len(row.what) for row in rows)
    column = (_WIDTH - what - 4) // 2
    lines = _cells(["", *names], [what, column, column])
    for part in dict.fromkeys(row.part for row in rows):
        lines += ["", part.upper()]
        for row in rows:
            if row.part == part:
                lines += _cells([row.what, row.first, row.second], [what, column, column])
    return "\n".join(lines)


def _cells(texts: Sequence[str], widths: Sequence[int]) -> list[str]:
    """A row of the table, each cell wrapped to its column."""
    columns = [textwrap.wrap(text, width) or [""] for text, width in zip(texts, widths, strict=True)]
    height = max(map(len, columns))
    padded = [c + [""] * (height - len(c)) for c in columns]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in zip(*padded, strict=True)
    ]


# Words. Each function says all that its keys decide, and nothing about keys without effect.


def _targets(loss: Literal["dino", "ibot"]) -> Callable[[Recipe], str]:
    def words(r: Recipe) -> str:
        section = getattr(r, loss)
        if not section.loss_weight:
            return "none, the loss is off"
        if (section.targets or r.train.centering) == "centering":
            return f"centering, with a running mean of momentum {_number(section.center_momentum)}"
        return f"Sinkhorn-Knopp, {_count(r.train.sinkhorn_iterations, 'iteration')}"

    return words


def _masks(r: Recipe) -> str:
    i = r.ibot
    low, high = i.mask_ratio_min_max
    if not i.mask_sample_probability:
        return "none"
    share = "every crop" if i.mask_sample_probability == 1 else f"{_share(i.mask_sample_probability)} of the crops"
    ratio = f"fixed ratio {_number(low)}" if low == high else f"ratio {_number(low)}–{_number(high)} in bins"
    if i.mask_kind == "bernoulli":
        return f"per token, {ratio}, on {share}"
    blocks = ""
    if (i.mask_min_patches, i.mask_min_aspect) != (4, 0.3):  # the reference's
        aspect = _number(i.mask_min_aspect)
        blocks = f"; blocks from {_count(i.mask_min_patches, 'patch')}, aspect {aspect} to 1/{aspect}"
    return f"block-wise, {ratio}, on {share}{blocks}"


def _losses(r: Recipe) -> str:
    d = r.dino
    parts = {"global": d.global_loss_weight, "local": d.local_loss_weight}
    weights = {
        "DINO": d.loss_weight,
        "iBOT": r.ibot.loss_weight,
        "KoLeo": d.koleo_loss_weight,
    }
    said = []
    for name, weight in weights.items():
        text = f"{name} × {_number(weight)}" if weight else f"no {name}"
        if name == "DINO" and weight and set(parts.values()) != {1.0}:
            text += f" ({', '.join(f'{part} × {_number(w)}' for part, w in parts.items())})"
        said.append(text)
    return ", ".join(said)


def _student_temps(r: Recipe) -> str:
    return f"{_number(r.dino.student_temp)} for cls tokens, {_number(r.ibot.student_temp)} for patches"


def _heads(r: Recipe) -> str:
    def head(section: Any) -> str:
        layers = f"{_count(section.head_nlayers, 'layer')} of width {section.head_hidden_dim:,}"
        return f"{layers}, bottleneck {section.head_bottleneck_dim}, {section.head_n_prototypes:,} prototypes"

    if r.ibot.separate_head:
        return f"one for each loss: cls {head(r.dino)}; patches {head(r.ibot)}"
    return f"one for both losses: {head(r.dino)}"


def _freeze(r: Recipe) -> str:
    o = r.optim
    length = _length(r, o.freeze_last_layer_length, o.freeze_last_layer_epochs)
    how = {
        "lr": "by a learning rate of 0, AdamW's moments go on",
        "gradient": "by dropping its gradient, AdamW's moments stand still",
    }
    return f"{how[o.freeze_last_layer]}; {length}"


def _freeze_backbone(r: Recipe) -> str:
    length = r.optim.freeze_backbone_length
    return f"only heads learn for {length}, then a warm-up of its own" if length else "none"


def _layer_decay(r: Recipe) -> str:
    d = r.optim.layerwise_decay
    return "none, one learning rate for all layers" if d == 1 else f"× {_number(d)} for each block below the top"


def _weight_decay(r: Recipe) -> str:
    o = r.optim
    scheduled = f"{_number(o.weight_decay)} → {_number(o.weight_decay_end)}"
    scope = "in backbone and heads" if o.weight_decay_scope == "all" else "in the backbone, heads 0.01, AdamW's default"
    return f"{scheduled} {scope}; 0 for biases, norms and LayerScale"


def _momentum(r: Recipe) -> str:
    t = r.teacher
    frozen = t.frozen_momentum_teacher
    held = "" if frozen is None else f"; {_number(frozen)} while the backbone is frozen"
    return f"{_number(t.momentum_teacher)} → {_number(t.final_momentum_teacher)}{held}"


def _teacher_temp(r: Recipe) -> str:
    t = r.teacher
    if t.warmup_teacher_temp == t.teacher_temp:
        return f"{_number(t.teacher_temp)}, constant"
    length = _length(r, t.warmup_teacher_temp_length, t.warmup_teacher_temp_epochs)
    return f"{_number(t.warmup_teacher_temp)} → {_number(t.teacher_temp)}, linear over {length}"


def _learning_rate(r: Recipe) -> str:
    o = r.optim
    rule = "for a batch of 1,024, × √(batch / 1024)" if o.scaling_rule == "sqrt_wrt_1024" else "for any batch"
    return f"{_number(o.base_lr)} {rule}, cosine to {_number(o.min_lr)}"


def _clipping(r: Recipe) -> str:
    limit = r.optim.clip_grad
    return f"norm {_number(limit)} for each sub-network" if limit else "none"


def _drop_path(r: Recipe) -> str:
    s = r.student
    if not s.drop_path_rate:
        return "none"
    return f"{_number(s.drop_path_rate)} " + ("in every block" if s.drop_path_uniform else "in the last, rising from 0")


def _crops(r: Recipe) -> str:
    c = r.crops
    low, high = (_number(a) for a in c.aspect_ratio)
    local = f", {c.local_crops_number} local of {_range(c.local_crops_scale)}" if c.local_crops_number else ""
    return f"2 global of {_range(c.global_crops_scale)} of the image{local}; aspect {low} to {high}"


def _flips(r: Recipe) -> str:
    a = r.augment
    turned = f"; {_share(a.quarter_turns)} of the crops turned by 90, 180 or 270 degrees" if a.quarter_turns else ""
    return f"horizontal {_share(a.horizontal_flip)}, vertical {_share(a.vertical_flip)}{turned}"


def _jitter(r: Recipe) -> str:
    a = r.augment
    strengths = ", ".join(f"{n} {_number(getattr(a, n))}" for n in ("brightness", "contrast", "saturation", "hue"))
    return f"{strengths}, on {_share(a.jitter_probability)} of the crops" if a.jitter_probability else "none"


def _blur(r: Recipe) -> str:
    a = r.augment
    released = {"released": (0.0, 0.9, 0.5), "stated": (1.0, 0.1, 0.5)}  # as in data/crops.py; tested
    probabilities = ", ".join(map(_share, a.blur_probability or released[a.blur]))
    return (
        f"on {probabilities} of first global, second global and local crops; sigma {_range(a.blur_sigma)}, "
        f"{a.blur_kernel} pixels wide"
    )


def _solarize(r: Recipe) -> str:
    a = r.augment
    if not a.solarize_probability:
        return "none"
    return f"above {a.solarize_threshold}, on {_share(a.solarize_probability)} of second global crops"


def _values(r: Recipe) -> str:
    d = r.data
    mean, std = (", ".join(map(_number, v)) for v in (d.mean, d.std))
    found = f"{d.sixteen_bit} range" if d.range is None else f"range {', '.join(f'{x:g}' for x in d.range)}"
    rest = {"no data": d.nodata, "filled with": d.fill or None, "plane": d.plane}
    more = "".join(f", {name} {value}" for name, value in rest.items() if value is not None)
    return f"mean {mean}, standard deviation {std}; values above 8 bits: {found}{more}"


def _architecture(r: Recipe) -> str:
    s = r.student
    given = {"width": s.embed_dim, "blocks": s.depth, "heads": s.num_heads}
    sizes = "".join(f", {name} {value}" for name, value in given.items() if value is not None)
    layer = {"mlp": "MLP", "swiglu": "SwiGLU", "swiglufused": "SwiGLU"}[s.ffn_layer]
    biases = {"qkv": s.qkv_bias, "projection": s.proj_bias, "feed-forward": s.ffn_bias}
    without = [name for name, has in biases.items() if not has]
    return f"{s.arch}{sizes}, {layer} of ratio {_number(s.mlp_ratio)}, {_count(s.num_register_tokens, 'register')}" + (
        f", no biases in {', '.join(without)}" if without else ""
    )


def _layerscale(r: Recipe) -> str:
    return f"starts at {_number(r.student.layerscale)}" if r.student.layerscale else "none"


def _resolution(r: Recipe) -> str:
    c, p = r.crops, r.student.patch_size
    local = f", local {c.local_crops_size}²" if c.local_crops_number else ""
    return f"global {c.global_crops_size}²{local} pixels, patch {p}, {_count(r.student.in_chans, 'channel')}"


def _positions(r: Recipe) -> str:
    s = r.student
    offset = f"offset {_number(s.interpolate_offset)}" if s.interpolate_offset else "to the size of the grid"
    return f"bicubic, {offset}, {'with' if s.interpolate_antialias else 'without'} antialiasing"


def _run_length(r: Recipe) -> str:
    if r.train.steps is not None:
        return f"{r.train.steps:,} steps"
    if r.train.epochs is not None:
        return f"{_number(r.train.epochs)} epochs of your images"
    return _nominal(r, r.optim.epochs)


def _length(r: Recipe, text: str | None, epochs: float) -> str:
    if text is None:
        return _nominal(r, epochs)
    return f"{text} of the run" if text.strip().endswith("%") else text


def _nominal(r: Recipe, epochs: float) -> str:
    steps = round(epochs * r.train.OFFICIAL_EPOCH_LENGTH)
    return f"{steps:,} steps ({_number(epochs)} nominal epoch{'' if epochs == 1 else 's'})"


def _range(values: Sequence[float]) -> str:
    return "–".join(map(_number, values))


def _share(value: float) -> str:
    return "half" if value == 0.5 else f"{_number(100 * value)} %"


def _number(value: float) -> str:
    return f"{value:.6g}"


def _count(number: int, thing: str) -> str:
    plural = f"{thing}es" if thing.endswith("h") else f"{thing}s"
    return f"{number} {thing if number == 1 else plural}"


def _plain(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "not set" if value is None else str(value)


_EPOCH = "train.OFFICIAL_EPOCH_LENGTH"
_ASPECTS = (
    _Aspect(
        "method",
        "targets of cls tokens",
        "dino.loss_weight train.centering dino.targets dino.center_momentum train.sinkhorn_iterations",
        _targets("dino"),
    ),
    _Aspect(
        "method",
        "targets of patches",
        "ibot.loss_weight train.centering ibot.targets ibot.center_momentum train.sinkhorn_iterations",
        _targets("ibot"),
    ),
    _Aspect(
        "method",
        "masks",
        "ibot.mask_kind ibot.mask_ratio_min_max ibot.mask_sample_probability ibot.mask_min_patches "
        "ibot.mask_min_aspect",
        _masks,
    ),
    _Aspect(
        "method",
        "losses",
        "dino.loss_weight dino.global_loss_weight dino.local_loss_weight ibot.loss_weight dino.koleo_loss_weight",
        _losses,
    ),
    _Aspect("method", "temperature of the student", "dino.student_temp ibot.student_temp", _student_temps),
    _Aspect(
        "method",
        "heads",
        "ibot.separate_head dino.head_n_prototypes dino.head_bottleneck_dim dino.head_nlayers dino.head_hidden_dim "
        "ibot.head_n_prototypes ibot.head_bottleneck_dim ibot.head_nlayers ibot.head_hidden_dim",
        _heads,
    ),
    _Aspect(
        "method",
        "freeze of the last layer",
        f"optim.freeze_last_layer optim.freeze_last_layer_epochs optim.freeze_last_layer_length {_EPOCH}",
        _freeze,
    ),
    _Aspect("method", "freeze of the backbone", "optim.freeze_backbone_length", _freeze_backbone),
    _Aspect("method", "layer-wise decay", "optim.layerwise_decay", _layer_decay),
    _Aspect(
        "method",
        "patch embedding",
        "optim.patch_embed_lr_mult",
        lambda r: f"learning rate × {_number(r.optim.patch_embed_lr_mult)}",
    ),
    _Aspect(
        "method",
        "weight decay",
        "optim.weight_decay optim.weight_decay_end optim.weight_decay_scope",
        _weight_decay,
    ),
    _Aspect(
        "method",
        "momentum of the teacher",
        "teacher.momentum_teacher teacher.final_momentum_teacher teacher.frozen_momentum_teacher",
        _momentum,
    ),
    _Aspect(
        "method",
        "temperature of the teacher",
        "teacher.warmup_teacher_temp teacher.teacher_temp teacher.warmup_teacher_temp_epochs "
        f"teacher.warmup_teacher_temp_length {_EPOCH}",
        _teacher_temp,
    ),
    _Aspect("method", "learning rate", "optim.base_lr optim.scaling_rule optim.min_lr", _learning_rate),
    _Aspect("method", "gradient clipping", "optim.clip_grad", _clipping),
    _Aspect(
        "method",
        "betas of AdamW",
        "optim.adamw_beta1 optim.adamw_beta2",
        lambda r: f"{_number(r.optim.adamw_beta1)}, {_number(r.optim.adamw_beta2)}",
    ),
    _Aspect("method", "stochastic depth", "student.drop_path_rate student.drop_path_uniform", _drop_path),
    _Aspect("method", "LayerScale", "student.layerscale", _layerscale),
    _Aspect(
        "augmentation",
        "crops",
        "crops.global_crops_scale crops.local_crops_scale crops.local_crops_number crops.aspect_ratio",
        _crops,
    ),
    _Aspect("augmentation", "flips", "augment.horizontal_flip augment.vertical_flip augment.quarter_turns", _flips),
    _Aspect(
        "augmentation",
        "colour jitter",
        "augment.brightness augment.contrast augment.saturation augment.hue augment.jitter_probability",
        _jitter,
    ),
    _Aspect(
        "augmentation",
        "grayscale",
        "augment.grayscale_probability",
        lambda r: f"{_share(r.augment.grayscale_probability)} of the crops",
    ),
    _Aspect(
        "augmentation",
        "blur",
        "augment.blur augment.blur_probability augment.blur_sigma augment.blur_kernel",
        _blur,
    ),
    _Aspect("augmentation", "solarize", "augment.solarize_probability augment.solarize_threshold", _solarize),
    _Aspect(
        "augmentation",
        "pixel values",
        "data.mean data.std data.range data.sixteen_bit data.nodata data.fill data.plane",
        _values,
    ),
    _Aspect(
        "sizes and lengths",
        "network",
        "student.arch student.embed_dim student.depth student.num_heads student.mlp_ratio student.ffn_layer "
        "student.num_register_tokens student.qkv_bias student.proj_bias student.ffn_bias",
        _architecture,
    ),
    _Aspect(
        "sizes and lengths",
        "resolution",
        "crops.global_crops_size crops.local_crops_size crops.local_crops_number student.patch_size student.in_chans",
        _resolution,
    ),
    _Aspect(
        "sizes and lengths",
        "position embeddings",
        "student.interpolate_antialias student.interpolate_offset",
        _positions,
    ),
    _Aspect(
        "sizes and lengths",
        "batch",
        "train.batch_size_per_gpu",
        lambda r: f"{_count(r.train.batch_size_per_gpu, 'image')} per process",
    ),
    _Aspect("sizes and lengths", "run", f"train.steps train.epochs optim.epochs {_EPOCH}", _run_length),
    _Aspect(
        "sizes and lengths",
        "warm-up",
        f"optim.warmup_epochs optim.warmup_length {_EPOCH}",
        lambda r: _length(r, r.optim.warmup_length, r.optim.warmup_epochs),
    ),
)
