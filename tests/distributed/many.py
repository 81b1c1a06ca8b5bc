"""What four, eight and three ranks do in turn, for ``test_many.py``: parts of one run, and steps on uneven shards."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from dinoforge.builders.networks import build_student_teacher
from dinoforge.recipe.load import load_recipe
from dinoforge.training.parallel import wrap
from distributed import continuing, layouts, ranks

KEYS = {"train.batch_size": 24, "checkpoint.every_steps": 2}
TIMEOUT = timedelta(seconds=77)


def four(rank: int, folder: Path) -> dict[str, Any]:
    return {"run": continuing.go_on(folder, "run", 3, **KEYS, **{"parallel.mode": "fsdp"})}


def eight(rank: int, folder: Path) -> dict[str, Any]:
    on_copies = {"parallel.mode": "hsdp", "parallel.shard_ranks": 4}
    return {
        "shards": shards(),  # first: DTensors remember meshes
        "run": continuing.go_on(folder, "run", 3, **KEYS, **on_copies),
        "steps": layouts.run("prime sizes", layouts.Layout("fsdp")),
    }


def three(rank: int, folder: Path) -> dict[str, Any]:
    return {"run": continuing.go_on(folder, "run", 99, **KEYS, **{"parallel.mode": "fsdp"})}


def shards() -> dict[str, Any]:
    """What this rank has of a head under FSDP2; and how long the groups of hsdp wait for each other."""
    recipe, _ = load_recipe("dinov2", layouts.BASE | layouts.KINDS["prime sizes"])
    networks = build_student_teacher(recipe)
    wrap(networks, "fsdp", torch.device("cpu"))
    head = {name: p.to_local() for name, p in networks.student.dino_head.named_parameters() if isinstance(p, DTensor)}
    copied = build_student_teacher(recipe)
    wrap(copied, "hsdp", torch.device("cpu"), shard_ranks=4, timeout=TIMEOUT)
    mesh = copied.student.dino_head.last_layer.weight_v.device_mesh
    backends = [group._get_backend(torch.device("cpu")) for group in mesh.get_all_groups()]
    return {
        "rows": len(head["last_layer.weight_v"]),
        "elements": sum(part.numel() for part in head.values()),
        "sizes": [backend.size() for backend in backends],
        "seconds": [backend.options._timeout.total_seconds() for backend in backends],
    }


if __name__ == "__main__":
    ranks.serve({"four": four, "eight": eight, "three": three})
