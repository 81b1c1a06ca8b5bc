"""The benchmark of the step runs, and counts as it says."""

import json
import subprocess
import sys

import pytest

from dinoforge.recipe.load import load_recipe

TINY = (
    "student.embed_dim=48 student.depth=2 student.num_heads=2 train.batch_size_per_gpu=4 crops.local_crops_number=2 "
    "dino.head_hidden_dim=64"
)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_one_line_of_json(benchmark, dtype):
    command = [sys.executable, benchmark.__file__, "--work", "B", "--dtype", dtype, "--prototypes", "64"]
    command += ["--steps", "2", "--json", *TINY.split()]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    (line,) = result.stdout.splitlines()
    values = json.loads(line)
    for name in ("gemm_gflops", "step_s", "images_per_s", "share_of_peak", "peak_rss_gib"):
        assert values[name] > 0
    assert values["images_per_s"] == pytest.approx(4 / values["step_s"])
    assert values["share_of_peak"] == pytest.approx(values["gflop"] / values["step_s"] / values["gemm_gflops"])
    assert {"teacher", "student", "losses", "backward", "optimizer"} <= values["phases_s"].keys()


@pytest.mark.parametrize(("work", "prototypes", "gflop"), [("A", 65536, 953), ("A", 8192, 868), ("B", 65536, 593)])
def test_the_work_is_the_references(benchmark, work, prototypes, gflop):
    """Counted on the reference implementation's own step."""
    keys = benchmark.COMMON | benchmark.WORKS[work] | {"dino.head_n_prototypes": prototypes}
    recipe, _ = load_recipe("dinov2", keys)
    assert benchmark.reference_flops(recipe) / 1e9 == pytest.approx(gflop, abs=0.7)
