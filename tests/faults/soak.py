"""Kills a run again and again, and compares its end with that of a run that was left alone.

    python tests/faults/soak.py --kills 50

A small network is trained on generated images by the command line. Each time, the process group gets SIGKILL at a
random moment: while the program starts, between and inside steps, or while a checkpoint is being written (the moment
is taken when its folder is seen). The command is then given again, with another number of data workers. At the end
every tensor and number of the last checkpoint, the backbone, and every logged loss must be bitwise those of the other
run. Prints a line for each kill, and exits with 1 if anything differs.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

STEPS = 240
KEYS = {
    "student.arch": "vit_custom",
    "student.embed_dim": 64,
    "student.depth": 3,
    "student.num_heads": 2,
    "student.patch_size": 8,
    "student.drop_path_rate": 0.2,
    "crops.global_crops_size": 32,
    "crops.local_crops_size": 16,
    "crops.local_crops_number": 2,
    "dino.head_n_prototypes": 4096,
    "dino.head_hidden_dim": 128,
    "dino.head_bottleneck_dim": 64,
    "train.batch_size_per_gpu": 8,
    "train.threads": 1,
    "train.steps": STEPS,
    "optim.warmup_length": "10%",
    "log.every_steps": 1,
    "checkpoint.every_steps": 3,
    "checkpoint.keep_last": 2,
    "checkpoint.keep_every": 60,
    "precision": "fp32",
}
VARYING = ("images_per_second", "data_wait_share", "memory_gib", "train_seconds")


def make_images(folder: Path, number: int = 48) -> Path:
    """Writes images of noise, one of them unreadable."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for index in range(number):
        pixels = generator.integers(0, 256, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((40, 40)).save(folder / f"{index:03d}.png")
    (folder / "007.png").write_bytes((folder / "007.png").read_bytes()[:100])
    return folder


def command(images: Path, run: Path, workers: int, steps: int) -> list[str]:
    keys = KEYS | {"train.steps": steps, "train.num_workers": workers}
    return [
        *(sys.executable, "-m", "dinoforge", "train", str(images), "--recipe", "small", "--out", str(run)),
        *(f"{key}={value}" for key, value in keys.items()),
    ]


def step_of(run: Path) -> int:
    """The last step that the metrics tell of; a kill or a full disk may have torn the last line."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return 0
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except ValueError:
            continue
    return 0


KINDS = ("starting", "training", "training", "writing", "writing", "writing")


def kill_once(images: Path, run: Path, steps: int, chance: random.Random, kind: str) -> tuple[str, int] | None:
    """Runs the command and kills it; returns when and at which step, or None if it ended before that."""
    process = subprocess.Popen(
        command(images, run, chance.randrange(3), steps),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    before = step_of(run)
    deadline = time.monotonic() + 120
    if kind == "starting":
        time.sleep(chance.uniform(0.0, 4.0))
    else:
        wanted = before + chance.randrange(1, 8)
        while process.poll() is None and step_of(run) < wanted and time.monotonic() < deadline:
            time.sleep(0.005)
        if kind == "writing":
            pattern = chance.choice(
                [".step_*.partial", ".step_*.partial/*", ".step_*.partial/SHA256SUMS", ".step_*.deleted"]
            )
            while process.poll() is None and not any((run / "checkpoints").glob(pattern)):
                if time.monotonic() > deadline:
                    break
        else:
            time.sleep(chance.uniform(0.0, 0.05))
    ended = process.poll()
    try:
        os.killpg(process.pid, signal.SIGKILL)  # also the workers, as when a machine is taken away
    except ProcessLookupError:
        assert ended is not None
    process.wait()
    if ended is not None:
        assert ended == 0, f"the run ended with {ended}"
        return None
    return kind, step_of(run)


def state_of(run: Path, step: int) -> tuple[dict[str, torch.Tensor], dict[str, object], list[dict[str, float]]]:
    """Tensors of the last checkpoint and of the backbone; its numbers; the metrics. Without what is time."""
    folder = run / "checkpoints" / f"step_{step:08d}"
    tensors = {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}
    tensors |= {f"backbone file {name}": t for name, t in load_file(run / "teacher.safetensors").items()}
    numbers = {k: v for k, v in json.loads((folder / "state.json").read_text()).items() if k != "seconds"}
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return tensors, numbers, [{k: v for k, v in line.items() if k not in VARYING} for line in lines]


def differences(killed: Path, alone: Path, step: int) -> list[str]:
    """What differs between two finished runs, bit by bit."""
    (ours, our_numbers, our_lines), (theirs, their_numbers, their_lines) = (state_of(r, step) for r in (killed, alone))
    found = [f"tensor {name}" for name in sorted(ours.keys() ^ theirs.keys())]
    found += [f"tensor {n}" for n in ours.keys() & theirs.keys() if not torch.equal(ours[n], theirs[n])]
    found += [] if our_numbers == their_numbers else [f"state.json: {our_numbers} and {their_numbers}"]
    found += [f"metrics of step {b['step']}" for a, b in zip(our_lines, their_lines, strict=False) if a != b]
    found += [] if len(our_lines) == len(their_lines) else [f"{len(our_lines)} and {len(their_lines)} lines of metrics"]
    skipped = [(run / "skipped.txt").read_text() for run in (killed, alone)]
    found += [] if skipped[0] == skipped[1] else [f"skipped.txt: {skipped}"]
    left = sorted(p.name for p in (killed / "checkpoints").glob("step_*"))
    wanted = sorted(p.name for p in (alone / "checkpoints").glob("step_*"))
    found += [] if left == wanted else [f"checkpoints {left} and {wanted}"]
    return found


def soak(folder: Path, *, kills: int, seed: int, steps: int = STEPS) -> list[str]:
    """Makes both runs under ``folder``; returns what differs."""
    chance = random.Random(seed)
    images = make_images(folder / "images")
    alone, killed = folder / "alone", folder / "killed"
    subprocess.run(command(images, alone, 0, steps), check=True, stdout=subprocess.DEVNULL)
    done, cut_short = 0, False
    while done < kills or not cut_short:  # on a busy machine a checkpoint may be whole before the kill comes
        if (killed / "summary.json").exists() and json.loads((killed / "summary.json").read_text())["finished"]:
            raise SystemExit(f"the run was finished after {done} kills: make it longer, by --steps")
        kind = chance.choice(KINDS) if done < kills else "writing"
        if outcome := kill_once(images, killed, steps, chance, kind):
            done += 1
            left = [p.name for p in (killed / "checkpoints").glob(".*")] if (killed / "checkpoints").is_dir() else []
            cut_short |= any(name.endswith(".partial") for name in left)
            print(
                f"kill {done:3d}  {outcome[0]:<9} at step {outcome[1]:4d}  left behind: {', '.join(left) or '-'}",
                flush=True,
            )
    subprocess.run(command(images, killed, 1, steps), check=True, stdout=subprocess.DEVNULL)
    return differences(killed, alone, steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = soak(Path(folder), kills=options.kills, seed=options.seed, steps=options.steps)
    print(
        "\n".join(found) or f"at least {options.kills} kills: every tensor, number and logged loss is bitwise the same"
    )
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
