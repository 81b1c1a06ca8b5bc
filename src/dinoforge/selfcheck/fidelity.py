"""Compares training steps with numbers measured on the reference implementation.

A case is a directory: initial weights, batches, and the losses, gradients and final weights that the reference gave.
Six come with the package, in ``cases``. The steps run through the code that training uses.
"""

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from dinoforge.builders.networks import build_optimizer, build_student_teacher
from dinoforge.data.bad_images import BadImages
from dinoforge.data.batch import Batch, masked_patches
from dinoforge.errors import TrainingError
from dinoforge.kernels import ops
from dinoforge.kernels.types import Kept
from dinoforge.method.dinov2 import StudentTeacher
from dinoforge.models.stochastic_depth import KeptSamples
from dinoforge.optim.schedules import Hyperparameters
from dinoforge.recipe.load import load_recipe
from dinoforge.recipe.schema import Recipe
from dinoforge.system import distributed
from dinoforge.system.device import autocast, in_use
from dinoforge.training.parallel import Mode, wrap
from dinoforge.training.pieces import crop_counts
from dinoforge.training.state import TrainState
from dinoforge.training.step import Stepper

CASES = Path(__file__).parent / "cases"
"""The cases that come with the package; ``README.md`` there says how they were measured."""

LOSS = 1e-5  # relative
GRAD_NORM = 1e-4  # relative
GRADIENT = 1e-4  # relative, of tensors with a norm above GRADIENT_FLOOR
GRADIENT_FLOOR = 1e-6
UPDATE = 1e-3  # relative to how far the reference moved the parameter …
UPDATE_FLOOR = 3e-7  # … plus this share of the parameter itself
CENTER = 1e-5  # relative
BOUNDS = {"loss": LOSS, "gradient norm": GRAD_NORM, "gradient": GRADIENT, "parameter": UPDATE, "centre": CENTER}

AMPLIFIED = {"two_ranks_centering": 3.4}
"""Cases whose steps multiply rounding errors, and how many bounds steps in float64 end away from the reference.

A device that rounds in another way than the reference's CPU did cannot be asked to be nearer, after the first step.
"""

HALF_BOUNDS: dict[torch.dtype, dict[str, float]] = {
    torch.bfloat16: {
        "loss": 0.04,  # relative; 0.014
        "gradient norm": 0.1,  # relative; 0.033
        "gradient": 0.1,  # ‖g − g_ref‖ / ‖g_ref‖ at step 0; 0.051
        "parameter": 0.6,  # ‖p − p_ref‖ / ‖p_ref − p_initial‖ after all steps; 0.29
        "centre": 0.008,  # relative; 0.0024
    },
    torch.float16: {
        "loss": 0.008,  # 0.0026
        "gradient norm": 0.06,  # 0.021
        "gradient": 0.015,  # 0.0045
        "parameter": 0.6,  # 0.20
        "centre": 0.006,  # 0.0022
    },
}
"""Largest error of any term, sub-network, tensor in half precision, beside the reference's float32.

Two to three times what was measured over all cases (PyTorch 2.14, a CPU with AVX-512 BF16), which is the last number of
each line. An error after the first step holds what the steps before it did: AdamW's first updates have nearly the same
length for every gradient, so one that is almost 0 and changes its sign moves its parameter by a whole step in the other
direction.
"""

HALF_LEAST = {torch.bfloat16: 1e-3, torch.float16: 1e-4}
"""Gradients that are nearer to float32 than this were not computed in half precision."""

_CPU = torch.device("cpu")
_FLOAT16_SCALE = 2.0**10
"""Of the loss: the gradients of the cases neither overflow nor vanish, so no step is skipped."""

_MODES: tuple[Mode, ...] = ("ddp", "fsdp")  # modes of several ranks

Prepare = Callable[[StudentTeacher], None]


