import functools
import io
import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dinoforge.data.bad_images import BadImages, BadImagesError, by_reason
from dinoforge.data.batch import Batch, prepare
from dinoforge.data.batches import MAX_ATTEMPTS, Failure, TrainingData, make_loader
from dinoforge.data.crops import MultiCrop
from dinoforge.data.decode import decode
from dinoforge.data.masks import batch_masks
from dinoforge.data.order import sample_index, sample_rng
from dinoforge.data.sources import SequenceSource, open_source
from dinoforge.data.summary import summarize
from dinoforge.errors import DataError

CROPS = MultiCrop(global_size=28, local_size=14, local_number=2)
MASKS = functools.partial(batch_masks, kind="block", ratio=(0.1, 0.5), probability=0.5, max_patches=8)


def images(count: int, *, bad: tuple[int, ...] = ()) -> SequenceSource:
    """Small images, image i of base colour i; those in `bad` are no images."""
    rng = np.random.default_rng(0)
    pixels = (
        rng.integers(0, 40, (count, 24, 32, 3), dtype=np.uint8) + np.arange(count, dtype=np.uint8)[:, None, None, None]
    )
    return SequenceSource([b"not an image" if index in bad else pixels[index] for index in range(count)])


def training_data(source: SequenceSource | None = None, **changes: Any) -> TrainingData:
    settings: dict[str, Any] = {"patch_size": 7, "seed": 0, "batch_size": 4} | changes
    return TrainingData(source or images(20), CROPS, MASKS, **settings)


def assert_equal(first: Batch, second: Batch) -> None:
    for name in ("global_crops", "local_crops", "masks", "indices"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    assert first.skipped == second.skipped


# --- the order -------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(length=st.integers(1, 400), epoch=st.integers(0, 10**9), seed=st.integers(-(2**70), 2**70))
def test_every_epoch_is_a_permutation(length: int, epoch: int, seed: int) -> None:
    order = [sample_index(epoch * length + place, length, seed) for place in range(length)]
    assert sorted(order) == list(range(length))


def test_a_billion_images_need_no_list() -> None:
    started = time.perf_counter()
    draws = [sample_index(position, 10**9 + 7, 3) for position in range(2000)]
    assert time.perf_counter() - started < 2
    assert len(set(draws)) == 2000
    assert max(draws) < 10**9 + 7
    assert abs(np.mean(draws) / 10**9 - 0.5) < 5 * math_sd(2000)


def math_sd(count: int) -> float:
    """Standard error of the mean of `count` draws uniform in 0…1."""
    return float(1 / np.sqrt(12 * count))


@pytest.mark.parametrize("length", [2, 3, 5, 16, 60])
def test_every_image_is_as_likely_everywhere(length: int) -> None:
    """Chi-square over epochs of the images at the first, second and last place, and of pairs at the first two."""
    epochs = 4000
    draws = np.array(
        [[sample_index(epoch * length + place, length, 7) for place in (0, 1, length - 1)] for epoch in range(epochs)]
    )
    for column in draws.T:
        counts = np.bincount(column, minlength=length)
        chi_square = ((counts - epochs / length) ** 2 / (epochs / length)).sum()
        assert chi_square < (length - 1) + 5 * np.sqrt(2 * (length - 1)) + 5
    if 2 < length <= 16:
        pairs = Counter(map(tuple, draws[:, :2].tolist()))
        expected = epochs / (length * (length - 1))
        assert len(pairs) == length * (length - 1)
        chi_square = sum((count - expected) ** 2 / expected for count in pairs.values())
        assert chi_square < len(pairs) + 5 * np.sqrt(2 * len(pairs)) + 5


def test_epochs_and_seeds_differ() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return [sample_index(epoch * 100 + place, 100, seed) for place in range(100)]

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1, 2)]
    for i, first in enumerate(orders):
        for second in orders[:i]:
            assert sum(a == b for a, b in zip(first, second, strict=True)) < 10
    assert order(0, 0) == orders[0]


