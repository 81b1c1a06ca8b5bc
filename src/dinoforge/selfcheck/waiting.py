"""The number of times that a step makes the host wait for a GPU, by CUDA's own count."""

import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from dinoforge.planning.bench import StepBench
from dinoforge.recipe.load import load_recipe
from dinoforge.selfcheck.lines import Line, guarded, judged, not_here
from dinoforge.selfcheck.settings import Settings
from dinoforge.system.device import in_use, resolve_device, resolve_precision

WAITS = 1
"""Whether the loss and the gradients are finite; float16's scaler asks once more."""

_NAME = "waits in a step"


def check(settings: Settings) -> Iterator[Line]:
    device = resolve_device(settings.device)
    if device.type != "cuda":
        yield not_here(_NAME, "only CUDA counts them; see the lines of one device for the same step elsewhere")
        return
    yield guarded(_NAME, partial(_waits, device))


def _waits(device: torch.device) -> Line:
    recipe, _ = load_recipe("small", {"train.batch_size_per_gpu": 32})
    precision = resolve_precision("auto", device)
    with in_use(device):
        bench = StepBench(recipe, device, precision)
        bench.warm_up()
        bench.run(2)  # algorithms are chosen, and there is room
        batch = bench.batch().pin_memory()
        torch.cuda.synchronize(device)
        before = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                bench.step(batch)
            finally:
                torch.cuda.set_sync_debug_mode(before)
    return of_warnings(told, WAITS + (precision is torch.float16))


def of_warnings(told: list[warnings.WarningMessage], most: int) -> Line:
    """The line of what CUDA warned of in a step.

    Args:
        told: All warnings.
        most: Number of synchronisations that may be.
    """
    where = [
        f"{Path(warning.filename).name}:{warning.lineno}"
        for warning in told
        if "called a synchronizing" in str(warning.message)
    ]
    others = sorted({str(w.message).splitlines()[0] for w in told if "called a synchronizing" not in str(w.message)})
    text = f"{len(where)} (at most {most}): {', '.join(where) or 'none'}"
    return judged(len(where) <= most, _NAME, text, tuple(others[:5]), waits=len(where), where=where)
