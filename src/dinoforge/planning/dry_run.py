"""The plan of a run, checked and in words, before the run starts."""

from dataclasses import dataclass

import torch

from dinoforge.builders.layout import note_of_mode
from dinoforge.builders.networks import build_student_teacher, vit_size
from dinoforge.builders.resolved import ResolvedRun, resolve_run
from dinoforge.data.folders import left_out_in_words
from dinoforge.data.summary import DataSummary
from dinoforge.errors import RecipeError
from dinoforge.method.dinov2 import StudentTeacher
from dinoforge.planning.memory import estimate, of_reading, ways_to_save
from dinoforge.recipe.schema import Recipe
from dinoforge.system import distributed
from dinoforge.system.device import (
    allocator_settings,
    free_memory,
    note_of_fallback,
    note_of_idle_gpus,
    resolve_precision,
    usable_processors,
)
from dinoforge.training.parallel import Mode, shard_count


@dataclass(frozen=True, kw_only=True)
class Plan(ResolvedRun):
    """A recipe on a data set on this machine, checked.

    Args:
        data: What a look at some images found.
        parameters: The number of parameters of each sub-network of the student.
        memory: The estimated bytes of each part.
        free: The bytes that the device has free; None: unknown.
        notes: What the user may not expect, and what to do.
    """

    data: DataSummary
    parameters: dict[str, int]
    memory: dict[str, float]
    free: float | None
    notes: tuple[str, ...] = ()


def make_plan(recipe: Recipe, data: DataSummary) -> Plan:
    """Everything that can be known, and can be wrong, before work starts. Allocates no weights.

    Raises:
        RecipeError: The recipe contradicts itself, or does not fit the data or the machine.
    """
    with torch.device("meta"):
        networks = build_student_teacher(recipe)
    run = resolve_run(recipe, data.count, networks)
    device, mode, workers = run.device, run.mode, run.num_workers
    if recipe.parallel.kernels == "fast" and device.type != "cpu":
        raise RecipeError(
            f"parallel.kernels=fast is for CPUs, and this run computes on {device.type}: set parallel.kernels=auto"
        )
    shards = shard_count(mode, recipe.parallel.shard_ranks)
    reading = of_reading(recipe, data.working_bytes, workers)
    memory = estimate(
        recipe, networks, precision=run.precision, device=device, mode=mode, shards=shards, reading=reading
    )
    free = free_memory(device)
    notes = (
        note_of_fallback(recipe.device, device),
        note_of_idle_gpus(recipe.device, device),
        note_of_mode(recipe, mode),
        _note_of_precision(recipe, device, run.precision),
        _note_of_workers(recipe.train.num_workers, usable_processors()),
        _note_of_one_image(recipe, run.length.batch_size),
        _note_of_values(recipe, data),
        _note_of_memory(recipe, sum(memory.values()), free, device, run.precision, mode, workers, data.working_bytes),
        _note_of_reading(recipe, reading, device, workers),
    )
    return Plan(
        **vars(run),
        data=data,
        parameters=_count(networks),
        memory=memory,
        free=free,
        notes=tuple(note for note in notes if note is not None),
    )


def _note_of_precision(recipe: Recipe, device: torch.device, precision: torch.dtype) -> str | None:
    if precision is resolve_precision(recipe.precision, device):
        return None
    return (
        "computes in float32, since float16, in which this GPU is faster, cannot be sharded; parallel.mode=ddp takes "
        "float16, if the weights fit"
    )


def _note_of_workers(wanted: int | None, processors: int) -> str | None:
    if wanted is None or wanted <= processors:
        return None
    return (
        f"train.num_workers={wanted}, but there {'is' if processors == 1 else 'are'} "
        f"{_count_of(processors, 'processor')} for this rank, and so {_count_of(processors, 'data worker')}"
    )


