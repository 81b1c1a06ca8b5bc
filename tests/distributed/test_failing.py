"""``dinoforge train --nproc 4`` where one rank fails: all end soon, the cause is said last, and may be tried again."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from distributed import continuing
from programs import environment

INJECTED = Path(__file__).parent / "injected"
LIMIT = 60  # seconds from the fault to the launcher's end; about 3 are usual, and 8 where the others are stuck
pytestmark = [pytest.mark.timeout(300), pytest.mark.processes]


class Ended(NamedTuple):
    code: int
    errors: str  # what was printed there
    strikes: int
    seconds: float  # from the last strike to the end


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return continuing.make_images(tmp_path_factory.mktemp("failing") / "images")


def run(images: Path, folder: Path, *, ranks: int = 4, restarts: int = 3, fault: dict, **keys: object) -> Ended:
    stamps = folder / "stamps"
    texts = [f"{key}={value}" for key, value in (continuing.KEYS | keys).items()]
    command = [sys.executable, "-m", "dinoforge", "train", str(images), "--out", str(folder / "run"), *texts]
    given = environment(INJECTED) | {
        "FAULT": json.dumps(fault | {"step": 3, "stamps": str(stamps)}),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [*command, "--nproc", str(ranks), "--restarts", str(restarts)],
        env=given,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    now = time.time()
    struck = [float(line) for line in stamps.read_text().splitlines()] if stamps.exists() else [now]
    print(f"{fault}: {now - struck[-1]:.1f} s from the fault to the end\n{done.stderr}")
    return Ended(done.returncode, done.stderr, len(struck) if stamps.exists() else 0, now - struck[-1])


def last_line(ended: Ended) -> str:
    return ended.errors.rstrip("\n").splitlines()[-1]


def test_an_error_in_the_data_of_one_rank_is_not_tried_again(images, tmp_path):
    ended = run(images, tmp_path, fault={"kind": "data", "rank": 2})
    assert ended.code == 2
    assert ended.strikes == 1
    assert ended.seconds < LIMIT
    assert ended.errors == "error on rank 2: the drive is gone\n"


def test_one_rank_out_of_memory_while_the_others_are_stuck(images, tmp_path):
    ended = run(images, tmp_path, fault={"kind": "memory", "rank": 1, "deaf": True})
    assert ended.code == 3
    assert ended.strikes == 1
    assert ended.seconds < LIMIT
    assert ended.errors.count("error") == 1
    assert last_line(ended).startswith(
        "error on rank 1: cpu is out of memory. Tried to allocate 2.00 GiB. "
        "GPU 0 has a total capacity of 79.10 GiB of which 1.25 GiB is free. Only a smaller network"
    )


def test_a_bug_in_the_backward_pass_of_one_rank_is_tried_again(images, tmp_path):
    ended = run(images, tmp_path, restarts=1, fault={"kind": "bug", "rank": 3})
    assert ended.code == 1
    assert ended.strikes == 2
    assert ended.seconds < LIMIT
    assert ended.errors.count("Traceback (most recent call last)") == 2
    assert ended.errors.count("starting all ranks again, from the last checkpoint (1 of 1)") == 1
    assert last_line(ended) == "error on rank 3: ZeroDivisionError: a bug"
    assert "torch.distributed.elastic" not in ended.errors


def test_one_rank_is_killed_while_the_others_are_stuck(images, tmp_path):
    ended = run(images, tmp_path, ranks=2, restarts=0, fault={"kind": "killed", "rank": 0, "deaf": True})
    assert ended.code == 128 + 9
    assert ended.seconds < LIMIT
    assert ended.errors == "error: rank 0 was ended by SIGKILL. Most often the system does that for lack of memory\n"


def test_what_no_start_can_do_is_tried_once_and_told_once(images, tmp_path):
    ended = run(images, tmp_path, ranks=2, fault={"kind": "bug", "rank": 9}, **{"parallel.mode": "hsdp"})
    assert ended.code == 2
    assert ended.strikes == 0
    assert ended.errors.count("parallel.mode=hsdp") == 1
    assert ended.errors.startswith("error: parallel.mode=hsdp: 2 ranks cannot be cut into copies of 2 ranks each")
