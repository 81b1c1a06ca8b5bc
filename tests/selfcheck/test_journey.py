"""Runs that do not continue as they should, and commands that fail, are failures."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dinoforge.selfcheck import journey as journeys
from dinoforge.selfcheck import runs
from dinoforge.selfcheck.images import KINDS, make_images
from dinoforge.selfcheck.settings import Settings

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def journey(tmp_path_factory):
    """A user with a run that is finished."""
    made = journeys.Journey(Settings("cpu", None, True, tmp_path_factory.mktemp("journey")), CPU)
    line = journeys._train(made)
    assert line.status == "ok", line
    return made


class _OtherImages(journeys.Journey):
    """Between the kill and the continuation, a hand changes which images come next."""

    def start(self, command):
        run = self.folder / "killed"
        if saved := runs.saved_steps(run):
            folder = run / "checkpoints" / f"step_{saved[-1]:08d}"
            state = json.loads((folder / "state.json").read_text())
            (folder / "state.json").write_text(json.dumps(state | {"passed_over": 1}))
            sums = folder / "SHA256SUMS"
            rows = [row.split(maxsplit=1) for row in sums.read_text().splitlines()]
            digests = {name: hashlib.sha256((folder / name.strip()).read_bytes()).hexdigest() for _, name in rows}
            sums.write_text("".join(f"{digest}  {name}\n" for name, digest in digests.items()))
        return super().start(command)


def test_a_run_whose_continuation_differs(journey, tmp_path):
    other = _OtherImages(Settings("cpu", None, True, tmp_path), CPU)
    other.run, other.images = journey.run, journey.images
    line = journeys._continue(other)
    assert line.status == "FAIL"
    assert "not bitwise" in line.text
    assert line.values["loss"] > journeys.LOSS_BOUND  # so it would be found where sums are not always the same, too


def test_a_command_that_fails(journey, tmp_path):
    other = journeys.Journey(Settings("cpu", None, True, tmp_path), CPU)  # which has no run
    line = journeys._embed(other)
    assert line.status == "FAIL"
    assert "exit code 2" in line.text
    assert any("error:" in row for row in line.details)


def test_no_probe_is_found(journey, tmp_path):
    other = journeys.Journey(Settings("cpu", None, True, tmp_path), CPU)
    other.run.mkdir()
    metrics = (journey.run / "metrics.jsonl").read_text()
    (other.run / "metrics.jsonl").write_text(metrics.replace("probe.knn", "probe.other"))
    assert journeys._probe(other).status == "FAIL"
    assert journeys._probe(journey).status == "ok"


@pytest.fixture
def copy(journey, tmp_path):
    shutil.copytree(journey.run, tmp_path / "copy")
    return tmp_path / "copy"


def how_apart(copy: Path, journey: journeys.Journey, after: int = 0) -> runs.Apart:
    return runs.apart(copy, journey.run, step=journey.steps, since=journey.saved_every, after=after)


def test_a_run_beside_itself(copy, journey):
    found = how_apart(copy, journey)
    assert found.same
    assert (found.loss, found.typical, found.weights, found.steps) == (0, 0, 0, "")


def test_a_weight_that_differs_in_its_last_bit(copy, journey):
    folder = copy / "checkpoints" / f"step_{journey.steps:08d}"
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    name = "student.backbone.cls_token"
    tensors[name].view(-1)[0] = torch.nextafter(tensors[name].view(-1)[0], torch.tensor(torch.inf))
    save_file(tensors, file)
    found = how_apart(copy, journey)
    assert not found.same
    assert 0 < found.weights < 1e-6
    assert found.within(loss=0, weights=1e-6)


def test_losses_that_differ(copy, journey):
    lines = runs.lines_of(copy)
    for line in lines[20:]:
        line["ibot"] += 0.01 * line["total"]
    (copy / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    found = how_apart(copy, journey, after=18)
    assert not found.same
    assert found.loss == pytest.approx(0.01)
    assert found.typical == pytest.approx(0.01)
    assert how_apart(copy, journey).typical == 0
    assert not found.within(loss=0.001, weights=1)


def test_a_loss_that_is_no_number(copy, journey):
    lines = runs.lines_of(copy)
    lines[5]["koleo"] = float("nan")
    (copy / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert how_apart(copy, journey).loss == float("inf")


def test_steps_that_are_missing(copy, journey):
    rows = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text("".join(rows[:-2]))
    found = how_apart(copy, journey)
    assert not found.within(loss=1, weights=1)
    assert "22 steps" in found.told


def test_a_copy_as_of_a_checkpoint(journey, tmp_path):
    runs.copy_as_of(journey.run, tmp_path / "cut", 12)
    assert runs.saved_steps(tmp_path / "cut") == [6, 12]
    assert not (tmp_path / "cut" / "summary.json").exists()


def test_images_are_the_same_each_time_and_further_ones_are_others(tmp_path):
    def contents(folder: Path) -> list[bytes]:
        return [path.read_bytes() for path in sorted(folder.rglob("*.*"))]

    one, two = (contents(make_images(tmp_path / name, of_each=3)) for name in "ab")
    others = contents(make_images(tmp_path / "c", of_each=3, first=3))
    assert one == two
    assert len(set(one + others)) == 2 * 3 * len(KINDS)
