"""Training batches: every one is a pure function of (seed, step).

No random state lives in a process: the image at a position of the global order, its crops and its masks are computed
from the seed and that position. So the stream of batches does not depend on the number of worker processes, on where a
run was stopped, or, at equal global batch, on the number of ranks.
"""

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from dinoforge.data.bad_images import BadImagesError, by_reason
from dinoforge.data.bad_images import Skipped as Skipped
from dinoforge.data.batch import Batch, collate_photometry, masked_patches
from dinoforge.data.crops import CropParameters, MultiCrop, on_reduced, reduction
from dinoforge.data.decode import decode
from dinoforge.data.headers import size_and_kind
from dinoforge.data.order import sample_index, sample_rng
from dinoforge.data.photometry import Photometry, PhotometryBatch
from dinoforge.data.preflight import Needs, refuse_second_start, require_room, require_sendable
from dinoforge.data.sources import Source, printable
from dinoforge.data.values import Decoding
from dinoforge.data.workers import LOOK_SECONDS, Table, Watch, Workers, start_worker
from dinoforge.errors import ImageError, WorkerError

PREFETCH = 2
"""The number of batches that each worker has ready."""

MAX_ATTEMPTS = 10
"""The number of images that are tried for one position before the batch is given up."""

DrawMasks = Callable[[int, tuple[int, int], np.random.Generator], npt.NDArray[np.bool_]]
"""A function of the number of global crops, the patch grid (h, w) and a generator: masks, bool [number, h·w].

It is `masks.batch_masks` with its settings.
"""


@dataclass(frozen=True)
class Failure:
    """A batch that could not be made: data rather than an exception, which would carry a worker's traceback."""

    message: str
    skipped: tuple[Skipped, ...]


