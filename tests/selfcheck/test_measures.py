"""What is counted of a step on a GPU, from made records."""

import warnings

import pytest
import torch

from dinoforge.recipe.load import load_recipe
from dinoforge.selfcheck import environment, memory, speed, waiting
from dinoforge.selfcheck.settings import Settings

SYNC = "called a synchronizing CUDA operation"


def told(*messages):
    with warnings.catch_warnings(record=True) as kept:
        warnings.simplefilter("always")
        for number, message in enumerate(messages):
            warnings.warn_explicit(message, UserWarning, f"/somewhere/step{number}.py", 10 + number)
    return kept


def test_waits_are_counted_with_their_places():
    line = waiting.of_warnings(told(SYNC), 1)
    assert line.status == "ok"
    assert line.values == {"waits": 1, "where": ["step0.py:10"]}
    line = waiting.of_warnings(told(SYNC, "something else", SYNC), 1)
    assert line.status == "FAIL"
    assert line.values["where"] == ["step0.py:10", "step2.py:12"]
    assert line.details == ("something else",)


def test_waits_need_cuda(tmp_path):
    (line,) = waiting.check(Settings("cpu", None, True, tmp_path))
    assert line.status == "not here"


def test_idle_time_between_kernels():
    # 0 to 2 with another inside of it, a gap, 4 to 5 and at once 5 to 8: 6 of 8 are busy.
    found = speed.of_times([(4, 5), (0, 2), (1, 1.5), (5, 8)])
    assert found.kernels == 4
    assert found.idle == pytest.approx(2 / 8)
    assert speed.of_times([]).kernels == 0


def test_networks_that_do_not_fit_are_tried_smaller(monkeypatch):
    tried = []

    def step(name, recipe, *_):
        tried.append(recipe.train.batch_size_per_gpu)
        if len(tried) < 3:
            raise torch.OutOfMemoryError
        return speed.ok(name, "")

    monkeypatch.setattr(speed, "_step", step)
    line = speed._largest_that_fits("name", "vit_small", torch.device("cpu"), torch.float32, 1.0)
    assert (tried, line.status) == ([32, 16, 8], "ok")


def test_networks_that_do_not_fit_at_all(monkeypatch):
    def step(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(speed, "_step", step)
    line = speed._largest_that_fits("name", "vit_small", torch.device("cpu"), torch.float32, 1.0)
    assert line.status == "not here"


def test_speed_of_a_step():
    recipe, _ = load_recipe("small", {"student.depth": 1, "train.batch_size_per_gpu": 2})
    line = speed._step("name", recipe, torch.device("cpu"), torch.float32, 1e12)
    assert line.status == "ok"
    assert 0 < line.values["share_of_peak"] < 1
    assert "kernels" not in line.values


def test_an_estimate_that_is_far_off(monkeypatch):
    monkeypatch.setattr(memory, "_ON_CPU", {"train.batch_size_per_gpu": 2})
    monkeypatch.setattr(memory, "peak_memory_gib", lambda device: 10.0)
    line = memory._beside_estimate(torch.device("cpu"))
    assert line.status == "FAIL"
    assert line.values["measured_gib"] == 10.0


def test_products_that_are_rounded_as_tf32(monkeypatch):
    assert environment._float32(torch.device("cpu")).status == "ok"
    product = torch.Tensor.__matmul__

    def rounded(a, b):
        if a.dtype is not torch.float32:
            return product(a, b)
        # 10 bits of the fraction are left
        return product(*((x.view(torch.int32) & ~0x1FFF).view(torch.float32) for x in (a, b)))

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    line = environment._float32(torch.device("cpu"))
    assert line.status == "FAIL"
    assert 1e-5 < line.values["product"] < 1e-2
    assert line.values["convolution"] < 1e-5
