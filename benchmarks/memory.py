"""Measures the memory of training steps beside what is estimated of it before.

    python benchmarks/memory.py [--only NAME] [--json]

Three networks, in fp32 and bf16, without and with activation checkpointing, in one process; and in bf16 on two ranks
by DDP and by FSDP2. Each is measured twice, in processes of its own: the tensors that are alive at once in three steps,
which is what an accelerator would count; and, for one process, the most main memory that it took.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dinoforge.builders.networks import build_student_teacher
from dinoforge.planning.bench import StepBench
from dinoforge.planning.memory import estimate, of_tensors
from dinoforge.recipe.load import load_recipe
from dinoforge.recipe.schema import Recipe
from dinoforge.system import distributed
from dinoforge.system.device import peak_memory_gib
from dinoforge.training.parallel import shard_count

CPU = torch.device("cpu")
STEPS = 3
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "small": ("small", {}),
    "ViT-S/16, 8 images, 65,536 prototypes": (
        "dinov2",
        {"student.arch": "vit_small", "train.batch_size_per_gpu": 8},
    ),
    "ViT-B/16, 2 images, 8,192 prototypes": (
        "dinov2",
        {
            "student.arch": "vit_base",
            "student.patch_size": 16,
            "student.drop_path_rate": 0.1,
            "crops.local_crops_size": 96,
            "train.batch_size_per_gpu": 2,
            "dino.head_n_prototypes": 8192,
        },
    ),
}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class AliveTensors(TorchDispatchMode):
    """While it is entered: the most bytes of tensors' memory alive at once, of those made in it."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        new = False
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                # What a sharded tensor says of its memory is that of the whole.
                storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
                known = self._alive.get(storage._cdata)
                if known is None or known() is None:
                    self._alive[storage._cdata] = weakref.ref(storage)
                    new = True
        if new:
            self._look()
        return result

    def _look(self) -> None:
        storages = {key: storage() for key, storage in self._alive.items()}
        self._alive = {key: self._alive[key] for key, storage in storages.items() if storage is not None}
        # Asked each time, since FSDP empties memory without giving it up.
        self.peak = max(self.peak, sum(s.nbytes() for s in storages.values() if s is not None))


def recipe_of(settings: dict[str, Any]) -> Recipe:
    base, keys = NETWORKS[settings["network"]]
    layout = {
        "parallel.activation_checkpointing": settings["checkpointed"],
        "parallel.crops_in_turn": settings.get("in_turn"),  # where it is not the default
    }
    return load_recipe(base, keys | layout)[0]


def measure(settings: dict[str, Any]) -> dict[str, float]:
    """Of one rank, in bytes: its tensors and their estimate, or the process and its estimate."""
    torch.set_num_threads(1)
    recipe, precision = recipe_of(settings), PRECISIONS[settings["precision"]]
    with torch.device("meta"):
        networks = build_student_teacher(recipe)
    with distributed.process_group(CPU):
        if settings["process"]:
            StepBench(recipe, CPU, precision).run(STEPS)
            parts = estimate(recipe, networks, precision=precision, device=CPU)
            parts.pop("checkpoint")  # none is written here
            return {"measured": peak_memory_gib(CPU) * 2**30, "estimated": sum(parts.values())}
        with AliveTensors() as tensors:
            bench = StepBench(recipe, CPU, precision, settings["mode"])
            tensors.peak = 0  # whole networks are made before they are sharded
            bench.run(STEPS)
        shards = shard_count(settings["mode"], None)
        parts = of_tensors(recipe, networks, precision=precision, device=CPU, mode=settings["mode"], shards=shards)
        return {"measured": tensors.peak, "estimated": sum(parts.values())}


def measured_apart(settings: dict[str, Any]) -> dict[str, float]:
    """``measure`` in a process of its own, or in two."""
    command = [sys.executable]
    if settings["mode"] != "none":
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [__file__, "--one", json.dumps(settings)]
    printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    result: dict[str, float] = json.loads(next(line for line in printed.splitlines() if line.startswith("{")))
    return result


def rows(only: str | None) -> list[dict[str, Any]]:
    """What is measured: network, precision, checkpointing and layout."""
    names = [name for name in NETWORKS if only in (None, name)]
    one = [
        {"network": name, "precision": precision, "checkpointed": checkpointed, "mode": "none"}
        for name, precision, checkpointed in itertools.product(names, PRECISIONS, (False, True))
    ]
    two = [
        {"network": name, "precision": "bf16", "checkpointed": checkpointed, "mode": mode}
        for name, mode, checkpointed in itertools.product(names, ("ddp", "fsdp"), (False, True))
    ]
    return one + two


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=NETWORKS, help="one of the networks")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        result = measure(json.loads(options.one))
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(result))
        return
    results = []
    for row in rows(options.only):
        row["tensors"] = measured_apart(row | {"process": False})
        row["whole"] = measured_apart(row | {"process": True}) if row["mode"] == "none" else None
        results.append(row)
    if options.json:
        print(json.dumps(results))
        return
    print("| network | precision | layout | tensors, MB | estimated | | process, MB | estimated | |")
    print("|---|---|---|---|---|---|---|---|---|")
    layouts = {"none": "one process", "ddp": "2 ranks, DDP", "fsdp": "2 ranks, FSDP2"}
    for row in results:
        layout = layouts[row["mode"]] + (", activations recomputed" if row["checkpointed"] else "")
        columns = [row["network"], row["precision"], layout, *_columns(row["tensors"]), *_columns(row["whole"])]
        print(f"| {' | '.join(columns)} |")


def _columns(result: dict[str, float] | None) -> list[str]:
    if result is None:
        return ["", "", ""]
    measured, estimated = result["measured"], result["estimated"]
    return [f"{measured / 1e6:,.0f}", f"{estimated / 1e6:,.0f}", f"{estimated / measured - 1:+.0%}"]


if __name__ == "__main__":
    main()
