"""The findings of an inspection, as data; ``as_json`` makes one object of them, whose keys docs/inspect.md lists."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any


@dataclass(frozen=True)
class Sampling:
    """Which images were looked at.

    Args:
        images: Number of images that were looked at.
        of: Number of images in all.
        limit: Most images that may be looked at.
        seconds, seconds_limit: Seconds that the look took, and that it may take.
        time_was_up: Whether the limit of seconds ended the look.
    """

    images: int
    of: int
    limit: int
    seconds: float
    seconds_limit: float
    time_was_up: bool

    @property
    def is_all(self) -> bool:
        return self.images == self.of


@dataclass(frozen=True)
class Spread:
    """The smallest, the median and the largest of something."""

    min: float
    median: float
    max: float


@dataclass(frozen=True)
class Extreme:
    """An image that is the most or the least of something."""

    name: str
    value: float


@dataclass(frozen=True)
class Sizes:
    """Sizes of the images that could be read, in pixels.

    Args:
        width, height, side: Width and height; ``side`` is the shorter of both.
        bytes: Size of a file in bytes.
        flattest: The image whose longer side is longest beside its shorter one, and by how much.
        smallest, largest: The images with the fewest and the most pixels.
    """

    width: Spread
    height: Spread
    side: Spread
    bytes: Spread
    flattest: Extreme
    smallest: Extreme
    largest: Extreme


@dataclass(frozen=True)
class Histogram:
    """Counts of values in bins of equal width; what lies outside is in the first and the last.

    Args:
        low, high: Beginning of the first bin, and end of the last.
        counts: Count of each bin.
    """

    low: float
    high: float
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Channel:
    """The values of one channel as the files store them.

    Args:
        min, max: Smallest and largest of all values that are data.
        percentiles: 0.1, 1, 50, 99 and 99.9 % of a sample of the values lie below.
        black, white: Values that become 0 and 255; None: each image's own minimum and maximum.
        below, above: Share of the values beyond black and white, which are clipped.
        histogram: Histogram of a sample of the values.
    """

    min: float
    max: float
    percentiles: tuple[float, float, float, float, float]
    black: float | None
    white: float | None
    below: float
    above: float
    histogram: Histogram

    @property
    def clipped(self) -> float:
        return self.below + self.above


@dataclass(frozen=True)
class Values:
    """The values of the images of one type.

    Args:
        type: Type of the values, such as ``uint16``.
        bits: Number of bits that count, such as 12 where the files say so.
        images: Number of images that have the type.
        channels: The channels; transparency is none.
        fills: Share of the range that ``data.sixteen_bit=full`` maps to 0 to 255 which lies between the percentiles 0.1
            and 99.9 of the values.
        is_within: Whether all values lie within that range; others are refused unless the keys give a range.
        levels: Share of the levels 0 to 255 that nearly all values become under the keys that would be used.
    """

    type: str
    bits: int
    images: int
    channels: tuple[Channel, ...]
    fills: float
    is_within: bool
    levels: float


@dataclass(frozen=True)
class Alike:
    """Images that are the same, or nearly.

    Args:
        how: ``files`` are equal byte by byte; ``pixels`` are one picture in different files; ``near`` are nearly equal.
        groups: Number of groups of images that are alike.
        images: Number of images in these groups.
        examples: Names of some groups.
        across_parts: Groups that lie in more than one of train/, val/, test/…
        across_classes: Groups whose images have different labels.
        part_examples, class_examples: Names of an image on either side.
    """

    how: str
    groups: int
    images: int
    examples: tuple[tuple[str, ...], ...] = ()
    across_parts: int = 0
    part_examples: tuple[tuple[str, ...], ...] = ()
    across_classes: int = 0
    class_examples: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Copies:
    """Images that are there more than once.

    Args:
        files_compared: Files whose size, and where that agrees content, was compared; 0 where the data are no folder.
        files_complete: Whether these are all.
        found: The groups of each way of being alike.
    """

    files_compared: int
    files_complete: bool
    found: tuple[Alike, ...]


@dataclass(frozen=True)
class LabelsFound:
    """Labels that evaluation would use.

    Args:
        said: A sentence: how many classes, from where, and which images have none; or why there are none.
        notes: What was guessed.
        classes: Images of each class, the largest first.
        without: Images without a label.
        parts: Images in each part of a split: train, val, test…
    """

    said: str
    notes: tuple[str, ...]
    classes: Mapping[str, int]
    without: int
    parts: Mapping[str, int]


@dataclass(frozen=True)
class Cost:
    """Cost of reading images on this machine.

    Args:
        median_seconds, slowest: Seconds to read and decode one image: the median, and the slowest image.
        images_per_second: Images that one core reads in a second.
        peak_bytes: Estimated most memory that decoding takes, and the image that takes it.
    """

    median_seconds: float
    slowest: Extreme
    images_per_second: float
    peak_bytes: Extreme


@dataclass(frozen=True)
class Pixels:
    """The pixels that training gets.

    Args:
        images: Number of images that were measured.
        mean, std: Mean and standard deviation of each channel, on the range 0 to 1.
        upside_down: Whether there is no up.
        mirrored, quarter_turns: Whether mirroring and quarter turns change nothing.
        symmetry: What was measured.
    """

    images: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    upside_down: bool
    mirrored: bool
    quarter_turns: bool
    symmetry: str


@dataclass(frozen=True)
class Trouble:
    """A fault of some of the images, or something that a user has to know about them.

    Args:
        code: Stable word for it, such as ``narrow_range``.
        said: A sentence.
        images: How many of those that were looked at have it; of all images where `sampled` is False.
        examples: Names of some.
        way: What to do; '' where nothing has to be done.
        sampled: Whether it was looked for in the sample alone.
        serious: Whether it costs images, or makes them wrong.
    """

    code: str
    said: str
    images: int
    examples: tuple[str, ...] = ()
    way: str = ""
    sampled: bool = True
    serious: bool = False


@dataclass(frozen=True)
class Advice:
    """A key that the user should give.

    Args:
        key, value: Key and value as on the command line.
        reason: Why the value fits the images.
        by: Who chooses it: ``auto``, the recipe auto by itself; or ``inspect``, so that the user has to give it.
    """

    key: str
    value: str
    reason: str
    by: str


@dataclass(frozen=True)
class Crops:
    """An image, and what the network gets of it; pictures as data addresses."""

    name: str
    size: tuple[int, int]  # height, width
    image: str
    crops: tuple[str, ...]  # two global ones, then the local ones, all after their colours have changed


@dataclass(frozen=True)
class Inspection:
    """Everything that an inspection found; see docs/inspect.md."""

    data: str
    images: int
    bytes: int | None  # size of all files; None where the data are no folder, or time was up
    sampling: Sampling
    ends: Mapping[str, int]  # ends of the names of all images -> how many
    kinds: Mapping[str, int]  # kinds by content -> how many of the sample
    modes: Mapping[str, int]  # kinds of pixels -> how many of the sample
    left_out: Mapping[str, int]
    unreadable: tuple[tuple[str, str], ...]  # name and reason of all of the sample
    refused: tuple[tuple[str, str], ...]  # name and reason of readable images that training refuses
    profiles: Mapping[str, int]  # embedded colour profiles -> how many of the sample
    orientations: Mapping[str, int]  # EXIF orientations -> how many of the sample
    sizes: Sizes | None
    values: tuple[Values, ...]
    no_data: float  # share of the values of the sample that are no data
    labels: LabelsFound
    copies: Copies
    pixels: Pixels | None
    cost: Cost | None
    troubles: tuple[Trouble, ...]
    channels: int  # number of channels that the keys below ask for
    advice: tuple[Advice, ...]
    command: str
    crops: tuple[Crops, ...] = field(default=(), metadata={"json": False})
    shown_channels: str = field(default="", metadata={"json": False})

    def as_json(self) -> dict[str, Any]:
        """One object of JSON, without pictures; numbers that are not finite are text."""
        plain = _plain(self)
        assert isinstance(plain, dict)
        return plain


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        shown = [part.name for part in fields(value) if part.metadata.get("json", True)]
        return {name: _plain(getattr(value, name)) for name in shown}
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