def _note_of_one_image(recipe: Recipe, together: int) -> str | None:
    """A note on losses that compare images but see only one of ``together`` in a step."""
    if recipe.train.batch_size_per_gpu > 1:
        return None
    d = recipe.dino
    seen = {"rank": 1, "global": together, "groups": d.koleo_group_size or 1}[d.koleo_scope]
    idle = []
    if d.koleo_loss_weight > 0 and seen < 2:
        way = "dino.koleo_scope=global seeks neighbours among the images of a step" if together > 1 else None
        idle.append(f"KoLeo stays 0, because it needs two images at a time{f' ({way})' if way else ''}")
    weights = {"dino": (d.loss_weight, d.targets), "ibot": (recipe.ibot.loss_weight, recipe.ibot.targets)}
    balanced = [
        loss
        for loss, (weight, targets) in weights.items()
        if weight > 0 and (targets or recipe.train.centering) == "sinkhorn_knopp"
    ]
    if balanced and together < 2:
        idle.append(f"Sinkhorn-Knopp ({', '.join(balanced)}) balances targets within one image and not between images")
    idle.append("the effective rank is not measured, and dinoforge doctor cannot tell whether features collapse")
    what = "one image is a step" if together == 1 else "one image is computed at a time"
    key = "train.batch_size_per_gpu" if recipe.train.batch_size is None else "train.batch_size"  # the latter wins
    fewer = " or a smaller train.accumulate" if recipe.train.batch_size is not None and together > 1 else ""
    return f"{what}: {'; '.join(idle)}. A larger {key}{fewer} mends that"


def _note_of_memory(
    recipe: Recipe,
    needed: float,
    free: float | None,
    device: torch.device,
    precision: torch.dtype,
    mode: Mode,
    workers: int,
    working_bytes: int,
) -> str | None:
    if free is None or needed <= free:
        return None
    reading = of_reading(recipe, working_bytes, workers)
    ranks = distributed.world_size()
    ways = ways_to_save(recipe, ranks=ranks, mode=mode, device=device, precision=precision, reading=reading)
    if device.type == "cpu":
        ways = [*_ways_to_read(recipe, needed, reading, workers, working_bytes), *ways]
    return (
        f"may run out of memory: by the estimate it takes {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB "
        f"{'of main memory are free' if device.type == 'cpu' else f'are free on {device}'}. What takes less, in the "
        "order to try: " + "; ".join([*ways, "smaller crops, or a smaller network"])
    )


def _ways_to_read(recipe: Recipe, needed: float, reading: float, workers: int, working_bytes: int) -> list[str]:
    """The number of workers that takes less memory, where reading takes much of it."""
    if workers < 2 or reading < 0.2 * needed:
        return []
    less = needed - reading + of_reading(recipe, working_bytes, 1)
    return [f"train.num_workers=1: about {less / 2**30:.1f} GiB"]


def _note_of_reading(recipe: Recipe, reading: float, device: torch.device, workers: int) -> str | None:
    """A note on main memory beside an accelerator, whose own memory is estimated separately."""
    free = free_memory(torch.device("cpu"))
    if device.type == "cpu" or free is None or reading <= free:
        return None
    return (
        f"may run out of main memory: {_count_of(max(workers, 1), 'process').replace('processs', 'processes')} that "
        f"read images take about {reading / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free. Fewer "
        "train.num_workers take less"
    )


def _note_of_values(recipe: Recipe, data: DataSummary) -> str | None:
    """Values that become a few dark levels, since nothing says their range."""
    if recipe.data.range is not None or recipe.data.sixteen_bit == "minmax":
        return None
    for kind, depth in data.depths.items():
        if kind != "bool" and 0 <= depth.low < depth.high < depth.top / 4:
            level = round(depth.high / depth.top * 255)
            return (
                f"{kind} values of {_count_of(depth.images, 'image')} looked at end at {depth.high:,.5g} of "
                f"{depth.top:,.5g}, and become levels up to {level} of 255: data.range=[{depth.low:.5g},"
                f"{depth.high:.5g}] spreads them over all" + " (a map of classes is no picture)" * (kind == "uint8")
            )
    return None


def _count(networks: StudentTeacher) -> dict[str, int]:
    return {name: sum(p.numel() for p in network.parameters()) for name, network in networks.student.parts.items()}


