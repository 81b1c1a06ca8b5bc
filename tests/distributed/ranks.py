"""Start a module as several ranks, and what such a module does first and last.

    PYTHONPATH=tests python -m MODULE TASKS RANK WORLD_SIZE FOLDER

TASKS are names of functions, with commas between them. Each is called with the rank and a folder that all share, and
what it returns is written there.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from programs import environment


def start(module: str, tasks: Sequence[str], world_size: int, folder: Path) -> list[dict[str, Any]]:
    """Run the tasks of a module on several processes.

    Args:
        module: Its name from the folder ``tests``.
        tasks: Names of its functions.
        world_size: Number of processes.
        folder: A folder that all processes share.

    Returns:
        What the tasks of each rank returned, by task.
    """
    processes = []
    try:
        for rank in range(world_size):
            arguments = [",".join(tasks), str(rank), str(world_size), str(folder)]
            command = [sys.executable, "-m", module, *arguments]
            processes.append(
                subprocess.Popen(
                    command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
                )
            )
        outputs = [process.communicate(timeout=280)[0] for process in processes]  # one that waits for ever fails here
        failed = [f"rank {r}: {outputs[r]}" for r, process in enumerate(processes) if process.returncode != 0]
        assert not failed, "\n".join(failed)  # also of those that only missed another
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world_size)]


def serve(functions: Mapping[str, Callable[[int, Path], Any]]) -> None:
    """Do in a module what ``start`` asks of it."""
    tasks, rank, world_size, folder = sys.argv[1].split(","), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=120))
    try:
        torch.save({task: functions[task](rank, folder) for task in tasks}, folder / f"rank{rank}.pt")
    finally:
        dist.destroy_process_group()
    # gloo's threads outlive the group and may drop a tensor while the interpreter shuts down, which aborts the process.
    os._exit(0)
