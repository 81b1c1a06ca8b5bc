"""Requirements of a run on machines that are not here: memory, communication, data, hours.

Device figures are their makers' published peaks, and what of them is reached is an assumption that is printed with
every answer. Nothing here was measured on such devices.
"""

import dataclasses
import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from dinoforge.builders.lengths import RunLength, run_length, with_batch_cut
from dinoforge.builders.networks import build_student_teacher, vit_size
from dinoforge.errors import RecipeError
from dinoforge.method.dinov2 import StudentTeacher
from dinoforge.planning.memory import of_tensors
from dinoforge.planning.work import measure_masks, work_of_a_step
from dinoforge.recipe.schema import Recipe

_GPUS_PER_NODE = 8
_NODE_LINK = 50e9  # bytes per second and GPU between machines: one 400 Gbit/s port each
_LINK_SHARE = 0.7  # share of a link's peak that collectives reach
_USABLE_MEMORY = 0.9  # share of a device's memory; the CUDA context and gaps between blocks take the rest


@dataclass(frozen=True)
class Device:
    """Published peaks: dense bfloat16 FLOP/s, bytes of memory, bytes per second each way to the GPUs beside it."""

    flops: float
    memory: float
    link: float


DEVICES = {
    "A100": Device(312e12, 80e9, 300e9),
    "A100-40": Device(312e12, 40e9, 300e9),
    "H100": Device(989e12, 80e9, 450e9),
    "H200": Device(989e12, 141e9, 450e9),
    "B200": Device(2250e12, 180e9, 900e9),
    "L4": Device(121e12, 24e9, 32e9),
    "L40S": Device(362e12, 48e9, 32e9),
    "RTX3090": Device(71e12, 24e9, 32e9),
    "RTX4090": Device(165e12, 24e9, 32e9),
}


@dataclass(frozen=True)
class Layout:
    """One way to lay the networks over the ranks: bytes of each rank by part, and bytes it sends in a step."""

    name: str
    memory: dict[str, float]
    sent: float
    extra_flops: float  # FLOPs of a step that are computed again in the backward pass

    @property
    def total(self) -> float:
        return sum(self.memory.values())


@dataclass(frozen=True)
class Requirements:
    """Everything ``dinoforge plan`` says."""

    recipe: Recipe
    length: RunLength
    ranks: int
    device_name: str
    device: Device
    utilisation: float
    parameters: dict[str, int]
    flops: float  # FLOPs of a step on each rank
    layouts: list[Layout]

    def seconds(self, layout: Layout) -> tuple[float, float]:
        """Seconds of a step: in products, and in communication if none of it were hidden behind them."""
        link = self.device.link if self.ranks <= _GPUS_PER_NODE else _NODE_LINK
        compute = (self.flops + layout.extra_flops) / (self.device.flops * self.utilisation)
        return compute, layout.sent / (link * _LINK_SHARE)

    @property
    def chosen(self) -> Layout | None:
        """The first layout that fits: they come in the order of what they cost."""
        return next((x for x in self.layouts if x.total <= self.device.memory * _USABLE_MEMORY), None)


def parse_gpus(text: str) -> tuple[int, str]:
    """Reads ``8xH100``.

    Raises:
        RecipeError: The text has another form, or names an unknown device.
    """
    match = re.fullmatch(r"(\d+)\s*[x×]\s*(\S+)", text)
    names = {name.lower(): name for name in DEVICES}
    if not match or int(match[1]) < 1 or match[2].lower() not in names:
        raise RecipeError(f"--gpus: expected a number and one of {', '.join(DEVICES)}, such as 8xH100, got {text!r}")
    return int(match[1]), names[match[2].lower()]


def requirements(recipe: Recipe, *, images: int, gpus: str, utilisation: float = 0.35) -> Requirements:
    """The requirements of a run of the recipe; allocates no weights.

    Args:
        recipe: The recipe.
        images: Number of images in the data set.
        gpus: Number and kind of the GPUs, such as ``8xH100``.
        utilisation: Share of the device's peak that products reach over the whole step, above 0 up to 1.

    Raises:
        RecipeError: The devices are not known, or the recipe contradicts itself or does not fit the data.
    """
    ranks, name = parse_gpus(gpus)
    if not 0 < utilisation <= 1:
        raise RecipeError(f"--utilisation: expected above 0 up to 1, got {utilisation:g}")
    recipe = with_batch_cut(recipe, world_size=ranks)
    length = run_length(recipe, images=images, world_size=ranks)
    with torch.device("meta"):
        networks = build_student_teacher(recipe)
    masks = measure_masks(recipe, batch=length.batch_size)
    work = work_of_a_step(recipe, networks, masked=masks.masked_tokens_per_batch / ranks)
    return Requirements(
        recipe=recipe,
        length=length,
        ranks=ranks,
        device_name=name,
        device=DEVICES[name],
        utilisation=utilisation,
        parameters={
            key: sum(p.numel() for p in network.parameters()) for key, network in networks.student.parts.items()
        },
        flops=sum(part.flops for part in work),
        layouts=_layouts(recipe, networks, ranks, recomputed=sum(p.flops for p in work if "student" in p.part) / 3),
    )


