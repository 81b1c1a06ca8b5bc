"""Batches whose loss or gradients were not finite: kept, and run again to see where it went wrong."""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dinoforge.data.batch import Batch, masked_patches
from dinoforge.errors import WeightsError
from dinoforge.method.dinov2 import Losses, StudentTeacher
from dinoforge.models.stochastic_depth import KeptSamples
from dinoforge.optim.schedules import Hyperparameters
from dinoforge.system.files import save_tensors, write_atomically

_FORMAT = "dinoforge-batch-1"
_TENSORS = ("global_crops", "local_crops", "masks", "indices")


@dataclass(frozen=True)
class SavedBatch:
    """A batch as it was given to a step.

    Args:
        batch: Normalised crops, on the CPU.
        step: Steps done before it.
        number: Number of the batch; see ``TrainState.next_batch``.
        names: Names of its images.
        terms: Losses and gradient norms of the step by name.
    """

    batch: Batch
    step: int
    number: int
    names: tuple[str, ...]
    terms: dict[str, float]
    rank: int = 0  # whose it was


def save_batch(path: Path, saved: SavedBatch) -> None:
    """Write a batch as safetensors.

    Raises:
        RunError: The disk is full, or the file cannot be written.
    """
    tensors = {name: getattr(saved.batch, name).detach().cpu().contiguous() for name in _TENSORS}
    # As text, since JSON has no word for infinity.
    terms = {name: repr(value) for name, value in saved.terms.items()}
    about = {"step": saved.step, "number": saved.number, "names": saved.names, "terms": terms, "rank": saved.rank}
    header = {"format": _FORMAT, "about": json.dumps(about)}
    write_atomically(path, lambda temporary: save_tensors(tensors, temporary, header))


