"""Measurements of training steps and of making their data, beside what the machine can multiply."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from dinoforge.builders.data import build_data, build_masks
from dinoforge.builders.lengths import build_schedules, run_length
from dinoforge.builders.networks import build_state, build_stepper
from dinoforge.data.batch import Batch, masked_patches, prepare
from dinoforge.data.batches import Failure, make_loader
from dinoforge.data.order import sample_rng
from dinoforge.data.sources import Source
from dinoforge.errors import DataError
from dinoforge.kernels import ops
from dinoforge.kernels.products import linear
from dinoforge.method.dinov2 import StudentTeacher
from dinoforge.planning.dry_run import Plan
from dinoforge.planning.work import work_of_a_step
from dinoforge.recipe.schema import Recipe
from dinoforge.system.device import (
    in_use,
    keep_freed_memory,
    loader_workers,
    peak_memory_gib,
    rank_device,
    resolve_precision,
    usable_processors,
)
from dinoforge.system.phases import PHASES, Stopwatch, timed_by
from dinoforge.training.parallel import Mode, wrap

Shape = tuple[int, int, int]  # m, k, n of a product [m, k] @ [k, n]

_SQUARES = (1024, 2048, 3072, 4096)
_MOST_OVERFLOWS = 20  # steps after which the loss scale has come down from 65,536 to 1


def gemm_peak(
    device: torch.device,
    dtype: torch.dtype,
    shapes: Sequence[Shape] = (),
    *,
    seconds: float = 0.4,
    by_linear: bool = True,
) -> float:
    """The highest rate of matrix products that is reached on a device, FLOP/s.

    Args:
        device: The device that multiplies.
        dtype: The dtype of both factors and the product.
        shapes: Shapes to try besides large squares.
        seconds: Time to spend on each shape.
        by_linear: Whether to multiply as linear layers here do, and not by ``torch.mm``.
    """
    best = 0.0
    for m, k, n in [(s, s, s) for s in _SQUARES] + list(shapes):
        a = torch.randn(m, k, device=device).to(dtype)
        b = torch.randn(n, k, device=device).to(dtype)
        out = torch.empty(m, n, device=device, dtype=dtype)
        multiply = partial(linear, a, b, place=out) if by_linear else partial(torch.mm, a, b.T, out=out)
        times = _repeat(multiply, device, seconds)
        best = max(best, 2 * m * k * n / min(times))
    return best


def seconds_per_step(recipe: Recipe, source: Source, *, repeats: int = 6) -> float:
    """Seconds of a step and the making of its batch, the quickest of several.

    On a processor it is the work that counts, so that what else runs meanwhile hardly matters: both are timed on one
    thread in processor time, and shared out over all processors at 90 %. Elsewhere, the longer of the step and the
    batch, which workers make meanwhile; without workers, both.
    """
    device = rank_device(recipe.device)
    with in_use(device, allow_tf32=recipe.allow_tf32):
        return _seconds_per_step(recipe, source, device, repeats)


def _seconds_per_step(recipe: Recipe, source: Source, device: torch.device, repeats: int) -> float:
    bench = StepBench(recipe, device, resolve_precision(recipe.precision, device))
    data = build_data(recipe, source)
    making = []
    for number in range(repeats):
        started = time.process_time()
        batch = data[number]
        making.append(time.process_time() - started)
        if isinstance(batch, Failure):
            raise DataError(batch.message)
    processors = usable_processors()
    if device.type != "cpu":
        bench.warm_up()
        step, workers = min(bench.run(repeats)), loader_workers(device, processors, recipe.train.num_workers)
        return max(step, min(making) / workers) if workers else step + min(making)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        bench.processor_times(2)  # the first steps are slower
        step = min(bench.processor_times(repeats))
    finally:
        torch.set_num_threads(threads)
    return (step + min(making)) / (0.9 * processors)


def _repeat(call: Callable[[], object], device: torch.device, seconds: float) -> list[float]:
    call()
    times: list[float] = []
    while sum(times) < seconds or len(times) < 3:
        times.append(_timed(call, device))
    return times


def _timed(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, with whatever it left to the device."""
    _wait(device)
    started = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class StepBench:
    """Production steps of a recipe on generated images, without a data pipeline.

    Args:
        recipe: The recipe of the run; its seed decides weights and masks.
        device, precision: Device and dtype of matrix products, as resolved.
        mode: How the networks are laid over the ranks, each of which makes a bench of its own.
    """

    def __init__(self, recipe: Recipe, device: torch.device, precision: torch.dtype, mode: Mode = "none") -> None:
        self._recipe, self._device, self._precision = recipe, device, precision
        keep_freed_memory(device)
        # Longer than any warm-up and freeze, and past them, so that the step is an ordinary one.
        self._images = recipe.train.batch_size_per_gpu * recipe.train.accumulate
        length = run_length(recipe, images=self._images)
        self._schedules = build_schedules(recipe, length)
        self._state = build_state(
            recipe, device, images=length.images, precision=precision, lay_out=partial(self._lay_out, mode)
        )
        self._state.step = length.steps // 2
        self._stepper = build_stepper(recipe, device, precision, self.parallel)
        self._generator = torch.Generator().manual_seed(recipe.train.seed)

    def _lay_out(self, mode: Mode, networks: StudentTeacher) -> None:
        checkpointed = self._recipe.parallel.activation_checkpointing
        self.parallel = wrap(networks, mode, self._device, activation_checkpointing=checkpointed)

    def batch(self) -> Batch:
        """Random crops with masks as the recipe draws them."""
        r = self._recipe
        images, channels, side = self._images, r.student.in_chans, r.crops.global_crops_size
        grid = (side // r.student.patch_size,) * 2
        masks = torch.from_numpy(build_masks(r)(2 * images, grid, sample_rng(r.train.seed, self._state.step, "masks")))

        def crops(count: int, edge: int) -> torch.Tensor:
            shape = (count, channels, edge, edge)
            return torch.randint(0, 256, shape, generator=self._generator, dtype=torch.uint8)

        return Batch(
            global_crops=crops(2 * images, side),
            local_crops=crops(r.crops.local_crops_number * images, r.crops.local_crops_size),
            masks=masks,
            masked=masked_patches(masks),
            indices=torch.arange(images),
        )

    def step(self, batch: Batch) -> bool:
        """One optimizer step, all of it but the making of the batch; whether it updated the weights.

        It does not where gradients overflow in float16, until the loss scale has come down, or are not finite.
        """
        r = self._recipe
        prepared = prepare(batch, device=self._device, mean=r.data.mean, std=r.data.std)
        with ops.using(r.parallel.kernels):
            result = self._stepper(self._state, prepared, self._schedules(self._state.step))
        self._state.step += 1
        return result.finite and not result.overflowed

    def warm_up(self) -> None:
        """Runs steps until two have updated the weights."""
        whole = sum(self.step(self.batch()) for _ in range(2))
        for _ in range(_MOST_OVERFLOWS):
            if whole >= 2:
                return
            whole += self.step(self.batch())

    def run(self, steps: int) -> list[float]:
        """Seconds of each of so many steps."""
        times = []
        for _ in range(steps):
            batch = self.batch()
            times.append(_timed(partial(self.step, batch), self._device))
        return times

    def processor_times(self, steps: int) -> list[float]:
        """Seconds of processor time of each of so many steps."""
        times = []
        for _ in range(steps):
            batch = self.batch()
            started = time.process_time()
            self.step(batch)
            times.append(time.process_time() - started)
        return times

    def phases(self) -> dict[str, float]:
        """Seconds of one step by phase, and the rest."""
        batch, stopwatch = self.batch(), Stopwatch(self._device)
        with timed_by(stopwatch):
            total = _timed(partial(self.step, batch), self._device)
        spent = dict.fromkeys(PHASES, 0.0) | stopwatch.seconds()
        return spent | {"rest": max(total - sum(spent.values()), 0.0)}

    def work(self, batch: Batch) -> float:
        """FLOPs of the matrix products and of attention in a step, as ``explain`` counts them."""
        parts = work_of_a_step(self._recipe, self._state.student_teacher, masked=len(batch.masked))
        return sum(part.flops for part in parts)


@dataclass(frozen=True)
class BenchResult:
    """The cost of a run's step and data on a machine.

    Args:
        device, precision, threads, num_workers, processors, batch_size: The setting that was measured.
        gemm_gflops: Highest rate of matrix products, GFLOP/s.
        gflop: Work of a step, GFLOP.
        step_s: Median step without data loading, seconds.
        phases_s: Seconds of one step by part.
        data_ms: Milliseconds that one core takes for an image's crops, by setting; ``as it is`` comes first.
        together_s: Median step with data loading, seconds.
        waited_s: Median seconds of such a step that went into waiting for data.
        peak_memory_gib: Peak memory of the device, or on the CPU of this process, GiB.
    """

    device: str
    precision: str
    threads: int
    num_workers: int
    processors: int
    batch_size: int
    gemm_gflops: float
    gflop: float
    step_s: float
    phases_s: dict[str, float]
    data_ms: dict[str, float]
    together_s: float
    waited_s: float
    peak_memory_gib: float

    @property
    def share_of_peak(self) -> float:
        """Part of the step's time that its products would take at the highest rate."""
        return self.gflop / self.gemm_gflops / self.step_s

    @property
    def waits(self) -> bool:
        """Whether data limits the run."""
        return self.waited_s > 0.1 * self.together_s

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {
            "images_per_s": self.batch_size / self.together_s,
            "share_of_peak": self.share_of_peak,
            "limited_by": "data" if self.waits else "step",
            "advice": self.advice(),
        }

    def advice(self) -> list[str]:
        """Say in sentences what limits the run, and which keys to change."""
        base, *others = self.data_ms.items()
        lines = []
        if self.waits:
            lines.append(
                f"Data limits: the step waits {self.waited_s / self.together_s:.0%} of its time for crops. One core "
                f"makes an image's in {base[1]:.1f} ms."
            )
            needed = math.ceil(base[1] / 1e3 * self.batch_size / self.step_s)
            lines.append(f"To keep up takes {needed} of them; this machine has {self.processors}.")
            if self.num_workers < min(needed, self.processors):
                lines.append(f"Set train.num_workers={min(needed, self.processors)}; now it is {self.num_workers}.")
            lines += [f"{key} brings it to {ms:.1f} ms." for key, ms in others if ms < 0.8 * base[1]]
            lines.append("Fewer or smaller local crops, and images stored nearer to the size of a crop, cost less.")
            return lines
        part = max(self.phases_s, key=lambda name: self.phases_s[name])
        lines.append(
            f"The step limits, not data. Its products would take {self.share_of_peak:.0%} of its time at the highest "
            f"rate; the longest part is {part} ({self.phases_s[part] / sum(self.phases_s.values()):.0%})."
        )
        if part == "losses":
            lines.append("The losses grow with dino.head_n_prototypes: fewer make them cheaper.")
        if self.together_s > 1.15 * self.step_s:
            lines.append(
                f"With data loading beside it a step takes {self.together_s / self.step_s:.2f} times as long: both "
                "use the same cores."
            )
            lines += [
                f"{key} would take {ms:.1f} ms of a core per image, not {base[1]:.1f}."
                for key, ms in others
                if ms < 0.8 * base[1]
            ]
        return lines


def measure(plan: Plan, source: Source, *, seconds: float = 10.0) -> BenchResult:
    """Measure a planned run: its step alone, its data alone, both together.

    Args:
        plan: The plan of the run.
        source: The images.
        seconds: Rough time for each of the three; each takes at least three steps or one batch.

    Raises:
        DataError: Images cannot be read.
    """
    recipe = plan.recipe
    bench = StepBench(recipe, plan.device, plan.precision)
    bench.warm_up()
    times = bench.run(3)
    while sum(times) < seconds:
        times += bench.run(1)
    batch = bench.batch()

    together, waited = [], []
    limit = min(3 + math.ceil(2 * seconds / statistics.median(times)), plan.length.steps)
    loader = make_loader(
        build_data(recipe, source),
        start_step=0,
        end_step=limit,
        num_workers=plan.num_workers,
        pin_memory=plan.device.type == "cuda",
    )
    with closing(loader):
        for number in range(limit):
            started = time.perf_counter()
            made = next(loader)
            waited.append(time.perf_counter() - started)
            bench.step(made)
            _wait(plan.device)
            together.append(time.perf_counter() - started)
            if number > 2 * plan.num_workers and sum(together[number // 2 :]) > seconds:
                break
    half = len(together) // 2  # the first ones find batches that were made ahead, or none yet

    return BenchResult(
        device=str(plan.device),
        precision=str(plan.precision).removeprefix("torch."),
        threads=torch.get_num_threads(),
        num_workers=plan.num_workers,
        processors=usable_processors(),
        batch_size=recipe.train.batch_size_per_gpu,
        step_s=statistics.median(times),
        phases_s=bench.phases(),
        gflop=bench.work(batch) / 1e9,
        peak_memory_gib=peak_memory_gib(plan.device),
        gemm_gflops=gemm_peak(plan.device, plan.precision) / 1e9,
        data_ms=_data_ms(recipe, source, plan.device, seconds),
        together_s=statistics.median(together[half:]),
        waited_s=statistics.median(waited[half:]),
    )


def _data_ms(recipe: Recipe, source: Source, device: torch.device, seconds: float) -> dict[str, float]:
    """Milliseconds of one core per image: as the recipe says, and with what else might help."""
    recipe = replace(recipe, train=replace(recipe.train, batch_size_per_gpu=min(16, recipe.train.batch_size_per_gpu)))
    variants = {"as it is": recipe}
    if not recipe.data.reduced_decode:
        variants["data.reduced_decode=true"] = replace(recipe, data=replace(recipe.data, reduced_decode=True))
    if recipe.augment.device == "workers" and device.type != "cpu":
        variants["augment.device=train"] = replace(recipe, augment=replace(recipe.augment, device="train"))
    data = {name: build_data(variant, source) for name, variant in variants.items()}
    times: dict[str, list[float]] = {name: [] for name in data}
    step = 0
    while step < 2 or sum(map(sum, times.values())) < seconds:  # they take turns on the same images
        for name, batches in data.items():
            started = time.perf_counter()
            batch = batches[step]
            times[name].append(time.perf_counter() - started)
            if isinstance(batch, Failure):
                raise DataError(batch.message)
        step += 1
    images = recipe.train.batch_size_per_gpu
    return {name: 1e3 * statistics.median(values[1:]) / images for name, values in times.items()}


def result_text(result: BenchResult) -> str:
    """The result as aligned lines, with advice."""
    total = sum(result.phases_s.values())
    rows = {
        "step alone": (
            f"{result.step_s:.3f} s ({result.batch_size} images, {result.device}, {result.precision}, "
            f"{result.threads} threads)"
        ),
        "  its parts": ", ".join(f"{k} {v / total:.0%}" for k, v in result.phases_s.items() if v > 0.01 * total),
        "  its work": f"{result.gflop:,.0f} GFLOP; the highest rate here is {result.gemm_gflops:,.0f} GFLOP/s",
        "data alone": "; ".join(f"{k}: {v:.2f} ms per image and core" for k, v in result.data_ms.items()),
        "together": (
            f"{result.together_s:.3f} s, {result.waited_s / result.together_s:.0%} of it waiting for data "
            f"({result.num_workers} data workers); {result.batch_size / result.together_s:,.1f} images/s"
        ),
        "memory": f"{result.peak_memory_gib:.2f} GiB at most",
    }
    lines = [f"{name:<12} {text}" for name, text in rows.items()]
    return "\n".join([*lines, "", *result.advice()])