def plan_text(plan: Plan, *, data_path: str, out: str) -> str:
    """The plan as aligned lines."""
    r, s = plan.recipe, plan.recipe.student
    embed_dim, depth, heads = vit_size(r)
    side = r.crops.global_crops_size
    tf32 = " with TF32" if r.allow_tf32 and plan.device.type == "cuda" else ""
    total = sum(plan.memory.values())
    top = sorted(plan.memory.items(), key=lambda part: -part[1])[:3]
    local = f" + {r.crops.local_crops_number} × {r.crops.local_crops_size}²" if r.crops.local_crops_number else ""
    targets = {"dino": r.dino.targets or r.train.centering, "ibot": r.ibot.targets or r.train.centering}
    losses = {
        f"DINO ({targets['dino']})": r.dino.loss_weight,
        f"iBOT ({targets['ibot']}, {r.ibot.mask_kind} masks)": r.ibot.loss_weight,
        "KoLeo": r.dino.koleo_loss_weight,
    }
    lines = {
        "data": f"{plan.data.count:,} image{'s' * (plan.data.count != 1)} in {data_path}: {_sizes(plan.data)}",
        **({"left out": left_out_in_words(plan.data.left_out)} if plan.data.left_out else {}),
        **_of_images(r, plan.data),
        "crops": f"2 × {side}²{local} pixels, {_count_of(s.in_chans, 'channel')}",
        "model": (
            f"{s.arch}: width {embed_dim}, {_count_of(depth, 'block')}, {_count_of(heads, 'head')}, "
            f"patch {s.patch_size} → {_count_of((side // s.patch_size) ** 2, 'patch').replace('patchs', 'patches')}; "
            + ", ".join(f"{name} {count / 1e6:.1f} M" for name, count in plan.parameters.items())
        ),
        "losses": ", ".join(f"{name} × {weight:g}" for name, weight in losses.items() if weight),
        "run": (
            f"{plan.length.steps:,} steps of {plan.length.batch_size} images = {plan.length.epochs:.1f} epochs of "
            "your data"
        ),
        "compute": (
            f"{plan.device}, {str(plan.precision).removeprefix('torch.')}{tf32}, {_count_of(plan.threads, 'thread')}, "
            f"{_count_of(plan.num_workers, 'data worker')}{_ranks(plan)}"
        ),
        "memory": f"about {total / 2**30:.1f} GiB ("
        + ", ".join(f"{name} {size / 2**30:.1f}" for name, size in top)
        + f"){_of_device(plan)}",
    }
    notes = [("note", note) for note in plan.notes]
    return "\n".join(f"{name:<8} {text}" for name, text in [*lines.items(), *notes, ("out", out)])


def _of_device(plan: Plan) -> str:
    """The memory that the device has free, and PyTorch's settings for it, in words."""
    free = "" if plan.free is None else f" of {plan.free / 2**30:.1f} GiB that are free"
    settings = allocator_settings() if plan.device.type == "cuda" else None
    return free + (f"; allocator {settings}" if settings else "")


def _ranks(plan: Plan) -> str:
    """The ranks and micro-batches of a step, in words; '' where there is one of each."""
    images, accumulate = plan.recipe.train.batch_size_per_gpu, plan.recipe.train.accumulate
    ranks = plan.length.batch_size // (images * accumulate)
    cut = f"{_count_of(accumulate, 'micro-batch').replace('batchs', 'batches')} of {images} images"
    if ranks > 1:
        return f", each of {ranks} ranks ({plan.mode}); a step is {ranks} × {cut}"
    return f"; a step is {cut}" if accumulate > 1 else ""


