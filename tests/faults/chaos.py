"""A random walk over what befalls runs on real machines, against one run; its end is that of a run left alone.

    PYTHONPATH=tests python tests/faults/chaos.py --events 60

Each event meets the same run, which the same command then continues: standard output closed, the terminal gone
(SIGHUP), SIGTERM while it waits for a batch, SIGKILL, a full disk, reads that fail (EIO), a stranger's files, a second
start of the same command, a data worker killed, a container without shared memory. After each the exit code and what is
said are checked. At the end every tensor, number and logged loss must be bitwise those of the other run. Prints a line
for each event, and exits with 1 if anything differs. Events that need the right to mount are left out without it, which
is said.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from faults import soak

STEPS = 600
_PATIENCE = 300.0  # seconds; only what hangs takes so long
_STRANGERS = (".DS_Store", "._state.json", "._shard-00001-model-00001-of-00001.safetensors", "desktop.ini", ".nfs00f1")


@dataclass
class World:
    """One run, and what happens to it.

    Args:
        images: Its data.
        run: Its directory, on a disk of its own where that can be had.
        steps: Of it in all.
        chance: Decides.
        log: Where what it prints goes.
    """

    images: Path
    run: Path
    steps: int
    chance: random.Random
    log: Path

    def command(self, workers: int | None = None) -> list[str]:
        return soak.command(self.images, self.run, self.chance.randrange(3) if workers is None else workers, self.steps)

    @contextmanager
    def started(self, workers: int | None = None, prefix: tuple[str, ...] = ()) -> Iterator[subprocess.Popen[bytes]]:
        """The command, in a process group of its own that is gone in the end."""
        with self.log.open("wb") as log:
            process = subprocess.Popen(
                [*prefix, *self.command(workers)],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            try:
                yield process
            finally:
                _kill_group(process)

    def go_on(self, process: subprocess.Popen[bytes], steps: int | None = None) -> None:
        """Wait for a few steps."""
        wanted = soak.step_of(self.run) + (self.chance.randrange(1, 6) if steps is None else steps)
        self.wait(lambda: soak.step_of(self.run) >= wanted, process)

    def wait(self, happened: Callable[[], bool], process: subprocess.Popen[bytes] | None = None) -> None:
        deadline = time.monotonic() + _PATIENCE
        while not happened():
            if process is not None and process.poll() is not None:
                raise AssertionError(f"it ended with {process.returncode}: {self.said()}")
            if time.monotonic() > deadline:
                raise AssertionError(f"nothing happened for {_PATIENCE:.0f} s: {self.said()}")
            time.sleep(0.01)

    def ends(self, process: subprocess.Popen[bytes], code: int, *words: str) -> None:
        """See that it ends with a code, says something, and has no traceback."""
        got = process.wait(timeout=_PATIENCE)
        said = self.said()
        assert got == code, f"exit code {got} in place of {code}: {said}"
        for word in words:
            assert word in said, f"{word!r} is missing in: {said}"
        assert "Traceback" not in said, said

    def said(self) -> str:
        return self.log.read_text(errors="replace")


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _workers(process: subprocess.Popen[bytes]) -> list[int]:
    """The data workers of a run."""
    found = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(pid) for pid in found]


# Events


def standard_output_closed(world: World) -> None:
    process = subprocess.Popen(
        world.command(), stdout=subprocess.PIPE, stderr=world.log.open("wb"), start_new_session=True
    )
    try:
        out: IO[bytes] | None = process.stdout
        assert out is not None
        out.readline()
        out.close()
        world.go_on(process, 12)  # a line is printed every ten seconds at most; the first ones come at once
        process.send_signal(signal.SIGTERM)
        world.ends(process, 143)
    finally:
        _kill_group(process)


def terminal_gone(world: World) -> None:
    with world.started() as process:
        world.go_on(process)
        process.send_signal(signal.SIGHUP)
        world.ends(process, 129, "Stopped by SIGHUP")


def stopped_while_it_waits(world: World) -> None:
    with world.started(workers=1) as process:
        world.go_on(process)
        workers = _workers(process)
        assert workers
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)
        before = -1
        while before != soak.step_of(world.run):  # it takes the batches that are there
            before = soak.step_of(world.run)
            time.sleep(1)
        process.send_signal(signal.SIGTERM)
        world.ends(process, 143, "Stopped by SIGTERM")


def killed(world: World) -> None:
    with world.started() as process:
        world.go_on(process)
        time.sleep(world.chance.uniform(0, 0.05))


def disk_full(world: World) -> None:
    filler = world.run.parent / "filler"
    with world.started() as process:
        world.go_on(process)
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(2**16))
            except OSError:
                pass
        world.wait(lambda: "not saved" in world.said(), process)
    filler.unlink()


def reads_fail(world: World) -> None:
    command = world.command()
    assert command[1:3] == ["-m", "dinoforge"]
    flaky = [command[0], str(Path(__file__).with_name("flaky.py")), str(world.chance.randrange(1000)), *command[3:]]
    with world.log.open("wb") as log:
        process = subprocess.Popen(flaky, stdout=log, stderr=log, start_new_session=True)
        try:
            world.go_on(process)
            process.send_signal(signal.SIGTERM)
            world.ends(process, 143)
        finally:
            _kill_group(process)


def stranger(world: World) -> None:
    newest = max((world.run / "checkpoints").glob("step_*[0-9]"), default=world.run)
    for folder in {world.run, world.run / "checkpoints", newest}:
        if folder.is_dir():
            (folder / world.chance.choice(_STRANGERS)).write_bytes(b"\0\x05\x16\x07")
    with world.started() as process:
        world.go_on(process)
        process.send_signal(signal.SIGTERM)
        world.ends(process, 143)


def second_start(world: World) -> None:
    with world.started() as process:
        world.go_on(process)
        second = subprocess.run(world.command(), capture_output=True, text=True, timeout=_PATIENCE)
        assert second.returncode == 2, second.stderr
        assert f"is written by process {process.pid}" in second.stderr, second.stderr
        world.go_on(process)
        process.send_signal(signal.SIGTERM)
        world.ends(process, 143)


def worker_killed(world: World) -> None:
    with world.started(workers=1) as process:
        world.go_on(process)
        workers = _workers(process)
        assert workers
        os.kill(world.chance.choice(workers), signal.SIGKILL)
        world.ends(process, 1, "data worker")


def no_shared_memory(world: World) -> None:
    script = 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"'
    with world.started(workers=1, prefix=("unshare", "-m", "sh", "-c", script, "sh")) as process:
        world.ends(process, 2, "/dev/shm", "train.num_workers=0")


EVENTS: tuple[Callable[[World], None], ...] = (
    standard_output_closed,
    terminal_gone,
    stopped_while_it_waits,
    killed,
    reads_fail,
    stranger,
    second_start,
    worker_killed,
    disk_full,
    no_shared_memory,
)
_NEED_MOUNT = (disk_full, no_shared_memory)


@contextmanager
def _small_disk(folder: Path) -> Iterator[bool]:
    """A file system of 256 MiB over a folder, where that is allowed."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(folder)]
    mounted = shutil.which("mount") is not None and subprocess.run(mount, capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def walk(folder: Path, *, events: int, seed: int, steps: int = STEPS) -> list[str]:
    """Take one run through so many events; return what differs from one left alone."""
    chance = random.Random(seed)
    images = soak.make_images(folder / "images")
    alone = folder / "alone"
    subprocess.run(soak.command(images, alone, 0, steps), check=True, stdout=subprocess.DEVNULL)
    with _small_disk(folder / "disk") as mounted:
        world = World(images, folder / "disk" / "run", steps, chance, folder / "log")
        possible = [event for event in EVENTS if mounted or event not in _NEED_MOUNT]
        if not mounted:
            print("left out, since nothing can be mounted here: a full disk, no shared memory", flush=True)
        order = [event for _ in range(-(-events // len(possible))) for event in chance.sample(possible, len(possible))]
        for number, event in enumerate(order[:events], 1):
            before = soak.step_of(world.run)
            event(world)
            after = soak.step_of(world.run)
            print(
                f"event {number:3d}  {event.__name__.replace('_', ' '):<24} steps {before:4d} to {after:4d}", flush=True
            )
            if after >= steps:
                raise SystemExit(f"the run was finished after {number} events: make it longer, by --steps")
        subprocess.run(world.command(), check=True, stdout=subprocess.DEVNULL)
        return soak.differences(world.run, alone, steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--events", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = walk(Path(folder), events=options.events, seed=options.seed, steps=options.steps)
    print("\n".join(found) or f"{options.events} events: every tensor, number and logged loss is bitwise the same")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