@dataclass
class Errors:
    """The worst error of each kind, as a multiple of its bound, and where."""

    worst: dict[str, tuple[float, str]] = field(default_factory=dict)

    def add(self, kind: str, error: float, bound: float, where: str) -> None:
        # An error that is not a number, or above 0 with a bound of 0, is infinitely bad.
        ratio = error / bound if bound > 0 else (0.0 if error == 0 else float("inf"))
        if ratio != ratio:
            ratio = float("inf")
        if kind not in self.worst or ratio > self.worst[kind][0]:
            self.worst[kind] = (ratio, where)

    def add_all(self, others: "Errors", prefix: str) -> None:
        for kind, (ratio, where) in others.worst.items():
            self.add(kind, ratio, 1.0, prefix + where)

    @property
    def within_bounds(self) -> bool:
        return all(ratio <= 1 for ratio, _ in self.worst.values())


def recipe_of(case: dict[str, Any]) -> Recipe:
    """The case's configuration: overrides on the official defaults, with the sizes of ``vit_custom``."""
    overrides: dict[str, Any] = {}
    for section, keys in case.get("config", {}).items():
        overrides |= {f"{section}.{k}": v for k, v in keys.items()} if isinstance(keys, dict) else {section: keys}
    overrides |= {"student.arch": "vit_custom"} | {f"student.{key}": value for key, value in case["vit"].items()}
    overrides["optim.adamw_beta1"], overrides["optim.adamw_beta2"] = case["optimizer"]["betas"]
    overrides["augment.blur_kernel"] = 1  # crops come as they are, also smaller ones than the blur's kernel
    recipe, _ = load_recipe("dinov2", overrides)
    return recipe


def world_size_of(folder: Path) -> int:
    """The number of ranks of a case."""
    size: int = json.loads((folder / "case.json").read_text()).get("world_size", 1)
    return size


def load_networks(student_teacher: StudentTeacher, weights: Mapping[str, Tensor]) -> None:
    for role in ("student", "teacher"):
        own = {k.removeprefix(f"{role}."): v for k, v in weights.items() if k.startswith(f"{role}.")}
        getattr(student_teacher, role).load_state_dict(own, strict=True)