def test_neighbours_do_not_stay_neighbours() -> None:
    order = np.array([sample_index(place, 10_000, 0) for place in range(10_000)])
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.05
    assert (np.abs(np.diff(order)) == 1).mean() < 0.003


def test_generators_are_independent_and_repeatable() -> None:
    keys = [(0, 0, "crops"), (0, 1, "crops"), (1, 0, "crops"), (0, 0, "masks"), (-1, 0, "crops"), (2**64, 0, "crops")]
    draws = [sample_rng(seed, position, purpose).random() for seed, position, purpose in keys]
    assert len(set(draws)) == len(keys)
    assert draws == [sample_rng(seed, position, purpose).random() for seed, position, purpose in keys]
    firsts = np.array([sample_rng(0, position, "crops").random() for position in range(4000)])
    assert abs(firsts.mean() - 0.5) < 5 * math_sd(4000)
    assert abs(np.corrcoef(firsts[:-1], firsts[1:])[0, 1]) < 0.08


# --- batches ---------------------------------------------------------------------------------------------------------


def test_batch() -> None:
    batch = training_data()[3]
    assert isinstance(batch, Batch)
    assert batch.global_crops.shape == (8, 3, 28, 28)
    assert batch.local_crops.shape == (8, 3, 14, 14)
    assert batch.masks.shape == (8, 16)
    assert batch.masks.dtype == torch.bool
    assert int(batch.masks.any(dim=1).sum()) <= 4
    assert batch.indices.tolist() == [sample_index(position, 20, 0) for position in range(12, 16)]
    assert batch.skipped == ()


def test_every_image_comes_once_an_epoch() -> None:
    data = training_data()
    indices = [index for step in range(5) for index in data[step].indices.tolist()]  # type: ignore[union-attr]
    assert sorted(indices) == list(range(20))


def test_batches_depend_on_seed_and_step_alone() -> None:
    assert_equal(training_data()[2], training_data()[2])  # type: ignore[arg-type]
    first, other, later = training_data()[2], training_data(seed=1)[2], training_data()[7]
    for batch in (other, later):
        assert not torch.equal(first.masks, batch.masks)  # type: ignore[union-attr]
        assert not torch.equal(first.global_crops, batch.global_crops)  # type: ignore[union-attr]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_global_batch(world_size: int) -> None:
    whole = training_data()[1]
    parts = [training_data(rank=rank, world_size=world_size)[1] for rank in range(world_size)]
    assert isinstance(whole, Batch)
    for name in ("global_crops", "local_crops", "masks"):
        by_view = [getattr(part, name).unflatten(0, (2, -1)) for part in parts]
        assert torch.equal(torch.cat(by_view, dim=1).flatten(0, 1), getattr(whole, name)), name
    assert torch.equal(torch.cat([part.indices for part in parts]), whole.indices)  # type: ignore[union-attr]


def test_unreadable_images_are_replaced_by_others() -> None:
    bad = (2, 3, 11)
    data, clean = training_data(images(20, bad=bad)), training_data()
    skipped = set()
    for step in range(5):
        batch, undisturbed = data[step], clean[step]
        assert isinstance(batch, Batch)
        assert isinstance(undisturbed, Batch)
        assert not set(batch.indices.tolist()) & set(bad)
        same = [i for i, index in enumerate(undisturbed.indices.tolist()) if index not in bad]
        assert torch.equal(batch.global_crops[same], undisturbed.global_crops[same])
        assert torch.equal(batch.masks, undisturbed.masks)
        skipped |= set(batch.skipped)
        assert_equal(batch, training_data(images(20, bad=bad))[step])  # type: ignore[arg-type]
    assert {index for index, _, _ in skipped} == set(bad)
    assert all(name == f"item {index}" and "not an image" in reason for index, name, reason in skipped)


@pytest.mark.processes
def test_batch_without_readable_images_is_a_failure() -> None:
    data = training_data(images(20, bad=tuple(range(20))))
    failure = data[0]
    assert isinstance(failure, Failure)
    assert len(failure.skipped) == MAX_ATTEMPTS
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"10 images in a row could not be read.*item"):
            next(make_loader(data, start_step=0, end_step=1, num_workers=workers))


