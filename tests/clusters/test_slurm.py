"""``dinoforge submit --slurm`` against a real Slurm: a run to its end, jobs that are taken away and queued again."""

import contextlib
import json
import re

import pytest

from clusters import slurm as clusters
from dinoforge.cli.main import main
from distributed import continuing

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    clusters.require()
    with clusters.started(tmp_path_factory.mktemp("slurm") / "cluster") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return continuing.make_images(tmp_path_factory.mktemp("slurm-images") / "images")


def submitted(capsys, images, run, steps, **options):
    """The number of the job."""
    keys = [f"{key}={value}" for key, value in (continuing.KEYS | {"train.steps": steps}).items()]
    options = {"out": run, "ranks-per-node": 2, "cpus-per-rank": 1, "minutes": 30, "partition": "low"} | options
    texts = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    assert main(["submit", str(images), "--slurm", *texts, *keys]) == 0
    return re.search(r"job (\d+)", capsys.readouterr().out)[1]


def lines_of(run):
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def logs_of(run):
    folder = run.parent / f"{run.name}-jobs"
    return "\n".join(f"== {path.name}\n{path.read_text()}" for path in sorted(folder.glob("*.[eo]*")))


def finished(run):
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        return bool(json.loads((run / "summary.json").read_text())["finished"])
    return False


def test_a_run_from_its_start_to_its_end(slurm, images, tmp_path, capsys):
    run = tmp_path / "run"
    job = submitted(capsys, images, run, 20)
    slurm.wait(lambda: slurm.state(job) not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), "it did not end")
    assert slurm.state(job) == "COMPLETED", logs_of(run)
    assert finished(run)
    assert [line["step"] for line in lines_of(run)] == list(range(1, 21))
    assert [start["ranks"] for start in json.loads((run / "run.json").read_text())["starts"]] == [2]


def taken_away(slurm, job, run, take):
    """Has the job taken away after some steps; waits for the run to be finished all the same."""
    slurm.wait(lambda: len(lines_of(run)) >= 5, f"no steps\n{logs_of(run)}")
    take()
    slurm.start_soon(job)
    slurm.wait(lambda: finished(run), f"it did not go on: {slurm.ask('scontrol', 'show', 'job', job)}\n{logs_of(run)}")
    slurm.wait(lambda: slurm.state(job) == "COMPLETED", f"it did not end\n{logs_of(run)}")
    starts = json.loads((run / "run.json").read_text())["starts"]
    assert [start["ranks"] for start in starts] == [2, 2]
    steps = [line["step"] for line in lines_of(run)]
    assert steps == list(range(1, len(steps) + 1))
    assert 5 <= starts[1]["step"] < len(steps)  # from where it was stopped
    assert "Restarts=1" in slurm.ask("scontrol", "show", "job", job)


def test_a_job_that_is_pre_empted_goes_on_when_there_is_room(slurm, images, tmp_path, capsys):
    run = tmp_path / "run"
    job = submitted(capsys, images, run, 150)

    def take():
        script = ["sbatch", "--partition=high", "--exclusive", "--output=/dev/null", "--wrap", "sleep 3"]
        slurm.ask(*script)

    taken_away(slurm, job, run, take)


def test_a_job_whose_time_is_nearly_over_goes_on_in_another(slurm, images, tmp_path, capsys):
    run = tmp_path / "run"
    job = submitted(capsys, images, run, 150)
    # What --signal has Slurm do two minutes before the end.
    taken_away(slurm, job, run, lambda: slurm.ask("scancel", "--signal=USR2", job))


def test_a_job_that_is_cancelled_stays_away(slurm, images, tmp_path, capsys):
    run = tmp_path / "run"
    job = submitted(capsys, images, run, 5000)
    slurm.wait(lambda: len(lines_of(run)) >= 5, f"no steps\n{logs_of(run)}")
    slurm.ask("scancel", job)
    slurm.wait(lambda: (run / "summary.json").exists(), f"it did not stop\n{logs_of(run)}")
    slurm.wait(lambda: not slurm.ask("squeue", "--noheader"), "it is still queued")
    assert slurm.state(job) == "CANCELLED"
    assert "Restarts=0" in slurm.ask("scontrol", "show", "job", job)
    assert not finished(run)
