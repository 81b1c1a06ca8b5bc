"""The number of channels to read a data set's images with."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from dinoforge.data.decode import read_values
from dinoforge.data.headers import channels_said, size_and_kind
from dinoforge.data.pictures import AnImage
from dinoforge.data.sampling import spaced, spread
from dinoforge.data.sources import Source
from dinoforge.data.statistics import bytes_of
from dinoforge.errors import ImageError

_HEADERS = 64  # images whose headers are read
_BANDS = 4  # images of a kind whose last band is examined, where it may be no more than a mask
_BYTES = 2e9  # bytes of files that are read
_GREY = frozenset(("1", "L", "LA", "La", "I", "F", "I;16", "I;16B", "I;16L", "I;16N"))


@dataclass(frozen=True)
class Channels:
    """The number of channels to read, and why."""

    count: int
    reason: str


@dataclass(frozen=True)
class Has:
    """The channels that an image has.

    Args:
        channels: The number of channels.
        is_picture: Whether the image can be read as grey and as RGB, too.
    """

    channels: int
    is_picture: bool

    def serves(self, count: int) -> bool:
        return self.channels == count or (self.is_picture and count in (1, 3))


def has_of(kind: str) -> Has:
    """The channels of images of a kind, as ``size_and_kind`` names it."""
    count = channels_said(kind)
    if count is None:
        mode = kind.partition(",")[0]
        return Has(1 if mode in _GREY or mode.removesuffix(";16") in _GREY else 3, True)
    return Has(count, count in (1, 3) or "RGB and 1 more band" in kind)


def channels_of(source: Source) -> Channels:
    """Choose the number of channels that most of some images have.

    Grey images beside colour ones make 3. A band beside the colours or beside grey in a TIFF is a channel unless it has
    no more than two values, as a mask or a transparency that says little. Transparency of other files is no channel,
    since images are laid over white.
    """
    kinds: Counter[str] = Counter()
    beside: dict[str, list[Has]] = {}  # by kind, for kinds whose last band may be no channel
    size = 0
    for index in spread(spaced(len(source), _HEADERS)):
        if size > _BYTES:
            break
        try:
            image = source.item(index).image
            size += bytes_of(image)
            kind = size_and_kind(image)[2]
            if has_of(kind).channels in (2, 4) and len(found := beside.setdefault(kind, [])) < _BANDS:
                found.append(_last_band(image, has_of(kind)))
        except ImageError:
            continue  # training reports it when it comes to it
        kinds[kind] += 1
    have: Counter[Has] = Counter()
    dropped = 0
    for kind, number in kinds.items():
        one = max(beside[kind], key=lambda has: has.channels) if beside.get(kind) else has_of(kind)
        dropped += number if one.channels < has_of(kind).channels else 0
        have[one] += number
    chosen = most(have)
    if dropped and chosen.count in (1, 3):
        return Channels(chosen.count, f"{chosen.reason}; the last band of {dropped} is a mask or a transparency")
    return chosen


def _last_band(image: AnImage, has: Has) -> Has:
    """The channels of an image of two or four, by the values of the last one."""
    found = read_values(image)
    if found is None or found.alpha:
        return Has(has.channels - 1, True)
    if found.colour != has.channels - 1:
        return has
    band = found.values[:, :, -1]
    is_mask = bool(((band == band.min()) | (band == band.max())).all())
    return Has(has.channels - is_mask, True)


def most(have: Mapping[Has, int]) -> Channels:
    """Choose the number of channels that most images have, where grey and RGB are one kind."""
    total = sum(have.values())
    if not total:
        return Channels(3, "no image could be looked at")
    groups: Counter[int] = Counter()
    for has, number in have.items():
        groups[3 if has.channels == 1 else has.channels] += number
    count = max(groups, key=lambda group: (groups[group], group == 3, group))
    if count == 3 and not any(has.channels == 3 for has in have):
        count = 1
    others = Counter({has.channels: 0 for has in have if not has.serves(count)})
    for has, number in have.items():
        if not has.serves(count):
            others[has.channels] += number
    if not others:
        mixed = " (grey and colour)" if count == 3 and any(has.channels == 1 for has in have) else ""
        return Channels(count, f"as all {total} images that were looked at{mixed}")
    refused = sum(others.values())
    which = ", ".join(f"{number} with {channels}" for channels, number in sorted(others.items()))
    return Channels(
        count,
        f"as {total - refused} of {total} images that were looked at; the others will be refused: {which} channels",
    )


def guess_channels(source: Source) -> int:
    """The number of channels to read images with; see ``channels_of``."""
    return channels_of(source).count