def test_real_images(solar_cells: Path) -> None:
    data = TrainingData(open_source(solar_cells), CROPS, MASKS, patch_size=14, channels=1, seed=0, batch_size=3)
    batch = data[100]
    assert isinstance(batch, Batch)
    assert batch.global_crops.shape == (6, 1, 28, 28)
    assert batch.skipped == ()
    assert batch.global_crops.float().std() > 5


# --- the stream ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "num_workers", [0, pytest.param(1, marks=pytest.mark.processes), pytest.param(2, marks=pytest.mark.processes)]
)
@pytest.mark.parametrize("start_step", [0, 3])
def test_stream_is_the_same_for_any_workers_and_start(num_workers: int, start_step: int) -> None:
    data = training_data(images(20, bad=(4,)))
    stream = list(make_loader(data, start_step=start_step, end_step=7, num_workers=num_workers))
    assert len(stream) == 7 - start_step
    for step, batch in enumerate(stream, start=start_step):
        assert_equal(batch, data[step])  # type: ignore[arg-type]


@pytest.mark.processes
def test_large_crops_do_not_depend_on_threads() -> None:
    """Sums over many pixels are split among threads, and must not round differently for it."""
    crops = MultiCrop(global_size=448, local_number=0, jitter_probability=1.0, blur_probability=(1.0, 1.0, 0.0))
    data = TrainingData(images(8), crops, MASKS, patch_size=14, seed=0, batch_size=4)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        here = list(make_loader(data, start_step=0, end_step=1, num_workers=0))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    there = list(make_loader(data, start_step=0, end_step=1, num_workers=1))
    assert_equal(here[0], there[0])


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.processes)])
def test_global_generators_are_left_alone(num_workers: int) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    for _ in make_loader(training_data(), start_step=0, end_step=2, num_workers=num_workers):
        pass
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())


@pytest.mark.processes
def test_empty_range_is_an_empty_stream() -> None:
    for workers in (0, 1):
        assert list(make_loader(training_data(), start_step=4, end_step=4, num_workers=workers)) == []


