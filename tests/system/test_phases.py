"""The parts of a step, timed where the work is done."""

import threading
import time

import pytest
import torch

from dinoforge.data.batch import prepare
from dinoforge.planning import bench as bench_module
from dinoforge.recipe.load import load_recipe
from dinoforge.system import phases
from dinoforge.system.phases import PHASES, Stopwatch, phase, timed_by
from dinoforge.training.loop import train
from dinoforge.training.step import Stepper
from tiny import TINY


class Event:
    """An event of a device that has done everything at once: its time is the number of events before it."""

    made = 0

    def __init__(self, enable_timing):
        assert enable_timing
        self.when = None

    def record(self):
        Event.made += 1
        self.when = Event.made

    def elapsed_time(self, other):
        return 1000.0 * (other.when - self.when)


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_a_device_stamps_the_time_itself(kind, monkeypatch):
    monkeypatch.setattr(getattr(torch, kind), "Event", Event)
    stopwatch = Stopwatch(torch.device(kind))
    with timed_by(stopwatch):
        with phase("student"):
            pass
        with phase("losses"), phase("backward"):
            pass
        with phase("student"):
            pass
    assert stopwatch.seconds() == {"student": 2.0, "losses": 3.0, "backward": 1.0}
    with phase("student"):
        pass  # nobody asks any more
    assert stopwatch.seconds()["student"] == 2.0


def test_every_phase_of_a_step_is_stamped_also_the_one_of_another_thread(monkeypatch):
    """PyTorch runs the backward pass for a GPU in a thread of its own, where no name of this one is known."""
    backward = torch.Tensor.backward

    def elsewhere(tensor, *args, **keys):
        thread = threading.Thread(target=backward, args=(tensor, *args), kwargs=keys)
        thread.start()
        thread.join()

    monkeypatch.setattr(torch.Tensor, "backward", elsewhere)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    recipe, _ = load_recipe("small", TINY | {"train.steps": 1000})
    bench = bench_module.StepBench(recipe, torch.device("cpu"), torch.float32)
    stopwatch = Stopwatch(torch.device("cuda"))
    with timed_by(stopwatch):
        bench.step(bench.batch())
    seconds = stopwatch.seconds()
    assert set(seconds) == set(PHASES)
    assert all(value >= 1 for value in seconds.values())
    spent = bench.phases()
    assert set(spent) == {*PHASES, "rest"}
    assert all(spent[name] > 0 for name in PHASES)


def test_other_threads_are_not_timed():
    stopwatch = Stopwatch(torch.device("cpu"))

    def work():
        with phase("teacher"):
            pass

    with timed_by(stopwatch):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert stopwatch.seconds() == {}
    assert phases._running.get() is None


def test_waiting_for_data_is_not_waiting_for_the_device():
    """What ``prepare`` takes, where a full queue may be drained, is no wait for data."""

    class Enough(Exception):
        pass

    reports = []

    def hook(report):
        reports.append(report)
        raise Enough

    def slowly(batch):
        time.sleep(0.5)
        return batch

    recipe, _ = load_recipe("small", TINY)
    bench = bench_module.StepBench(recipe, torch.device("cpu"), torch.float32)
    batch = prepare(bench.batch(), device=torch.device("cpu"), mean=[0.5], std=[0.5])
    with pytest.raises(Enough):
        train(
            bench._state,
            iter([batch]),
            bench._schedules,
            Stepper(clip_grad=3.0),
            samples_per_step=8,
            prepare=slowly,
            hooks=[hook],
            is_measured=lambda step: False,
            should_stop=lambda: False,
            on_skipped=lambda new: None,
            on_non_finite=lambda batch, values: None,
        )
    assert reports[0].seconds >= 0.5
    assert reports[0].waited < 0.5 * reports[0].seconds
