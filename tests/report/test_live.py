"""The report that a run writes about itself."""

import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import dinoforge
from dinoforge.report import live, page
from dinoforge.report.live import Live
from report_sizes import SIZES


class Drawing:
    """A data set that draws from every global random state when it is read."""

    def __len__(self):
        return 24

    def __getitem__(self, index):
        random.random(), np.random.rand(), torch.rand(1)
        return np.random.default_rng(index).integers(0, 256, (40, 30, 3), dtype=np.uint8)


def states() -> tuple[object, ...]:
    kind, keys, *rest = np.random.get_state()
    return random.getstate(), (kind, keys.tolist(), *rest), torch.get_rng_state().tolist(), torch.get_num_threads()


def results_of(run: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    from dinoforge.runs.metrics import read_metrics

    timed = {"images_per_second", "data_wait_share", "memory_gib", "train_seconds"}
    (newest,) = sorted((run / "checkpoints").iterdir())[-1:]
    tensors = {name: tensor for file in newest.glob("*.safetensors") for name, tensor in load_file(file).items()}
    return tensors, [{k: v for k, v in read_metrics(run / "metrics.jsonl")[0].items() if k not in timed}]


@pytest.mark.slow
def test_a_run_ends_bitwise_the_same_with_and_without_reports(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(live, "SHARE", 1e9)  # a report after every step
    written = []
    monkeypatch.setattr("dinoforge.commands.run.write_text", lambda path, text: written.append((path, text)))
    settings = SIZES | {"train.steps": 5, "checkpoint.every_steps": 2, "student.drop_path_rate": 0.2}
    torch.manual_seed(3)
    often = dinoforge.train(Drawing(), "small", tmp_path / "often", **settings, **{"report.every_minutes": 1e-9}).out
    torch.manual_seed(3)
    never = dinoforge.train(Drawing(), "small", tmp_path / "never", **settings, **{"report.every_minutes": None}).out
    assert [path for path, _ in written] == [often / "report.html"] * 6  # each step, and the end
    assert "no checkpoint yet" in written[0][1]
    assert '"step": 4,' in written[-2][1] or '"step": 2,' in written[-2][1]  # the teacher of the newest checkpoint
    (ours, our_metrics), (theirs, their_metrics) = results_of(often), results_of(never)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert our_metrics == their_metrics


def test_global_random_states_are_left_alone() -> None:
    before = states()
    assert Live(lambda: [Drawing()[0] for _ in range(3)], every_minutes=1, say=print).make()
    assert states() == before


def test_an_error_is_told_and_training_goes_on(tmp_path, monkeypatch, capsys) -> None:
    def fail(runs):
        raise RuntimeError("the page fell over")

    monkeypatch.setattr(page, "page", fail)
    result = dinoforge.train(Drawing(), "small", tmp_path / "run", **SIZES)
    assert result.finished
    said = capsys.readouterr().out
    assert "no report  RuntimeError: the page fell over" in said
    assert "A page that shows the run" not in said
    assert not (tmp_path / "run" / "report.html").exists()


def test_reports_that_take_long_come_rarely(monkeypatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    written = []

    def write() -> None:
        nonlocal now
        written.append(now)
        now += 12.0

    hook = Live(write, every_minutes=1, say=print)
    for _ in range(3000):
        now += 1.0
        hook(None)
    assert written[0] == 60
    assert hook.seconds <= 0.02 * now + 12
    assert len(written) == 1 + int((now - 72) // 612)  # 12 s are 2 % of 600


def test_nothing_is_written_where_the_recipe_does_not_want_it(tmp_path) -> None:
    run = dinoforge.train(Drawing(), "small", tmp_path / "run", **SIZES, **{"report.every_minutes": None}).out
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("minutes", [0, -1])
def test_minutes_are_above_zero(minutes) -> None:
    with pytest.raises(dinoforge.errors.RecipeError, match=r"report\.every_minutes"):
        dinoforge.train(Drawing(), "small", **{"report.every_minutes": minutes})
