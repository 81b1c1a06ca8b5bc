"""Probes while training: they change nothing, survive everything, keep the best and end a run that gets no better."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import dinoforge
from dinoforge.cli.main import main
from dinoforge.errors import DataError
from dinoforge.evaluation.probe import Probe, Scores
from tiny import TINY

pytestmark = pytest.mark.slow

SETTINGS = TINY | {"train.steps": 12, "log.every_steps": 5}
PROBED = SETTINGS | {"probe.every_steps": 3}


@pytest.fixture(scope="module")
def probed(classes, tmp_path_factory):
    run = tmp_path_factory.mktemp("probed") / "run"
    torch.manual_seed(123)
    before = torch.get_rng_state(), torch.get_num_threads()
    dinoforge.train(classes, "small", run, **PROBED)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.get_num_threads() == before[1]
    return run


def metrics_of(run):
    return {line["step"]: line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}


def probes_of(run):
    kept = json.loads((run / "probes.json").read_text())
    return [{k: v for k, v in probe.items() if k != "seconds"} for probe in kept["history"]]


def test_probes_change_no_weight(classes, probed, tmp_path):
    plain = tmp_path / "plain"
    dinoforge.train(classes, "small", plain, **SETTINGS | {"probe.every_minutes": None})
    ours, theirs = load_file(probed / "teacher.safetensors"), load_file(plain / "teacher.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    lines, plain_lines = metrics_of(probed), metrics_of(plain)
    assert set(plain_lines) == {5, 10, 12}
    for step, line in plain_lines.items():
        assert not any(name.startswith("probe.") for name in line)
        assert {k: lines[step][k] for k in line if k.startswith(("total", "diag"))} == {
            k: v for k, v in line.items() if k.startswith(("total", "diag"))
        }
    assert not (plain / "probes.json").exists()
    assert not (plain / "best.safetensors").exists()


def test_what_a_probe_leaves(probed):
    lines = metrics_of(probed)
    assert set(lines) == {3, 5, 6, 9, 10, 12}
    names = {f"probe.{row}{method}" for row in ("", "pixels.", "untrained.") for method in ("knn", "linear")}
    for step, line in lines.items():
        found = {name for name in line if name.startswith("probe.")}
        assert found == (names | {"probe.seconds"} if step % 3 == 0 else set())
        assert all(0 <= line[name] <= 1 for name in found & names)
        assert any(name.startswith("diag.") for name in line)
    assert [probe["step"] for probe in probes_of(probed)] == [3, 6, 9, 12]
    values = [lines[step]["probe.knn"] for step in (3, 6, 9, 12)]
    best = json.loads((probed / "summary.json").read_text())["best"]
    assert best["file"] == "best.safetensors"
    assert (best["step"], best["knn"]) == ((3, 6, 9, 12)[values.index(max(values))], max(values))
    backbone = dinoforge.load(probed / "best.safetensors")
    assert backbone.step == best["step"]
    assert backbone.metadata["probe"]["knn"] == best["knn"]
    assert dinoforge.embed(probed / "best.safetensors", [torch.zeros(32, 32).numpy()]).shape == (1, 48)


def test_it_equals_the_measurement_of_the_finished_network(classes, probed):
    source = dinoforge.data.sources.open_source(classes)
    image = dinoforge.load(probed).image
    reading = {"size": 32, "channels": 1, "mean": image.mean, "std": image.std}
    probe = Probe(source, source.labels(), max_images=2000, sixteen_bit="full", max_pixels=10**8, **reading)
    scores = probe.measure(dinoforge.load(probed).network)
    assert (scores.knn, scores.linear) == (probes_of(probed)[-1]["knn"], probes_of(probed)[-1]["linear"])


def test_a_continued_run_has_the_same_probes_and_measures_no_baseline_again(classes, probed, tmp_path, monkeypatch):
    run = tmp_path / "run"
    script = PROBED | {"checkpoint.every_steps": 4, "checkpoint.asynchronous": False}
    real = Probe.measure

    def stop_at_second(self, backbone):
        if len(json.loads((run / "probes.json").read_text())["history"] if (run / "probes.json").exists() else []) == 2:
            raise KeyboardInterrupt
        return real(self, backbone)

    with monkeypatch.context() as patch:
        patch.setattr(Probe, "measure", stop_at_second)
        with pytest.raises(KeyboardInterrupt):
            dinoforge.train(classes, "small", run, **script)
    monkeypatch.setattr(Probe, "baselines", lambda *args: pytest.fail("measured again"))
    dinoforge.train(classes, "small", run, **script)  # from step 8; the probe at 6 is kept, that at 9 made
    assert probes_of(run) == probes_of(probed)
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [
        3,
        5,
        6,
        9,
        10,
        12,
    ]
    assert (
        json.loads((run / "summary.json").read_text())["best"]
        == json.loads((probed / "summary.json").read_text())["best"]
    )
    ours, theirs = load_file(run / "best.safetensors"), load_file(probed / "best.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def scripted(monkeypatch, values):
    """Lets probes give these k-NN accuracies, one after the other."""
    left = iter(values)
    monkeypatch.setattr(Probe, "measure", lambda self, backbone: Scores(next(left), 0.5))


def test_patience_ends_a_run_that_gets_no_better_and_is_continued_with_it(classes, tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    settings = SETTINGS | {"probe.every_steps": 2, "probe.patience": 2}
    scripted(monkeypatch, [0.5, 0.7, 0.6, 0.7])
    result = dinoforge.train(classes, "small", run, **settings)
    assert (result.steps, result.stopped_by, result.finished) == (8, "probe.patience", False)
    assert "probe.patience" in capsys.readouterr().out
    scripted(monkeypatch, [])
    assert dinoforge.train(classes, "small", run, **settings).steps == 8  # it remembers
    scripted(monkeypatch, [0.6, 0.8])
    result = dinoforge.train(classes, "small", run, **settings | {"probe.patience": 4})
    assert result.finished
    assert result.summary["best"]["step"] == 12
    assert result.summary["best"]["knn"] == 0.8
    assert dinoforge.load(run / "best.safetensors").step == 12


def test_an_error_in_a_probe_is_told_and_training_goes_on(classes, tmp_path, monkeypatch, capsys):
    calls = []

    def fail_once(self, backbone):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("out of memory")
        return Scores(0.5, 0.5)

    monkeypatch.setattr(Probe, "measure", fail_once)
    result = dinoforge.train(classes, "small", tmp_path / "run", **SETTINGS | {"probe.every_steps": 6})
    assert result.finished
    output = capsys.readouterr().out
    assert "failed at step 6: RuntimeError: out of memory" in output
    assert "knn 50.0%" in output
    assert [probe["step"] for probe in probes_of(tmp_path / "run")] == [12]


def test_the_cost_is_shown_and_minutes_wait_for_a_logged_step(classes, tmp_path, monkeypatch, capsys):
    scripted(monkeypatch, [0.4, 0.4, 0.4])
    run = tmp_path / "run"
    settings = SETTINGS | {"probe.every_minutes": 1e-9}
    dinoforge.train(classes, "small", run, **settings)
    assert [probe["step"] for probe in probes_of(run)] == [5, 10, 12]
    assert json.loads((run / "summary.json").read_text())["probe_seconds"] >= 0
    assert "knn 40.0% (pixels" in capsys.readouterr().out


def test_labels_that_are_names_are_told_and_not_measured(solar_cells, tmp_path, capsys):
    for i, path in enumerate(sorted(solar_cells.iterdir())[:12]):
        (tmp_path / "cells" / str(i)).mkdir(parents=True)
        shutil.copy(path, tmp_path / "cells" / str(i))
    dinoforge.train(tmp_path / "cells", "small", tmp_path / "run", **PROBED | {"train.steps": 3})
    assert "probe    none, since the labels do not serve: 12 different labels of 12 images" in capsys.readouterr().out
    assert not (tmp_path / "run" / "probes.json").exists()


def test_labels_of_a_file(flat_classes, tmp_path, capsys):
    flat, labels = flat_classes
    keys = [f"{k}={json.dumps(v) if not isinstance(v, str) else v}" for k, v in (PROBED | {"train.steps": 3}).items()]
    arguments = ["train", str(flat), "--out", str(tmp_path / "run"), *keys]
    assert main([*arguments, "--labels", str(labels)]) == 0
    assert "linear" in capsys.readouterr().out
    assert [probe["step"] for probe in probes_of(tmp_path / "run")] == [3]
    labels.write_text("\n".join(labels.read_text().splitlines()[1:]))
    with pytest.raises(DataError, match="no label for 1 of 40"):
        dinoforge.train(flat, "small", tmp_path / "other", labels=labels, **PROBED)
    assert not (tmp_path / "other").exists()


def test_images_that_are_there_twice_are_told_once(classes, tmp_path, capsys):
    images = tmp_path / "images"
    shutil.copytree(classes, images)
    first = sorted(p for p in images.rglob("*") if p.is_file())[0]
    shutil.copy(first, first.with_name("twin" + first.suffix))
    run = tmp_path / "run"
    dinoforge.train(images, "small", run, **PROBED)
    said = capsys.readouterr().out
    assert said.count("2 of its 41 images are like another one (2 equal, 0 nearly), such as ") == 1
    kept = json.loads((run / "probes.json").read_text())["duplicates"]
    names = [
        first.relative_to(images).as_posix(),
        (first.parent.relative_to(images) / f"twin{first.suffix}").as_posix(),
    ]
    assert kept == {"exact": 2, "near": 0, "tested": 41, "examples": [names, names[::-1]]}


def test_nothing_is_told_of_images_that_are_all_different(probed):
    assert json.loads((probed / "probes.json").read_text())["duplicates"] == {
        "exact": 0,
        "near": 0,
        "tested": 40,
        "examples": [],
    }
