"""How fast training steps are, beside what the machine can multiply."""

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch.profiler import ProfilerActivity, profile

from dinoforge.config import Recipe
from dinoforge.data.batch import Batch, masked_patches, prepare
from dinoforge.data.loader import sample_rng
from dinoforge.models.vit import draw_kept_samples
from dinoforge.training.build import build_drop_path_rates, build_masks, build_schedules, build_state, run_length
from dinoforge.training.device import autocast, keep_freed_memory
from dinoforge.training.step import PHASES, train_step

Shape = tuple[int, int, int]  # of a product [m, k] @ [k, n]

_SQUARES = (1024, 2048, 3072, 4096)


def gemm_peak(device: torch.device, dtype: torch.dtype, shapes: Sequence[Shape] = (), *, seconds: float = 0.4) -> float:
    """The highest rate of matrix products that is reached on a device, FLOP/s.

    Args:
        device: where to multiply.
        dtype: of both factors and the product.
        shapes: shapes to try besides large squares.
        seconds: time to spend on each.
    """
    best = 0.0
    for m, k, n in [(s, s, s) for s in _SQUARES] + list(shapes):
        a = torch.randn(m, k, device=device).to(dtype)
        b = torch.randn(n, k, device=device).to(dtype)
        out = torch.empty(m, n, device=device, dtype=dtype)
        times = _repeat(partial(torch.mm, a, b.T, out=out), device, seconds)
        best = max(best, 2 * m * k * n / min(times))
    return best


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
        recipe: the run; its weights and masks come from its seed.
        device, precision: as resolved.
    """

    def __init__(self, recipe: Recipe, device: torch.device, precision: torch.dtype) -> None:
        self._recipe, self._device, self._precision = recipe, device, precision
        keep_freed_memory(device)
        # Longer than any warm-up and freeze, and past them, so that the step is an ordinary one.
        length = run_length(recipe, images=recipe.train.batch_size_per_gpu)
        self._schedules = build_schedules(recipe, length)
        self._state = build_state(recipe, device, images=length.images)
        self._step = length.steps // 2
        self._generator = torch.Generator().manual_seed(recipe.train.seed)

    def batch(self) -> Batch:
        """Random crops with masks as the recipe draws them."""
        r = self._recipe
        images, channels, side = r.train.batch_size_per_gpu, r.student.in_chans, r.crops.global_crops_size
        grid = (side // r.student.patch_size,) * 2
        masks = torch.from_numpy(build_masks(r)(2 * images, grid, sample_rng(r.train.seed, self._step, "masks")))

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

    def step(self, batch: Batch) -> None:
        """One optimizer step, all of it but the making of the batch."""
        r, networks = self._recipe, self._state.student_teacher
        prepared = prepare(batch, device=self._device, mean=r.data.mean, std=r.data.std)
        rates = build_drop_path_rates(r)
        kept = None
        if any(rates):
            sizes = [len(crops) for crops in networks.student_crops(prepared)]
            kept = draw_kept_samples(rates, sizes, self._generator)
        train_step(
            networks,
            self._state.optimizer,
            prepared,
            self._schedules(self._step),
            clip_grad=r.optim.clip_grad,
            kept=kept,
            autocast=autocast(self._device, self._precision),
            scaler=self._state.scaler,
        )
        self._step += 1

    def run(self, steps: int) -> list[float]:
        """Seconds of each of so many steps."""
        times = []
        for _ in range(steps):
            batch = self.batch()
            times.append(_timed(partial(self.step, batch), self._device))
        return times

    def phases(self) -> dict[str, float]:
        """Seconds of one step by phase, and the rest."""
        batch = self.batch()
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self._device.type == "cuda" else [])
        with profile(activities=activities) as profiler:
            total = _timed(partial(self.step, batch), self._device)
        spent = dict.fromkeys(PHASES, 0.0)
        for event in profiler.key_averages():
            if event.key in spent:
                time_us = event.device_time_total if self._device.type == "cuda" else event.cpu_time_total
                spent[event.key] = time_us / 1e6
        return spent | {"rest": max(total - sum(spent.values()), 0.0)}