class TrainingData(Dataset[Batch | Failure]):
    """The training batches, by step.

    Args:
        source: The images.
        crops: The augmentation.
        masks: A function that draws the masks of all global crops in a global batch.
        patch_size: The edge of a patch in pixels, a divisor of the global crop size.
        channels: The number of channels, C.
        decoding: Further keywords of `decode`: how values become pixels, and what is refused.
        reduced_decode: Whether large JPEG files are decoded at the smallest scale from which no crop is enlarged.
        photometry: Whether colours are changed here; otherwise batches carry the operations, see `Batch.photometry`.
        seed: The run's seed.
        batch_size: The number of images in a global batch, over all ranks.
        rank: The number of the contiguous slice of the global batch to make.
        world_size: The number of slices, a divisor of `batch_size`.
    """

    def __init__(
        self,
        source: Source,
        crops: MultiCrop,
        masks: DrawMasks,
        *,
        patch_size: int,
        channels: int = 3,
        decoding: Decoding | None = None,
        reduced_decode: bool = False,
        photometry: bool = True,
        seed: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        assert batch_size % world_size == 0, (batch_size, world_size)
        assert 0 <= rank < world_size, (rank, world_size)
        assert crops.global_size % patch_size == 0, (crops.global_size, patch_size)
        self.source = source
        self.crops = crops
        self.masks = masks
        self.grid = (crops.global_size // patch_size,) * 2
        self.channels = channels
        self.decoding = decoding or Decoding()
        self.reduced_decode = reduced_decode
        self.photometry = photometry
        self.seed = seed
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.on_image: Callable[[int], None] | None = None
        """A function that gets the index of each image before it is read, and -1 when a batch is done."""

    def __getitem__(self, step: int) -> Batch | Failure:
        """Make this rank's part of the global batch of a step."""
        first = step * self.batch_size
        share = self.batch_size // self.world_size
        global_crops, local_crops = self.crops.empty(share, self.channels)
        drawn: list[list[Photometry]] = []
        indices: list[int] = []
        skipped: list[Skipped] = []
        with _one_thread():
            for place in range(share):
                sample = self.sample(first + self.rank * share + place, skipped)
                if sample is None:
                    message = f"{MAX_ATTEMPTS} images in a row could not be read: {by_reason(skipped[-MAX_ATTEMPTS:])}"
                    return Failure(message=message, skipped=tuple(skipped))
                index, image, parameters = sample
                indices.append(index)
                drawn.append([p.photometry for p in parameters])
                room = global_crops[:, place], local_crops[:, place]
                self.crops.make(image, parameters, *room, photometry=self.photometry)
        masks = self._masks(first)
        if self.on_image:
            self.on_image(-1)
        return Batch(
            global_crops=global_crops.flatten(0, 1),
            local_crops=local_crops.flatten(0, 1),
            masks=masks,
            masked=masked_patches(masks),
            indices=torch.tensor(indices, dtype=torch.int64),
            skipped=tuple(skipped),
            photometry=None if self.photometry else collate_photometry(drawn, global_number=2),
        )

    def sample(
        self, position: int, skipped: list[Skipped]
    ) -> tuple[int, npt.NDArray[np.uint8], list[CropParameters]] | None:
        """Find the image of one position and draw its crops; unreadable images are noted and replaced."""
        for attempt in range(MAX_ATTEMPTS):
            if attempt == 0:
                index = sample_index(position, len(self.source), self.seed)
            else:
                index = int(sample_rng(self.seed, position, f"replacement {attempt}").integers(len(self.source)))
            rng = sample_rng(self.seed, position, f"crops {attempt}")
            if self.on_image:
                self.on_image(index)
            try:
                image, parameters = self._read(index, rng)
            except ImageError as error:
                skipped.append((index, printable(self.source.name(index)), str(error)))
                continue
            return index, image, parameters
        return None

    def _read(self, index: int, rng: np.random.Generator) -> tuple[npt.NDArray[np.uint8], list[CropParameters]]:
        """Decode an image and draw its crops."""
        read = partial(decode, channels=self.channels, **self.decoding)
        data = self.source.item(index).image
        if not (self.reduced_decode and isinstance(data, bytes)):
            image = read(data)
            return image, self.crops.draw(image.shape[0], image.shape[1], rng)
        # The crops say how much of the image is needed, so they are drawn for its size in the header.
        width, height, _ = size_and_kind(data)
        parameters = self.crops.draw(height, width, rng)
        image = read(data, reduction=reduction(parameters))
        if image.shape[:2] != (height, width):
            parameters = [on_reduced(p, (height, width), image.shape[:2]) for p in parameters]
        return image, parameters

    def _masks(self, first: int) -> torch.Tensor:
        """Draw the masks of the global batch and take the rows of this rank's images: bool [2·B, N]."""
        masks = self.masks(2 * self.batch_size, self.grid, sample_rng(self.seed, first, "masks"))
        tokens = masks.shape[1]
        by_view = masks.reshape(2, self.world_size, -1, tokens)  # [2, ranks, B, N]
        return torch.from_numpy(by_view[:, self.rank].reshape(-1, tokens))


def make_loader(
    data: TrainingData,
    *,
    start_step: int,
    end_step: int,
    num_workers: int,
    pin_memory: bool = False,
    prefetch: int = PREFETCH,
    timeout: float = 600.0,
) -> Generator[Batch]:
    """Start making the batches of steps `start_step`…`end_step` - 1, and yield them in order.

    Workers start at once and leave when the iterator is closed, exhausted or forgotten.

    Args:
        data: The batches.
        start_step: The first step.
        end_step: The step after the last.
        num_workers: The number of worker processes; 0 makes each batch in this process when it is asked for.
        pin_memory: Whether batches lie in page-locked memory.
        prefetch: The number of batches that each worker prepares ahead.
        timeout: The longest wait for a batch in seconds, above 0; it has no meaning without workers.

    Raises:
        DataError: Workers cannot be started here or cannot be given the images; or, on iteration, a batch cannot be
            made or fetched.
        WorkerError: On iteration, a worker was killed or hangs; the message names its image.
    """
    if num_workers:
        refuse_second_start()
        require_room(_needs(data, num_workers, num_workers * prefetch + 1))
        require_sendable(data.source)
    workers = Workers(Table(num_workers))
    loader: DataLoader[Batch | Failure] = DataLoader(
        data,
        batch_size=None,
        sampler=range(start_step, end_step),
        num_workers=num_workers,
        collate_fn=_unchanged,
        pin_memory=pin_memory,
        prefetch_factor=prefetch if num_workers else None,
        # Only at a timeout does the loader look whether its workers live; see `Watch` for the user's.
        timeout=LOOK_SECONDS if num_workers else 0.0,
        worker_init_fn=partial(start_worker, table=workers.table),
        generator=torch.Generator(),  # or else torch would draw from the global generator
    )
    return _checked(workers.start(loader), timeout, data.source, workers if num_workers else None)


def _needs(data: TrainingData, num_workers: int, batches: int) -> Needs:
    """Compute what workers and `batches` in flight need of the system."""
    share = data.batch_size // data.world_size
    crops = share * data.channels * (2 * data.crops.global_size**2 + data.crops.local_number * data.crops.local_size**2)
    masks = 2 * share * data.grid[0] * data.grid[1]
    tensors = 5 + (0 if data.photometry else 2 * len(fields(PhotometryBatch)))
    return Needs(workers=num_workers, batches=batches, batch_bytes=crops + masks, batch_tensors=tensors)


def _checked(
    batches: Iterator[Batch | Failure], timeout: float, source: Source, workers: Workers | None
) -> Generator[Batch]:
    if workers is None:
        for batch in batches:
            yield _sound(batch)
        return
    watch = Watch(workers, timeout)
    watch.start()
    try:
        while True:
            try:
                batch = watch.wait_for(batches)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:  # the last two: a batch whose maker is gone
                if watch.hung is not None:
                    raise WorkerError(
                        f"no batch came within {timeout:g} s (data.timeout): a data-loading worker "
                        f"hangs{_naming(source, [watch.hung])}. The storage may be stuck, or the image too much work"
                    ) from error
                if str(error).startswith("DataLoader timed out"):
                    continue
                if failure := workers.failure(error, partial(_naming, source)):
                    raise failure from None  # it says what came; what the libraries say would only hide it
                raise
            yield _sound(batch)
    finally:
        watch.stop()
        del batches  # asks the workers to leave, and waits a few seconds for each
        workers.kill()


def _sound(batch: Batch | Failure) -> Batch:
    if isinstance(batch, Failure):
        raise BadImagesError(batch.message, batch.skipped, of_one_rank=True)
    return batch


def _naming(source: Source, indices: list[int]) -> str:
    """Name the images that workers were at."""
    names = [printable(source.name(index)) for index in indices if index >= 0]
    return f" while it read {', '.join(names)}" if names else " between two images"


def _unchanged(batch: Any) -> Any:
    return batch


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute as a worker does: sums over many threads may round differently, and the stream would depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
