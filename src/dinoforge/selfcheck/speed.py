"""The speed of steps, beside what the device multiplies at best, and the speed of reading images."""

import statistics
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from dinoforge.builders.data import build_data
from dinoforge.data.batch import Batch
from dinoforge.data.batches import make_loader
from dinoforge.data.sources import open_source
from dinoforge.planning.bench import StepBench, gemm_peak
from dinoforge.recipe.load import load_recipe
from dinoforge.recipe.schema import Recipe
from dinoforge.selfcheck.images import make_images
from dinoforge.selfcheck.lines import Line, guarded, not_here, ok
from dinoforge.selfcheck.settings import Settings
from dinoforge.system.device import in_use, loader_workers, resolve_device, resolve_precision, usable_processors

NETWORKS = {"ViT-S": "vit_small", "ViT-B": "vit_base", "ViT-L": "vit_large"}
_IMAGES = 32  # images of a step; fewer where they do not fit
_LEAST_IMAGES = 4
_LOADER_SECONDS, _LOADER_STEPS = 5.0, 200
_LARGE = {
    "student.patch_size": 16,
    "student.drop_path_rate": 0.0,
    "crops.local_crops_size": 96,
    "dino.head_n_prototypes": 65536,
}


@dataclass(frozen=True)
class Profile:
    """A profile of a GPU's step.

    Args:
        kernels: Number of kernels that the GPU ran.
        idle: Share of the time between the first and the last kernel in which none ran.
    """

    kernels: int
    idle: float


def check(settings: Settings) -> Iterator[Line]:
    device = resolve_device(settings.device)
    precision = resolve_precision("auto", device)
    peak = 0.0
    with in_use(device):

        def measured() -> Line:
            nonlocal peak
            seconds = 0.05 if settings.short else 0.4  # time for each size
            peak = gemm_peak(device, precision, seconds=seconds, by_linear=device.type == "cpu")
            dtype = str(precision).removeprefix("torch.")
            return ok("speed: products", f"{peak / 1e12:.3g} TFLOP/s in {dtype} at best", flops=peak)

        yield guarded("speed: products", measured)
        recipe, _ = load_recipe("small", {"train.batch_size_per_gpu": _IMAGES} if device.type == "cpu" else {})
        yield guarded("speed: small", partial(_step, "speed: small", recipe, device, precision, peak))
        for name, arch in NETWORKS.items():
            line = f"speed: {name}"
            if device.type == "cpu":
                yield not_here(line, "too slow on a CPU")
                continue
            yield guarded(line, partial(_largest_that_fits, line, arch, device, precision, peak))
        yield guarded("speed: images", partial(_loader, settings, device))


def _largest_that_fits(name: str, arch: str, device: torch.device, precision: torch.dtype, peak: float) -> Line:
    images = _IMAGES
    while images >= _LEAST_IMAGES:
        keys: dict[str, Any] = {"student.arch": arch, "train.batch_size_per_gpu": images}
        recipe, _ = load_recipe("dinov2", _LARGE | keys)
        try:
            return _step(name, recipe, device, precision, peak)
        except torch.OutOfMemoryError:
            images //= 2
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return not_here(name, f"{_LEAST_IMAGES} images do not fit into the memory of {device}")


def _step(name: str, recipe: Recipe, device: torch.device, precision: torch.dtype, peak: float) -> Line:
    bench = StepBench(recipe, device, precision)
    bench.warm_up()
    seconds = statistics.median(bench.run(5))
    batch = bench.batch()
    share = bench.work(batch) / seconds / peak if peak else float("nan")
    images = recipe.train.batch_size_per_gpu
    told = f"{images} images: {seconds:.3f} s a step, {images / seconds:.0f} images/s, {share:.0%} of the best rate"
    values: dict[str, Any] = {"images": images, "seconds": seconds, "share_of_peak": share}
    if device.type == "cuda":
        seen = profiled(bench, batch.pin_memory())
        told += f", {seen.kernels:,} kernels, idle {seen.idle:.0%}"
        values |= {"kernels": seen.kernels, "idle": seen.idle}
    return ok(name, told, **values)


def profiled(bench: StepBench, batch: Batch) -> Profile:
    """Profiles a step on CUDA."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        bench.step(batch)
        torch.cuda.synchronize()
    times = [
        (event.time_range.start, event.time_range.end)
        for event in profiler.events() or []
        if event.device_type.name == "CUDA" and not event.is_user_annotation
    ]
    return of_times(times)


def of_times(times: list[tuple[float, float]]) -> Profile:
    """Counts kernels and the time between them.

    Args:
        times: Start and end of each kernel, in any order; kernels may overlap.
    """
    if not times:
        return Profile(0, 1.0)
    busy, until = 0.0, float("-inf")
    for start, end in sorted(times):
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    whole = until - min(start for start, _ in times)
    return Profile(len(times), 1 - busy / whole if whole > 0 else 0.0)


def _loader(settings: Settings, device: torch.device) -> Line:
    """Measure what the data workers of a run of recipe ``small`` deliver."""
    recipe, _ = load_recipe("small", {"train.batch_size_per_gpu": 32})
    source = open_source(make_images(settings.folder / "images", of_each=24, side=256))
    workers = loader_workers(device, usable_processors(), recipe.train.num_workers)
    batches = make_loader(build_data(recipe, source), start_step=0, end_step=_LOADER_STEPS, num_workers=workers)
    with closing(batches):
        next(batches)  # the workers have started
        started, made = time.perf_counter(), 0
        for batch in batches:
            made += len(batch.indices)
            if time.perf_counter() - started > _LOADER_SECONDS / (1 + 2 * settings.short):
                break
        rate = made / (time.perf_counter() - started)
    text = f"{rate:.0f} images/s from {workers} workers, for recipe small, of made images of 256 pixels"
    return ok("speed: images", text, images_per_second=rate, workers=workers)
