"""Equal and nearly equal images, found by fingerprints of their pixels.

Equal: the same shape and pixels. Nearly equal: one picture that was encoded again, resized (down to thumbnails of 64
pixels) or made a little brighter or darker. Crops, rotations, mirror images and other colours are different pictures,
and so are two photographs of one scene.

Two images are nearly equal where both of these hold:

1. Their 64-bit hashes differ in few bits. The hash has one bit for each of the 64 lowest frequencies of the grey
   picture: whether its coefficient is above the median (Zauner, "Implementation and Benchmarking of Perceptual Image
   Hash Functions", 2010).
2. Their pictures of 32 x 32 pixels agree, as solar cells or microscope fields that merely look alike do not: with one
   as bright as the other by a gain and an offset, they differ by no more than the noise of an encoder, in detail as
   well, and their colours are the same.

``docs/evaluation.md`` has the shares of changed images that are found, and of found ones that are right, with
``distance`` 7 on the 2,624 solar cells of ELPV, which all look alike, and on 30 photographs and wallpapers.

Images that show nothing are no duplicates of each other. Images of one constant colour are in no group at all
(``Fingerprint.is_constant``). Images that are nearly flat at 32 x 32 pixels (``near`` is 0) are in a group only where
their pixels are equal.
"""

import functools
import hashlib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import cv2
import numpy as np
import numpy.typing as npt

DISTANCE = 7  # bits of 64; up to 7, bands find all pairs with few look-ups

_SIDE = 32  # the side of the small picture, in samples
_REACH = 1.5  # half the width, in samples, of the triangle under which a sample is a mean
_COARSE = 8  # the side of the grid of coarse colours
_FLAT = 1.5  # the standard deviation, in levels, of a small picture in which there is nothing to compare
_NOISE = 0.65, 0.04  # the tolerated difference, in levels or, where that is more, as a share of the deviation
_MOST_NOISE = 0.15  # the most noise, as a share of the deviation; beyond, a comparison says nothing
_DETAIL = 0.7  # the least correlation of details
_GAIN = 1.2  # the largest gain of brightness
_OFFSET = 24.0  # the largest difference of means, in levels
_COLOUR = 5.0  # the largest difference of the coarse colours of one picture, in levels
_BANDS, _BAND_BITS = 4, 16
_PAIRS = 4096  # pairs that are compared at once
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)  # set in each byte

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """The fingerprint of an image: 2 KiB, and 64 bytes for each channel of a coloured one.

    Args:
        exact: A hash of shape and pixels, 16 bytes.
        near: A perceptual hash, 64 bits; 0 for a picture that is too flat to be compared.
        is_constant: Whether all pixels are the same.
        small: The small picture by which candidates are compared; empty where hashes alone decide.
    """

    exact: bytes
    near: int
    is_constant: bool = False
    small: bytes = b""


