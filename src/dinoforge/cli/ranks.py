"""Starting a command on several ranks of this machine, and again when one dies, by PyTorch's elastic agent."""

import logging
import signal
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from dinoforge.errors import LAUNCHER, RECURRING, STOPPED, LostRankError

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

_SHUTDOWN_SECONDS = 120  # time for the ranks to write a checkpoint after the user has stopped them


def launch(arguments: Sequence[str], *, ranks: int, restarts: int) -> int:
    """Run ``dinoforge`` with these arguments on several ranks, as ``torchrun --standalone`` would.

    What a rank failed of is printed last, when all have ended. Unlike ``torchrun``, it does not start again what would
    fail again, or what a signal has stopped.

    Args:
        arguments: Arguments of the command line.
        ranks: Number of ranks.
        restarts: How often all ranks are started again after one has died.

    Returns:
        The exit code: 0; that of the rank that failed first; or of the signal that stopped all.
    """
    from torch.distributed.elastic.multiprocessing import SignalException

    starts = 0
    try:
        while failures := _run(arguments, ranks):
            starts += 1
            codes = {failure.exitcode for failure in failures.values()}
            if stopped := codes & STOPPED:
                return min(stopped)
            rank, failure = first_failure(failures)
            print(_described(rank, failure), file=sys.stderr)
            if failure.exitcode in RECURRING or starts > restarts:
                return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode
            print(f"starting all ranks again, from the last checkpoint ({starts} of {restarts})", file=sys.stderr)
    except SignalException as stop:
        return 128 + int(stop.sigval)
    return 0


def _run(arguments: Sequence[str], ranks: int) -> "Mapping[int, ProcessFailure]":
    """Starts the ranks once, and waits until all have ended; gives those that failed."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with TemporaryDirectory(prefix=LAUNCHER) as folder, _quiet():
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=ranks,
            run_id=f"{LAUNCHER}{uuid.uuid4()}",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
            max_restarts=0,
            shutdown_timeout=_SHUTDOWN_SECONDS,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            elastic_launch(config, sys.executable)("-m", "dinoforge", *arguments)
        except ChildFailedError as error:
            return error.failures
    return {}


def first_failure(failures: "Mapping[int, ProcessFailure]") -> "tuple[int, ProcessFailure]":
    """The rank that failed first, and how; not one that only lost another, or that the agent ended then."""

    def order(item: "tuple[int, ProcessFailure]") -> tuple[bool, float]:
        _, failure = item
        time = float(failure.timestamp)  # time of the look that found the failure, in whole seconds
        if isinstance(failure.message, Mapping):
            time = float(failure.message["extraInfo"]["timestamp"])
        elif failure.exitcode != -signal.SIGKILL:
            time += 1  # libraries that miss another rank abort; what is killed is a cause
        return failure.exitcode in (LostRankError.exit_code, -signal.SIGTERM), time

    return min(failures.items(), key=order)


def _described(rank: int, failure: "ProcessFailure") -> str:
    if isinstance(failure.message, Mapping):
        where = f" on rank {rank}" if rank and failure.message["extraInfo"].get("of_one_rank") else ""
        return f"error{where}: {failure.message['message']}"
    if failure.exitcode > 0:
        return f"error: rank {rank} ended with exit code {failure.exitcode}"
    hint = ". Most often the system does that for lack of memory" if failure.exitcode == -signal.SIGKILL else ""
    return f"error: rank {rank} was ended by {failure.signal_name()}{hint}"


@contextmanager
def _quiet() -> Iterator[None]:
    """The agent logs each signal that it sends, and which rank failed: said better here, and last."""
    logger = logging.getLogger("torch.distributed.elastic")
    handler, propagate = logging.NullHandler(), logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
