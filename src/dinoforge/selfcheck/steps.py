"""Training steps on the device: beside the reference's numbers, and gradients beside the CPU's."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dinoforge.builders.networks import build_student_teacher
from dinoforge.data.batch import prepare
from dinoforge.planning.bench import StepBench
from dinoforge.recipe.load import load_recipe
from dinoforge.recipe.schema import Recipe
from dinoforge.selfcheck import fidelity
from dinoforge.selfcheck.lines import Line, guarded, judged, not_here, percent
from dinoforge.selfcheck.settings import Settings
from dinoforge.system.device import autocast, in_use, resolve_device, resolve_precision

HALVES = (torch.bfloat16, torch.float16)

GRADIENT_BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 0.06, torch.float16: 0.008}
"""Of any tensor, ‖g − g_CPU‖ / ‖g_CPU‖, where g_CPU is the CPU's in float32.

What was measured on a CPU: 3e-6 between its own paths and those that accelerators take, in float32; 0.021 in bfloat16;
0.0025 in float16. TF32 would be at about 1e-3.
"""

_SCALE = 1024.0  # scale of the loss in float16
_VIT_SMALL = {
    "student.arch": "vit_small",
    "student.patch_size": 16,
    "student.layerscale": 1.0,  # or else the blocks hardly matter
    "student.drop_path_rate": 0.0,
    "crops.local_crops_size": 96,
    "crops.local_crops_number": 2,
    "train.batch_size_per_gpu": 2,
    "train.centering": "sinkhorn_knopp",
    "dino.head_n_prototypes": 4096,
    "dino.head_hidden_dim": 512,
}


@dataclass(frozen=True)
class _Case:
    name: str
    folder: Path
    ranks: int


def check(settings: Settings) -> Iterator[Line]:
    device = resolve_device(settings.device)
    cases = [_Case(path.parent.name, path.parent, fidelity.world_size_of(path.parent)) for path in _descriptions()]
    alone, together = [case for case in cases if case.ranks == 1], [case for case in cases if case.ranks > 1]
    with in_use(device), _one_thread():
        for dtype in (torch.float32, *HALVES):
            if reason := _cannot(device, dtype):
                yield not_here(f"steps, {_name(dtype)}", reason)
                continue
            name = f"steps, {_name(dtype)}"
            yield guarded(name, partial(_steps, name, alone, dtype, device))
            name = f"steps of 2 ranks, {_name(dtype)}"
            if reason := _cannot_together(device, settings, dtype):
                yield not_here(name, reason)
            else:
                yield guarded(name, partial(_steps, name, together[-1:] if settings.short else together, dtype, device))
    if settings.short and device.type == "cpu":
        yield not_here("gradients, bfloat16", "left out of the short form")
        return
    with in_use(device):
        yield from _gradients(device)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread meanwhile: the networks of the cases are so small that a second one only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _descriptions() -> list[Path]:
    found = sorted(fidelity.CASES.glob("*/case.json"))
    if not found:
        raise FileNotFoundError(f"no cases in {fidelity.CASES}: they come with the package, so install it again")
    return found


def _cannot(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why steps in a precision are not tried."""
    if device.type == "mps" and dtype is not torch.float32:
        return "precision=auto never takes it on mps"
    if device.type == "cuda" and dtype is torch.bfloat16 and resolve_precision("auto", device) is not torch.bfloat16:
        return "this GPU has no units for bfloat16"
    return None


def _cannot_together(device: torch.device, settings: Settings, dtype: torch.dtype) -> str | None:
    if settings.short and dtype is not torch.float32:
        return "left out of the short form"
    if device.type == "mps":
        return "a Mac has one GPU, which ranks cannot share"
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        return "needs a GPU for each rank; here is one"
    return None


