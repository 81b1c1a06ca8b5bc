"""Training runs in which a fault is injected, to see what is said and how soon all processes have ended.

A check starts them by ``dinoforge selfcheck --fault``, so they end as every run does that a user starts.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from dinoforge.commands.train import train_as_program
from dinoforge.errors import DataError, RecipeError
from dinoforge.recipe.load import parse_override
from dinoforge.system import distributed
from dinoforge.training.state import TrainState
from dinoforge.training.step import Stepper, StepResult

AT_CALL = 3
"""The step in which it happens, from 1; the ranks have found each other by then."""

MESSAGE = "made by selfcheck, to see how a run ends"

_HUGE = 2**50  # bytes, which no memory has


@dataclass(frozen=True)
class Fault:
    """A run, and the fault to inject.

    Args:
        kind: ``backward``, an exception in the backward pass of the last rank; ``data``, a DataError of the last rank;
            ``hang``, a last rank that stands still; or ``memory``, an allocation that fails, on any rank.
        images: Folder of images.
        out: Run directory. The file ``fault`` there is written just before the fault.
        keys: Keys over the recipe ``small``, as on the command line.
    """

    kind: str
    images: str
    out: str
    keys: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, read: dict[str, Any]) -> "Fault":
        return cls(**(read | {"keys": tuple(read["keys"])}))


def train_with(fault: Fault) -> int:
    """Train as ``dinoforge train`` does, until the fault strikes.

    Raises:
        RecipeError: The kind is unknown.
        DataError: The kind is ``data``.
        OutOfMemoryError: The kind is ``memory``.
        LostRankError: Another rank failed.
    """
    happen = _HAPPENINGS.get(fault.kind)
    if happen is None:
        raise RecipeError(f"--fault: expected a kind of {', '.join(_HAPPENINGS)}, got {fault.kind!r}")
    calls = 0

    make_step = Stepper.__call__

    def faulty_step(stepper: Stepper, state: TrainState, *arguments: Any, **more: Any) -> StepResult:
        nonlocal calls
        calls += 1
        if calls == AT_CALL and (fault.kind == "memory" or distributed.rank() == distributed.world_size() - 1):
            Path(fault.out, "fault").write_text(f"{time.time()}")
            happen(state.student_teacher)
        return make_step(stepper, state, *arguments, **more)

    with patch.object(Stepper, "__call__", faulty_step):
        train_as_program(fault.images, "small", fault.out, **dict(map(parse_override, fault.keys)))
    return 0


def _raise_in_backward(networks: torch.nn.Module) -> None:
    """Make the backward pass fail when some gradients are there, and others are not."""

    def fail(gradient: torch.Tensor) -> torch.Tensor:
        raise RuntimeError(MESSAGE)

    names = [name for name, parameter in networks.named_parameters() if parameter.requires_grad]
    dict(networks.named_parameters())[names[len(names) // 2]].register_hook(fail)


def _raise_data_error(networks: torch.nn.Module) -> None:
    raise DataError(MESSAGE)


def _hang(networks: torch.nn.Module) -> None:
    time.sleep(3600)


def _run_out_of_memory(networks: torch.nn.Module) -> None:
    """Leaves the step no memory on a GPU; on a CPU asks for more than there can be."""
    device = next(networks.parameters()).device
    if device.type == "cuda":
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(torch.cuda.memory_reserved(device) / total, device)
    elif device.type == "mps":
        torch.mps.empty_cache()
        used, most = torch.mps.driver_allocated_memory(), torch.mps.recommended_max_memory()
        torch.mps.set_per_process_memory_fraction(used / most)
    else:
        torch.empty(_HUGE, dtype=torch.uint8, device=device)


_HAPPENINGS: dict[str, Callable[[torch.nn.Module], None]] = {
    "backward": _raise_in_backward,
    "data": _raise_data_error,
    "hang": _hang,
    "memory": _run_out_of_memory,
}
