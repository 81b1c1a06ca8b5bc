"""Compute features of a data set's images by a backbone, in bounded memory."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NotRequired, Unpack, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from dinoforge.data.bad_images import by_reason
from dinoforge.data.batch import normalize
from dinoforge.data.crops import whole
from dinoforge.data.decode import decode
from dinoforge.data.duplicates import Fingerprint, fingerprint
from dinoforge.data.preflight import Needs, refuse_second_start, require_room, require_sendable
from dinoforge.data.sources import Source, printable
from dinoforge.data.values import Decoding
from dinoforge.data.workers import Table, Workers, start_worker
from dinoforge.errors import DataError, ImageError, WeightsError
from dinoforge.models.vit import Tokens

MAX_KEPT_BYTES = 8 * 2**30
"""The most memory, in bytes, for uint8 images that are kept for a comparison with raw pixels."""

_PREFETCH = 2  # number of batches that each worker prefetches


class Reading(Decoding):
    """The keywords of ``extract`` that say how images are read and shown to a backbone.

    Args:
        size: The side of the backbone's input images, in pixels.
        channels: The number of channels.
        mean: The mean of each channel, on the range 0 to 1.
        std: The standard deviation of each channel, on the same range.
        center_crop: Whether the centre of an image is cut out, by the official rule of evaluation; by default the
            whole image is resized.
        device: The device on which the backbone runs; the CPU by default.
        autocast: The type of matrix products; float32 by default.
        batch_size: The number of images at a time; 64 by default.
        num_workers: The number of processes that read images; 0, the default, for this process alone.
    """

    size: int
    channels: int
    mean: Sequence[float]
    std: Sequence[float]
    center_crop: NotRequired[bool]
    device: NotRequired[torch.device]
    autocast: NotRequired[torch.dtype | None]
    batch_size: NotRequired[int]
    num_workers: NotRequired[int]


def decoding_of(reading: Reading) -> Decoding:
    """Select the keywords that say how values become pixels."""
    return cast(Decoding, {key: value for key, value in reading.items() if key in Decoding.__annotations__})


@dataclass(frozen=True)
class Skipped:
    """An image that could not be used."""

    name: str  # printable
    reason: str


@dataclass(frozen=True)
class Features:
    """Features of images: row ``i`` of every tensor belongs to image ``kept[i]`` of the source.

    Args:
        cls: The cls tokens, [N, D] float32, on the CPU.
        images: The images that the backbone saw, before normalisation, [N, C, size, size] uint8; None if not wanted.
        kept: Indices of the images that could be read.
        skipped: The images that could not be read.
        fingerprints: Fingerprints of the images as they were decoded; None if not wanted.
    """

    cls: Tensor
    images: Tensor | None
    kept: list[int]
    skipped: list[Skipped]
    fingerprints: list[Fingerprint] | None = None


def extract(
    backbone: nn.Module,
    source: Source,
    indices: Sequence[int],
    *,
    keep_images: bool = False,
    fingerprints: bool = False,
    max_kept_bytes: int = MAX_KEPT_BYTES,
    **reading: Unpack[Reading],
) -> Features:
    """Compute the cls token of each image, in the order of ``indices``; unreadable images are left out and reported.

    Memory holds one batch of images and tokens, and the result; a fingerprint takes 2 KiB.

    Args:
        backbone: A network from float32 images [B, C, H, W] to ``Tokens``. It runs in evaluation mode, on the
            ``device`` of ``reading``, and is moved back to its own device afterwards.
        source: The data set.
        indices: Indices of the images to embed.
        keep_images: Whether ``Features.images`` is filled.
        fingerprints: Whether ``Features.fingerprints`` is filled.
        max_kept_bytes: The most memory that kept images may take, in bytes.
        reading: Keywords of ``Reading``.

    Raises:
        DataError: None of the images can be read, or the kept images would take more than ``max_kept_bytes``.
        WeightsError: The backbone's output is not finite.
    """
    image_bytes = len(indices) * reading["channels"] * reading["size"] ** 2
    if keep_images and image_bytes > max_kept_bytes:
        raise DataError(
            f"comparing {len(indices):,} images of {reading['size']} x {reading['size']} pixels by their raw pixels "
            f"takes {image_bytes / 2**30:.1f} GiB of memory, more than the {max_kept_bytes / 2**30:.0f} GiB allowed: "
            "choose a smaller eval.size or fewer images"
        )
    kept: list[int] = []
    skipped: list[Skipped] = []
    cls: list[Tensor] = []
    kept_images: list[Tensor] = []
    prints: list[Fingerprint] = []
    with placed(backbone, _device(reading)):
        for indices_read, batch, unread, batch_prints in _batches(source, indices, reading, fingerprints):
            kept += indices_read
            skipped += unread
            prints += batch_prints
            if indices_read:
                cls.append(embed(backbone, batch, **reading))
                if keep_images:
                    kept_images.append(batch)
    if not kept:
        told = by_reason((0, one.name, one.reason) for one in skipped)
        raise DataError(f"none of the {len(indices)} images can be read{': ' * bool(told)}{told}")
    images = torch.cat(kept_images) if keep_images else None
    return Features(torch.cat(cls), images, kept, skipped, prints if fingerprints else None)


def stream(
    backbone: nn.Module, source: Source, indices: Sequence[int], **reading: Unpack[Reading]
) -> Iterator[tuple[list[int], Tokens | None, list[Skipped]]]:
    """Compute all tokens, batch by batch, in the order of ``indices``; memory holds one batch of images and tokens.

    Args:
        backbone: A network as for ``extract``.
        source: The data set.
        indices: Indices of the images to embed.
        reading: Keywords of ``Reading``.

    Yields:
        The indices of the readable images of a batch; their tokens in float32 on the CPU, or None if no image is
        readable; and the unreadable images.

    Raises:
        WeightsError: The backbone's output is not finite.
    """
    with placed(backbone, _device(reading)):
        for kept, batch, skipped, _ in _batches(source, indices, reading):
            yield kept, _tokens(backbone, batch, reading) if kept else None, skipped


def embed(backbone: nn.Module, images: Tensor, **reading: Unpack[Reading]) -> Tensor:
    """Compute the cls tokens [N, D], float32 on the CPU, of uint8 images [N, C, H, W], batch by batch.

    Raises:
        WeightsError: The backbone's output is not finite.
    """
    with placed(backbone, _device(reading)):
        return torch.cat([_tokens(backbone, b, reading).cls for b in images.split(reading.get("batch_size", 64))])


@contextmanager
def placed(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Move a network to a device inside the context, and back to its own device afterwards."""
    before = next((p.device for p in network.parameters()), device)
    network.to(device)
    try:
        yield
    finally:
        network.to(before)