def read_batch(folder: Path, name: str, patches: int) -> Batch:
    """A batch of a case. Without masks, nothing is masked; without local crops, there are none."""
    tensors = load_file(folder / f"{name}.safetensors")
    crops = tensors["global_crops"].float()
    masks = tensors.get("masks", torch.zeros(len(crops), patches)).flatten(1).bool()
    return Batch(
        global_crops=crops,
        local_crops=tensors.get("local_crops", crops[:0]).float(),
        masks=masks,
        masked=masked_patches(masks),
        indices=torch.arange(len(crops) // 2),
    )


def read_subsets(
    folder: Path, rank_prefix: str, step: int, depth: int, group_sizes: Sequence[int]
) -> list[KeptSamples] | None:
    """The images that stochastic depth keeps; a branch or group that is not listed keeps all of them.

    Each rank has a file of its own, or its tensors have the rank's name in a common file.
    """
    own, common = folder / f"{rank_prefix}subsets.safetensors", folder / "subsets.safetensors"
    path = own if own.exists() else common
    if not path.exists():
        return None
    tensors = load_file(path)
    if rank_prefix:
        ours = {
            k[len(rank_prefix) :]: v for k, v in tensors.items() if k.startswith((rank_prefix, rank_prefix[:-1] + "."))
        }
        tensors = ours or tensors

    def kept(block: int, branch: str) -> list[Kept]:
        names = [f"step{step}.block{block}.{branch}.{group}" for group in ("global", "local")]
        images = [
            tensors[name].long() if name in tensors else torch.arange(size)
            for name, size in zip(names, group_sizes, strict=False)
        ]
        return [Kept(each, size / len(each)) for each, size in zip(images, group_sizes, strict=True)]

    return [KeptSamples(attn=kept(b, "attn"), ffn=kept(b, "ffn")) for b in range(depth)]


def without_noise(name: str, tensor: Tensor) -> Tensor:
    """Leave out the key third of the attention bias: softmax cancels it, and AdamW turns noise into steps."""
    if not name.endswith("attn.qkv.bias"):
        return tensor
    third = len(tensor) // 3
    return torch.cat([tensor[:third], tensor[2 * third :]])


def run_case(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    prepare: Prepare | None = None,
    mode: Mode = "none",
    *,
    least_tokens: int | None = None,
    device: torch.device = _CPU,
    gradients: dict[str, Tensor] | None = None,
    kernels: ops.Kernels = "auto",
) -> Errors:
    """Runs one rank of a case; on several ranks, call it on each. The errors are those of rank 0.

    Args:
        folder: Folder of the case.
        dtype: The dtype of matrix products, under autocast unless it is float32, which on a GPU is float32 only inside
            of ``in_use``; in float16 the loss is scaled.
        prepare: Changes the networks when they have the case's weights, for example by compiling them.
        mode: How the networks are laid over ranks.
        least_tokens: As for ``Stepper``.
        device: The device that runs the steps; what they are compared with stays on the CPU.
        gradients: Receives the gradients of the first step, before clipping, by the names of the student's parameters.
        kernels: The kernels that compute the steps.
    """
    case = json.loads((folder / "case.json").read_text())
    recipe = recipe_of(case)
    initial, expected = load_file(folder / "initial.safetensors"), load_file(folder / "expected.safetensors")
    torch.manual_seed(0)
    student_teacher = build_student_teacher(recipe)
    load_networks(student_teacher, initial)
    student_teacher.to(device)
    if prepare is not None:
        prepare(student_teacher)
    parallel = wrap(student_teacher, mode, device)
    optimizer = build_optimizer(recipe, student_teacher)
    for group in optimizer.param_groups:
        group["eps"] = case["optimizer"]["eps"]
    scaler = torch.amp.GradScaler(device.type, init_scale=_FLOAT16_SCALE) if dtype is torch.float16 else None
    state = TrainState(student_teacher, optimizer, scaler, BadImages(0.0, 1))
    stepper = Stepper(
        recipe.optim.clip_grad,
        partial(autocast, device, dtype),
        least_tokens=least_tokens,
        parallel=parallel,
    )
    prefix = f"rank{distributed.rank()}_" if case.get("world_size", 1) > 1 else ""

    errors = Errors()
    clipped: dict[str, Tensor] = {}
    gradients = {} if gradients is None else gradients
    names = ("lr", "last_layer_lr", "weight_decay", "momentum", "teacher_temp")
    patches = (recipe.crops.global_crops_size // recipe.student.patch_size) ** 2
    for i, (schedule, reference) in enumerate(zip(case["schedule"], case["losses"], strict=True)):
        hyper = Hyperparameters(**{name: schedule[name] for name in names}, last_layer_frozen=False)
        batch = read_batch(folder, f"{prefix}batch_{i}", patches).to(device)
        groups = crop_counts(student_teacher.objective, batch)
        handle = (
            optimizer.register_step_pre_hook(lambda *_: _keep_gradients(student_teacher, clipped)) if i == 0 else None
        )
        with ops.using(kernels):
            result = stepper(state, batch, hyper, kept=[read_subsets(folder, prefix, i, case["vit"]["depth"], groups)])
        if not result.finite:
            raise TrainingError(f"loss or gradient is not finite at step {i} of {folder.name}")
        if handle is not None:
            handle.remove()
            limit = recipe.optim.clip_grad or float("inf")
            scales = {name: max(1.0, (float(norm) + 1e-6) / limit) for name, norm in result.grad_norms.items()}
            gradients |= {name: scales[name.split(".")[0]] * gradient for name, gradient in clipped.items()}
        for term, value in vars(result.losses).items():
            ours, theirs = float(value), float(reference.get(term, 0.0))
            errors.add("loss", abs(ours - theirs), LOSS * abs(theirs), f"{term} at step {i}: {ours:.8g}, {theirs:.8g}")
        for network, theirs in reference.get("grad_norm", {}).items():
            ours = float(result.grad_norms.get(network, torch.nan))
            where = f"{network} at step {i}: {ours:.8g}, {theirs:.8g}"
            errors.add("gradient norm", abs(ours - theirs), GRAD_NORM * abs(theirs), where)

    _compare_gradients(errors, gradients, expected)
    _compare_parameters(errors, student_teacher, initial, expected)
    for name in ("dino_center", "ibot_center"):
        if name in expected:
            wanted = expected[name].flatten()
            center = student_teacher.state_dict().get(name, torch.full_like(wanted, torch.nan)).cpu()
            errors.add("centre", float((center - wanted).norm()), CENTER * float(wanted.norm()), name)
    return errors


def _keep_gradients(student_teacher: StudentTeacher, into: dict[str, Tensor]) -> None:
    """Keeps the gradients as the optimizer gets them: averaged over ranks and clipped, whole on every rank."""
    for name, p in student_teacher.student.named_parameters():
        gradient = torch.zeros_like(p.detach()) if p.grad is None else p.grad
        into[name] = distributed.whole(gradient).to("cpu", copy=True)


def _compare_gradients(errors: Errors, gradients: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name, theirs in expected.items():
        if not name.startswith("grad.student."):
            continue
        short = name.removeprefix("grad.student.")
        theirs = without_noise(short, theirs)
        ours = without_noise(short, gradients[short]) if short in gradients else torch.zeros_like(theirs)
        if float(theirs.norm()) > GRADIENT_FLOOR:
            errors.add("gradient", float((ours - theirs).norm()), GRADIENT * float(theirs.norm()), short)


def _compare_parameters(
    errors: Errors, student_teacher: StudentTeacher, initial: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> None:
    for role in ("student", "teacher"):
        ours = {name: distributed.whole(p).cpu() for name, p in getattr(student_teacher, role).state_dict().items()}
        theirs = {k.removeprefix("final."): v for k, v in expected.items() if k.startswith(f"final.{role}.")}
        if set(theirs) != {f"{role}.{name}" for name in ours}:
            errors.add("parameter", 1.0, 0.0, f"{role}: other parameters than the reference has")
            continue
        for name, final in theirs.items():
            short = name.removeprefix(f"{role}.")
            p, p_ref, p_0 = (without_noise(short, x) for x in (ours[short], final, initial[name]))
            bound = UPDATE * float((p_ref - p_0).norm()) + UPDATE_FLOOR * float(p_ref.norm())
            errors.add("parameter", float((p - p_ref).norm()), bound, name)


def _run_rank(
    rank: int, folder: str, dtype: torch.dtype, world_size: int, store: str, out: str, device_type: str
) -> None:
    """Runs the case with DDP and with FSDP2."""
    torch.set_num_threads(1)
    device, backend = torch.device("cpu"), "gloo"
    if device_type == "cuda":
        device, backend = torch.device("cuda", rank), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        both = Errors()
        for mode in _MODES:
            if mode != "ddp" and dtype is torch.float16:
                continue  # its gradients are not scaled there
            with in_use(device):
                both.add_all(run_case(Path(folder), dtype, mode=mode, device=device), f"{mode}: ")
        if rank == 0:
            Path(out).write_text(json.dumps(both.worst))
    finally:
        dist.destroy_process_group()
    # gloo's threads outlive the group and may drop a tensor while the interpreter shuts down, which aborts the process.
    os._exit(0)


def check(folder: Path, dtype: torch.dtype = torch.float32, device: torch.device = _CPU) -> Errors:
    """Runs a case with matrix products in ``dtype``.

    One of one rank runs twice, all crops at once and a few at a time; one of several on as many processes, each with a
    GPU of its own where the device is one, by DDP and by FSDP2.
    """
    world_size = world_size_of(folder)
    if world_size == 1:
        both = Errors()
        for least in (None, 1):
            errors = run_case(folder, dtype, least_tokens=least, device=device)
            both.add_all(errors, "in turn: " if least else "")
        return both
    with tempfile.TemporaryDirectory() as tmp:
        out = Path(tmp, "errors.json")
        arguments = (str(folder), dtype, world_size, str(Path(tmp, "store")), str(out), device.type)
        spawn(_run_rank, args=arguments, nprocs=world_size)
        return Errors({kind: (ratio, where) for kind, (ratio, where) in json.loads(out.read_text()).items()})
