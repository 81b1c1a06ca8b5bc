"""Starts a command on several ranks of this machine, and starts them again when one dies: PyTorch's elastic agent."""

import sys
import uuid
from collections.abc import Sequence

import torch

from dinoforge.errors import RecipeError

_SHUTDOWN_SECONDS = 120  # for the ranks to write a checkpoint, or to notice that another is gone


def number_of_ranks(text: str) -> int:
    """What ``--nproc`` says: a number, or ``auto``: one for each GPU.

    Raises:
        RecipeError: neither.
    """
    if text == "auto":
        return max(1, torch.cuda.device_count())
    if not text.isdecimal() or int(text) < 1:
        raise RecipeError(f"--nproc: expected a number from 1, or auto for one for each GPU, got {text!r}")
    return int(text)


def launch(arguments: Sequence[str], *, ranks: int, restarts: int) -> int:
    """Runs ``dinoforge`` with these arguments on so many ranks, as ``torchrun --standalone`` would.

    Args:
        arguments: of the command line.
        ranks: how many.
        restarts: how often all are started again after one has died.

    Returns:
        The exit code: 0; that of the first rank that failed; or of the signal that stopped all.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=restarts,
        shutdown_timeout=_SHUTDOWN_SECONDS,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "dinoforge", *arguments)
    except SignalException as stop:
        return 128 + int(stop.sigval)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
    return 0
