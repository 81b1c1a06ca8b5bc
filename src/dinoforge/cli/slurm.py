"""A run as a job of Slurm, by submitit: queued again when it is pre-empted or its time is over."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinoforge.errors import STOPPED, RunError

_TIME_LIMITS = 10_000  # how often a job may reach its time limit; the run itself knows when it is finished
_SIGNAL_SECONDS = 120  # before the end of its time that a job is told of it


@dataclass(frozen=True)
class Resources:
    """The resources that a job asks for."""

    nodes: int = 1
    ranks_per_node: int = 1
    gpus_per_node: int = 0
    cpus_per_rank: int = 8
    minutes: int = 24 * 60
    partition: str | None = None


class Rank:
    """A task of the job: ``dinoforge`` as one rank. Queued again, it continues the run.

    Args:
        arguments: Arguments of the command line.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self.arguments = list(arguments)
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        from submitit.helpers import TorchDistributedEnvironment

        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        self._process = subprocess.Popen([sys.executable, "-m", "dinoforge", *self.arguments])
        # A process of its own, so that signals to the job find submitit here and the run's own handling there.
        while (code := self._process.poll()) is None:
            time.sleep(0.2)
        if code not in (0, *STOPPED):
            raise RuntimeError(f"dinoforge ended with exit code {code}: see the log of this task")
        if code == 128 + signal.SIGTERM:
            _queue_again()
        return code

    def checkpoint(self) -> Any:
        """Stop the run and return what to queue; submitit calls this when the job is about to be taken away."""
        from submitit.helpers import DelayedSubmission

        deadline = time.monotonic() + 0.9 * _SIGNAL_SECONDS
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGUSR2)
            while self._process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.2)
        return DelayedSubmission(Rank(self.arguments))


def _queue_again() -> None:
    """Make Slurm queue this job again, whose run was stopped by SIGTERM, the first signal of a pre-emption.

    A run that stops in time ends its job before that is taken away, and Slurm would take it for finished. A job that
    was cancelled gets the same signal, but does not count as running any more.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if not job or os.environ.get("SLURM_PROCID") != "0":
        return
    shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True)
    if "JobState=RUNNING" in shown.stdout.split():
        result = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
        print(f"stopped by SIGTERM; scontrol requeue {job}: {result.stderr.strip() or 'queued again'}", flush=True)


def submit(arguments: Sequence[str], resources: Resources, *, folder: Path, cluster: str = "slurm") -> Any:
    """Queue the job.

    Args:
        arguments: Arguments of the command line of each rank.
        resources: What to ask the scheduler for.
        folder: A folder for logs and submitit's files, on storage that all machines see.
        cluster: Either ``slurm`` or, to try it, ``local``: processes of this machine.

    Returns:
        The job, as submitit returns it.

    Raises:
        RunError: submitit or Slurm is missing, or Slurm refuses the resources.
    """
    try:
        import submitit
    except ImportError as error:
        raise RunError("submitting needs: pip install 'dinoforge[slurm]'") from error
    try:
        executor = submitit.AutoExecutor(folder, cluster=cluster, **{f"{cluster}_max_num_timeout": _TIME_LIMITS})
        optional = {"slurm_partition": resources.partition} if resources.partition else {}
        executor.update_parameters(
            name="dinoforge",
            nodes=resources.nodes,
            tasks_per_node=resources.ranks_per_node,
            gpus_per_node=resources.gpus_per_node,
            cpus_per_task=resources.cpus_per_rank,
            timeout_min=resources.minutes,
            slurm_signal_delay_s=_SIGNAL_SECONDS,
            **optional,
        )
        return executor.submit(Rank(arguments))
    except (RuntimeError, ValueError, submitit.core.utils.FailedJobError) as error:
        raise RunError(f"the job was not taken: {error}") from error
