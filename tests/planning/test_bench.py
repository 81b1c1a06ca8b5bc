"""What `dinoforge bench` measures and says."""

import json
from dataclasses import replace

import pytest

from dinoforge.cli.main import main
from dinoforge.commands.bench import bench
from dinoforge.errors import DataError
from dinoforge.planning.bench import BenchResult, result_text

TINY = (
    "student.embed_dim=48 student.depth=2 student.num_heads=2 student.patch_size=8 student.in_chans=1 data.mean=0.5 "
    "data.std=0.25 crops.global_crops_size=32 crops.local_crops_size=16 crops.local_crops_number=2 "
    "dino.head_n_prototypes=64 dino.head_hidden_dim=64 train.batch_size_per_gpu=8 train.steps=20"
).split()
REPORT = BenchResult(
    device="cpu",
    precision="float32",
    threads=8,
    num_workers=2,
    processors=8,
    batch_size=32,
    gemm_gflops=200.0,
    gflop=100.0,
    step_s=1.0,
    phases_s={"teacher": 0.2, "student": 0.3, "losses": 0.1, "backward": 0.4},
    data_ms={"as it is": 10.0, "data.reduced_decode=true": 4.0},
    together_s=1.05,
    waited_s=0.01,
    peak_memory_gib=1.0,
)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_bench_writes_one_line_of_json_and_nothing_else(solar_cells, tmp_path, monkeypatch, capsys, workers):
    monkeypatch.chdir(tmp_path)
    keys = [*TINY, f"train.num_workers={workers}", "data.reduced_decode=false"]
    assert main(["bench", str(solar_cells), "--seconds", "0.1", "--json", *keys]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    values = json.loads(line)
    for key in ("gemm_gflops", "gflop", "step_s", "together_s", "peak_memory_gib", "images_per_s", "share_of_peak"):
        assert values[key] > 0
    assert values["images_per_s"] == pytest.approx(8 / values["together_s"])
    assert values["share_of_peak"] == pytest.approx(values["gflop"] / values["gemm_gflops"] / values["step_s"])
    assert values["waited_s"] <= values["together_s"]
    assert values["num_workers"] == workers
    assert list(values["data_ms"]) == ["as it is", "data.reduced_decode=true"]
    assert values["limited_by"] in ("data", "step")
    assert not list(tmp_path.iterdir())


def test_a_run_that_waits_is_told_what_helps():
    waits = replace(REPORT, data_ms={"as it is": 100.0, "data.reduced_decode=true": 40.0}, together_s=1.7, waited_s=0.8)
    advice = " ".join(waits.advice())
    assert waits.waits
    assert "47%" in advice  # 0.8 of 1.7 s
    assert "takes 4 of them" in advice  # 100 ms · 32 images in a step of 1 s
    assert "train.num_workers=4" in advice
    assert "data.reduced_decode=true brings it to 40.0 ms" in advice
    few = replace(waits, processors=3)
    assert "train.num_workers=3" in " ".join(few.advice())
    assert "train.num_workers" not in " ".join(replace(few, num_workers=3).advice())
    useless = replace(waits, data_ms={"as it is": 100.0, "data.reduced_decode=true": 99.0})
    assert "reduced_decode" not in " ".join(useless.advice())


def test_a_run_that_computes_is_told_what_takes_long():
    advice = " ".join(REPORT.advice())
    assert not REPORT.waits
    assert "50% of its time" in advice  # 100 GFLOP at 200 GFLOP/s in 1 s
    assert "backward (40%)" in advice
    assert "prototypes" not in advice
    wide = replace(REPORT, phases_s={"losses": 0.9, "backward": 0.1}, together_s=1.4)
    assert "dino.head_n_prototypes" in " ".join(wide.advice())
    assert "1.40 times" in " ".join(wide.advice())
    assert REPORT.advice()[0] in result_text(REPORT)


def test_unreadable_images_end_in_an_error(tmp_path):
    for number in range(12):
        (tmp_path / f"{number}.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="could be read"):
        bench(tmp_path, seconds=0.1, **dict(key.split("=") for key in TINY))