def _steps(name: str, cases: Sequence[_Case], dtype: torch.dtype, device: torch.device) -> Line:
    """The worst errors of some cases, each beside its bound."""
    worst: dict[str, tuple[float, float, str]] = {}  # kind -> share of its bound, error, where
    least = float("inf")
    for case in cases:
        errors = fidelity.check(case.folder, dtype, device).worst
        least = min(least, errors["gradient"][0] * fidelity.GRADIENT)
        for kind, (ratio, where) in errors.items():
            error = ratio * fidelity.BOUNDS[kind]
            share = ratio if dtype is torch.float32 else error / fidelity.HALF_BOUNDS[dtype][kind]
            if device.type != "cpu" and dtype is torch.float32 and kind != "gradient":
                share /= fidelity.AMPLIFIED.get(case.name, 1.0)
            if kind not in worst or share > worst[kind][0]:
                worst[kind] = (share, error, f"{case.name}: {where}")
    passed = all(share <= 1 for share, _, _ in worst.values())
    ordered = sorted(worst.items(), key=lambda item: -item[1][0])
    shares = ", ".join(f"{kind} {share:.2f}" for kind, (share, _, _) in ordered[:3])
    text = f"{len(cases)} case{'s' * (len(cases) > 1)}; largest errors as shares of their bounds: {shares}"
    if dtype is not torch.float32 and least < fidelity.HALF_LEAST[dtype]:
        passed, text = False, f"{text}; but gradients differ by {least:.1e} from float32: this was not {_name(dtype)}"
    details = tuple(f"{kind}: {share:.3g} of its bound, {where}" for kind, (share, _, where) in worst.items())
    values = {kind: {"error": error, "share_of_bound": share, "where": w} for kind, (share, error, w) in worst.items()}
    ran = [case.name for case in cases]
    return judged(passed, name, text, () if passed else details, errors=values, cases=ran)


def _gradients(device: torch.device) -> Iterator[Line]:
    """Gradients of a network of an ordinary size, random weights and images, beside the CPU's in float32."""
    recipe, _ = load_recipe("dinov2", _VIT_SMALL)
    of_cpu: dict[str, Tensor] = {}
    for dtype in (torch.float32, *HALVES):
        name = f"gradients, {_name(dtype)}"
        if device.type == "cpu" and dtype is not torch.bfloat16:
            same = "the CPU's are what others are held against" if dtype is torch.float32 else "slow on a CPU"
            yield not_here(name, same)
            continue
        if reason := _cannot(device, dtype):
            yield not_here(name, reason)
            continue
        of_cpu = of_cpu or gradients_of(recipe, torch.device("cpu"), torch.float32)
        yield guarded(name, partial(_beside_cpu, name, recipe, device, dtype, of_cpu))


def gradients_of(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """The gradients of a step at the recipe's seed, by the names of the student's parameters, on the CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.train.seed)
        networks = build_student_teacher(recipe)
    networks.to(device)
    made = StepBench(recipe, torch.device("cpu"), torch.float32).batch()
    batch = prepare(made, device=device, mean=recipe.data.mean, std=recipe.data.std)
    scale = _SCALE if dtype is torch.float16 else 1.0
    with autocast(device, dtype):
        losses = networks(batch, teacher_temp=recipe.teacher.teacher_temp)
    (losses.total * scale).backward()
    return {
        name: fidelity.without_noise(name, parameter.grad.cpu() / scale)
        for name, parameter in networks.student.named_parameters()
        if parameter.grad is not None
    }


def _beside_cpu(
    name: str, recipe: Recipe, device: torch.device, dtype: torch.dtype, of_cpu: Mapping[str, Tensor]
) -> Line:
    return beside(name, gradients_of(recipe, device, dtype), of_cpu, dtype)


def beside(name: str, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], dtype: torch.dtype) -> Line:
    """The largest relative difference of any tensor."""
    if missing := theirs.keys() ^ ours.keys():
        return judged(False, name, f"gradients of {', '.join(sorted(missing)[:3])} on one side alone")
    errors = {key: float((ours[key] - theirs[key]).norm() / theirs[key].norm()) for key in theirs}
    # A NaN is larger than anything.
    worst = max(errors, key=lambda key: errors[key] if errors[key] == errors[key] else float("inf"))
    bound, least = GRADIENT_BOUNDS[dtype], fidelity.HALF_LEAST.get(dtype, 0.0)
    text = f"of ViT-S, beside the CPU's in float32: {percent(errors[worst])} at most (bound {percent(bound)}), {worst}"
    return judged(least <= errors[worst] <= bound, name, text, largest=errors[worst], bound=bound, where=worst)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
