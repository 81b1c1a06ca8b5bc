"""The journey of a user, by the commands that a user gives: train, continue, measure, look, export the backbone."""

import importlib.util
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dinoforge.selfcheck import runs
from dinoforge.selfcheck.images import KINDS, make_images
from dinoforge.selfcheck.lines import Line, fail, guarded, judged, not_here, ok, percent
from dinoforge.selfcheck.processes import Ended, Program
from dinoforge.selfcheck.settings import Settings
from dinoforge.system.device import resolve_device

IMAGES = 24  # images of each kind
LOSS_BOUND = 0.01
"""Of a run that was killed and continued beside one that was left alone, on devices whose sums are not always the same:
the relative difference of losses in the median step after it.

On a CPU, bfloat16 instead of float32 gave 0.0016, other images than those that come next 0.027. How far the weights are
apart does not tell the two from each other.
"""
FEATURE_BOUND = 0.03  # largest difference from the CPU's features, over their spread; bfloat16 beside float32: 0.004
ACCURACY = 0.9  # least accuracy on two kinds of images that differ in colour, where a half is chance

_SECONDS = 240.0  # time of a command on a machine that does other things too
_AT_ONCE = 2
_LONGEST = "eval linear"
_FORMATS = {
    "safetensors": ("backbone.safetensors", ()),
    "official": ("backbone.pth", ()),
    "timm": ("backbone-timm.safetensors", ("timm",)),
    "hf": ("backbone-hf", ("transformers",)),
    "onnx": ("backbone.onnx", ("onnx", "onnxscript", "onnxruntime")),
}
"""Of each export: file or folder, and the packages that it needs."""