class Slow:
    """Images that say which process read them, and take a while."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> np.ndarray:
        time.sleep(self.seconds)
        return np.full((28, 28, 3), index, np.uint8)


@pytest.mark.processes
def test_killed_worker_is_told_as_such() -> None:
    handler = signal.getsignal(signal.SIGCHLD)
    stream = make_loader(training_data(open_source(Slow(0.01))), start_step=0, end_step=1000, num_workers=1)  # type: ignore[arg-type]
    next(stream)
    assert signal.getsignal(signal.SIGCHLD) is handler
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid or 0, signal.SIGKILL)
    time.sleep(0.3)  # the death must not surface here, in whatever the main process is doing
    with pytest.raises(DataError, match=r"worker was killed.*train\.num_workers"):
        for _ in stream:
            pass


@pytest.mark.processes
def test_workers_leave_interrupts_to_the_main_process() -> None:
    data = training_data(open_source(Slow(0.01)))  # type: ignore[arg-type]
    stream = make_loader(data, start_step=0, end_step=8, num_workers=1)
    batches = [next(stream)]
    (worker,) = multiprocessing.active_children()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(worker.pid or 0, number)
    batches += stream
    assert len(batches) == 8
    assert_equal(batches[-1], data[7])  # type: ignore[arg-type]


@pytest.mark.processes
def test_closed_stream_ends_its_workers() -> None:
    stream = make_loader(training_data(), start_step=0, end_step=1000, num_workers=2)
    next(stream)
    assert len(multiprocessing.active_children()) == 2
    del stream
    assert not multiprocessing.active_children()


@pytest.mark.processes
def test_stuck_storage_is_told_as_such() -> None:
    stuck = training_data(open_source(Slow(1.0)), batch_size=2)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"no batch came within 0\.2 s"):
        next(make_loader(stuck, start_step=0, end_step=1, num_workers=1, timeout=0.2))


@pytest.mark.processes
def test_opencv_threads_of_this_process_do_not_stop_workers() -> None:
    """Looking at large images starts them; after a fork, whoever changes their number would wait for ever."""
    before = cv2.getNumThreads()
    cv2.setNumThreads(4)
    try:
        cv2.resize(np.zeros((4000, 4000, 3), np.uint8), (5000, 5000), interpolation=cv2.INTER_CUBIC)
        batch = next(make_loader(training_data(), start_step=0, end_step=1, num_workers=1, timeout=20))
        assert_equal(batch, next(make_loader(training_data(), start_step=0, end_step=1, num_workers=0)))
    finally:
        cv2.setNumThreads(before)


# --- bad images ------------------------------------------------------------------------------------------------------


def test_bad_images_are_counted_once() -> None:
    bad = BadImages(max_share=0.1, length=1000)
    assert bad.update([(1, "a", "x"), (2, "b", "y"), (1, "a", "x")], 10) == [(1, "a", "x"), (2, "b", "y")]
    assert bad.update([(1, "a", "x")], 20) == []
    other = BadImages(max_share=0.1, length=1000)
    other.load_state_dict(bad.state_dict())
    assert other.skipped == bad.skipped == {1: ("a", "x"), 2: ("b", "y")}


@pytest.mark.parametrize(
    ("length", "draws", "allowed"),
    [(1000, 1, 6), (1000, 64, 6), (1000, 500, 50), (1000, 5000, 100), (20, 4, 2), (20, 400, 2)],
)
def test_share_of_bad_images(length: int, draws: int, allowed: int) -> None:
    skipped = [(index, f"{index}.png", "truncated") for index in range(allowed + 1)]
    bad = BadImages(max_share=0.1, length=length)
    bad.update(skipped[:allowed], draws)
    with pytest.raises(
        DataError, match=rf"data\.max_bad_share allows 10\.0%.*: {allowed + 1} such as 0\.png: truncated$"
    ):
        bad.update(skipped, draws)


def test_no_bad_image_may_be_allowed() -> None:
    bad = BadImages(max_share=0.0, length=10)
    bad.update([], 5)
    with pytest.raises(DataError):
        bad.update([(0, "a", "b")], 6)


def test_inspect(solar_cells: Path) -> None:
    summary = summarize(open_source(solar_cells), channels=1, samples=5)
    assert (summary.count, summary.sampled) == (2624, 5)
    assert summary.widths == summary.heights == (300, 300)
    assert summary.modes == (("L", 5),)
    assert 0 <= summary.values[0] < summary.values[1] <= 255
    assert summary.failures == ()


def test_inspect_mixed_and_bad() -> None:
    source = SequenceSource([np.zeros((4, 6), np.uint16), b"?", np.full((8, 5, 3), 9, np.uint8)])
    summary = summarize(source)
    assert summary.widths == (5, 6)
    assert summary.heights == (4, 8)
    assert summary.values == (0, 9)
    assert set(summary.modes) == {("uint16 x1", 1), ("uint8 x3", 1)}
    assert [(index, name) for index, name, _ in summary.failures] == [(1, "item 1")]
    with pytest.raises(DataError, match=r"none of 3 images.*: 2 such as item 0: is text, [^;]*; item 1: "):
        summarize(SequenceSource([b"?", b"", b"!"]))


def test_reasons_are_told_by_kind_most_frequent_first() -> None:
    lost = [(i, f"{i}.tif", f"truncated: {i} of 1,{i:03d} strips lie beyond the end") for i in range(12)]
    other = [(20, "x.png", "empty file"), (21, "y.jpg", "is a git-lfs pointer"), (22, "z.png", "empty file")]
    assert by_reason([*other, *lost]) == (
        "12 such as 0.tif: truncated: 0 of 1,000 strips lie beyond the end; 2 such as x.png: empty file; "
        "y.jpg: is a git-lfs pointer"
    )
    many = [(i, f"{i}.png", "because of " + "abcdefgh"[i]) for i in range(8)]
    assert by_reason(many).endswith("; 5.png: because of f; 2 for 2 other reasons")


def test_what_is_newly_bad_comes_with_the_error() -> None:
    bad = BadImages(max_share=0.1, length=1000)
    bad.update([(0, "0.png", "empty file")], 10)
    with pytest.raises(BadImagesError) as raised:
        bad.update([(i, f"{i}.png", "empty file") for i in range(7)], 20)
    assert raised.value.skipped == tuple((i, f"{i}.png", "empty file") for i in range(1, 7))
    assert not raised.value.of_one_rank
    data = training_data(images(20, bad=tuple(range(20))))
    with pytest.raises(BadImagesError) as raised:
        next(make_loader(data, start_step=0, end_step=1, num_workers=0))
    assert len(raised.value.skipped) == MAX_ATTEMPTS
    assert raised.value.of_one_rank


# --- where colours are changed, and how much of an image is decoded ---------------------------------------------------


def test_photometry_that_is_left_to_the_device_gives_the_same_crops() -> None:
    source = images(20)
    made, left = training_data(source)[3], training_data(source, photometry=False)[3]
    assert isinstance(made, Batch)
    assert isinstance(left, Batch)
    assert made.photometry is None
    assert not torch.equal(made.global_crops, left.global_crops)
    settings: dict[str, Any] = {"device": torch.device("cpu"), "mean": (0.0,), "std": (1 / 255,)}  # levels
    expected, finished = prepare(made, **settings), prepare(left, **settings)
    assert finished.photometry is None
    for name in ("global_crops", "local_crops"):
        difference = (getattr(expected, name) - getattr(finished, name)).abs()
        # A level of hue is several of colour; at the threshold of solarize, one side may be inverted.
        assert difference.mean() < 1.5
        assert difference.quantile(0.99) <= 12
    for name in ("masks", "masked", "indices"):
        assert torch.equal(getattr(made, name), getattr(left, name))


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.processes)])
def test_photometry_travels_from_workers(num_workers: int) -> None:
    data = training_data(photometry=False)
    for step, batch in enumerate(make_loader(data, start_step=0, end_step=3, num_workers=num_workers)):
        alone = data[step]
        assert isinstance(alone, Batch)
        assert alone.photometry is not None
        assert batch.photometry is not None
        for ours, theirs in zip(alone.photometry, batch.photometry, strict=True):
            assert ours.kernel == theirs.kernel
            for name in ("operations", "factors", "grayscale", "sigma", "threshold"):
                assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


def photo(width: int, height: int, *, quality: int = 95, orientation: int = 1) -> bytes:
    """A JPEG of smooth colours."""
    coarse = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    picture = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    picture.save(buffer, "JPEG", quality=quality, exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize("orientation", [1, 6])
def test_reduced_decoding_gives_nearly_the_same_crops(orientation: int, monkeypatch: pytest.MonkeyPatch) -> None:
    source = SequenceSource([photo(1000 + 8 * i, 701, orientation=orientation) for i in range(4)])
    sizes = []

    def note(*arguments: Any, **options: Any) -> np.ndarray:
        image = decode(*arguments, **options)
        sizes.append(image.shape)
        return image

    monkeypatch.setattr("dinoforge.data.batches.decode", note)
    full = training_data(source)[0]
    assert all(max(shape) >= 1000 for shape in sizes)
    sizes.clear()
    reduced = training_data(source, reduced_decode=True)[0]
    assert isinstance(full, Batch)
    assert isinstance(reduced, Batch)
    assert all(max(shape) <= 516 for shape in sizes)
    assert torch.equal(full.indices, reduced.indices)
    for name in ("global_crops", "local_crops"):
        difference = (getattr(full, name).float() - getattr(reduced, name).float()).abs()
        # An edge of a box moves by up to half a pixel of the reduced image: half a pixel of the crop, or less.
        assert difference.mean() < 4


def test_reduced_decoding_leaves_small_and_other_images_alone() -> None:
    for item in (photo(30, 40), np.zeros((900, 900, 3), np.uint8)):
        source = SequenceSource([item] * 4)
        full, reduced = training_data(source)[0], training_data(source, reduced_decode=True)[0]
        assert isinstance(full, Batch)
        assert isinstance(reduced, Batch)
        assert_equal(full, reduced)