def load_batch(path: Path) -> SavedBatch:
    """Read a batch that ``save_batch`` wrote.

    Raises:
        WeightsError: There is no such file, it is damaged, or it holds something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != _FORMAT:
                raise WeightsError(f"{path} is no batch that a run has saved: those are in its folder non_finite")
            tensors = {name: file.get_tensor(name) for name in _TENSORS}
        about = json.loads(header["about"])
        terms = {name: float(text) for name, text in about["terms"].items()}
        batch = Batch(**tensors, masked=masked_patches(tensors["masks"]))
        return SavedBatch(batch, about["step"], about["number"], tuple(about["names"]), terms, about.get("rank", 0))
    except FileNotFoundError as error:
        raise WeightsError(f"there is no file {path}") from error
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} is damaged: {error}") from error


@dataclass(frozen=True)
class Findings:
    """The places where a step's values stop being finite, in the order in which they are computed.

    Args:
        weights: Names of parameters and buffers that are not finite before the step.
        inputs: Numbers of the images, 0…B-1, with crops that are not finite.
        module: Name of the first module whose output is not finite; None if all are.
        largest: Largest absolute output of any module before that one, with its module's name.
        terms: Losses and gradient norms by name.
        gradients: Names of parameters whose gradients are not finite; all of them if the loss is not.
        images: Numbers of the images whose own loss, as a batch of one, is not finite.
    """

    weights: tuple[str, ...]
    inputs: tuple[int, ...]
    module: str | None
    largest: tuple[float, str]
    terms: dict[str, float]
    gradients: tuple[str, ...]
    images: tuple[int, ...]

    @property
    def finite(self) -> bool:
        return not (self.weights or self.inputs or self.module or self.gradients) and all(
            abs(value) < float("inf") for value in self.terms.values()
        )


def find(
    student_teacher: StudentTeacher,
    batch: Batch,
    hyper: Hyperparameters,
    *,
    kept: Sequence[KeptSamples] | None,
    autocast: Callable[[], AbstractContextManager[None]],
) -> Findings:
    """Run the forward and backward pass of a batch, and look at every value; nothing is changed.

    Args:
        student_teacher: The networks.
        batch: Normalised crops on the device of the networks.
        hyper: Hyper-parameters of the step.
        kept: Samples that stochastic depth keeps in the step.
        autocast: Makes the context of the forward pass.
    """
    centers = [c.clone() for c in student_teacher.buffers()]
    first: list[str] = []
    largest = (0.0, "")

    def look(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal largest
        if first or not isinstance(output, Tensor):
            return
        peak = float(output.detach().abs().amax()) if output.numel() else 0.0
        if not peak < float("inf"):  # NaN is not, either
            first.append(name)
        elif peak > largest[0]:
            largest = (peak, name)

    def losses_of(part: Batch, kept: Sequence[KeptSamples] | None) -> Losses:
        with autocast():
            losses: Losses = student_teacher(part, teacher_temp=hyper.teacher_temp, kept=kept)
        for center, before in zip(student_teacher.buffers(), centers, strict=True):
            center.copy_(before)  # moved in the forward pass
        return losses

    tensors: dict[str, Tensor] = dict(student_teacher.state_dict())
    weights = tuple(name for name, tensor in tensors.items() if not _finite(tensor))
    hooks = [m.register_forward_hook(partial(look, name)) for name, m in student_teacher.named_modules()]
    try:
        losses = losses_of(batch, kept)
        losses.total.backward()
    finally:
        for hook in hooks:
            hook.remove()
    gradients = {n: p.grad for n, p in student_teacher.student.named_parameters() if p.grad is not None}
    terms = {name: float(value.detach()) for name, value in vars(losses).items()}
    bad_gradients = tuple(name for name, gradient in gradients.items() if not _finite(gradient))
    student_teacher.zero_grad(set_to_none=True)

    count = len(batch.global_crops) // 2
    inputs = tuple(i for i in range(count) if not all(map(_finite, _crops_of(batch, i))))
    images = []
    with torch.no_grad():
        for i in range(count):
            if not _finite(losses_of(_only(batch, i), None).total):
                images.append(i)
    return Findings(weights, inputs, first[0] if first else None, largest, terms, bad_gradients, tuple(images))


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _crops_of(batch: Batch, image: int) -> tuple[Tensor, Tensor]:
    """The global and the local crops of one image."""
    count = len(batch.global_crops) // 2
    return batch.global_crops[image::count], batch.local_crops[image::count]


def _only(batch: Batch, image: int) -> Batch:
    """A batch of one of the images."""
    count = len(batch.global_crops) // 2
    global_crops, local_crops = _crops_of(batch, image)
    masks = batch.masks[image::count]
    return Batch(global_crops, local_crops, masks, masked_patches(masks.cpu()), batch.indices[image : image + 1])


def describe(findings: Findings, names: Sequence[str]) -> str:
    """The findings in words, one on each line."""
    f = findings
    lines = []
    if f.weights:
        lines.append(f"weights    {_some(f.weights)} not finite before the step: go back to an earlier checkpoint")
    if f.inputs:
        lines.append(f"images     crops of {_some([names[i] for i in f.inputs])} not finite")
    if f.module:
        lines.append(f"forward    the first output that is not finite is that of {f.module}")
    else:
        lines.append("forward    every module's output is finite")
    if f.largest[1]:
        lines.append(f"           the largest finite one is {f.largest[0]:.3g}, of {f.largest[1]}")
    lines.append("losses     " + ", ".join(f"{name} {value:.4g}" for name, value in f.terms.items()))
    lines.append(f"gradients  {_some(f.gradients) + ' not finite' if f.gradients else 'all finite'}")
    count = len(names)
    if 0 < len(f.images) < count:
        lines.append(f"by image   {_some([names[i] for i in f.images])} not finite when alone: look at these files")
    elif f.images:
        lines.append(f"by image   each of the {count} images is not finite when alone: it is not the images")
    else:
        lines.append(f"by image   each of the {count} images is finite when alone")
    return "\n".join(lines)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def describe_terms(terms: Mapping[str, float]) -> str:
    """Name the terms that are not finite: losses, or else gradient norms."""
    bad = [name for name, value in terms.items() if not abs(value) < float("inf")]
    losses = [name for name in bad if not name.startswith("grad_norm.")]
    return ", ".join(f"{name} {terms[name]}" for name in losses or bad)
