"""Several ranks beside one process, and what becomes of the others when one dies or fails."""

import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dinoforge.selfcheck import runs
from dinoforge.selfcheck.faults import AT_CALL, MESSAGE, Fault
from dinoforge.selfcheck.images import make_images
from dinoforge.selfcheck.lines import Line, fail, guarded, judged, not_here
from dinoforge.selfcheck.processes import Ended, Program
from dinoforge.selfcheck.settings import Settings
from dinoforge.system.device import number_of_ranks, resolve_device

STEPS, SAVED_EVERY = 12, 4
LOSS_BOUND, WEIGHTS_BOUND = 1e-4, 0.02
"""Of losses, relative, and of weights, as a share of their way, beside one process in float32.

On a CPU, 2 and 4 ranks gave 1.5e-7 and 1e-4.
"""
END_SECONDS = 60.0
"""Until all ranks have ended after one has failed; on an idle machine it takes at most 20."""

_SECONDS = 300.0  # time of a run on a machine that does other things too
START_SECONDS = 60.0  # until the fault happens: the ranks start and find each other
_PER_RANK = 4  # images of a step


class Ranks:
    """Runs on several ranks, by the commands of a user.

    Args:
        settings: Settings of the check.
        device: Type of the ranks' devices.
        number: Number of ranks.
    """

    def __init__(self, settings: Settings, device: str, number: int) -> None:
        self.folder, self.device, self.number = settings.folder, device, number
        self.images = make_images(self.folder / "images", of_each=max(12, _PER_RANK * number))
        self.alone = self.folder / "alone"

    def keys(self, **more: Any) -> list[str]:
        """Recipe keys under which it does not matter how a batch is cut."""
        settings: dict[str, Any] = {
            "device": self.device,
            "precision": "fp32",
            "dino.koleo_scope": "global",
            "ibot.center_mean": "patches",
            "student.depth": 2,
            "train.steps": STEPS,
            "train.batch_size": _PER_RANK * self.number,
            "log.every_steps": 1,
            "checkpoint.every_steps": SAVED_EVERY,
            "checkpoint.keep_last": STEPS // SAVED_EVERY,
            "probe.every_minutes": "null",
            "report.every_minutes": "null",
        }
        if self.device == "cpu":
            settings |= {"train.threads": 1, "train.num_workers": 1}
        return [f"{key}={value}" for key, value in (settings | more).items()]

    def train(self, out: Path, *options: str, **keys: Any) -> Program:
        command = ["dinoforge", "train", str(self.images), "--recipe", "small", "--out", str(out), *options]
        return Program([*command, *self.keys(**keys)], self.folder, seconds=_SECONDS)

    def on_ranks(self, out: Path, **keys: Any) -> Program:
        return self.train(out, "--nproc", str(self.number), **keys)

    def beside_one(self, name: str, out: Path, told: str, **values: Any) -> Line:
        """The line of a run that is to end as the one of one process."""
        found = runs.apart(out, self.alone, step=STEPS, since=SAVED_EVERY)
        text = f"{told}: {found.told} from one process (bounds {LOSS_BOUND:g} and {WEIGHTS_BOUND:g})"
        passed = found.within(loss=LOSS_BOUND, weights=WEIGHTS_BOUND)
        return judged(passed, name, text, loss=found.loss, weights=found.weights, **values)


def check(settings: Settings) -> Iterator[Line]:
    if settings.nproc is None:
        yield not_here("ranks", "not asked for: --nproc N starts N ranks")
        return
    number, device = number_of_ranks(settings.nproc), resolve_device(settings.device).type
    if reason := _cannot(device, number):
        yield not_here("ranks", reason)
        return
    ranks = Ranks(settings, device, number)
    line = guarded("ranks: one process", partial(_alone, ranks))
    if line.status == "FAIL":
        yield line
    looks: dict[str, Callable[[str], Line]] = {}
    if line.status == "ok":
        if not settings.short:
            looks["ranks: DDP"] = partial(_layout, ranks, "ddp", None)
        looks["ranks: FSDP2"] = partial(_layout, ranks, "fsdp", None)
        if (shards := _shards(number)) and not settings.short:
            looks["ranks: HSDP"] = partial(_layout, ranks, "hsdp", shards)
        elif not shards:
            looks["ranks: HSDP"] = partial(not_here, reason="needs --nproc 4, or another number that is no prime")
        looks["ranks: continued on one"] = partial(_continue, ranks)
        looks["ranks: one is killed"] = partial(_kill, ranks)
    looks["ranks: one fails, backward"] = partial(_fail, ranks, "backward", 1)
    if not settings.short:
        looks["ranks: one fails, its data"] = partial(_fail, ranks, "data", 2)
    for name, look in looks.items():
        yield guarded(name, partial(look, name))


def _cannot(device: str, number: int) -> str | None:
    """Why there cannot be so many ranks."""
    if number < 2:
        return "--nproc 1 is one process: ask for 2 or more"
    if device == "mps":
        return "a Mac has one GPU, which ranks cannot share"
    if device == "cuda" and (count := torch.cuda.device_count()) < number:
        return f"{number} ranks need {number} GPUs; here {'is one' if count == 1 else f'are {count}'}"
    return None


def _shards(number: int) -> int | None:
    """Ranks of a copy under HSDP: more than one, and fewer than all."""
    return next((inner for inner in range(2, number) if number % inner == 0), None)


