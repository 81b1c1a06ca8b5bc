"""While training, what is wrong is said once, in the doctor's words."""

import json
import shutil

import pytest

import dinoforge
from dinoforge.commands.report import doctor
from dinoforge.recipe.load import load_recipe
from dinoforge.recipe.schema import flatten
from dinoforge.runs.metrics import Alarm, JsonLines
from tiny import TINY

KEYS = TINY | {"train.steps": 12, "optim.base_lr": 3.0}


@pytest.mark.slow
def test_a_run_with_a_huge_learning_rate_is_told_once_and_not_again_when_continued(solar_cells, tmp_path, capsys):
    images, run = tmp_path / "images", tmp_path / "run"
    images.mkdir()
    for path in sorted(solar_cells.iterdir())[:16]:
        shutil.copy(path, images)
    dinoforge.train(images, "small", run, **KEYS | {"train.max_minutes": 60.0})
    out = capsys.readouterr().out
    (finding,) = [finding for finding in doctor(run) if finding.name == "lr_too_high"]
    assert out.count(f"diagnosis  at step {finding.step}: {finding.sentence}") == 1
    assert out.count("The learning rate is too high") == 1

    lines = (run / "metrics.jsonl").read_text().splitlines()
    told: list[str] = []
    file = JsonLines(run / "metrics.jsonl", first_step=12)
    alarm = Alarm(flatten(load_recipe(run / "recipe.yaml")[0]), file, told.append)
    alarm(json.loads(lines[-1]) | {"step": 13})
    assert not any("learning rate" in sentence for sentence in told)  # it may have waited for data
    file.cut(1)  # a rollback to before it
    alarm.cut()
    for line in lines[1:]:
        alarm(json.loads(line))
    assert not any("learning rate" in sentence for sentence in told)


def test_lines_that_are_done_anew_do_not_count_twice(tmp_path):
    recipe = flatten(load_recipe("small")[0])
    path, told = tmp_path / "metrics.jsonl", []
    file = JsonLines(path, first_step=0)
    alarm = Alarm(recipe, file, told.append)

    def log(step, ratio=0.1):
        metrics = {"step": step, "diag.update_ratio.backbone": ratio}
        file(metrics)
        alarm(metrics)

    log(10, 0.001)
    log(20)
    log(30)
    file.cut(20)
    alarm.cut()
    log(30)  # the second of two, not the third
    assert told == []
    log(40)
    assert len(told) == 1
    assert told[0].startswith("diagnosis  at step 40: The learning rate is too high")


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_batch_of_one_has_no_collapse_and_its_plan_says_what_cannot_act(solar_cells, tmp_path, capsys, accumulate):
    images, run = tmp_path / "images", tmp_path / "run"
    images.mkdir()
    for path in sorted(solar_cells.iterdir())[:16]:
        shutil.copy(path, images)
    one = {"train.batch_size_per_gpu": 1, "train.accumulate": accumulate, "train.steps": 12}
    dinoforge.train(images, "small", run, **TINY | one)
    out = capsys.readouterr().out
    assert "KoLeo stays 0" in out
    assert "diagnosis" not in out
    assert doctor(run) == []
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 12
    measured = {name for line in lines for name, value in line.items() if value is not None}
    assert {"diag.feature_norm", "diag.target_entropy.dino", "diag.update_ratio.backbone"} <= measured
    assert not {"diag.effective_rank", "diag.target_information.dino"} & measured