class Journey:
    """The commands of one user.

    Args:
        settings: Settings of the check.
        device: The device, as resolved.
    """

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.settings, self.device, self.folder = settings, device, settings.folder
        self.run = self.folder / "run"
        self.images = make_images(self.folder / "images", of_each=IMAGES)
        self.others = make_images(self.folder / "others", of_each=IMAGES // 2, first=IMAGES)
        self._on_cpu = device.type == "cpu"
        # On a GPU there are so many that there is time to kill it.
        self.steps, self.saved_every = (24, 6) if self._on_cpu else (60, 15)

    def train_command(self, out: Path, **keys: Any) -> list[str]:
        """``dinoforge train`` with a small recipe."""
        settings: dict[str, Any] = {
            "device": str(self.device),
            "train.steps": self.steps,
            "train.batch_size_per_gpu": 8,
            "log.every_steps": 1,
            "checkpoint.every_steps": self.saved_every,
            "checkpoint.keep_last": self.steps // self.saved_every,
            "probe.every_steps": self.steps // 2,
            "report.every_minutes": "null",
        }
        if self._on_cpu:
            settings |= {"student.depth": 2, "train.threads": 1}
        settings |= keys
        texts = [f"{key}={value}" for key, value in settings.items()]
        return ["dinoforge", "train", str(self.images), "--recipe", "small", "--out", str(out), *texts]

    def do(self, *arguments: str) -> Ended:
        """Runs a command to its end."""
        with self.start(["dinoforge", *arguments]) as program:
            return program.wait()

    def start(self, command: Sequence[str]) -> Program:
        # Several at once on one thread each are faster than one on all, for networks of this size.
        environment = {"OMP_NUM_THREADS": "1"} if self._on_cpu else {}
        return Program(command, self.folder, seconds=_SECONDS, environment=environment)

    def keys_of_device(self) -> list[str]:
        return [f"device={self.device}"]


def check(settings: Settings) -> Iterator[Line]:
    device = resolve_device(settings.device)
    journey = Journey(settings, device)
    line = guarded("train", partial(_train, journey))
    yield line
    looks: dict[str, Callable[[], Line]] = {"killed, continued": partial(_continue, journey)}
    looks["a loss that is not finite"] = partial(_replay, journey)
    if line.status == "ok":
        looks |= _uses(journey)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        longest_first = sorted(looks, key=lambda name: name != _LONGEST)
        started = {name: pool.submit(_timed, name, looks[name]) for name in longest_first}
        for name in looks:
            yield started[name].result()
    if line.status != "ok":
        yield not_here("embed, eval, report, export", "need the run that failed above")


def _timed(name: str, look: Callable[[], Line]) -> Line:
    started = time.monotonic()
    return guarded(name, look).after(time.monotonic() - started)


def _uses(journey: Journey) -> dict[str, Callable[[], Line]]:
    """Use the trained backbone by each command that takes one."""
    looks: dict[str, Callable[[], Line]] = {"probe": partial(_probe, journey), "embed": partial(_embed, journey)}
    for method in ("knn",) if journey.settings.short else ("knn", "logreg"):
        looks[f"eval {method}"] = partial(_evaluate, journey, method)
    looks["report"] = partial(_report, journey)
    for to in ("official",) if journey.settings.short else _FORMATS:
        looks[f"export {to}"] = partial(_export, journey, to)
    if not journey.settings.short:
        looks[_LONGEST] = partial(_evaluate, journey, "linear")
    return looks


def _failed(name: str, ended: Ended, expected: int = 0) -> Line | None:
    """A failure, if a command did not end as expected."""
    if ended.code == expected:
        return None
    wanted = f", not with {expected}" if expected else ""
    return fail(name, f"the command {ended.told}{wanted}", ended.tail())


def _train(journey: Journey) -> Line:
    with journey.start(journey.train_command(journey.run)) as program:
        ended = program.wait()
    if line := _failed("train", ended):
        return line
    lines = runs.lines_of(journey.run)
    first, last = (float(np.mean([line["total"] for line in part])) for part in (lines[:5], lines[-5:]))
    speed = float(np.median([line["images_per_second"] for line in lines[5:]]))
    told = f"{len(lines)} steps, loss {first:.2f} to {last:.2f}, {speed:.0f} images/s"
    passed = len(lines) == journey.steps and all(np.isfinite([line["total"] for line in lines]))
    return judged(passed, "train", told, steps=len(lines), first_loss=first, last_loss=last, images_per_second=speed)


def _continue(journey: Journey) -> Line:
    """Run the same command in another folder, kill it in the middle, and give it again."""
    name, out = "killed, continued", journey.folder / "killed"
    over = f"its {journey.steps} steps were over before it could be killed"
    command = journey.train_command(out)
    with journey.start(command) as program:
        while program.running and not program.late:
            if runs.step_of(out) > journey.saved_every and runs.saved_steps(out):
                break
            time.sleep(0.005)
        if not program.running or program.late:
            ended = program.wait()
            return _failed(name, ended) or not_here(name, over)
        program.kill()  # with its data workers, as when a machine is taken away
    killed_at, saved = runs.step_of(out), runs.saved_steps(out)[-1]
    if killed_at >= journey.steps:
        return not_here(name, over)
    with journey.start(command) as program:
        ended = program.wait()
    if line := _failed(name, ended):
        return line
    if f"Continuing at step {saved}" not in ended.output:
        return fail(name, f"killed at step {killed_at}, it did not continue at step {saved}", ended.tail())
    found = runs.apart(out, journey.run, step=journey.steps, since=journey.saved_every, after=saved)
    values: dict[str, Any] = {"killed_at": killed_at, "continued_at": saved, "same": found.same}
    values |= {"loss": found.typical, "weights": found.weights}
    told = f"killed at step {killed_at}, continued at {saved}: "
    if found.same:
        return ok(name, f"{told}the end is bitwise that of a run that was left alone", **values)
    told += f"not bitwise like a run that was left alone: {found.told}"
    if journey.device.type == "cpu":
        return fail(name, told, **values)
    told += f"; losses of the median step by {found.typical:.1e} (bound {LOSS_BOUND:g})"
    return judged(not found.steps and found.typical <= LOSS_BOUND, name, told, **values)


def _probe(journey: Journey) -> Line:
    """The teacher was measured while it trained, since the images are in folders by kind."""
    probed = [line for line in runs.lines_of(journey.run) if "probe.knn" in line]
    if len(probed) != 2:
        return fail("probe", f"{len(probed)} steps have a probe.knn in metrics.jsonl, expected 2")
    scores = {key.removeprefix("probe."): value for key, value in probed[-1].items() if key.startswith("probe.")}
    told = f"k-NN {percent(scores['knn'])}, linear {percent(scores['linear'])} of {len(KINDS)} kinds of images"
    return judged(min(scores["knn"], scores["linear"]) >= ACCURACY, "probe", told, scores=scores)


def _embed(journey: Journey) -> Line:
    def on(device: str) -> tuple[Ended, Path]:
        file = journey.folder / f"features-{device.replace(':', '-')}.npy"
        keys = ("--out", str(file), f"device={device}")
        return journey.do("embed", str(journey.run), str(journey.images), *keys), file

    ended, file = on(str(journey.device))
    if line := _failed("embed", ended):
        return line
    features = np.load(file).astype(np.float64)
    finite, spread = bool(np.isfinite(features).all()), float(features.std(axis=0).mean())
    told = f"{features.shape[0]} images, features of {features.shape[1]}"
    if features.shape[0] != len(KINDS) * IMAGES or not finite or not spread > 0:
        return fail("embed", f"{told}, finite: {finite}, spread {spread:.2g}")
    if journey.device.type == "cpu":
        return ok("embed", told, spread=spread)
    ended, file = on("cpu")
    if line := _failed("embed", ended):
        return line
    of_cpu = np.load(file).astype(np.float64)
    error = float(np.linalg.norm(features - of_cpu) / np.linalg.norm(of_cpu - of_cpu.mean(axis=0)))
    told += f"; {percent(error)} of their spread from the CPU's (bound {percent(FEATURE_BOUND)})"
    return judged(error <= FEATURE_BOUND, "embed", told, spread=spread, error=error)


def _evaluate(journey: Journey, method: str) -> Line:
    name = f"eval {method}"
    if method == "logreg" and importlib.util.find_spec("sklearn") is None:
        return not_here(name, "needs scikit-learn: pip install 'dinoforge[eval]'")
    ended = journey.do(
        "eval",
        method,
        str(journey.run),
        *("--data", str(journey.images), "--test", str(journey.others), "--json"),
        *journey.keys_of_device(),
    )
    if line := _failed(name, ended):
        return line
    result = json.loads(next(row for row in ended.output.splitlines() if row.startswith("{")))
    accuracy = float((result.get("rows") or result["knn"])["trained"]["mean"])
    told = f"{percent(accuracy)} of images of {len(KINDS)} kinds (at least {percent(ACCURACY)})"
    return judged(accuracy >= ACCURACY, name, told, accuracy=accuracy)


def _report(journey: Journey) -> Line:
    ended = journey.do("report", str(journey.run), "--device", str(journey.device))
    if line := _failed("report", ended):
        return line
    page = journey.run / "report.html"
    text = page.read_text(encoding="utf-8")
    missing = [word for word in ("<html", "What it learned", "</html>") if word not in text]
    told = f"{page.name} of {len(text) / 1e6:.1f} MB" + (f", without {missing}" if missing else "")
    return judged(not missing, "report", told, bytes=len(text))


def _export(journey: Journey, to: str) -> Line:
    name = f"export {to}"
    file, packages = _FORMATS[to]
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        return not_here(name, f"needs {', '.join(missing)}: pip install 'dinoforge[export]'")
    out = journey.folder / file
    ended = journey.do("export", str(journey.run), "--to", to, "--out", str(out))
    if line := _failed(name, ended):
        return line
    # Of sizes for which a library has a rule of its own, the difference is only told.
    rows = [row for row in ended.output.splitlines() if "another rule" not in row]
    differences = [float(text) for text in re.findall(r"\b\d\.\de[+-]\d+\b", "\n".join(rows))]
    if not out.exists() or not differences:
        return fail(name, f"no {file}, or nothing to compare it with", ended.tail())
    told = f"{file}: outputs there differ by {max(differences):.1e} at most"
    return ok(name, told, difference=max(differences))


def _replay(journey: Journey) -> Line:
    """A learning rate that nothing survives: the run says so, keeps the batch, and the batch can be run again."""
    name, out = "a loss that is not finite", journey.folder / "diverged"
    keys = {"optim.base_lr": 1e30, "optim.warmup_length": "0%", "train.max_skips": 2, "train.max_rollbacks": 0}
    with journey.start(journey.train_command(out, **keys)) as program:
        ended = program.wait()
    if line := _failed(name, ended, expected=2):
        return line
    batches = sorted((out / "non_finite").glob("*.safetensors"))
    if "not finite" not in ended.output or not batches:
        return fail(name, f"the run kept {len(batches)} batches and said", ended.tail())
    ended = journey.do("replay", str(out), "--batch", str(batches[0]))
    if line := _failed(name, ended):
        return line
    passed = "forward" in ended.output and "losses" in ended.output
    told = f"the run ended with exit code 2 and kept {len(batches)} batches; replay ran one again"
    return judged(passed, name, told, () if passed else ended.tail(), batches=len(batches))
