"""The command line as a shell sees it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dinoforge
from dinoforge.cli.main import main
from dinoforge.errors import LAUNCHER, DataError, LostRankError, OutOfMemoryError, RecipeError, RunError, WorkerError
from dinoforge.runs.lock import RunLock

SMALL = (
    "student.embed_dim=48 student.depth=2 student.num_heads=2 student.patch_size=8 student.in_chans=1 data.mean=0.5 "
    "data.std=0.25 crops.global_crops_size=32 crops.local_crops_size=16 crops.local_crops_number=2 "
    "dino.head_n_prototypes=64 dino.head_hidden_dim=64 train.batch_size_per_gpu=8 train.steps=5 train.num_workers=0"
).split()


@pytest.fixture(scope="module")
def run(classes, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main(["train", str(classes), "--out", str(out), *SMALL]) == 0
    return out


@pytest.mark.processes
def test_help_is_light():
    code = "import sys; from dinoforge.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass\n" + (
        "assert not {'torch', 'numpy', 'PIL', 'rich'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout


@pytest.mark.parametrize("arguments", [[], ["eval"], ["train", "--help"], ["eval", "knn", "--help"], ["--version"]])
def test_help_of_everything(arguments, capsys):
    try:
        code = main(arguments)
    except SystemExit as exit_:
        code = exit_.code
    assert code == 0
    assert "dinoforge" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "/nowhere"], "does not exist"),
        (["train", "{classes}", "train.stps=5"], "did you mean train.steps"),
        (["train", "{classes}", "train.steps=five"], "whole number"),
        (["train", "{classes}", "--recipe", "smal"], "did you mean small"),
        (["train", "/nowhere", "--recipe", "auto", "train.stps=5"], "did you mean train.steps"),
        (["explain", "--recipe", "auto"], "function of the images"),
        (["train", "{classes}/fine", "train.batch_size_per_gpu=32"], "larger than the data"),
        (["eval", "knn", "{empty}", "--data", "{classes}"], "no teacher.safetensors"),
        (["eval", "knn", "{run}", "--data", "{classes}/fine"], "labels"),
        (["eval", "knn", "{run}", "--data", "{classes}", "eval.size=33"], "multiple"),
        (["eval", "knn", "{run}", "--data", "{classes}", "train.steps=3"], "eval.size"),
        (["eval", "knn", "{run}", "--data", "{empty}"], "no images"),
    ],
)
def test_user_errors_exit_with_2_and_no_traceback(arguments, message, classes, run, tmp_path, capfd):
    places = {"classes": classes, "run": run, "empty": tmp_path}
    assert main([a.format(**places) for a in arguments]) == 2
    captured = capfd.readouterr()
    assert message in captured.err
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RecipeError("no"), 2),
        (DataError("no"), 2),
        (WorkerError("no"), 1),
        (OutOfMemoryError("no"), 3),
        (LostRankError("no"), 4),
    ],
)
def test_errors_have_exit_codes_of_their_own(error, code, monkeypatch, capsys):
    def train(*given, **named):
        raise error

    monkeypatch.setattr("dinoforge.commands.train.train_as_program", train)
    assert main(["train", "photos"]) == code
    assert capsys.readouterr().err == "error: no\n"


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_a_rank_has_its_launcher_print_the_error(ranks, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", f"{LAUNCHER}1")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setenv("WORLD_SIZE", ranks)
    assert main(["train", "photos", "train.stps=5"]) == 2
    assert capsys.readouterr().err == ""
    assert "did you mean train.steps" in json.loads((tmp_path / "error.json").read_text())["message"]["message"]


@pytest.mark.processes
def test_a_crash_of_a_rank_is_told_before_it_leaves(tmp_path):
    """It leaves without waiting for threads and destructors, which may wait for other ranks."""
    code = (
        "import sys, threading\n"
        "from dinoforge.cli.main import run\nfrom dinoforge.commands import train as command\n"
        "threading.Thread(target=threading.Event().wait).start()\n"
        "def train(*given, **named): raise ZeroDivisionError('a bug')\n"
        "command.train_as_program = train\n"
        "sys.argv = ['dinoforge', 'train', 'photos']\n"
        "run()"
    )
    told = tmp_path / "error.json"
    environment = os.environ | {"WORLD_SIZE": "2", "RANK": "1", "TORCHELASTIC_ERROR_FILE": str(told)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith("rank 1:\nTraceback (most recent call last):")
    assert done.stderr.endswith("ZeroDivisionError: a bug\n")
    assert json.loads(told.read_text())["message"]["message"] == "ZeroDivisionError: a bug"


def test_usage_errors(capsys):
    for arguments in (["train"], ["train", "x", "--no-such-option"], ["train", "x", "--dry-run", "z"], ["frobnicate"]):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 2
    assert main(["train", "x", "y=1", "z"]) == 2


def test_keys_may_stand_before_and_after_options(classes, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", str(classes), *SMALL[:8], "--out", str(out), "--dry-run", *SMALL[8:]]) == 0
    assert "5 steps of 8 images" in capsys.readouterr().out


@pytest.mark.slow
def test_default_out_names_data_and_recipe(classes, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(classes), *SMALL]) == 0
    assert Path("runs", f"{classes.name}-small", "teacher.safetensors").is_file()


def test_knn_prints_one_line_of_json_and_completes_the_summary(classes, run, capsys):
    assert main(["eval", "knn", str(run), "--data", str(classes), "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    result = json.loads(out)
    assert set(result) == {"knn", "k", "splits", "n", "shots", "labels_from", "duplicates"}
    assert set(result["knn"]) == {"pixels", "untrained", "trained"}
    for row in result["knn"].values():
        assert {"mean", "sd", "by_k", "balanced_mean"} <= set(row)
        assert 0 <= row["mean"] <= 1
    assert (result["splits"], result["n"], result["labels_from"]) == (5, 40, "folders")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["knn"] == result["knn"]
    assert summary["steps"] == 5


def test_knn_with_labels_file_test_folder_and_weights_file(flat_classes, run, capsys):
    flat, labels = flat_classes
    weights = str(run / "teacher.safetensors")
    arguments = ["eval", "knn", weights, "--data", str(flat), "--test", str(flat), "--labels", str(labels), "--json"]
    assert main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["splits"], result["n"], result["labels_from"]) == (1, 80, "labels.csv")
    # Every test image stands among the labelled ones too; that and a near-zero distance decide its vote at small k.
    assert result["knn"]["pixels"]["mean"] >= 0.5


def test_knn_table_reads_well(classes, run, capsys):
    assert main(["eval", "knn", str(run), "--data", str(classes), "eval.crop=true", "eval.size=40"]) == 0
    out = capsys.readouterr().out
    for word in ("accuracy", "pixels", "untrained", "trained", "5 stratified splits"):
        assert word in out


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert dinoforge.__version__ in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["train", ""], "DATA is empty"),
        (["train", " "], "DATA is empty"),
        (["train", "d", "--out", ""], "--out is empty"),
        (["train", "d", "--labels="], "--labels is empty"),
        (["train", "d", "--recipe", ""], "--recipe is empty"),
        (["embed", "run", "", "--out", "x.npy"], "DATA is empty"),
        (["eval", "knn", "", "--data", "d"], "RUN|FILE is empty"),
        (["eval", "knn", "run", "--data", ""], "--data is empty"),
        (["report", "run", ""], "RUN is empty"),
        (["export", "run", "--to", "timm", "--out", ""], "--out is empty"),
        (["doctor", ""], "RUN is empty"),
        (["bench", "d", "--seconds", "-1"], "expected a number above 0"),
        (["bench", "d", "--seconds", "nan"], "expected a number above 0"),
        (["plan", "--images", "-5", "--gpus", "8xH100"], "expected at least 1"),
        (["submit", "d", "--local", "--out", "x", "--nodes", "-1"], "expected at least 1"),
        (["train", "d", "--recpie", "small"], "did you mean --recipe?"),
        (["train", "d", "--steps", "100"], "did you mean train.steps=VALUE?"),
        (["train", "d", "--batch-size", "8"], "did you mean train.batch_size=VALUE?"),
        (["doctor", "r", "--jsn"], "did you mean --json?"),
    ],
)
def test_mistakes_name_the_argument_and_the_way_out(arguments, named, capsys):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    assert named in capsys.readouterr().err


@pytest.mark.slow
def test_home_is_expanded_where_shells_leave_it(classes, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "data").symlink_to(classes)
    assert main(["train", "~/data", "--out=~/run", *SMALL]) == 0
    assert main(["train", "~/data", "--out=~/second", "init.weights=~/run", *SMALL]) == 0
    assert (tmp_path / "run" / "teacher.safetensors").exists()
    dinoforge.embed("~/run", "~/data")


@pytest.mark.parametrize("size", ["", " "])
def test_an_empty_environment_is_none(size, classes, monkeypatch, capsys):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, size)
    assert main(["train", str(classes), "--dry-run", *SMALL]) == 0
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert main(["train", str(classes), "--dry-run", *SMALL]) == 2
    assert "WORLD_SIZE='two': expected a number" in capsys.readouterr().err


def test_the_nearest_sizes_are_named(run, classes, tmp_path, capsys):
    assert main(["embed", str(run), str(classes), "--out", str(tmp_path / "x.npy"), "eval.size=37"]) == 2
    assert "the nearest that is, is 40" in capsys.readouterr().err
    assert main(["export", str(run), "--to", "onnx", "--out", str(tmp_path / "x.onnx"), "--size", "37", "50"]) == 2
    assert "the nearest that is, is 40 × 48" in capsys.readouterr().err
    assert main(["train", str(classes), "--dry-run", *SMALL, "train.batch_size=3200"]) == 2
    assert "set train.batch_size to" in capsys.readouterr().err


def test_an_evaluation_of_a_run_that_one_may_only_read_is_not_lost(classes, run, monkeypatch, capsys):
    def refuse(self, values):
        raise RunError(f"cannot write {self.summary} (Permission denied): choose another place with --out")

    monkeypatch.setattr("dinoforge.runs.directory.RunDirectory.write_summary", refuse)
    assert main(["eval", "knn", str(run), "--data", str(classes), "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["knn"]["trained"]["mean"] >= 0
    assert "summary  not written: cannot write" in said.err


@pytest.mark.slow
def test_a_second_start_of_the_same_command_is_refused(run, classes, tmp_path, capsys):
    out = tmp_path / "run"
    out.mkdir()
    with RunLock(out, print):
        assert main(["train", str(classes), "--out", str(out), *SMALL]) == 2
    assert f"is written by process {os.getpid()}" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == []
    assert main(["train", str(classes), "--out", str(out), *SMALL]) == 0
    assert not (out / ".lock").exists()
