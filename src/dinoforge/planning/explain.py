"""An explanation of a recipe: what it does to every parameter at a step, its schedules, masks, work and memory."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from dinoforge.builders.lengths import RunLength, build_schedules, run_length, with_batch_cut
from dinoforge.builders.networks import build_optimizer, build_student_teacher
from dinoforge.errors import DinoforgeError, RecipeError
from dinoforge.optim.param_groups import UNREGULARISED, set_hyperparameters
from dinoforge.optim.schedules import Schedules
from dinoforge.planning.memory import estimate
from dinoforge.planning.work import Masks, Work, measure_masks, work_of_a_step
from dinoforge.recipe.schema import Recipe
from dinoforge.system.device import resolve_device, resolve_precision
from dinoforge.system.terminal import table

IMAGENET_1K = 1_281_167  # images
_POINTS = 49  # points of each schedule in JSON


@dataclass(frozen=True)
class Group:
    """A parameter group of AdamW at one step."""

    module: str
    rule: str
    params: list[str]  # official names inside the module
    lr: float
    weight_decay: float
    lr_multiplier: float
    wd_multiplier: float
    last_layer: bool


@dataclass(frozen=True)
class Explanation:
    """Everything ``dinoforge explain`` says."""

    recipe: Recipe
    length: RunLength
    step: int
    groups: list[Group]
    sizes: list[int]  # values in each group
    schedules: Schedules
    masks: Masks
    work: list[Work]
    memory: dict[str, float]  # estimated bytes of one process, by part
    compute: str  # device and precision that the memory is estimated for

    @property
    def processes(self) -> int:
        return self.length.batch_size // (self.recipe.train.batch_size_per_gpu * self.recipe.train.accumulate)


def explain(
    recipe: Recipe, *, images: int = IMAGENET_1K, batch: int | None = None, step: int | Literal["last"] = 0
) -> Explanation:
    """Explains a recipe through the functions that training uses, on the ``meta`` device: no weights are allocated.

    Args:
        recipe: The recipe.
        images: Number of images in the data set.
        batch: Images in a step over all processes. A multiple of ``train.batch_size_per_gpu`` means that many
            processes; anything else is one process with that batch.
        step: The step to explain, from 0; or ``last``.

    Raises:
        RecipeError: The recipe contradicts itself or does not fit the data, or the run has no such step.
    """
    for name, number in (("--images", images), ("--batch", batch)):
        if number is not None and number < 1:
            raise RecipeError(f"{name}: expected at least 1, got {number}")
    processes = 1
    recipe = with_batch_cut(recipe, world_size=1)
    if batch is not None:
        processes, rest = divmod(batch, recipe.train.batch_size_per_gpu * recipe.train.accumulate)
        if rest or not processes:
            processes = 1
            recipe = dataclasses.replace(
                recipe, train=dataclasses.replace(recipe.train, batch_size_per_gpu=batch, accumulate=1)
            )
    length = run_length(recipe, images=images, world_size=processes)
    schedules = build_schedules(recipe, length)
    if step == "last":
        step = length.steps - 1
    if not 0 <= step < length.steps:
        raise RecipeError(f"--step: expected 0 to {length.steps - 1} or last, got {step}")

    with torch.device("meta"):
        networks = build_student_teacher(recipe)
    optimizer = build_optimizer(recipe, networks)
    hyper = schedules(step)
    set_hyperparameters(
        optimizer,
        lr=hyper.lr,
        last_layer_lr=hyper.last_layer_lr,
        weight_decay=hyper.weight_decay,
        backbone_lr_mult=hyper.backbone_lr_mult,
    )
    groups = [_group(group, frozen=hyper.last_layer_frozen) for group in optimizer.param_groups]
    masks = measure_masks(recipe, batch=length.batch_size)
    device, precision = _where(recipe)
    return Explanation(
        recipe=recipe,
        length=length,
        step=step,
        groups=groups,
        sizes=[sum(p.numel() for p in group["params"]) for group in optimizer.param_groups],
        schedules=schedules,
        masks=masks,
        work=work_of_a_step(recipe, networks, masked=masks.masked_tokens_per_batch / processes),
        memory=estimate(recipe, networks, precision=precision, device=device),
        compute=f"{device.type}, {str(precision).removeprefix('torch.')}",
    )


def _where(recipe: Recipe) -> tuple[torch.device, torch.dtype]:
    """Device and precision of the recipe; the device need not be here, and is then one that has bfloat16."""
    precision = recipe.precision
    try:
        device = resolve_device(recipe.device)
    except RecipeError:
        kind = recipe.device.partition(":")[0]
        if kind not in ("cuda", "mps"):
            raise
        device = torch.device(kind)
        if kind == "cuda" and precision == "auto":
            precision = "bf16"
    return device, resolve_precision(precision, device)


def _group(group: dict[str, Any], *, frozen: bool) -> Group:
    rule = group["text"]
    if group["fixed_weight_decay"] is not None:
        rule += "; weight decay off the schedule (optim.weight_decay_scope)"
    if group["last_layer"] and frozen:
        rule += "; not moved at this step: its gradient is dropped"
    return Group(
        module=group["module"],
        rule=rule,
        params=list(group["names"]),
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        lr_multiplier=group["lr_multiplier"],
        wd_multiplier=group["wd_multiplier"],
        last_layer=group["last_layer"],
    )


def explanation_json(explained: Explanation) -> dict[str, Any]:
    """The explanation as plain values."""
    s, steps = explained.schedules, _evenly(explained.length.steps)
    values = [vars(s(step)) for step in steps]
    return {
        "step": explained.step,
        "groups": [vars(group) for group in explained.groups],
        "schedules": {
            "total_steps": s.total_steps,
            "warmup_steps": s.warmup_steps,
            "teacher_temp_steps": s.teacher_temp_steps,
            "freeze_last_layer_steps": s.freeze_last_layer_steps,
            "freeze_last_layer": explained.recipe.optim.freeze_last_layer,
            "freeze_backbone_steps": s.freeze_backbone_steps,
            "images": explained.length.images,
            "batch_size": explained.length.batch_size,
            "epochs": explained.length.epochs,
            "at_step": vars(s(explained.step)),
            "steps": steps,
            **{name: [v[name] for v in values] for name in values[0]},
        },
        "masks": vars(explained.masks),
    }


def _evenly(total_steps: int) -> list[int]:
    last = total_steps - 1
    return sorted({round(i * last / (_POINTS - 1)) for i in range(_POINTS)})


def explanation_text(explained: Explanation) -> str:
    """The explanation as text."""
    n = explained.length
    known = " (as many as ImageNet-1k; --images says yours)" if n.images == IMAGENET_1K else ""
    per_process = explained.recipe.train.batch_size_per_gpu
    processes = "1 process" if explained.processes == 1 else f"{explained.processes} processes × {per_process}"
    head = [
        ["step", f"{explained.step:,} of {n.steps:,} (0 to {n.steps - 1:,})"],
        ["images", f"{n.images:,}{known}"],
        ["batch", f"{n.batch_size:,} images, {processes}: {n.epochs:.1f} epochs"],
    ]
    parts = {
        "PARAMETER GROUPS": "\n".join(
            [_groups_table(explained), _freeze_in_words(explained), *_backbone_in_words(explained)]
        ),
        "SCHEDULES": _schedules_table(explained),
        "MASKS, measured": _masks_table(explained),
        "WORK of a step, matrix products": _work_table(explained),
        "MEMORY, estimated": _memory_table(explained),
    }
    return "\n\n".join([table(head), *(f"{title}\n{text}" for title, text in parts.items())])


def _groups_table(explained: Explanation) -> str:
    return table(_group_rows(explained), right=range(3, 7))


def _group_rows(explained: Explanation) -> list[list[str]]:
    rows = [["module", "rule", "of", "tensors", "values", "lr", "decay"]]
    for group, size in zip(explained.groups, explained.sizes, strict=True):
        kind = "weights" if group.wd_multiplier else "biases, norms, scales"
        numbers = [str(len(group.params)), f"{size:,}", f"{group.lr:.3e}", f"{group.weight_decay:.4g}"]
        rows.append([group.module, group.rule.replace(f"; {UNREGULARISED}", ""), kind, *numbers])
    return rows


def _freeze_in_words(explained: Explanation) -> str:
    steps = explained.schedules.freeze_last_layer_steps
    if not steps:
        return "The heads' last layer is not frozen at any step."
    if explained.schedules.freeze_by_gradient:
        how = "dropping its gradient after clipping: AdamW's moments and step count stand still, too"
    else:
        how = "a learning rate of 0: AdamW's moments and step count move on"
    now = "this is one of them" if explained.step < steps else "this one comes after"
    return f"The heads' last layer is frozen in the first {steps:,} steps ({now}), by\n{how}."


def _backbone_in_words(explained: Explanation) -> list[str]:
    s = explained.schedules
    if not s.freeze_backbone_steps:
        return []
    now = "this is one of them" if explained.step < s.freeze_backbone_steps else "this one comes after"
    return [
        f"Only the heads learn in the first {s.freeze_backbone_steps:,} steps ({now}). Then the backbone's",
        f"learning rate rises to theirs over {s.warmup_steps:,} steps.",
    ]


def _schedules_table(explained: Explanation) -> str:
    s = explained.schedules
    first, now, last = (s(step) for step in (0, explained.step, s.total_steps - 1))

    def row(name: str, field: str, words: str) -> list[str]:
        return [name, *(f"{getattr(h, field):.6g}" for h in (first, now, last)), words]

    warmup = f"linear from 0 over {s.warmup_steps:,} steps to {s.lr:.6g}, then " if s.warmup_steps else ""
    zero = s.freeze_last_layer_steps and not s.freeze_by_gradient
    frozen = f"; 0 in the first {s.freeze_last_layer_steps:,} steps" if zero else ""
    held = "" if s.frozen_momentum is None else f"{s.frozen_momentum:g} while the backbone is frozen, "
    temp = f"linear over {s.teacher_temp_steps:,} steps, then constant" if s.teacher_temp_steps else "constant"
    rows = [
        ["", "first step", f"step {explained.step:,}", "last step", ""],
        row("learning rate", "lr", f"{warmup}cosine to {s.min_lr:g}"),
        row("of the last layer", "last_layer_lr", f"the same{frozen}"),
        *([row("of the backbone", "backbone_lr_mult", "times the same")] if s.freeze_backbone_steps else []),
        row("weight decay", "weight_decay", f"cosine from {s.weight_decay:g} to {s.weight_decay_end:g}"),
        row("teacher momentum", "momentum", f"{held}cosine from {s.momentum:g} to {s.final_momentum:g}"),
        row("teacher temperature", "teacher_temp", temp),
    ]
    return table(rows)


def _masks_table(explained: Explanation) -> str:
    return table(_mask_rows(explained))


def _mask_rows(explained: Explanation) -> list[list[str]]:
    m = explained.masks
    return [
        ["kind", f"{m.kind}, on {m.grid[0]} × {m.grid[1]} patches"],
        ["crops with masked patches", f"{m.masked_crops:.1%} of {m.crops:,} global crops that were drawn"],
        ["masked patches of those", f"{m.ratio_mean:.1%} on average, from {m.ratio_min:.1%} to {m.ratio_max:.1%}"],
        ["masked patches in a step", f"{m.masked_tokens_per_batch:,.0f}, of {explained.length.batch_size:,} images"],
    ]


def _work_table(explained: Explanation) -> str:
    total = sum(w.flops for w in explained.work)
    unit, size = ("TFLOP", 1e12) if total >= 1e12 else ("GFLOP", 1e9)
    rows = [["part", "tokens", unit, "share"]]
    rows += [[w.part, f"{w.rows:,}", f"{w.flops / size:,.3f}", f"{w.flops / total:.1%}"] for w in explained.work]
    rows.append(["one process", "", f"{total / size:,.3f}", ""])
    if explained.processes > 1:
        rows.append(["all processes", "", f"{total * explained.processes / size:,.3f}", ""])
    note = (
        "2·n for each token and weight of n values, 4·N²·D for attention among N tokens, in each block; a backward\n"
        "pass counts twice its forward pass; the teacher only goes forward; the last block computes only what is read"
    )
    return f"{table(rows, right=range(1, 4))}\n{note}"


def _memory_table(explained: Explanation) -> str:
    total = sum(explained.memory.values())
    rows = [
        [name, f"{size / 2**30:.2f} GiB"] for name, size in sorted(explained.memory.items(), key=lambda part: -part[1])
    ]
    return table([*rows, [f"one process ({explained.compute})", f"{total / 2**30:.2f} GiB"]], right=[1])


def tables(recipe: Recipe, *, images: int, batch: int | None) -> tuple[tuple[dict[str, str], ...], dict[str, str]]:
    """Parameter groups at the last step and masks of a run, as texts by column and by name."""
    explained = explain(recipe, images=images, batch=batch, step="last")
    head, *groups = _group_rows(explained)
    return tuple(dict(zip(head, row, strict=True)) for row in groups), dict(_mask_rows(explained))


def plot_schedules(explained: Explanation, path: Path) -> None:
    """Draws the schedules, one small figure for each, to a .png or .svg file.

    Raises:
        DinoforgeError: The file's name has another ending, matplotlib is missing, or the file cannot be written.
    """
    if path.suffix.lower() not in (".png", ".svg"):
        raise DinoforgeError(f"--plot {path}: expected a file name that ends in .png or .svg")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DinoforgeError("--plot needs matplotlib: pip install 'dinoforge[plot]'") from error
    titles = {
        "lr": "learning rate",
        "last_layer_lr": "learning rate of the last layer",
        "weight_decay": "weight decay",
        "momentum": "teacher momentum",
        "teacher_temp": "teacher temperature",
    }
    last = explained.length.steps - 1
    s = explained.schedules
    thawed = s.freeze_backbone_steps
    ends = (s.warmup_steps, s.freeze_last_layer_steps, s.teacher_temp_steps, thawed, thawed and thawed + s.warmup_steps)
    corners = {step for end in ends for step in (end - 1, end) if 0 <= step <= last}  # where a curve bends or jumps
    steps = sorted({round(i * last / 500) for i in range(501)} | corners)
    values = [s(step) for step in steps]
    figure = Figure(figsize=(8, 2 * len(titles)), layout="constrained")
    for axes, (field, title) in zip(figure.subplots(len(titles), sharex=True), titles.items(), strict=True):
        axes.plot(steps, [getattr(v, field) for v in values], linewidth=1.2)
        axes.axvline(explained.step, color="0.6", linewidth=0.8, linestyle=":")
        axes.set_title(title, loc="left", fontsize=9)
    axes.set_xlabel("step")
    try:
        figure.savefig(path)
    except OSError as error:
        raise DinoforgeError(f"cannot write {path}: {error}") from error
