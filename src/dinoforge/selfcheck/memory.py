"""The memory that steps take beside its estimate, and the message of a run that has none left."""

import json
from collections.abc import Iterator
from functools import partial

import torch

from dinoforge.builders.networks import build_student_teacher
from dinoforge.planning.bench import StepBench
from dinoforge.planning.memory import estimate, of_tensors
from dinoforge.recipe.load import load_recipe
from dinoforge.selfcheck.faults import AT_CALL, Fault
from dinoforge.selfcheck.images import make_images
from dinoforge.selfcheck.lines import Line, fail, guarded, judged, not_here, ok
from dinoforge.selfcheck.processes import Program
from dinoforge.selfcheck.settings import Settings
from dinoforge.system.device import in_use, peak_memory_gib, resolve_device, resolve_precision

PROCESS_BOUND = 0.35  # relative, for a process on a CPU: systems differ by 0.15 in what they count
TENSORS_BOUND = 0.25  # relative, for the tensors on a GPU; counted on a CPU, they were within 0.08
RESERVED_BOUND = 0.5  # share above the tensors' estimate that PyTorch may keep on a GPU, where memory has gaps

_STEPS = 3
_SECONDS = 180.0
_ON_CPU = {"train.batch_size_per_gpu": 64}
_ON_GPU = {"student.arch": "vit_small", "student.patch_size": 16, "train.batch_size_per_gpu": 16}


def check(settings: Settings) -> Iterator[Line]:
    device = resolve_device(settings.device)
    yield guarded("memory of a step", partial(_beside_estimate, device))
    yield guarded("out of memory", partial(_out_of_memory, settings, device))


def _beside_estimate(device: torch.device) -> Line:
    name = "memory of a step"
    if device.type == "mps":
        return not_here(name, "PyTorch does not say on mps how much was used at most")
    recipe, _ = load_recipe("small", _ON_CPU) if device.type == "cpu" else load_recipe("dinov2", _ON_GPU)
    precision = resolve_precision("auto", device)
    with torch.device("meta"):
        networks = build_student_teacher(recipe)
    images = f"{recipe.train.batch_size_per_gpu} images"
    with in_use(device):
        StepBench(recipe, device, precision).run(_STEPS)
    if device.type == "cpu":
        parts = estimate(recipe, networks, precision=precision, device=device)
        parts.pop("checkpoint", None)  # none is written here
        estimated, measured = sum(parts.values()) / 2**30, peak_memory_gib(device)
        error = estimated / measured - 1
        text = (
            f"recipe small, {images}: this process took {measured:.2f} GiB, estimated {estimated:.2f} ({error:+.0%}, "
        )
        text += f"bound {PROCESS_BOUND:.0%})"
        return judged(abs(error) <= PROCESS_BOUND, name, text, measured_gib=measured, estimated_gib=estimated)
    parts = of_tensors(recipe, networks, precision=precision, device=device)
    estimated = sum(parts.values()) / 2**30
    used = torch.cuda.max_memory_allocated(device) / 2**30
    reserved = torch.cuda.max_memory_reserved(device) / 2**30
    error, more = estimated / used - 1, reserved / estimated - 1
    text = (
        f"ViT-S, {images}: tensors took {used:.2f} GiB, estimated {estimated:.2f} ({error:+.0%}, bound "
        f"{TENSORS_BOUND:.0%}); PyTorch kept {reserved:.2f} (bound {1 + RESERVED_BOUND:g} × the estimate)"
    )
    passed = abs(error) <= TENSORS_BOUND and more <= RESERVED_BOUND
    return judged(passed, name, text, measured_gib=used, estimated_gib=estimated, reserved_gib=reserved)


def _out_of_memory(settings: Settings, device: torch.device) -> Line:
    """A run whose third step finds no memory: it names keys, saves the last step, and ends with a code of its own."""
    name = "out of memory"
    images, out = make_images(settings.folder / "images", of_each=12), settings.folder / "run"
    keys = [f"device={device}", "train.steps=20", "train.batch_size_per_gpu=24", "report.every_minutes=null"]
    keys += ["dino.head_n_prototypes=32768"]  # so that there is something to be saved
    keys += ["train.threads=1"] if device.type == "cpu" else []
    fault = Fault("memory", str(images), str(out), tuple(keys))
    command = ["dinoforge", "selfcheck", "--fault", json.dumps(fault.as_json())]
    with Program(command, settings.folder, seconds=_SECONDS) as program:
        ended = program.wait()
    if ended.code != 3:
        return fail(name, f"a run with no memory left {ended.told}; expected exit code 3", ended.tail())
    said = [row for row in ended.output.splitlines() if row.startswith("error: ")]
    wanted = {"the keys that help": "train.batch_size_per_gpu=" in said[-1] if said else False}
    wanted["what was saved"] = f"step {AT_CALL - 1}" in ended.output
    if missing := [what for what, there in wanted.items() if not there]:
        return fail(name, f"exit code 3, without saying {' and '.join(missing)}", ended.tail())
    return ok(name, f"exit code 3, the last whole step saved, and: {said[-1].removeprefix('error: ')}")
