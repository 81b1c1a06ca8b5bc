"""Statistics of a data set: mean, deviation and symmetry of its pixels, and sizes and kinds of its images."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt

from dinoforge.data.decode import decode
from dinoforge.data.headers import size_and_kind
from dinoforge.data.pictures import AnImage
from dinoforge.data.sampling import spaced, spread
from dinoforge.data.sources import OnePlane, Source
from dinoforge.data.values import Bool, Decoding, UInt8
from dinoforge.errors import ImageError

ENOUGH = 32
"""The least number of images by which symmetry is judged."""

_SHARPEST = 96  # images: an asymmetry that only more of them show is too small to matter
_LARGEST = 0.025  # the share of the asymmetry that all images may have in common where few of them leave much to chance
_CELLS, _PIXELS = 8, 8  # cells of the grid's side, pixels of a cell's
_SIDE = _CELLS * _PIXELS
_NORMAL = 2.326  # 99 % of a normal distribution lie below

_LOOKED_AT = 16  # images whose sizes and kinds count
_MEASURED = 256  # the most images whose pixels are measured
_EFFORT = 140e6  # the most pixels of three channels that are decoded; a quarter of them count for a reduced JPEG
_REDUCED = 512  # the least pixels of the shorter side of a reduced JPEG

Float = npt.NDArray[np.float64]
Turn = Literal["upside down", "mirrored", "turned by a quarter"]


@dataclass(frozen=True)
class Symmetry:
    """The turns of the images that look alike on average.

    Args:
        upside_down: Whether there is no up: images and their vertical mirror images are alike.
        mirrored: Whether left and right are alike.
        quarter_turns: Whether images and images turned by 90, 180 or 270 degrees are alike.
        reason: The measurement in words and numbers.
    """

    upside_down: bool
    mirrored: bool
    quarter_turns: bool
    reason: str


class PixelStatistics:
    """Mean and deviation per channel, and symmetry, of images that are added one by one.

    Memory does not grow with the images. Each image counts alike for mean and deviation, whatever its size, since each
    is seen as crops of one size.

    Symmetry is judged by a grid of 8 × 8 cells that covers the image, whatever its aspect: the brightness of each cell
    and the contrast within it, both relative to the image's own. Of an image's grid f and the grid P f of the image
    upside down, d = (f - P f) / 2 is what tells them apart. For n images the statistic is T = n |mean d|² / mean |d|²:
    1 on average where either way up is as likely, and near n where all images have the same up. There it is
    distributed about as chi² / ν of ν degrees of freedom, ν = trace(C)² / trace(C²) for the covariance C of d (the
    central limit theorem, with two moments), and the images count as alike below its 99th percentile. From 96 images on
    n stays 96: a smaller asymmetry than those show is no reason against a flip. Of fewer images, where much may hide in
    chance, T has to be below 1 + 0.025 (n - 1), too: then the mean explains no more than 2.5 % of all d.

    Quarter turns are judged on the central square of each image, which stays where it is when the image is turned, by
    the same statistic and by another one: the logarithm of the ratio of horizontal to vertical gradients, which tells
    the direction of stripes wherever they lie.
    """

    def __init__(self) -> None:
        self.images = 0
        """Number of images that count for mean and deviation."""
        self._mean: Float = np.zeros(0)  # [C], levels
        self._squares: Float = np.zeros(0)  # [C], sum over images of the mean squared distance to the mean
        self._whole = _Moments(2 * _CELLS**2)
        self._square = _Moments(2 * _CELLS**2)
        self._stripes = _Moments(1)

    @property
    def mean(self) -> tuple[float, ...]:
        """The mean of each channel on the range 0 to 1; empty before the first image."""
        return tuple((self._mean / 255).tolist())

    @property
    def std(self) -> tuple[float, ...]:
        """The standard deviation of each channel over all pixels of all images, on the range 0 to 1."""
        return tuple((np.sqrt(self._squares / max(self.images, 1)) / 255).tolist())

    def add(self, pixels: UInt8, valid: Bool | None = None) -> None:
        """Add an image.

        Args:
            pixels: The image, uint8 [H, W, C], with as many channels as the images before.
            valid: A mask [H, W] or [H, W, C], False where there is no data; None where every pixel is valid. An image
                without any data in some channel is left out.
        """
        channels = pixels.shape[2]
        assert self.images == 0 or channels == len(self._mean), (channels, self._mean.shape)
        if valid is not None:
            valid = np.broadcast_to(valid if valid.ndim == 3 else valid[:, :, np.newaxis], pixels.shape)
        counts = np.stack([_counts(pixels, valid, channel) for channel in range(channels)])  # [C, 256]
        total = counts.sum(axis=1)
        if not total.all():
            return
        levels = np.arange(256)
        mean = counts @ levels / total
        variance = (counts * (levels - mean[:, np.newaxis]) ** 2).sum(axis=1) / total
        if self.images == 0:
            self._mean, self._squares = np.zeros(channels), np.zeros(channels)
        self.images += 1  # Welford's update, of whole images
        difference = mean - self._mean
        self._mean = self._mean + difference / self.images
        self._squares = self._squares + variance + difference * (mean - self._mean)
        if valid is None or total.sum() * 2 >= valid.size:  # the outline of a small rest would be all there is to see
            self._add_grids(pixels, valid, mean)

    def _add_grids(self, pixels: UInt8, valid: Bool | None, mean: Float) -> None:
        if valid is not None:
            pixels = np.where(valid, pixels, np.rint(mean).astype(np.uint8))
            valid = valid.mean(axis=2, dtype=np.float32) >= 0.5  # [H, W]
        brightness = _brightness(pixels)
        height, width = brightness.shape
        if valid is not None:
            valid = cv2.resize(valid.astype(np.uint8), (width, height), interpolation=cv2.INTER_AREA) > 0
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        inner = slice(top, top + side), slice(left, left + side)
        if (whole := _shrunk(brightness)) is not None:
            self._whole.add(_grid(whole, valid))
        if (square := whole if height == width else _shrunk(brightness[inner])) is not None:
            self._square.add(_grid(square, None if valid is None else valid[inner]))
            self._stripes.add(_direction(square))

    def symmetry(self) -> Symmetry:
        """Judge flips and quarter turns by the images added so far; nothing is alike below `ENOUGH` of them."""
        if self._whole.count < ENOUGH:
            few = f"{self._whole.count} images with a picture are too few to tell whether there is an up"
            return Symmetry(False, False, False, f"{few} (at least {ENOUGH})")
        upside_down = self._whole.test(_half_difference(lambda grid: grid[:, ::-1]))
        mirrored = self._whole.test(_half_difference(lambda grid: grid[:, :, ::-1]))
        said = [upside_down.said("upside down"), mirrored.said("mirrored")]
        quarter = False
        if self._square.count >= ENOUGH:
            turned = self._square.test(_half_difference(lambda grid: np.rot90(grid, axes=(1, 2))))
            stripes = self._stripes.test(np.eye(1))
            quarter = upside_down.alike and turned.alike and stripes.alike
            said.append(turned.said("turned by a quarter"))
            if turned.alike and not stripes.alike:
                said.append(f"but lines run in one direction (T = {stripes.statistic:.1f}, limit {stripes.limit:.1f})")
        reason = f"of {self._whole.count} images: {', '.join(said)}"
        return Symmetry(upside_down.alike, mirrored.alike, quarter, reason)


@dataclass(frozen=True)
class _Test:
    statistic: float
    limit: float

    @property
    def alike(self) -> bool:
        return self.statistic <= self.limit

    def said(self, turn: Turn) -> str:
        return f"{'alike' if self.alike else 'not alike'} {turn} (T = {self.statistic:.1f}, limit {self.limit:.1f})"


class _Moments:
    """Mean and second moments of vectors."""

    def __init__(self, length: int) -> None:
        self.count = 0
        self._sum: Float = np.zeros(length)
        self._products: Float = np.zeros((length, length))

    def add(self, vector: Float) -> None:
        self.count += 1
        self._sum += vector
        self._products += np.outer(vector, vector)

    def test(self, difference: Float) -> _Test:
        """Test whether the mean of d = `difference` @ vector may be 0."""
        mean = difference @ self._sum / self.count
        second = difference @ self._products @ difference.T / self.count  # mean of d dᵀ
        size = float(np.trace(second))
        if size <= 1e-12:  # every image is alike by itself
            return _Test(0.0, 1.0)
        covariance = second - np.outer(mean, mean)
        count = min(self.count, _SHARPEST)
        limit = _percentile(_degrees(covariance, self.count))
        if len(difference) > 1:
            limit = min(limit, 1 + _LARGEST * (count - 1))
        return _Test(count * float(mean @ mean) / size, limit)


def _degrees(covariance: Float, count: int) -> float:
    """Estimate the degrees of freedom of a mean's sum of squares, less the excess of a sample's squared covariance."""
    trace = float(np.trace(covariance))
    squares = float((covariance**2).sum()) - trace**2 / count
    if trace <= 0:
        return 1.0
    return float(np.clip(trace**2 / max(squares, trace**2 / len(covariance)), 1, len(covariance)))


def _percentile(degrees: float) -> float:
    """Compute the 99th percentile of chi² / ν, by Wilson and Hilferty (1931)."""
    spread = 2 / (9 * degrees)
    return float((1 - spread + _NORMAL * math.sqrt(spread)) ** 3)


def _half_difference(turn: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int64]]) -> Float:
    """Make the matrix of f -> (f - turned f) / 2 for grids [2, 8, 8] laid out as vectors."""
    places = np.arange(2 * _CELLS**2)
    turned = turn(places.reshape(2, _CELLS, _CELLS)).reshape(-1)
    unit = np.eye(len(places))
    return np.asarray((unit - unit[turned]) / 2)


def _counts(pixels: UInt8, valid: Bool | None, channel: int) -> npt.NDArray[np.int64]:
    """Count each level in a channel, int64 [256]."""
    levels = pixels[:, :, channel]
    if valid is not None:
        levels = levels[valid[:, :, channel]].reshape(-1, 1)
    if not levels.size:
        return np.zeros(256, np.int64)
    found = cv2.calcHist([np.ascontiguousarray(levels)], [0], None, [256], [0, 256])
    return np.asarray(np.rint(found.reshape(256)).astype(np.int64))


def _brightness(pixels: UInt8) -> npt.NDArray[np.float32]:
    """Compute the mean of the channels, levels [H, W]; large images are shrunk, which costs less."""
    height, width, channels = pixels.shape
    fraction = max(min(height, width) // (4 * _SIDE), 1)
    size = -(-width // fraction), -(-height // fraction)
    brightness = np.zeros(size[::-1], np.float32)
    for channel in range(channels):
        levels = np.ascontiguousarray(pixels[:, :, channel])
        brightness += cv2.resize(levels, size, interpolation=cv2.INTER_AREA) if fraction > 1 else levels
    return np.asarray(brightness / channels, np.float32)


def _shrunk(brightness: npt.NDArray[np.float32]) -> Float | None:
    """Shrink brightness to 64 × 64 pixels, with mean 0 and deviation 1; None for an image of one brightness."""
    kind = cv2.INTER_AREA if min(brightness.shape) >= _SIDE else cv2.INTER_LINEAR
    small = cv2.resize(brightness, (_SIDE, _SIDE), interpolation=kind).astype(np.float64)
    small -= small.mean()
    deviation = float(small.std())
    return None if deviation < 0.1 else small / deviation


def _grid(brightness: Float, valid: Bool | None) -> Float:
    """Compute brightness and contrast of every cell, relative to their means, [2 · 8 · 8]; 0 for cells without data."""
    cells = brightness.reshape(_CELLS, _PIXELS, _CELLS, _PIXELS)
    grid = np.stack([cells.mean(axis=(1, 3)), cells.std(axis=(1, 3))])
    kept = np.ones((_CELLS, _CELLS), bool)
    if valid is not None:
        kept = cv2.resize(valid.astype(np.float32), (_CELLS, _CELLS), interpolation=cv2.INTER_AREA) >= 0.5
    if not kept.any():
        return np.zeros(grid.size)
    return np.asarray(((grid - grid[:, kept].mean(axis=1)[:, np.newaxis, np.newaxis]) * kept).reshape(-1))


def _direction(brightness: Float) -> Float:
    """Compute the log of the ratio of horizontal to vertical gradients, [1]; above 0 where lines run up and down."""
    energies = [float((np.diff(brightness, axis=axis) ** 2).mean()) + 1e-4 for axis in (1, 0)]
    return np.array([math.log(energies[0] / energies[1])])


@dataclass(frozen=True)
class Sizes:
    """Sizes and kinds of some images of a data set.

    Args:
        count: The number of images in the data set.
        widths: The smallest and largest width in pixels.
        heights: The smallest and largest height in pixels.
        modes: The kinds of pixels before decoding and their number, most frequent first.
        side: The median of the shorter sides in pixels; 0 where it is not known.
    """

    count: int
    widths: tuple[int, int]
    heights: tuple[int, int]
    modes: tuple[tuple[str, int], ...]
    side: int = 0


def read_sizes(source: Source, channels: int, decoding: Decoding) -> Sizes | None:
    """Read the sizes and kinds of as many images as ``summarize`` does, in less time; None where none can be read.

    Large JPEGs are decoded at a fraction of their size, which shows as well whether they are whole.

    Args:
        source: The images.
        channels: The number of channels wanted.
        decoding: Further keywords of `decode`.
    """
    sizes: list[tuple[int, int]] = []
    kinds: Counter[str] = Counter()
    for index in spaced(len(source), _LOOKED_AT):
        try:
            image = source.item(index).image
            width, height, kind = size_and_kind(image)
            decode(image, channels=channels, reduction=_reduction(image, width, height), **decoding)
        except ImageError:
            continue  # the plan reports it
        sizes.append((width, height))
        kinds[kind] += 1
    if not sizes:
        return None
    widths, heights = zip(*sizes, strict=True)
    ends = (min(widths), max(widths)), (min(heights), max(heights))
    return Sizes(len(source), *ends, tuple(kinds.most_common()), median_side(sizes))


def median_side(sizes: Sequence[tuple[int, int]]) -> int:
    """Compute the median of the shorter sides, so that a panorama among many small images counts as one image."""
    return sorted(min(size) for size in sizes)[len(sizes) // 2]


def _reduction(image: AnImage, width: int, height: int) -> int:
    """Choose the divisor of edges at which an image that is only measured is decoded; 1 for all but large JPEGs."""
    is_jpeg = isinstance(image, bytes) and image.startswith(b"\xff\xd8")
    return max(min(width, height) // _REDUCED, 1) if is_jpeg else 1


def measure_pixels(source: Source, channels: int, decoding: Decoding) -> PixelStatistics:
    """Measure mean, deviation and symmetry of the pixels of up to 256 images, as training gets them.

    The images are spread evenly, and fewer where they are large, since decoding them should take seconds. Large JPEGs
    are decoded at a half, a quarter or an eighth of their size, the smallest of at least 512 pixels. Other large images
    are fewer still, yet enough to see a symmetry where that takes no more than four times as long. Pixels without data
    do not count.

    Args:
        source: The images.
        channels: The number of channels wanted.
        decoding: Further keywords of `decode`.
    """
    statistics = PixelStatistics()
    effort = 0.0
    for index in spread(spaced(len(source), _MEASURED)):
        try:
            image = source.item(index).image
            width, height, kind = size_and_kind(image, channels)
            reduction = _reduction(image, width, height)
            if effort >= (_EFFORT if statistics.images > ENOUGH else 4 * _EFFORT):
                break
            decoded = width * height * max(channels / 3, 1) / (4 if reduction > 1 else 1)
            effort += max(decoded, bytes_of(image) / 4)  # a stack takes long to be read, whatever is taken of it
            read = partial(decode, image, channels=channels, reduction=reduction)
            pixels = read(**decoding)
            valid = None
            if _may_have_gaps(kind) or decoding.get("nodata") is not None:  # pixels without data change with the fill
                other: Decoding = {**decoding, "fill": 255 - decoding.get("fill", 0)}
                valid = pixels == read(**other)
            statistics.add(pixels, valid)
        except ImageError:
            continue  # training reports it when it comes to it
    return statistics


def _may_have_gaps(kind: str) -> bool:
    """Whether images of a kind, as ``size_and_kind`` names it, may say that some pixels have no data."""
    return kind.startswith(("float", "F")) or ", nodata " in kind or ", mask" in kind


def bytes_of(image: AnImage) -> int:
    """The size in bytes of an image's file; 0 where there is none."""
    data = image.image if isinstance(image, OnePlane) else image
    return len(data) if isinstance(data, bytes) else 0
