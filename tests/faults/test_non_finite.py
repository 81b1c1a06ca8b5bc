"""Losses and gradients that are not finite: skipped, counted, kept, gone back from, and explained."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import dinoforge
from dinoforge.builders.lengths import build_schedules, run_length
from dinoforge.builders.networks import build_state
from dinoforge.cli.main import main
from dinoforge.commands import replay as replay_command
from dinoforge.errors import RunError, TrainingError, WeightsError
from dinoforge.recipe.load import load_recipe
from dinoforge.runs import checkpoint, replay
from dinoforge.system.device import autocast

SIZES = {
    "student.embed_dim": 32,
    "student.depth": 2,
    "student.num_heads": 2,
    "student.patch_size": 8,
    "student.in_chans": 1,
    "crops.global_crops_size": 16,
    "crops.local_crops_size": 8,
    "crops.local_crops_number": 2,
    "augment.blur_kernel": 3,
    "dino.head_n_prototypes": 32,
    "dino.head_hidden_dim": 32,
    "dino.head_bottleneck_dim": 8,
    "train.batch_size_per_gpu": 4,
    "train.steps": 30,
    "train.num_workers": 0,
    "train.threads": 1,
    "data.mean": [0.0],
    "data.std": [1.0],
    "log.every_steps": 1,
    "checkpoint.every_steps": 5,
    "precision": "fp32",
}
# Divided by this, a black image stays 0, and any other overflows in the first product.
OVERFLOW = {"data.std": [1e-38]}


class Stopped(KeyboardInterrupt):
    """Ends a run wherever it is."""


class Images:
    """Black images, and some that are not."""

    def __init__(self, bright, length=64, stops_after=None):
        self.bright, self.length, self.left = set(bright), length, stops_after

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                raise Stopped
        return np.full((20, 20), 255 if index in self.bright else 0, dtype=np.uint8)


def metrics_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def summary_of(run):
    return json.loads((run / "summary.json").read_text())


def saved_batches(run):
    return sorted((run / "non_finite").glob("*.safetensors"))


def test_a_bad_batch_is_skipped_counted_and_kept(tmp_path, capsys):
    run = dinoforge.train(Images({7}), "small", tmp_path / "run", **SIZES | OVERFLOW).out
    skipped = summary_of(run)["skipped_steps"]
    assert skipped == 2  # 30 steps of 4 are twice through the 64 images, less 2 batches
    assert len(metrics_of(run)) == 30 - skipped
    assert metrics_of(run)[-1]["skipped_steps"] == skipped
    batches = [replay.load_batch(path) for path in saved_batches(run)]
    assert len(batches) == skipped
    for batch in batches:
        assert 7 in batch.batch.indices
        assert not all(np.isfinite(list(batch.terms.values())))
    output = capsys.readouterr().out
    assert output.count("Nothing was updated") == skipped
    for batch in batches:
        assert f"not finite at step {batch.step}" in output
    assert all(torch.isfinite(p).all() for p in dinoforge.load(run).network.parameters())


@pytest.mark.parametrize("targets", ["centering", "sinkhorn_knopp"])
def test_a_skipped_step_changes_nothing_but_the_count(tmp_path, targets):
    """Not the centres, either, which move in the forward pass."""
    settings = SIZES | OVERFLOW | {"train.centering": targets, "checkpoint.every_steps": 1, "checkpoint.keep_last": 99}
    run = dinoforge.train(Images({7}), "small", tmp_path / "run", **settings).out
    step = replay.load_batch(saved_batches(run)[0]).step
    assert step + 1 not in checkpoint.steps(run)  # there is nothing new to save
    before, after = (checkpoint.path_of(run, s) for s in (step, step + 2))
    assert before.is_dir()
    values = json.loads((after / "state.json").read_text())
    assert (values["skipped_steps"], values["skipped_in_a_row"]) == (1, 0)
    tensors = [{k: v for f in p.glob("*.safetensors") for k, v in load_file(f).items()} for p in (before, after)]
    steps = [{k: v for k, v in t.items() if k.endswith(".step")} for t in tensors]
    assert all(torch.equal(steps[1][k], steps[0][k] + 1) for k in steps[0])  # one update, not two
    assert all(torch.isfinite(v).all() for v in tensors[1].values())
    assert ("dino_center" in tensors[1]) == (targets == "centering")


def test_too_many_in_a_row_go_back_and_pass_over_them(tmp_path, capsys):
    # Every image of the second pass is black but for a stretch that no batch of 4 escapes.
    images = Images(range(12), length=64)
    settings = SIZES | OVERFLOW | {"train.max_skips": 2, "train.max_rollbacks": 100, "train.steps": 12}
    run = dinoforge.train(images, "small", tmp_path / "run", **settings).out
    summary = summary_of(run)
    assert summary["finished"]
    assert summary["rollbacks"] > 0
    output = capsys.readouterr().out
    assert output.count("rollback   at step") == summary["rollbacks"]
    assert f"rollback {summary['rollbacks']} of 100" in output
    numbers = [replay.load_batch(path).number for path in saved_batches(run)]
    assert len(set(numbers)) == len(numbers)  # none was tried twice
    steps = [line["step"] for line in metrics_of(run)]
    assert steps == sorted(set(steps))
    assert np.isfinite([line["total"] for line in metrics_of(run)]).all()


def test_a_run_that_went_back_continues_as_if_undisturbed(tmp_path):
    settings = SIZES | OVERFLOW | {"train.max_skips": 2, "train.max_rollbacks": 100, "train.steps": 12}
    settings["checkpoint.every_steps"] = 1
    images = Images(range(12), length=64)
    whole = dinoforge.train(images, "small", tmp_path / "whole", **settings).out

    with pytest.raises(Stopped):
        dinoforge.train(Images(range(12), stops_after=60), "small", tmp_path / "parts", **settings)
    parts = dinoforge.train(images, "small", tmp_path / "parts", **settings).out
    terms = ("step", "total", "dino_local", "dino_global", "ibot", "koleo", "skipped_steps", "rollbacks")
    assert [[m[t] for t in terms] for m in metrics_of(parts)] == [[m[t] for t in terms] for m in metrics_of(whole)]
    ours, theirs = (dinoforge.load(run).network.state_dict() for run in (parts, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_rollbacks_that_do_not_help_end_with_a_diagnosis(tmp_path):
    run = tmp_path / "run"
    images = np.random.default_rng(0).integers(0, 256, (64, 20, 20), dtype=np.uint8)
    settings = SIZES | {"optim.base_lr": 1e30, "optim.warmup_length": "0 steps", "optim.clip_grad": 0}
    settings |= {"train.max_skips": 2, "train.max_rollbacks": 2}
    with pytest.raises(TrainingError, match="2 rollbacks did not help") as caught:
        dinoforge.train(list(images), "small", run, **settings)
    text = str(caught.value)
    assert "lower optim.base_lr (now 1e+30)" in text
    assert "weights    student" in text or "forward    the first output that is not finite" in text
    assert len(saved_batches(run)) == 3 * 2
    assert f"dinoforge replay {run}" in text


def test_a_state_that_is_not_finite_is_no_checkpoint(tmp_path, capsys):
    """Gradients may be finite and the weights that they make not: going back must not go there."""
    images = list(np.random.default_rng(0).integers(0, 256, (64, 20, 20), dtype=np.uint8))
    settings = SIZES | {"optim.base_lr": 3e38, "optim.scaling_rule": "none", "optim.warmup_length": "0 steps"}
    settings |= {"optim.weight_decay": 10.0, "optim.weight_decay_end": 10.0, "checkpoint.every_steps": 1}
    with pytest.raises(TrainingError, match="rollbacks did not help"):
        dinoforge.train(images, "small", tmp_path / "run", **settings)
    assert "not finite (student." in capsys.readouterr().out
    for step in checkpoint.steps(tmp_path / "run"):
        for file in checkpoint.path_of(tmp_path / "run", step).glob("*.safetensors"):
            assert all(torch.isfinite(tensor).all() for tensor in load_file(file).values())


def test_replay_finds_the_image(tmp_path, capsys):
    run = dinoforge.train(Images({7}), "small", tmp_path / "run", **SIZES | OVERFLOW).out
    batch = saved_batches(run)[-1]
    capsys.readouterr()
    assert main(["replay", str(run), "--batch", str(batch)]) == 0
    output = capsys.readouterr().out
    assert "the first output that is not finite is that of teacher.backbone." in output
    name = replay.load_batch(batch).names[replay.load_batch(batch).batch.indices.tolist().index(7)]
    assert f"{name} not finite when alone" in output
    findings, saved, step = replay_command.replay(run, batch)
    assert step <= saved.step
    assert [saved.batch.indices[i] for i in findings.images] == [7]
    assert not findings.finite
    assert not findings.weights


def test_replay_tells_weights_from_images(tmp_path, capsys):
    """What was finite with the weights of the checkpoint before is the fault of what they became."""
    images = list(np.random.default_rng(0).integers(0, 256, (64, 20, 20), dtype=np.uint8))
    settings = SIZES | {"optim.base_lr": 1e30, "optim.warmup_length": "0 steps", "optim.clip_grad": 0}
    with pytest.raises(TrainingError):
        dinoforge.train(images, "small", tmp_path / "run", **settings)
    assert main(["replay", str(tmp_path / "run"), "--batch", str(saved_batches(tmp_path / "run")[0])]) == 0
    output = capsys.readouterr().out
    assert "weights    of step 0" in output
    assert "every module's output is finite" in output
    assert "With these weights all is finite" in output


def test_replay_of_what_is_none(tmp_path, capsys):
    run = dinoforge.train(Images({7}), "small", tmp_path / "run", **SIZES | OVERFLOW).out
    with pytest.raises(RunError, match="no run directory"):
        replay_command.replay(tmp_path, saved_batches(run)[0])
    with pytest.raises(WeightsError, match="there is no file"):
        replay_command.replay(run, tmp_path / "missing")
    with pytest.raises(WeightsError, match="no batch that a run has saved"):
        replay_command.replay(run, run / "teacher.safetensors")
    damaged = tmp_path / "damaged"
    damaged.write_bytes(saved_batches(run)[0].read_bytes()[:-5])
    with pytest.raises(WeightsError, match="damaged"):
        replay_command.replay(run, damaged)
    other = dinoforge.train(
        Images({}), "small", tmp_path / "other", **SIZES | {"crops.global_crops_size": 24, "train.steps": 1}
    ).out
    with pytest.raises(WeightsError, match="another run"):
        replay_command.replay(other, saved_batches(run)[0])


def test_what_is_found_leaves_the_networks_alone(tmp_path):

    run = dinoforge.train(Images({7}), "small", tmp_path / "run", **SIZES | OVERFLOW).out
    recipe, _ = load_recipe(run / "recipe.yaml")
    state = build_state(recipe, torch.device("cpu"), images=64)
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    schedules = build_schedules(recipe, run_length(recipe, images=64))
    replay.find(
        state.student_teacher,
        replay.load_batch(saved_batches(run)[0]).batch,
        schedules(0),
        kept=None,
        autocast=partial(autocast, torch.device("cpu"), torch.float32),
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.tensors().items())
    assert all(p.grad is None for p in state.student_teacher.parameters())
