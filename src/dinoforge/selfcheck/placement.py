"""Whether everything that belongs together is on one device: tried on an accelerator that is not there.

A network that is left on the CPU, or a tensor, is found here on any machine; on a real accelerator it would end the
command. What a step makes the host wait for is counted, too.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dinoforge.commands.embed import embed
from dinoforge.commands.evaluate import evaluate_knn
from dinoforge.commands.report import report
from dinoforge.commands.train import train
from dinoforge.planning.bench import StepBench
from dinoforge.recipe.load import load_recipe
from dinoforge.selfcheck.fake import DEVICE, fake_accelerator
from dinoforge.selfcheck.images import make_images
from dinoforge.selfcheck.lines import Line, guarded, judged, not_here
from dinoforge.selfcheck.settings import Settings

WAITS = 1
"""Of the host for the device, in a step: whether its loss and gradients are finite."""

PAGEABLE_BYTES = 2**16
"""A larger copy from memory that is not page-locked is waited for."""

_SMALL: dict[str, Any] = {
    "student.embed_dim": 32,
    "student.depth": 2,
    "student.patch_size": 16,
    "crops.global_crops_size": 64,
    "crops.local_crops_size": 32,
    "dino.head_n_prototypes": 64,
    "dino.head_hidden_dim": 64,
    "dino.head_bottleneck_dim": 16,
    "train.batch_size_per_gpu": 8,
    "train.steps": 4,
    "train.num_workers": 0,
    "optim.warmup_length": "25%",
    "log.every_steps": 1,
    "report.every_minutes": None,
    "precision": "fp32",
}
_RECIPES: dict[str, dict[str, Any]] = {
    "Sinkhorn-Knopp": {},
    "centering, two heads": {"train.centering": "centering", "ibot.separate_head": True},
    "SwiGLU, registers": {"student.ffn_layer": "swiglu", "student.num_register_tokens": 2},
    "stochastic depth, micro-batches": {"student.drop_path_rate": 0.3, "train.accumulate": 2},
    "activations recomputed": {"parallel.activation_checkpointing": True},
}


def check(settings: Settings) -> Iterator[Line]:
    yield guarded("one device: a step", _steps)
    images = make_images(settings.folder / "placement-images", of_each=12, side=64)
    run = settings.folder / "placement-run"
    quiet = Console(quiet=True)
    commands: dict[str, Callable[[], object]] = {
        "train, with a probe": lambda: train(
            images, out=run, console=quiet, **(_SMALL | {"augment.device": "train", "probe.every_steps": 2})
        ),
        "embed": lambda: embed(run, images),
        "eval knn": lambda: evaluate_knn(run, images),
        "report": lambda: report(run, data=images),
    }
    for name, call in commands.items():
        yield guarded(f"one device: {name}", partial(_command, f"one device: {name}", call, run))


def _steps() -> Line:
    """Steps of several recipes, in float32 and bfloat16; each makes the host wait once."""
    name = "one device: a step"
    worst, largest, kernels, tried = 0, 0, 0, 0
    details: tuple[str, ...] = ()
    for keys in _RECIPES.values():
        for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            recipe, _ = load_recipe("small", _SMALL | {"train.steps": 1000, "precision": precision} | keys)
            with fake_accelerator(float64=False) as counts:
                bench = StepBench(recipe, DEVICE, dtype)
                batch = bench.batch().pin_memory()
                counts.clear()
                bench.step(batch)
            tried += 1
            kernels = max(kernels, counts.kernels)
            largest = max([largest, *(size for size, _ in counts.pageable)])
            if len(counts.waits) > worst:
                worst, details = len(counts.waits), tuple(f"{reason} at {line}" for reason, line in counts.waits)
    text = (
        f"{tried} kinds of steps: the host waits {worst} time{'' if worst == 1 else 's'} in one (at most {WAITS} may "
        f"be), copies at most {largest:,} bytes from ordinary memory at once, starts at most {kernels:,} kernels"
    )
    passed = worst <= WAITS and largest <= PAGEABLE_BYTES
    return judged(passed, name, text, () if passed else details, waits=worst, pageable_bytes=largest, kernels=kernels)


def _command(name: str, call: Callable[[], object], run: Path) -> Line:
    """A command whose ``device=auto`` finds the accelerator."""
    if name != "one device: train, with a probe" and not (run / "teacher.safetensors").exists():
        return not_here(name, "there is no run to try it on")
    with fake_accelerator(float64=False, found=True) as counts:
        call()
    text = f"all on one device: {counts.kernels:,} kernels there" if counts.kernels else "did nothing on the device"
    return judged(counts.kernels > 0, name, text, kernels=counts.kernels)