def _device(reading: Reading) -> torch.device:
    return reading.get("device", torch.device("cpu"))


def _tokens(backbone: nn.Module, images: Tensor, reading: Reading) -> Tokens:
    """Compute the tokens, float32 on the CPU, of uint8 images [B, C, H, W]; the backbone is on its device already."""
    device, dtype = _device(reading), reading.get("autocast")
    # Activations of a sound network can be too large for float16; then float32 decides.
    for precision in (dtype, None) if dtype is torch.float16 else (dtype,):
        tokens = _forward(backbone, normalize(images.to(device), reading["mean"], reading["std"]), precision)
        if tokens.cls.isfinite().all() and tokens.patches.isfinite().all():
            return tokens
    raise WeightsError("the backbone's features are not finite: its weights are damaged, or its training diverged")


def _forward(backbone: nn.Module, images: Tensor, precision: torch.dtype | None) -> Tokens:
    """Compute the tokens, float32 on the CPU, of normalised images; matrix products run in ``precision`` or float32."""
    was_training = backbone.training
    backbone.eval()
    try:
        with torch.no_grad(), torch.autocast(images.device.type, precision, enabled=precision is not None):
            tokens: Tokens = backbone(images)
    finally:
        backbone.train(was_training)
    return Tokens(*(t.float().cpu() for t in (tokens.cls, tokens.registers, tokens.patches)))


@dataclass(frozen=True)
class _Images(Dataset[tuple[int, Tensor | str, Fingerprint | None]]):
    """Images for the loader: index; pixels uint8 [C, size, size], or an error's text; fingerprint if wanted."""

    source: Source
    indices: Sequence[int]
    reading: Reading
    fingerprints: bool

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> tuple[int, Tensor | str, Fingerprint | None]:
        index, reading = self.indices[position], self.reading
        try:
            array = decode(
                self.source.item(index).image,
                channels=reading["channels"],
                **decoding_of(reading),
            )
            image = whole(array, reading["size"], center_crop=reading.get("center_crop", False))
            return index, image, fingerprint(array) if self.fingerprints else None
        except ImageError as error:
            return index, str(error), None


def _batches(
    source: Source, indices: Sequence[int], reading: Reading, fingerprints: bool = False
) -> Iterator[tuple[list[int], Tensor, list[Skipped], list[Fingerprint]]]:
    """Read images batch by batch.

    Yields:
        The indices of the readable images; their pixels, uint8 [B, C, size, size]; the unreadable images; and, if
        wanted, the fingerprints of the readable images.
    """
    number, batch_size = reading.get("num_workers", 0), reading.get("batch_size", 64)
    if number:
        refuse_second_start()
        size = batch_size * reading["channels"] * reading["size"] ** 2
        batches = number * _PREFETCH + 1
        require_room(Needs(number, batches, batch_bytes=size, batch_tensors=batch_size, key="num_workers"))
        require_sendable(source, "num_workers")
    workers = Workers(Table(number, "num_workers"), "num_workers")
    loader = DataLoader(
        _Images(source, indices, reading, fingerprints),
        batch_size=batch_size,
        num_workers=number,
        prefetch_factor=_PREFETCH if number else None,
        worker_init_fn=partial(start_worker, table=workers.table),
        collate_fn=list,
        # Without its own generator, the loader would draw from the global generator, and a probe would change a run.
        generator=torch.Generator(),
    )
    none = torch.empty(0, reading["channels"], reading["size"], reading["size"], dtype=torch.uint8)
    for read in workers.batches(loader):
        images = [image for _, image, _ in read if isinstance(image, Tensor)]
        kept = [index for index, image, _ in read if isinstance(image, Tensor)]
        skipped = [Skipped(printable(source.name(i)), reason) for i, reason, _ in read if isinstance(reason, str)]
        prints = [one for _, _, one in read if one is not None]
        yield kept, torch.stack(images) if images else none, skipped, prints
