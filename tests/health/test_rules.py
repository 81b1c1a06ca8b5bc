"""Runs that were made to fail are named early, their healthy twins never; benchmarks/failures.py made them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dinoforge.cli.main import main
from dinoforge.health.rules import FEW_IMAGES, LINES, WAITING_LINES, Watch, diagnose
from dinoforge.recipe.load import load_recipe
from dinoforge.recipe.schema import flatten

DATA = Path(__file__).parent / "data"
NAMES = {
    "lr_x30": "lr_too_high",
    "temperature_0.3": "uniform_collapse",
    "no_centering": "dead_prototypes",
    "layerscale_1e-6": "dimensional_collapse",
    "crops_2_percent": "augmentation_too_strong",
    "lr_div1000": "lr_too_low",
}
FAILS_BY = 0.01  # accuracy below the twin's that counts as failing


def load(path):
    """A stored run: what it is, its metrics, its recipe."""
    head, *rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    metrics = {name: list(column) for name, column in zip(head["columns"], zip(*rows, strict=True), strict=True)}
    return head, metrics, flatten(load_recipe("dinov2")[0]) | head["recipe_beside_dinov2"]


RUNS = {path.stem: load(path) for path in sorted(DATA.glob("*.jsonl"))}
HEALTHY = [name for name in RUNS if "healthy" in name]
SICK = [name for name in RUNS if "healthy" not in name]


def failure_of(name):
    return name.split("-", 2)[2].rpartition("-")[0]


def twin_of(name):
    data, recipe, _ = name.split("-", 2)
    return RUNS[f"{data}-{recipe}-healthy-0"]


def ends_below_its_twin(name):
    return RUNS[name][0]["accuracy"]["trained"] < twin_of(name)[0]["accuracy"]["trained"] - FAILS_BY


def test_there_are_runs_of_every_kind():
    assert {failure_of(name) for name in SICK} == set(NAMES)
    assert {name.split("-")[0] for name in HEALTHY} == {"fashion", "solar"}
    assert len(HEALTHY) >= 5
    assert sum(map(ends_below_its_twin, SICK)) >= 5


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_raises_nothing(name):
    _, metrics, recipe = RUNS[name]
    assert diagnose(metrics, recipe) == []


@pytest.mark.parametrize("name", [name for name in SICK if ends_below_its_twin(name)])
def test_a_run_that_ends_below_its_twin_is_named_before_a_fifth_of_it(name):
    _, metrics, recipe = RUNS[name]
    first = diagnose(metrics, recipe)[0]
    assert first.step < 0.2 * recipe["train.steps"]
    assert first.name == NAMES[failure_of(name)]
    assert first.keys
    assert all(key in recipe for key in first.keys)


@pytest.mark.parametrize("name", SICK)
def test_nothing_else_is_said_of_a_sick_run_early_on(name):
    """It may be well after all, as some are; but it has no other disease in its first fifth."""
    _, metrics, recipe = RUNS[name]
    early = [finding.name for finding in diagnose(metrics, recipe) if finding.step < 0.2 * recipe["train.steps"]]
    allowed = {NAMES[failure_of(name)]} | ({"dimensional_collapse"} if "lr_x30" in name else set())  # its consequence
    assert set(early) <= allowed


@pytest.mark.parametrize("name", RUNS)
def test_what_is_said_does_not_depend_on_what_comes_after(name):
    _, metrics, recipe = RUNS[name]
    whole = diagnose(metrics, recipe)
    assert len({finding.name for finding in whole}) == len(whole)
    for i in range(1, len(metrics["step"]) + 1):
        so_far = {key: column[:i] for key, column in metrics.items()}
        assert diagnose(so_far, recipe) == [finding for finding in whole if finding.step <= metrics["step"][i - 1]]


def healthy():
    _, metrics, recipe = RUNS[HEALTHY[0]]
    return {name: list(column) for name, column in metrics.items()}, dict(recipe)


def test_runs_without_the_numbers_are_let_alone():
    metrics, recipe = healthy()
    assert diagnose({}, recipe) == []
    assert diagnose({"step": [1.0, 2.0], "total": [3.0, None]}, recipe) == []
    assert diagnose({name: [None] * len(column) for name, column in metrics.items()}, recipe) == []


def test_one_line_is_no_sign():
    metrics, recipe = healthy()
    for i in range(20, 20 + LINES - 1):
        metrics["diag.update_ratio.backbone"][i] = 0.1
        metrics["diag.effective_rank"][i] = 1.0
        metrics["diag.target_entropy.dino"][i], metrics["diag.kl.dino_global"][i] = 1.0, 0.0
        metrics["data_wait_share"][i] = 0.99
    assert diagnose(metrics, recipe) == []
    for name, value in {"diag.update_ratio.backbone": 0.1, "diag.effective_rank": 1.0}.items():
        metrics[name][20 + LINES - 1] = value
    expected = {"lr_too_high", "dimensional_collapse"}
    assert {finding.name for finding in diagnose(metrics, recipe)} == expected
    assert {finding.step for finding in diagnose(metrics, recipe)} == {metrics["step"][20 + LINES - 1]}


def test_waiting_for_data():
    metrics, recipe = healthy()
    metrics["data_wait_share"][5 : 5 + WAITING_LINES] = [0.8] * WAITING_LINES
    (finding,) = diagnose(metrics, recipe)
    assert (finding.name, finding.step) == ("data_bound", metrics["step"][5 + WAITING_LINES - 1])
    assert "80%" in finding.sentence


def test_steps_that_were_not_finite():
    metrics, recipe = healthy()
    metrics["skipped_steps"][10:] = [2] * len(metrics["skipped_steps"][10:])
    (finding,) = diagnose(metrics, recipe)
    assert (finding.name, finding.step) == ("non_finite", metrics["step"][10])
    assert "2 steps were skipped" in finding.sentence


def test_a_network_that_starts_alike_is_given_time():
    metrics, recipe = healthy()
    recipe |= {"train.steps": 100_000}
    metrics["diag.effective_rank"] = [1.0] * len(metrics["step"])
    assert diagnose(metrics, recipe) == []
    recipe |= {"train.steps": None, "train.epochs": 3.0}  # how long that is, only the data says
    metrics["step"] = [10 * step for step in metrics["step"]]
    (finding,) = diagnose(metrics, recipe)
    assert finding.step >= 300
    assert finding.name == "dimensional_collapse"


def test_advice_fits_the_recipe():
    metrics, recipe = healthy()
    metrics["diag.effective_rank"] = [1.0] * len(metrics["step"])
    assert "koleo" in diagnose(metrics, recipe)[0].sentence
    recipe["student.layerscale"] = 1e-5
    (finding,) = diagnose(metrics, recipe)
    assert finding.keys == ("student.layerscale",)
    metrics, recipe = healthy()
    metrics["koleo"] = [0.6] * len(metrics["step"])
    assert [finding.name for finding in diagnose(metrics, recipe)] == ["dimensional_collapse"]
    recipe["crops.global_crops_scale"] = (0.01, 0.05)
    assert [finding.name for finding in diagnose(metrics, recipe)] == ["augmentation_too_strong"]
    recipe["dino.koleo_loss_weight"] = 0.0
    assert diagnose(metrics, recipe) == []
    metrics["diag.kl.dino_global"] = [1.1 * x for x in metrics["diag.target_information.dino"]]
    assert [finding.name for finding in diagnose(metrics, recipe)] == ["augmentation_too_strong"]
    recipe["crops.global_crops_scale"] = (0.1, 0.3)
    assert diagnose(metrics, recipe) == []


def test_a_batch_of_few_samples_has_few_prototypes_in_use_at_best():
    metrics, recipe = healthy()
    recipe |= {"train.batch_size_per_gpu": 8, "dino.head_n_prototypes": 65536}
    metrics["diag.target_entropy.dino"] = [0.05] * len(metrics["step"])
    metrics["diag.prototype_use.dino"] = [5 / 16] * len(metrics["step"])
    assert diagnose(metrics, recipe) == []
    metrics["diag.prototype_use.dino"] = [1 / 16] * len(metrics["step"])
    assert [finding.name for finding in diagnose(metrics, recipe)] == ["dead_prototypes"]


def sick(**columns):
    """A healthy run with other numbers on all lines, and its recipe."""
    metrics, recipe = healthy()
    return metrics | {name: [value] * len(metrics["step"]) for name, value in columns.items()}, recipe


ONE_SIDED = {"diag.target_entropy.dino": 0.05, "diag.prototype_use.dino": 0.01}
UNIFORM = {"diag.target_entropy.dino": 0.995, "diag.kl.dino_global": 0.01}
ALIKE = {"diag.effective_rank": 1.0}
UNLEARNED = {"diag.kl.dino_global": 0.2, "diag.target_information.dino": 0.1}


@pytest.mark.parametrize("accumulate", [1, 32])
@pytest.mark.parametrize("images", [1, 2, FEW_IMAGES - 1, FEW_IMAGES])
@pytest.mark.parametrize("columns", [ALIKE, ONE_SIDED, UNLEARNED])
def test_of_few_images_at_a_time_no_collapse_is_told(images, columns, accumulate):
    """As older versions logged them, too; how many make a step does not matter."""
    metrics, recipe = sick(**columns)
    few = {"train.batch_size_per_gpu": images, "train.accumulate": accumulate, "dino.head_n_prototypes": 65536}
    few["crops.global_crops_scale"] = (0.01, 0.05)
    assert len(diagnose(metrics, recipe | few)) == (1 if images >= FEW_IMAGES else 0)


@pytest.mark.parametrize(("images", "accumulate", "told"), [(1, 1, 0), (1, 2, 1), (2, 1, 1)])
def test_balanced_targets_of_one_image_are_uniform_without_a_collapse(images, accumulate, told):
    metrics, recipe = sick(**UNIFORM)
    recipe |= {"train.batch_size_per_gpu": images, "train.accumulate": accumulate}
    assert len(diagnose(metrics, recipe | {"train.centering": "sinkhorn_knopp"})) == told
    assert len(diagnose(metrics, recipe | {"train.centering": "centering"})) == 1


@pytest.mark.parametrize("loss", ["dino", "ibot"])
@pytest.mark.parametrize("columns", [ALIKE, ONE_SIDED, UNIFORM])
@pytest.mark.parametrize(
    ("keys", "key"),
    [
        ({"train.centering": "centering"}, "train.centering"),
        ({"train.centering": "centering", "LOSS.targets": "centering"}, "LOSS.targets"),
        ({"train.centering": "sinkhorn_knopp", "LOSS.targets": "centering"}, "LOSS.targets"),
        ({"train.centering": "sinkhorn_knopp"}, None),
        ({"train.centering": "centering", "LOSS.targets": "sinkhorn_knopp"}, None),
    ],
)
def test_nobody_is_advised_to_take_the_targets_that_are_taken(columns, keys, key, loss):
    metrics, recipe = sick(**columns)
    if loss == "ibot":
        theirs = {"diag.kl.dino_global": "diag.kl.ibot"}
        for name in columns:
            ours = theirs.get(name, name.replace(".dino", ".ibot"))
            metrics[ours] = metrics[name]
        for name in [name for name in metrics if "dino" in name]:
            del metrics[name]
        recipe |= {"ibot.separate_head": False}
    recipe |= {"dino.targets": None, "ibot.targets": None}
    recipe |= {name.replace("LOSS", loss): value for name, value in keys.items()}
    (finding,) = diagnose(metrics, recipe)
    deciding = {"train.centering", "dino.targets", "ibot.targets"}
    assert deciding & set(finding.keys) == ({key.replace("LOSS", loss)} if key else set())
    assert ("=sinkhorn_knopp" in finding.sentence) == (key is not None)
    assert ("center_momentum" in finding.sentence) == (columns is ONE_SIDED and key is not None)
    if columns is UNIFORM:
        assert "dino.head_n_prototypes" in finding.keys  # of the one head that there is


@pytest.mark.parametrize(
    ("columns", "keys", "absent"),
    [
        ({"skipped_steps": 2}, {"precision": "fp32"}, "precision"),
        ({"data_wait_share": 0.9}, {"data.reduced_decode": True}, "data.reduced_decode"),
        ({"data_wait_share": 0.9}, {"augment.device": "train"}, "augment.device"),
        ({"diag.update_ratio.backbone": 1e-6}, {"optim.scaling_rule": "none"}, "optim.scaling_rule"),
        ({"diag.update_ratio.backbone": 1e-6}, {"optim.layerwise_decay": 1.0}, "optim.layerwise_decay"),
        (UNIFORM | {"teacher_temp": 0.04}, {}, "teacher.teacher_temp"),
    ],
)
def test_what_is_set_already_is_not_advised(columns, keys, absent):
    metrics, recipe = sick(**columns)
    (finding,) = diagnose(metrics, recipe | keys)
    assert finding.keys
    assert absent not in finding.keys
    assert absent not in finding.sentence
    other = {"precision": "bf16", "data.reduced_decode": False, "augment.device": "workers"}
    other |= {"optim.scaling_rule": "sqrt_wrt_1024", "optim.layerwise_decay": 0.9}
    warm = {} if "teacher_temp" not in columns else {"teacher_temp": [0.07] * len(metrics["step"])}
    (finding,) = diagnose(metrics | warm, recipe | {name: other[name] for name in keys})
    assert absent in finding.keys


def test_koleo_that_is_off_is_to_be_switched_on():
    metrics, recipe = sick(**ALIKE)
    (finding,) = diagnose(metrics, recipe | {"dino.koleo_loss_weight": 0.0})
    assert "Switch KoLeo on" in finding.sentence
    assert "more weight" not in finding.sentence


@pytest.mark.processes
def test_it_needs_no_torch():
    code = "import sys, dinoforge.health.rules; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def write_run(folder, name):
    _, metrics, recipe = RUNS[name]
    folder.mkdir()
    rows = [dict(zip(metrics, row, strict=True)) for row in zip(*metrics.values(), strict=True)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.json").write_text("{}")
    keys = {k: list(v) if isinstance(v, tuple) else v for k, v in recipe.items()}
    sections: dict[str, object] = {}
    for key, value in keys.items():
        section, dot, last = key.partition(".")
        if dot:
            sections.setdefault(section, {})[last] = value
        else:
            sections[key] = value
    (folder / "recipe.yaml").write_text(json.dumps(sections))
    return diagnose(metrics, recipe)


def test_doctor(tmp_path, capsys):
    sick = next(name for name in SICK if "lr_x30" in name)
    findings = write_run(tmp_path / "sick", sick)
    assert main(["doctor", str(tmp_path / "sick")]) == 1
    out = capsys.readouterr().out
    assert all(finding.sentence in out for finding in findings)
    assert main(["doctor", str(tmp_path / "sick"), "--json"]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["findings"] == [vars(f) | {"keys": list(f.keys)} for f in findings]
    write_run(tmp_path / "well", HEALTHY[0])
    assert main(["doctor", str(tmp_path / "well")]) == 0
    assert "Nothing is wrong" in capsys.readouterr().out
    assert main(["doctor", str(tmp_path / "well"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"findings": []}


def test_doctor_of_no_run(tmp_path, capsys):
    assert main(["doctor", str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
    write_run(tmp_path / "new", HEALTHY[0])
    (tmp_path / "new" / "metrics.jsonl").unlink()
    assert main(["doctor", str(tmp_path / "new")]) == 2
    assert "no numbers yet" in capsys.readouterr().err


def test_a_watch_tells_each_thing_once():
    _, metrics, recipe = RUNS[next(name for name in SICK if "lr_x30" in name)]
    watch = Watch(recipe)
    told = []
    for i in range(len(metrics["step"])):
        told += watch({name: column[i] for name, column in metrics.items()})
    assert told == diagnose(metrics, recipe)