def fingerprint(pixels: npt.NDArray[np.uint8]) -> Fingerprint:
    """Compute the fingerprint of an image.

    Args:
        pixels: The image, uint8 [H, W, C], any C.
    """
    pixels = np.ascontiguousarray(pixels)
    coloured = _shrink(pixels)  # [32, 32, C]
    grey = coloured @ np.full(pixels.shape[2], 1 / pixels.shape[2], np.float32)  # the mean, which is faster so
    is_constant = bool((np.abs(coloured - coloured[0, 0]) < 0.01).all() and (pixels == pixels[0, 0]).all())
    small = np.rint(grey * 256).astype("<u2").tobytes()
    if pixels.shape[2] > 1:
        cells = coloured.reshape(_COARSE, _SIDE // _COARSE, _COARSE, _SIDE // _COARSE, -1).mean(axis=(1, 3))
        small += np.rint(cells).astype(np.uint8).tobytes()
    return Fingerprint(_digest(pixels), _hash(grey), is_constant, small)


def same(fingerprints: Sequence[Fingerprint]) -> list[list[int]]:
    """Group images with equal pixels, two or more in a group.

    Returns:
        Ascending indices, the first images of groups ascending as well. Constant images are in no group.
    """
    found: dict[bytes, list[int]] = {}
    for index, one in enumerate(fingerprints):
        if not one.is_constant:
            found.setdefault(one.exact, []).append(index)
    return [group for group in found.values() if len(group) > 1]


def groups(fingerprints: Sequence[Fingerprint], *, distance: int = DISTANCE) -> list[list[int]]:
    """Group equal or nearly equal images, two or more in a group: each is like another image of its group.

    Hashes that differ in ``distance`` bits or fewer differ in ``distance // 4`` bits or fewer in one of four parts of
    16 bits, so looking up these parts finds all candidates: for 10,000 different images, in well under a second.

    Args:
        fingerprints: The fingerprints of the images.
        distance: The number of bits, 0 to 64, in which the hashes of nearly equal images may differ.

    Returns:
        Ascending indices, the first images of groups ascending as well. Constant images are in no group.
    """
    assert 0 <= distance <= 64, distance
    parent = np.arange(len(fingerprints))
    for group in same(fingerprints):
        parent[group] = group[0]
    # One of several equal images stands for all.
    compared = np.array([i for i, f in enumerate(fingerprints) if f.near and parent[i] == i], np.int64)
    hashes = np.array([fingerprints[i].near for i in compared], np.uint64)
    may_be_alike = _Glance([fingerprints[i].small for i in compared])
    for left, right in _candidates(hashes, distance):
        likely = may_be_alike(left, right)
        left, right = compared[left[likely]], compared[right[likely]]
        for start in range(0, len(left), _PAIRS):
            i, j = left[start : start + _PAIRS], right[start : start + _PAIRS]
            apart = _roots(parent, i) != _roots(parent, j)
            i, j = i[apart], j[apart]
            alike = _alike([fingerprints[k].small for k in i], [fingerprints[k].small for k in j])
            for a, b in zip(i[alike], j[alike], strict=True):
                first, second = sorted((_root(parent, a), _root(parent, b)))
                parent[second] = first
    found: dict[int, list[int]] = {}
    for index, root in enumerate(_roots(parent, np.arange(len(parent))).tolist()):
        found.setdefault(root, []).append(index)
    return [group for group in found.values() if len(group) > 1]


def _digest(pixels: npt.NDArray[np.uint8]) -> bytes:
    """Hash shape and pixels to 16 bytes, by checksums of 16 parts: a cryptographic hash costs three times as much."""
    stream = pixels.reshape(-1).data
    step = max(1, -(-len(stream) // 16))
    sums = [zlib.crc32(stream[start : start + step]) for start in range(0, len(stream), step)]
    return hashlib.blake2b(repr((pixels.shape, sums)).encode(), digest_size=16).digest()


def _shrink(pixels: npt.NDArray[np.uint8]) -> Floats:
    """Compute the mean colour of each cell in a grid of 32 x 32 equal cells, float32 [32, 32, C]."""
    height, width, _ = pixels.shape
    # Blocks of whole pixels first, which is most of the work; at least 2 x 2 of them in a cell.
    tall, wide = max(1, height // (2 * _SIDE)), max(1, width // (2 * _SIDE))
    blocks = _block_means(pixels, tall, wide)
    rows = np.tensordot(_weights(height, tall), blocks, axes=1)  # [32, W', C]
    return np.asarray(np.tensordot(_weights(width, wide), rows, axes=(1, 1)).swapaxes(0, 1), np.float32)


def _block_means(pixels: npt.NDArray[np.uint8], tall: int, wide: int) -> Floats:
    """Compute the means [H / tall, W / wide, C] of blocks of tall x wide pixels, which are smaller at the far edges."""
    height, width, channels = pixels.shape
    if (tall, wide) == (1, 1):
        return pixels.astype(np.float32)
    means = np.empty((-(-height // tall), -(-width // wide), channels), np.float32)
    for rows in _whole_and_rest(height, tall):
        for columns in _whole_and_rest(width, wide):
            part = pixels[rows, columns]
            there = (
                slice(rows.start // tall, -(-rows.stop // tall)),
                slice(columns.start // wide, -(-columns.stop // wide)),
            )
            size = there[1].stop - there[1].start, there[0].stop - there[0].start
            for first in range(0, channels, 64):  # OpenCV has a limit
                some = slice(first, first + 64)
                shrunk = cv2.resize(part[:, :, some], size, interpolation=cv2.INTER_AREA)
                means[*there, some] = shrunk.reshape(size[1], size[0], -1)
    return means


def _whole_and_rest(length: int, block: int) -> list[slice]:
    whole = length // block * block
    return [part for part in (slice(0, whole), slice(whole, length)) if part.start < part.stop]


@functools.lru_cache(maxsize=256)
def _weights(length: int, block: int) -> Floats:
    """Compute the share of each block of pixels in each of 32 samples, [32, number of blocks]; a row's sum is 1.

    A sample is a mean under a triangle three samples wide. Under a rectangle, sharp edges between two samples would
    belong to one or the other, depending on the filter by which the image was resized.
    """
    edges = np.minimum(np.arange(-(-length // block) + 1) * block, length) * _SIDE / length
    reach = np.clip(edges - (np.arange(_SIDE)[:, None] + 0.5), -_REACH, _REACH) / _REACH  # [32, number of blocks + 1]
    area = np.where(reach < 0, (1 + reach) ** 2 / 2, 1 - (1 - reach) ** 2 / 2)  # the triangle's area up to each edge
    weights = np.diff(area, axis=1)
    weights = np.asarray(weights / weights.sum(axis=1, keepdims=True), np.float32)
    weights.flags.writeable = False
    return weights


def _hash(grey: Floats) -> int:
    if grey.std() < _FLAT:
        return 0
    low = cv2.dct(grey)[:8, :8].ravel()  # frequencies from 0 to 4 periods in each direction
    bits = low > np.median(low[1:])
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def _candidates(hashes: npt.NDArray[np.uint64], distance: int) -> Iterator[tuple[Ints, Ints]]:
    """Find the pairs of places, the lower one first, whose hashes differ in at most `distance` bits; each pair once."""
    places = np.arange(len(hashes))
    tolerated = min(distance // _BANDS, _BAND_BITS)
    flips = [bits for n in range(tolerated + 1) for bits in combinations(range(_BAND_BITS), n)]
    earlier: list[npt.NDArray[np.uint64]] = []  # parts of all hashes, by which pairs were found before
    for band in range(_BANDS):
        # Neighbouring frequencies go together in many pictures: the parts are interleaved.
        keys = np.zeros(len(hashes), np.uint64)
        for bit in range(_BAND_BITS):
            keys |= (hashes >> np.uint64(bit * _BANDS + band) & np.uint64(1)) << np.uint64(bit)
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        for bits in flips:
            wanted = keys ^ np.uint64(sum(1 << bit for bit in bits))
            first, end = np.searchsorted(ordered, wanted), np.searchsorted(ordered, wanted, side="right")
            for some in _chunks(end - first):
                counts = (end - first)[some]
                left = np.repeat(places[some], counts)
                within = np.arange(len(left)) - np.repeat(np.cumsum(counts) - counts, counts)
                right = order[np.repeat(first[some], counts) + within]
                close = left < right
                close[close] = _count(hashes[left[close]] ^ hashes[right[close]]) <= distance
                left, right = left[close], right[close]
                for part in earlier:
                    anew = _count(part[left] ^ part[right]) > tolerated
                    left, right = left[anew], right[anew]
                yield left, right
        earlier.append(keys)


def _count(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint8]:
    """Count the bits that are 1 in each word, [P]; NumPy has a function for it from version 2."""
    return np.asarray(_BITS[words.view(np.uint8).reshape(-1, 8)].sum(axis=1, dtype=np.uint8))


def _chunks(counts: Ints) -> Iterator[slice]:
    """Cut the images into slices that have about a million candidates each."""
    totals = np.cumsum(counts)
    start = 0
    while start < len(counts):
        before = totals[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(totals, before + 2**20, side="right")))
        yield slice(start, stop)
        start = stop


class _Glance:
    """A quick test by 64 numbers of each image, which rules out most pairs before their small pictures are compared.

    The numbers are means over cells, which only remove the differences within cells: pairs that differ by too much here
    differ by no less in the whole small picture.

    Args:
        small: The small pictures of all images that may be asked for.
    """

    def __init__(self, small: Sequence[bytes]) -> None:
        self._is_known = np.array([bool(s) for s in small], bool)
        self._mean, self._sd = np.zeros((2, len(small)), np.float32)
        self._cells = np.zeros((len(small), _COARSE**2), np.float32)  # deviations from the mean
        step = _SIDE // _COARSE
        for start in range(0, len(small), _PAIRS):
            known = start + np.flatnonzero(self._is_known[start : start + _PAIRS])
            x = _grey(_stack([small[i][: 2 * _SIDE**2] for i in known.tolist()], 2 * _SIDE**2))  # [K, 32, 32]
            self._mean[known] = x.mean(axis=(1, 2))
            self._sd[known] = x.std(axis=(1, 2))
            cells = x.reshape(-1, _COARSE, step, _COARSE, step).mean(axis=(2, 4)).reshape(-1, _COARSE**2)
            self._cells[known] = cells - cells.mean(axis=1, keepdims=True)
        self._square = (self._cells**2).mean(axis=1)

    def __call__(self, left: Ints, right: Ints) -> npt.NDArray[np.bool_]:
        """Whether pairs may be alike."""
        known = self._is_known[left] & self._is_known[right]
        x, y = self._square[left], self._square[right]
        product = np.einsum("pc,pc->p", self._cells[left], self._cells[right]) / _COARSE**2
        least = np.minimum(x, y) - product**2 / np.maximum(np.maximum(x, y), 1e-9)  # square of the noise
        sd = np.minimum(self._sd[left], self._sd[right])
        return np.asarray(
            ~known
            | (np.abs(self._mean[left] - self._mean[right]) <= _OFFSET + 0.01)
            & (np.maximum(self._sd[left], self._sd[right]) <= (_GAIN + 0.01) * sd)
            & (least <= _tolerated(sd) ** 2 + 0.01)
        )


def _tolerated(sd: Floats) -> Floats:
    """The number of levels by which two small pictures of a standard deviation may differ."""
    return np.asarray(np.minimum(np.maximum(_NOISE[0], _NOISE[1] * sd), _MOST_NOISE * sd), np.float32)


def _alike(left: Sequence[bytes], right: Sequence[bytes]) -> npt.NDArray[np.bool_]:
    """Whether the small pictures of pairs are of one picture."""
    sizes = np.array([len(small) for small in left], np.int64)
    alike = sizes == np.array([len(small) for small in right], np.int64)
    for size in np.unique(sizes[alike & (sizes > 0)]):
        pairs = np.flatnonzero(alike & (sizes == size)).tolist()
        x, y = (_stack([side[i] for i in pairs], size) for side in (left, right))  # [P, size]
        alike[pairs] = _grey_alike(_grey(x), _grey(y)) & _colours_alike(_colours(x), _colours(y))
    return np.asarray(alike)


def _stack(rows: Sequence[bytes], size: int) -> npt.NDArray[np.uint8]:
    return np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), size)


def _grey(small: npt.NDArray[np.uint8]) -> Floats:
    """Take the grey pictures, [P, 32, 32], in levels."""
    numbers = small[:, : 2 * _SIDE**2].copy().view("<u2").reshape(-1, _SIDE, _SIDE)
    return np.asarray(numbers / np.float32(256), np.float32)


def _colours(small: npt.NDArray[np.uint8]) -> Floats:
    """Take the differences of channels from their mean, [P, 64, C], in levels; C is 0 for one channel."""
    cells = small[:, 2 * _SIDE**2 :].reshape(len(small), _COARSE**2, -1).astype(np.float32)
    return cells - cells.mean(axis=2, keepdims=True) if cells.size else cells


def _grey_alike(x: Floats, y: Floats) -> npt.NDArray[np.bool_]:
    x_mean, y_mean = x.mean(axis=(1, 2), keepdims=True), y.mean(axis=(1, 2), keepdims=True)
    x, y = x - x_mean, y - y_mean
    x_sd, y_sd = x.std(axis=(1, 2)), y.std(axis=(1, 2))
    correlation = (x * y).mean(axis=(1, 2)) / (x_sd * y_sd)
    gain = x_sd / y_sd
    sd = np.minimum(x_sd, y_sd)
    noise = np.sqrt(np.maximum(1 - correlation**2, 0)) * sd  # beyond a gain and an offset
    return np.asarray(
        (correlation > 0)
        & (np.abs(x_mean - y_mean).ravel() <= _OFFSET)
        & (np.maximum(gain, 1 / gain) <= _GAIN)
        & (noise <= _tolerated(sd))
        & (_correlation(_details(x), _details(y)) >= _DETAIL)
    )


def _details(x: Floats) -> Floats:
    """Subtract from pictures [P, 32, 32] their blur over 5 x 5 pixels, and so shading that a camera's images share."""
    return np.asarray(x - np.stack([cv2.blur(one, (5, 5)) for one in x]), np.float32)


def _correlation(x: Floats, y: Floats) -> Floats:
    norms = np.sqrt((x**2).sum(axis=(1, 2)) * (y**2).sum(axis=(1, 2)))
    return np.asarray((x * y).sum(axis=(1, 2)) / np.maximum(norms, 1e-6), np.float32)


def _colours_alike(x: Floats, y: Floats) -> npt.NDArray[np.bool_]:
    apart = np.sqrt(((x - y) ** 2).mean(axis=1))  # [P, C]
    return np.asarray((apart <= _COLOUR).all(axis=1))


def _roots(parent: Ints, which: Ints) -> Ints:
    """Find the first image of each image's group, in the forest of `parent`."""
    roots = parent[which]
    while not np.array_equal(higher := parent[roots], roots):
        roots = higher
    return roots


def _root(parent: Ints, one: int) -> int:
    while parent[one] != one:
        parent[one] = parent[parent[one]]
        one = parent[one]
    return int(one)
