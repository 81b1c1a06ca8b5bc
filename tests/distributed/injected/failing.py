"""Faults of one rank in the middle of a run, put in from outside.

``FAULT`` is JSON: ``kind``, the ``rank`` that it strikes, the ``step`` at which, and a file ``stamps`` that gets the
time of each strike. With ``deaf``, the other ranks wait from that step on for something that never comes and that no
closed connection ends, as they would in a kernel of NCCL.
"""

import dataclasses
import json
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch

from dinoforge.errors import DataError
from dinoforge.training.step import Stepper

FAULT: dict[str, Any] = json.loads(os.environ["FAULT"])
CUDA_MESSAGE = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.25 GiB is "
    "free. Including non-PyTorch memory, this process has 77.80 GiB memory in use. Of the allocated memory 70.00 GiB "
    "is allocated by PyTorch."
)


def data() -> None:
    raise DataError("the drive is gone")


def memory() -> None:
    raise torch.OutOfMemoryError(CUDA_MESSAGE)


def bug() -> None:
    raise ZeroDivisionError("a bug\nof two lines")


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def strike() -> None:
    with open(FAULT["stamps"], "a") as file:
        file.write(f"{time.time()}\n")
    {"data": data, "memory": memory, "bug": bug, "killed": killed}[FAULT["kind"]]()


def arm() -> None:
    """Patches the step of this rank."""
    step = Stepper.__call__
    number = 0

    def fails(stepper: Stepper, *given: Any, **named: Any) -> Any:
        nonlocal number
        number += 1
        mine = int(os.environ["RANK"]) == FAULT["rank"]
        if number == FAULT["step"] and FAULT.get("deaf"):
            while not mine:
                time.sleep(0.01)
            strike()  # at once: nothing that needs the others comes to an end
        if number == FAULT["step"] and mine:
            parallel = stepper.parallel
            assert parallel is not None
            struck = dataclasses.replace(parallel, forward=struck_in_backward(parallel.forward))
            stepper = dataclasses.replace(stepper, parallel=struck)
        return step(stepper, *given, **named)

    Stepper.__call__ = fails  # type: ignore[method-assign]


def struck_in_backward(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A forward pass whose backward pass is struck after the losses, and before the backbone."""

    def forward_of(*given: Any, **named: Any) -> Any:
        losses = forward(*given, **named)
        losses.total.register_hook(lambda gradient: strike())
        return losses

    return forward_of
