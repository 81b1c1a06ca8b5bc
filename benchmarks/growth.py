"""Step time and memory as the work grows: by batch, prototypes and image size, one at a time.

    python benchmarks/growth.py [--dtype fp32|bf16] [--steps N] [--json]

Each row is work B of ``step.py`` with one thing changed, in a process of its own, since a process never shrinks.
``per work`` is step time over the work of the reference's step, relative to the first row of its kind: above 1, cost
grows faster than the work.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

BASE = "train.batch_size_per_gpu=16 crops.global_crops_size=64 crops.local_crops_size=32".split()
KINDS = {
    "batch": [(str(n), 8192, f"train.batch_size_per_gpu={n}") for n in (16, 32, 64)],
    "prototypes": [(f"{k:,}", k, None) for k in (8192, 32768, 131072)],
    "image size": [
        (str(n), 8192, f"crops.global_crops_size={n} crops.local_crops_size={n // 2}") for n in (64, 128, 224)
    ],
}


def measure(prototypes: int, keys: list[str], dtype: str, steps: int) -> dict[str, float]:
    step = Path(__file__).with_name("step.py")
    command = [sys.executable, str(step), "--work", "B", "--dtype", dtype, "--prototypes", str(prototypes)]
    command += ["--steps", str(steps), "--json", *keys]
    result: dict[str, float] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of each; default: 4")
    parser.add_argument("--only", choices=KINDS, help="one kind of growth")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    options = parser.parse_args()
    rows = []
    for kind in [options.only] if options.only else KINDS:
        first = None
        for name, prototypes, changed in KINDS[kind]:
            result = measure(prototypes, [*BASE, *(changed or "").split()], options.dtype, options.steps)
            cost = result["step_s"] / result["gflop"]
            first = first or cost
            row = {key: result[key] for key in ("gflop", "step_s", "peak_rss_gib")}
            rows.append({"kind": kind, "value": name, "per_work": cost / first, **row})
    if options.json:
        print(json.dumps(rows))
        return
    print("| what grows | to | work, GFLOP | step, s | per work | peak RSS, GiB |\n|---|---|---|---|---|---|")
    for r in rows:
        print(
            f"| {r['kind']} | {r['value']} | {r['gflop']:.0f} | {r['step_s']:.2f} | {r['per_work']:.2f} | "
            f"{r['peak_rss_gib']:.2f} |"
        )


if __name__ == "__main__":
    main()