def schedules_text(plan: Plan) -> str:
    """Hyper-parameters at the steps where something changes."""
    s = plan.schedules
    last = s.total_steps - 1
    thawed = s.freeze_backbone_steps
    steps = {0, s.freeze_last_layer_steps, s.warmup_steps, s.teacher_temp_steps, last // 2, last}
    steps |= {thawed, thawed + s.warmup_steps} if thawed else set()
    backbone = f"  {'backbone':>8}" if thawed else ""
    lines = [f"{'step':>9}  {'lr':>9}  {'last layer':>10}{backbone}  {'decay':>7}  {'momentum':>8}  {'temp':>6}"]
    for step in sorted(i for i in steps if 0 <= i <= last):
        h = s(step)
        last_layer = "frozen" if h.last_layer_frozen else f"{h.last_layer_lr:.2e}"
        if thawed:
            last_layer += "    frozen" if h.backbone_frozen else f"  × {h.backbone_lr_mult:>6.3f}"
        lines.append(
            f"{step:>9,}  {h.lr:>9.2e}  {last_layer:>10}  {h.weight_decay:>7.4f}  {h.momentum:>8.5f}  "
            f"{h.teacher_temp:>6.4f}"
        )
    return "\n".join(lines)


def _count_of(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _sizes(data: DataSummary) -> str:
    (w0, w1), (h0, h1) = data.widths, data.heights
    size = f"{w0}×{h0}" if (w0, h0) == (w1, h1) else f"{w0}–{w1} × {h0}–{h1}"
    between = "; " if any("," in mode for mode, _ in data.modes) else ", "  # within a kind there are commas
    modes = between.join(mode for mode, _ in data.modes)
    return f"{size} pixels, {modes}"


def _of_images(recipe: Recipe, data: DataSummary) -> dict[str, str]:
    """Lines on what the look at some images found that the user may not expect, by their names."""
    d, seen = recipe.data, data.sampled
    lines: dict[str, str] = {}
    if data.failures:
        _, name, reason = data.failures[0]
        such = f", such as {name}" if len(data.failures) > 1 else f": {name}"
        lines["bad"] = f"{len(data.failures)} of {seen} images looked at cannot be read{such}: {reason}"
    if data.apart:
        lines["planes"] = data.apart
    elif data.planes:
        lines["planes"] = _of_planes(d.plane, data)
    types = {kind: depth.images for kind, depth in data.depths.items()}
    shallow = {"uint8", "bool"} & set(types)
    if shallow and len(types) > len(shallow):
        lines["depths"] = _of_depths(recipe, types)
    if data.transparent:
        lines["alpha"] = (
            f"{data.transparent} of {seen} images looked at have transparency, which is laid over white"
            + ("; student.in_chans=4 keeps it" if recipe.student.in_chans == 3 else "")
        )
    if data.profiles:
        named = ", ".join(f"{name} ({count})" for name, count in sorted(data.profiles.items(), key=lambda p: -p[1])[:3])
        count = sum(data.profiles.values())
        lines["colours"] = f"{count} of {seen} images looked at have a colour profile that is not applied: {named}"
    if data.blank:
        are = "is" if data.blank == 1 else "are"
        lines["blank"] = f"{data.blank} of {seen} images looked at {are} of one single colour, which teaches nothing"
    if data.turned:
        lines["turned"] = f"{data.turned} of {seen} images looked at are turned as their EXIF orientation says"
    return lines


def _of_planes(plane: str | None, data: DataSummary) -> str:
    numbers = sorted({number for number, _ in data.planes})
    along = ", ".join(sorted({along for _, along in data.planes}))
    many = f"{numbers[0]}" if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
    taken = f"number {plane} of {many} is taken"
    if plane is None:
        taken = f"the first of {many} is taken; data.plane=each, max or a number from 0 takes others"
    elif plane == "max":
        taken = f"the brightest value of all {many} is taken"
    have = "has" if len(data.planes) == 1 else "have"
    return f"{len(data.planes)} of {data.sampled} files looked at {have} several planes ({along}): {taken}"


def _of_depths(recipe: Recipe, types: dict[str, int]) -> str:
    """Which rule images of 8 bits and deeper ones get, where both lie in one data set."""
    d = recipe.data
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(types.items(), key=lambda kind: -kind[1]))
    if d.range is not None:
        given = f"data.range=[{','.join(f'{v:g}' for v in d.range)}]"
        both = max(d.range[1::2]) <= 255
        rule = f"{given} is applied to all" if both else f"8-bit values stay as they are, others get {given}"
    elif d.sixteen_bit == "minmax":
        rule = "8-bit values stay as they are, others get each image's own range (data.sixteen_bit=minmax)"
    else:
        rule = "8-bit values stay as they are, others get the range of their type (data.sixteen_bit=full)"
    return f"images looked at are {counts}: {rule}"


def ways_to_train(plan: Plan) -> list[str]:
    """Ways in which a run takes less memory, in the order to try them."""
    ranks = distributed.world_size()
    return ways_to_save(plan.recipe, ranks=ranks, mode=plan.mode, device=plan.device, precision=plan.precision)
