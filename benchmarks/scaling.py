"""Times training steps of one rank and of several on the processors of this machine.

    python benchmarks/scaling.py [--ranks 2] [--batch 32] [--steps 20] [--mode ddp|fsdp] [--json] [KEY=VALUE…]

The network is that of the recipe ``small``; crops are random, so nothing waits for data. Every rank computes with one
thread, so that a rank's work takes a processor of its own. Ranks are compared with one rank at equal work for each of
them (the global batch grows) and at equal global batch (each has its share). Under DDP, a second measurement leaves the
averaging of gradients out: the share of the step's time that this saves is what is told as communication.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from dinoforge.planning.bench import StepBench
from dinoforge.recipe.load import load_recipe, parse_override
from dinoforge.system import distributed
from dinoforge.system.device import resolve_precision

CPU = torch.device("cpu")


def measure(settings: dict[str, Any]) -> dict[str, float]:
    """Median seconds of a step of this rank, and of one without averaging gradients."""
    torch.set_num_threads(1)
    recipe, _ = load_recipe("small", settings["keys"] | {"train.batch_size_per_gpu": settings["batch"]})
    with distributed.process_group(CPU):
        mode = settings["mode"] if distributed.is_active() else "none"
        bench = StepBench(recipe, CPU, resolve_precision(recipe.precision, CPU), mode)
        bench.run(3)
        results = {"step_s": statistics.median(bench.run(settings["steps"]))}
        with bench.parallel.accumulating() if mode == "ddp" else nullcontext():
            results["local_s"] = statistics.median(bench.run(settings["steps"]))
    return results


def start(ranks: int, settings: dict[str, Any]) -> dict[str, float]:
    """Measures on so many ranks; what the first one gives."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "result.json")
        command = [sys.executable, __file__, "--rank-of", json.dumps(settings), "--result", str(out)]
        where = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        where |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        processes = [
            subprocess.Popen(command, env=os.environ | where | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(ranks)
        ]
        try:
            codes = [process.wait(timeout=3600) for process in processes]
        finally:
            for process in processes:
                process.kill()
        if any(codes):
            raise SystemExit(f"ranks ended with {codes}")
        result: dict[str, float] = json.loads(out.read_text())
        return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32, help="images in a step of one rank")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--mode", choices=("ddp", "fsdp"), default="ddp")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("--rank-of", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("keys", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    if options.rank_of:
        result = measure(options.rank_of)
        if distributed.launched_rank() == 0:
            options.result.write_text(json.dumps(result))
        os._exit(0)  # gloo's threads may abort the process while the interpreter shuts down
    if options.batch % options.ranks:
        parser.error(f"--batch {options.batch} is no multiple of --ranks {options.ranks}")

    settings = {"keys": dict(map(parse_override, options.keys)), "steps": options.steps, "mode": options.mode}
    alone = start(1, settings | {"batch": options.batch})["step_s"]
    rows = [{"ranks": 1, "images": options.batch, "step_s": alone, "efficiency": 1.0, "communication": 0.0}]
    for batch in (options.batch, options.batch // options.ranks):
        result = start(options.ranks, settings | {"batch": batch})
        speedup = alone / result["step_s"] * batch * options.ranks / options.batch
        rows.append(
            {
                "ranks": options.ranks,
                "images": batch * options.ranks,
                "step_s": result["step_s"],
                "efficiency": speedup / options.ranks,
                "communication": 1 - result["local_s"] / result["step_s"] if options.mode == "ddp" else None,
            }
        )
    if options.json:
        print(json.dumps(rows))
        return
    print(f"{'ranks':>5} {'images':>7} {'s/step':>8} {'images/s':>9} {'efficiency':>11} {'averaging':>10}")
    for row in rows:
        share = "" if row["communication"] is None else f"{row['communication']:.0%}"
        rate = row["images"] / row["step_s"]
        print(
            f"{row['ranks']:5} {row['images']:7} {row['step_s']:8.3f} {rate:9.1f} {row['efficiency']:11.0%} {share:>10}"
        )


if __name__ == "__main__":
    main()