def _layouts(recipe: Recipe, networks: StudentTeacher, ranks: int, *, recomputed: float) -> list[Layout]:
    """DDP and FSDP2, each without and with activation checkpointing."""
    parameters = sum(p.numel() for p in networks.student.parameters())
    share = (ranks - 1) / ranks
    results = []
    for checkpointed in (False, True):
        settings = dataclasses.replace(recipe.parallel, activation_checkpointing=checkpointed)
        with_settings = dataclasses.replace(recipe, parallel=settings)
        parts = partial(of_tensors, with_settings, networks, precision=torch.bfloat16, device=torch.device("cuda"))
        extra = recomputed if checkpointed else 0.0
        suffix = ", activations recomputed" if checkpointed else ""
        # An all-reduce in a ring sends each gradient once to be summed and once to be handed on.
        whole = parts(mode="ddp" if ranks > 1 else "none")
        results.append(Layout(f"DDP{suffix}", whole, 2 * share * 4 * parameters, extra))
        if ranks == 1:
            continue
        sharded = parts(mode="fsdp", shards=ranks)
        # The student's weights are gathered for both passes, the teacher's for one; gradients are scattered.
        sent = recipe.train.accumulate * 4 * share * 4 * parameters
        results.append(Layout(f"FSDP2{suffix}", sharded, sent, extra))
    return sorted(results, key=lambda layout: (layout.extra_flops, layout.sent))


def requirements_json(needs: Requirements) -> dict[str, Any]:
    """The answer as plain values: bytes, seconds, FLOPs."""
    chosen = needs.chosen
    result: dict[str, Any] = {
        "gpus": f"{needs.ranks}x{needs.device_name}",
        "utilisation": needs.utilisation,
        "steps": needs.length.steps,
        "batch_size": needs.length.batch_size,
        "parameters": needs.parameters,
        "flops_per_step_and_gpu": needs.flops,
        "layouts": [
            {"name": x.name, "memory": x.memory, "sent": x.sent, "compute": compute, "sending": sending}
            for x in needs.layouts
            for compute, sending in [needs.seconds(x)]
        ],
        "chosen": chosen and chosen.name,
    }
    if chosen:
        seconds = max(needs.seconds(chosen))
        result |= {"hours": needs.length.steps * seconds / 3600, "images_per_second": needs.length.batch_size / seconds}
    return result


def requirements_text(needs: Requirements) -> str:
    """The answer as text."""
    embed_dim, depth, _ = vit_size(needs.recipe)
    room = needs.device.memory * _USABLE_MEMORY
    lines = [
        f"model      width {embed_dim}, {depth} blocks: "
        + ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in needs.parameters.items()),
        f"run        {needs.length.steps:,} steps of {needs.length.batch_size:,} images = {needs.length.epochs:.1f} "
        f"epochs of {needs.length.images:,} images",
        f"work       {needs.flops / 1e12:.2f} TFLOP in a step on each of {needs.ranks} GPUs",
        f"assumed    {needs.device_name}: {needs.device.flops / 1e12:.0f} TFLOP/s (published peak, dense bf16), of "
        f"which {needs.utilisation:.0%} are reached; {room / 1e9:.0f} of {needs.device.memory / 1e9:.0f} GB usable",
        "",
        f"{'GB on each GPU':<32} {'weights':>8} {'optimizer':>9} {'activations':>11} {'other':>7} {'total':>7}   "
        f"{'GB sent':>7} {'compute':>8} {'sending':>8}",
    ]
    for x in needs.layouts:
        weights = x.memory["student and teacher"] + x.memory["gradients"]
        known = weights + x.memory["optimizer"] + x.memory["activations"]
        compute, sending = needs.seconds(x)
        sizes = (weights, x.memory["optimizer"], x.memory["activations"], x.total - known, x.total)
        columns = " ".join(f"{size / 1e9:{width}.1f}" for size, width in zip(sizes, (8, 9, 11, 7, 7), strict=True))
        lines.append(
            f"{x.name:<32} {columns}   {x.sent / 1e9:7.2f} {compute * 1e3:5.0f} ms {sending * 1e3:5.0f} ms"
            + ("" if x.total <= room else "   does not fit")
        )
    chosen = needs.chosen
    if chosen is None:
        lines += [
            "",
            "Nothing fits: lower train.batch_size_per_gpu and raise train.accumulate, or take more or larger GPUs.",
        ]
        return "\n".join(lines)
    compute, sending = needs.seconds(chosen)
    limit = "communication" if sending > compute else "products"
    seconds = max(compute, sending)
    lines += [
        "",
        f"chosen     {chosen.name}: {needs.length.steps * seconds / 3600:.1f} hours, limited by {limit}, if sending is "
        f"hidden behind products; {needs.length.steps * (compute + sending) / 3600:.1f} if not",
        f"data       {needs.length.batch_size / seconds:,.0f} images per second have to be read and cropped; "
        "dinoforge bench says what a core makes of yours",
    ]
    return "\n".join(lines)
