"""The verdict: what is said of which numbers, and which curves are drawn."""

import pytest

from dinoforge.report.charts import charts_of, curve, smoothed
from dinoforge.report.verdict import judge

PROBES = {
    "step": [10.0, 20.0, 30.0, 40.0],
    "probe.knn": [None, 0.70, 0.84, 0.80],
    "probe.pixels.knn": [None, 0.72, 0.72, 0.72],
    "probe.untrained.knn": [None, 0.65, 0.65, 0.65],
}


def evaluated(trained: float, pixels: float, untrained: float, sd: float) -> dict[str, object]:
    rows = {"trained": trained, "pixels": pixels, "untrained": untrained}
    return {"n": 2624, "knn": {name: {"mean": mean, "sd": sd} for name, mean in rows.items()}}


def test_probes_above_both_references_are_a_yes() -> None:
    verdict = judge(PROBES, {})
    assert verdict.answer == "yes"
    assert "80.0 % of the images at step 40" in verdict.sentence
    assert "8.0 points above raw pixels" in verdict.sentence
    assert "15.0 points above the untrained network" in verdict.sentence


@pytest.mark.parametrize(
    ("trained", "answer", "said"),
    [
        (0.725, "partly", "0.5 points above raw pixels, which is within the noise"),
        (0.655, "no", "6.5 points below raw pixels; 0.5 points above the untrained network, which is within the noise"),
        (0.60, "no", "5.0 points below the untrained network"),
    ],
)
def test_what_is_within_the_noise_counts_for_nothing(trained, answer, said) -> None:
    verdict = judge(PROBES | {"probe.knn": [None, None, None, trained]}, {})
    assert verdict.answer == answer
    assert said in verdict.sentence


def test_probes_win_over_an_evaluation_and_both_are_listed() -> None:
    verdict = judge(PROBES, evaluated(0.5, 0.6, 0.4, 0.01))
    assert verdict.answer == "yes"
    assert [m.by for m in verdict.measured] == ["k-NN", "k-NN on 2,624 images (dinoforge eval knn)"]


def test_without_probes_the_evaluation_decides_by_its_own_deviation() -> None:
    assert judge({}, evaluated(0.80, 0.70, 0.60, 0.02)).answer == "yes"
    verdict = judge({}, evaluated(0.80, 0.79, 0.60, 0.02))
    assert verdict.answer == "partly"
    assert "Noise is taken as 2.0 points" in verdict.sentence


@pytest.mark.parametrize("summary", [{}, {"knn": None}, {"knn": {"trained": {}}}, {"knn": {"pixels": {"mean": 1.0}}}])
def test_without_any_measurement_it_is_said_that_nobody_knows(summary) -> None:
    verdict = judge({"step": [1.0], "total": [3.0]}, summary)
    assert verdict.answer == "unknown"
    assert "no probes" in verdict.sentence
    assert verdict.best is None


def test_without_references_nothing_is_claimed() -> None:
    assert judge({"step": [1.0], "probe.knn": [0.9]}, {}).answer == "unknown"


def test_the_best_checkpoint_is_named_if_it_is_kept_and_else_the_nearest() -> None:
    kept = judge(PROBES, {}, checkpoints=[20, 30, 40], teacher_step=40).best
    assert kept == (
        "The best k-NN result was 84.0 %, at step 30. A checkpoint of that step is kept. "
        "teacher.safetensors is of step 40."
    )
    saved = judge(PROBES, {"best": {"step": 30, "file": "best.safetensors"}}, checkpoints=[30]).best
    assert "Its backbone is best.safetensors." in str(saved)
    assert "The nearest checkpoint that is kept is of step 40" in str(judge(PROBES, {}, checkpoints=[40]).best)
    assert "There is no checkpoint yet" in str(judge(PROBES, {}).best)


def test_what_limits_the_speed() -> None:
    def metrics(wait: float) -> dict[str, list[float]]:
        return {"step": [1, 2, 3, 4], "images_per_second": [1, 90, 100, 110], "data_wait_share": [1, 1, wait, wait]}

    slow, fast = judge(metrics(0.5), {}), judge(metrics(0.05), {})
    assert (slow.limits, fast.limits, judge({}, {}).limits) == ("data", "step", None)
    assert slow.speed == (
        "105 images per second. 50 % of the time goes into waiting for data, which limits the speed: "
        "`dinoforge bench` says which keys to change."
    )
    assert "the step itself limits" in str(fast.speed)


def test_thinning_keeps_every_stretch_s_extremes_and_the_rare_values() -> None:
    values = [0.0] * 100_000
    values[61_234], values[77_777] = 9.0, -9.0
    probe = [0.5 if i % 10_000 == 17 else None for i in range(100_000)]
    columns = {"step": [float(i) for i in range(100_000)], "total": values, "probe.knn": probe}
    steps, shown = curve(columns, "total")
    assert len(steps) <= 1000
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (0, 99_999)
    assert (61_234, 9.0) in zip(steps, shown, strict=True)
    assert (77_777, -9.0) in zip(steps, shown, strict=True)
    assert curve(columns, "probe.knn") == ([i * 10_000.0 + 17 for i in range(10)], [0.5] * 10)


def test_every_metric_has_a_chart_and_only_one() -> None:
    names = ["step", "total", "grad_norm.backbone", "grad_norm.head", "diag.kl.ibot", "lr", "probe.knn", "of.my.own"]
    charts = charts_of([{name: [1.0] for name in names}, {"train_seconds": [1.0], "skipped_steps": [0.0]}])
    keys = [key for chart in charts for key in chart.keys]
    assert sorted(keys) == sorted(name for name in names if name != "step")
    assert next(c.keys for c in charts if c.title == "Gradient norms") == ("grad_norm.backbone", "grad_norm.head")
    assert charts_of([{"step": [1.0], "skipped_steps": [2.0]}])[0].title == "Left out"  # only if there are any


def test_smoothing_is_a_running_mean() -> None:
    assert smoothed([]) == []
    assert smoothed([1.0, 3.0]) == [1.0, 2.0]
    long = smoothed([0.0] * 500 + [1.0] * 500)
    assert 0.04 < long[500] < 0.06
    assert long[-1] > 0.99