def _told(ended: Ended, name: str) -> Line | None:
    """A failure, if a run did not end well."""
    return None if ended.code == 0 else fail(name, f"the run {ended.told}", ended.tail())


def _alone(ranks: Ranks) -> Line:
    with ranks.train(ranks.alone) as program:
        ended = program.wait()
    return _told(ended, "ranks: one process") or Line("ranks: one process", "ok", "")


def _layout(ranks: Ranks, mode: str, shards: int | None, name: str) -> Line:
    keys = {"parallel.mode": mode} | ({"parallel.shard_ranks": shards} if shards else {})
    with ranks.on_ranks(ranks.folder / mode, **keys) as program:
        ended = program.wait()
    how = f"{ranks.number} ranks" + (f" in copies of {shards}" if shards else "")
    return _told(ended, name) or ranks.beside_one(name, ranks.folder / mode, how)


def _continue(ranks: Ranks, name: str) -> Line:
    """A run of several ranks, as it was at a checkpoint, goes on in one process."""
    begun, out = ranks.folder / "fsdp", ranks.folder / "continued"
    step = SAVED_EVERY * (STEPS // SAVED_EVERY // 2)
    if step not in runs.saved_steps(begun):
        return fail(name, f"the run by FSDP2 has no checkpoint of step {step}")
    runs.copy_as_of(begun, out, step)
    with ranks.train(out) as program:
        ended = program.wait()
    if line := _told(ended, name):
        return line
    if f"Continuing at step {step}" not in ended.output:
        return fail(name, f"it did not continue at step {step}", ended.tail())
    return ranks.beside_one(name, out, f"{ranks.number} ranks until step {step}, then one process")


def _kill(ranks: Ranks, name: str) -> Line:
    """SIGKILL to the last rank; the launcher starts all of them again."""
    out = ranks.folder / "killed"
    with ranks.on_ranks(out, **{"parallel.mode": "ddp"}) as program:
        while program.running and not program.late and not (runs.step_of(out) > SAVED_EVERY and runs.saved_steps(out)):
            time.sleep(0.005)
        victims = program.ranks() if program.running else []
        if not victims:
            return _told(program.wait(), name) or not_here(name, "the run was over before a rank could be killed")
        os.kill(victims[-1], getattr(signal, "SIGKILL", signal.SIGTERM))
        killed, killed_at, lines = time.monotonic(), runs.step_of(out), len(runs.lines_of(out))
        while program.running and not program.late and len(runs.lines_of(out)) == lines:
            time.sleep(0.01)  # until the next start has cut the metrics, or gone on
        waited = time.monotonic() - killed
        ended = program.wait()
    if line := _told(ended, name):
        return line
    if "Continuing at step" not in ended.output:
        if killed_at >= STEPS:
            return not_here(name, "the run was over before a rank could be killed")
        return fail(name, f"rank {len(victims) - 1} was killed at step {killed_at}, and none continued", ended.tail())
    told = f"rank {len(victims) - 1} killed at step {killed_at}, all went on after {waited:.1f} s"
    return ranks.beside_one(name, out, told, waited=waited, killed_at=killed_at)


def _fail(ranks: Ranks, kind: str, code: int, name: str, *, end_seconds: float = END_SECONDS) -> Line:
    """One rank fails while the others wait for it."""
    out = ranks.folder / f"fails-{kind}"
    fault = Fault(kind, str(ranks.images), str(out), tuple(ranks.keys(**{"parallel.mode": "ddp"})))
    options = ("--nproc", str(ranks.number), "--fault", json.dumps(fault.as_json()))
    command = ["dinoforge", "selfcheck", *options]
    return ended_by_fault(command, ranks.folder, out, name, code, end_seconds=end_seconds)


def ended_by_fault(
    command: Sequence[str],
    folder: Path,
    out: Path,
    name: str,
    code: int,
    *,
    start_seconds: float = START_SECONDS,
    end_seconds: float = END_SECONDS,
) -> Line:
    """Runs ranks of which one fails, and says how soon all have ended and what they said.

    Args:
        command: The command that starts the ranks.
        folder: The folder for the output.
        out: The run directory, where the file ``fault`` says when the fault happened.
        name: Name of the line.
        code: The exit code to expect.
        start_seconds: Seconds in which the fault has to happen.
        end_seconds: Seconds after the fault in which all ranks have to end.
    """
    file = out / "fault"
    with Program(command, folder, seconds=start_seconds) as program:
        while program.running and not program.late and not file.exists():
            time.sleep(0.02)
        if file.exists():
            program.seconds = time.monotonic() - program.started + end_seconds
        ended = program.wait()
        happened = float(file.read_text() or "nan") if file.exists() else float("nan")
        seconds = time.time() - happened
    if happened != happened:
        return fail(name, f"the ranks {ended.told}, before one could fail in step {AT_CALL}", ended.tail())
    if ended.code is None:
        return fail(
            name, f"ranks were still there {end_seconds:.0f} s after one had failed", ended.tail(), seconds=None
        )
    said = ended.output.count(MESSAGE)
    text = f"all had ended {seconds:.1f} s later (bound {end_seconds:.0f}), with exit code {ended.code}, saying why"
    if ended.code != code or not said:
        text = f"all had ended {seconds:.1f} s later, with exit code {ended.code} (expected {code})"
        text += "" if said else ", without saying why"
        return fail(name, text, ended.tail(), seconds_until_ended=seconds)
    return judged(True, name, text, seconds_until_ended=seconds, said=said)
