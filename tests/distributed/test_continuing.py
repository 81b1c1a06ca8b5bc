"""A checkpoint of any number of ranks, sharded or not, continues on any other as if nothing had happened."""

import json

import pytest

from dinoforge.errors import RecipeError, RunError
from distributed import continuing, ranks

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of three runs, and what each step of them was given; rank by rank where there were two."""
    folder = tmp_path_factory.mktemp("runs")
    continuing.make_images(folder / "images")
    streams = {"whole": continuing.go_on(folder, "whole", 99), "up": continuing.go_on(folder, "up", 3)}
    names = [path.name for path in sorted((folder / "images").iterdir())]
    (folder / "labels.csv").write_text("".join(f"{name},{i % 2}\n" for i, name in enumerate(names)))
    on_two = [rank["two"] for rank in ranks.start(continuing.__name__, ["two"], 2, folder)]
    streams |= {name: [rank[name] for rank in on_two] for name in ("probed", "sharded", "timed")}
    together = {name: [a + b for a, b in zip(*(r[name] for r in on_two), strict=True)] for name in ("up", "down")}
    streams["up"] += together["up"] + continuing.go_on(folder, "up", 99, **{"train.accumulate": 2})
    streams["down"] = together["down"] + continuing.go_on(folder, "down", 99)
    return folder, streams


@pytest.mark.parametrize("name", ["up", "down"])
def test_images_crops_and_masks_are_those_of_the_undisturbed_run(runs, name):
    _, streams = runs
    assert len(streams["whole"]) == continuing.STEPS
    assert [list(map(tuple, step)) for step in streams[name]] == streams["whole"]
    assert len({crops for step in streams["whole"] for _, crops, _ in step}) == 8 * continuing.STEPS


@pytest.mark.parametrize("name", ["up", "down"])
def test_the_losses_are_those_of_the_undisturbed_run(runs, name):
    folder, _ = runs
    ours, theirs = (
        [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
        for run in (name, "whole")
    )
    assert [line["step"] for line in ours] == list(range(1, continuing.STEPS + 1))
    for a, b in zip(ours, theirs, strict=True):
        for key in ("total", "dino_local", "dino_global", "ibot", "koleo"):
            assert a[key] == pytest.approx(b[key], rel=1e-4), (a["step"], key)
        assert a["skipped_images"] == b["skipped_images"]


def test_it_is_told_on_how_many_ranks_a_run_was(runs):
    folder, _ = runs
    info = json.loads((folder / "down" / "run.json").read_text())
    assert [(s["ranks"], s["parallel"], s["step"]) for s in info["starts"]] == [
        (2, "ddp", 0),
        (2, "fsdp", 3),
        (1, "none", 6),
    ]
    assert info["batch_size"] == 8
    assert (folder / "down" / "skipped.txt").read_text().count("07.png") == 1  # whichever rank met it


def test_all_ranks_stop_when_the_probes_of_the_first_say_so(runs):
    folder, ends = runs
    assert ends["probed"] == [(4, continuing.STEPS, "probe.patience")] * 2
    assert [probe["step"] for probe in json.loads((folder / "probed" / "probes.json").read_text())["history"]] == [2, 4]
    assert (folder / "probed" / "report.html").exists()


def test_where_no_rank_has_the_whole_teacher_it_is_not_probed(runs):
    folder, ends = runs
    assert ends["sharded"] == [(continuing.STEPS, continuing.STEPS, None)] * 2
    assert not (folder / "sharded" / "probes.json").exists()
    assert (folder / "sharded" / "report.html").exists()


def test_ranks_take_the_same_number_of_steps_that_they_timed(runs):
    _, ends = runs
    assert ends["timed"][0] == ends["timed"][1]


def test_another_global_batch_is_another_run(runs):
    folder, _ = runs
    with pytest.raises(RunError, match=r"train\.batch_size=8"):
        continuing.go_on(folder, "whole", 1, **{"train.batch_size": None, "train.batch_size_per_gpu": 4})


def test_a_global_batch_that_cannot_be_cut(runs):
    folder, _ = runs
    with pytest.raises(RecipeError, match=r"1 ranks × 3 micro-batches .* the nearest that can is 9"):
        continuing.go_on(folder, "other", 1, **{"train.accumulate": 3})
