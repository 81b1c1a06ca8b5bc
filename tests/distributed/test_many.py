"""Four ranks, then eight, then three: one run, whose images, crops and losses do not depend on that. Uneven shards."""

import json

import pytest
import torch

from distributed import continuing, layouts, many, ranks
from distributed.test_layouts import assert_same

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The folder of the runs ``whole``, on one process, and ``run``; what each step was given; what each rank got."""
    folder = tmp_path_factory.mktemp("many")
    continuing.make_images(folder / "images", 30)
    streams = {"whole": continuing.go_on(folder, "whole", 99, **many.KEYS), "run": []}
    got = {}
    for task, number in (("four", 4), ("eight", 8), ("three", 3)):
        (folder / task).mkdir()
        (folder / task / "images").symlink_to(folder / "images")
        (folder / task / "run").symlink_to(folder / "run")
        (folder / "run").mkdir(exist_ok=True)
        got[task] = [rank[task] for rank in ranks.start(many.__name__, [task], number, folder / task)]
        parts = zip(*(rank["run"] for rank in got[task]), strict=True)
        streams["run"] += [[image for part in step for image in part] for step in parts]
    return folder, streams, got


def test_images_crops_and_masks_are_those_of_one_process(results):
    _, streams, _ = results
    assert len(streams["whole"]) == continuing.STEPS
    assert [list(map(tuple, step)) for step in streams["run"]] == streams["whole"]


def test_losses_are_those_of_one_process(results):
    folder, _, _ = results
    ours, theirs = (
        [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("run", "whole")
    )
    assert [line["step"] for line in ours] == list(range(1, continuing.STEPS + 1))
    for a, b in zip(ours, theirs, strict=True):
        for key in ("total", "dino_local", "dino_global", "ibot", "koleo"):
            assert a[key] == pytest.approx(b[key], rel=1e-4), (a["step"], key)
    starts = json.loads((folder / "run" / "run.json").read_text())["starts"]
    assert [(s["ranks"], s["parallel"], s["step"]) for s in starts] == [(4, "fsdp", 0), (8, "hsdp", 3), (3, "fsdp", 6)]


def test_ten_steps_on_shards_of_different_sizes_are_those_of_one_process(results):
    _, _, got = results
    assert [rank["shards"]["rows"] for rank in got["eight"]] == [2, 2, 2, 2, 2, 1, 0, 0]
    assert [rank["shards"]["elements"] > 0 for rank in got["eight"]] == [True] * 7 + [False]
    at_once = layouts.run("prime sizes", layouts.Layout("none"))
    moved = f"{layouts.MEASURED} diag.update_ratio.dino_head"  # the last rank has nothing of it
    for rank in got["eight"]:
        ours = {moved: torch.tensor(0.0)} | rank["steps"]
        assert_same(ours, at_once, images=1)
        assert (ours[moved] > 0) == (rank["shards"]["elements"] > 0)


def test_the_groups_of_copies_and_shards_wait_as_long_as_the_recipe_says(results):
    _, _, got = results
    for rank in got["eight"]:
        assert rank["shards"]["sizes"] == [2, 4]
        assert rank["shards"]["seconds"] == [many.TIMEOUT.total_seconds()] * 2
