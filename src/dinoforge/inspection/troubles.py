"""Troubles of the images, each kind named once; docs/inspect.md lists the codes."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from dinoforge.data.folders import left_out_in_words
from dinoforge.inspection.gather import Seen, Unread
from dinoforge.inspection.result import Alike, Copies, LabelsFound, Trouble, Values

NARROW = 0.25
"""Share of a type's range below which values are called narrow."""

FLAT, TINY, HUGE = 4.0, 16, 25_000_000
"""Aspect, shorter side in pixels, and pixels from which on an image is called flat, tiny, and huge."""

_CLIPPED = 0.01  # share of the values of a channel that is worth a word
_HOT = 2.0  # times the range of nearly all values, from their end to the largest one
_SUSPECTS = (-9999.0, -32768.0, -32767.0, -99999.0, 65535.0, -3.4028234663852886e38, 1e20, 0.0)
_EXAMPLES = 5
_REASONS = 12  # groups of unreadable images that are told apart

Which = Callable[[Seen], bool]


@dataclass(frozen=True)
class Facts:
    """Everything in which troubles are looked for."""

    seen: Sequence[Seen]
    unread: Sequence[Unread]
    values: Sequence[Values]
    labels: LabelsFound
    copies: Copies
    left_out: Mapping[str, int]
    odd_names: int
    odd_examples: tuple[str, ...]
    channels: int  # wanted
    plane: str | None  # the recipe's data.plane
    fill: int
    range: str  # the key that says it; '' where there is none
    range_by: str  # measured, or given
    is_minmax: bool
    side: int  # side of a global crop


def find(facts: Facts) -> tuple[Trouble, ...]:
    """Find all troubles, those that cost images or make them wrong first."""
    found = [
        *_unreadable(facts),
        *_refused(facts),
        *_of_files(facts),
        *_of_channels(facts),
        *_of_values(facts),
        *_of_planes(facts),
        *_of_sizes(facts),
        *_of_labels(facts),
        *_of_copies(facts.copies),
        *_of_folder(facts),
    ]
    return tuple(sorted(found, key=lambda trouble: not trouble.serious))


def suspected_nodata(values: Values) -> float | None:
    """A number far from all others that many values have, such as -9999; None: there is none."""
    for suspect in _SUSPECTS:
        for channel in values.channels:
            low, *_, high = channel.percentiles
            _, second, median, last, _ = channel.percentiles
            if suspect == low == channel.min and _is_apart(suspect, second, median, last, high):
                return suspect
            if suspect == high == channel.max and suspect != 0 and _is_apart(-suspect, -last, -median, -second, -low):
                return suspect
    return None


def _is_apart(suspect: float, second: float, median: float, last: float, high: float) -> bool:
    """Whether the lowest value, `suspect`, lies further below the others than these are apart."""
    start = second if second > suspect else median
    return suspect < 0 and start > suspect and start - suspect > 2 * (max(last, high) - start) > 0


def _unreadable(facts: Facts) -> Iterator[Trouble]:
    groups: defaultdict[str, list[Unread]] = defaultdict(list)
    for one in facts.unread:
        groups[re.sub(r"\d[\d,.]*", "0", one.reason)].append(one)
    ordered = sorted(groups.values(), key=len, reverse=True)
    for group in ordered[:_REASONS]:
        reason = group[0].reason
        yield Trouble(
            "unreadable",
            f"{_count(len(group), 'image')} cannot be read: {reason}",
            len(group),
            _names(group),
            "" if ": " in reason else "fetch it again, or take it out",
            serious=True,
        )
    if rest := [one for group in ordered[_REASONS:] for one in group]:
        said = f"{_count(len(rest), 'more image')} cannot be read, for other reasons, such as: {rest[0].reason}"
        yield Trouble("unreadable", said, len(rest), _names(rest), serious=True)


def _refused(facts: Facts) -> Iterator[Trouble]:
    groups: defaultdict[str, list[Seen]] = defaultdict(list)
    for one in facts.seen:
        if one.refused:
            groups[re.sub(r"-?\d[\d,.e+-]*", "0", one.refused)].append(one)
    for group in sorted(groups.values(), key=len, reverse=True)[:_REASONS]:
        said = f"{_count(len(group), 'image')} can be read, but training refuses them: {group[0].refused}"
        yield Trouble("refused", said.replace("refuses them", _refuses(group)), len(group), _names(group), serious=True)


def _of_files(facts: Facts) -> Iterator[Trouble]:
    misnamed: defaultdict[tuple[str, str], list[Seen]] = defaultdict(list)
    for one in facts.seen:
        if not one.is_named:
            misnamed[(one.end, one.kind)].append(one)
    for (end, kind), group in sorted(misnamed.items()):
        said = f"{_count(len(group), 'file')} named .{end} {_are(group, 'holds', 'hold')} {kind}"
        yield Trouble("misnamed", f"{said}, and {_are(group)} read as {kind}", len(group), _names(group))
    foreign: defaultdict[tuple[str, str], list[Unread]] = defaultdict(list)
    for lost in facts.unread:
        if lost.kind and not lost.is_named:
            foreign[(lost.end, lost.kind)].append(lost)
    for (end, kind), lost_ones in sorted(foreign.items()):
        said = f"{_count(len(lost_ones), 'file')} named .{end} {_are(lost_ones, 'holds', 'hold')} another thing: {kind}"
        yield Trouble("misnamed", said, len(lost_ones), _names(lost_ones), serious=True)

    yield from _those(
        facts,
        "repaired",
        lambda one: one.repaired,
        "{n} without {their} end, with all rows there: read",
        noun="JPEG file",
    )
    yield from _those(
        facts,
        "bare_cmyk",
        lambda one: one.bare_cmyk,
        "{n} without Adobe's marker: read as CMYK stored upright, as the standard says",
        noun="CMYK JPEG",
    )
    profiles: defaultdict[str, list[Seen]] = defaultdict(list)
    for one in facts.seen:
        if one.profile and "srgb" not in one.profile.lower():
            profiles[one.profile].append(one)
    for profile, group in sorted(profiles.items(), key=lambda item: -len(item[1]))[:_REASONS]:
        said = f"{_have(group)} the colour profile {profile}, which is not applied"
        yield Trouble("colour_profile", said, len(group), _names(group), "convert to sRGB where colours have to agree")
    yield from _those(
        facts,
        "orientation",
        lambda one: one.orientation is not None and not 1 <= one.orientation <= 8,
        "{n} with an EXIF orientation that is none of 1 to 8: ignored",
    )


def _of_channels(facts: Facts) -> Iterator[Trouble]:
    wanted = facts.channels
    yield from _those(
        facts,
        "laid_over_white",
        lambda one: one.laid_over_white,
        "{n} with transparency {are} laid over white, as viewers show {them}",
        way="give opaque images where that is not what they show",
    )
    yield from _those(
        facts,
        "alpha_dropped",
        lambda one: wanted in (1, 3) and bool(one.transparent) and not one.laid_over_white,
        "{n} with transparency that is 0 everywhere: it is dropped, and the colours are taken as they are",
    )
    yield from _those(
        facts,
        "band_left_out",
        lambda one: wanted in (1, 3) and (one.colour, one.channels) in ((3, 4), (1, 2)),
        f"{{n}} with one more band beside the picture, such as infrared or alpha: student.in_chans={wanted} leaves it "
        "out, and nothing is laid over white",
        way="student.in_chans=4 takes red, green, blue and the band" if wanted == 3 else "",
    )
    counts = Counter(one.channels for one in facts.seen)
    if len(counts) > 1:
        ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        said = ", ".join(f"{channels} in {number:,}" for channels, number in ordered)
        usual = ordered[0][0]
        others = sorted(
            (one for one in facts.seen if one.channels != usual), key=lambda one: (counts[one.channels], one.index)
        )
        serious = bool(set(counts) - {1, 3, 4})
        yield Trouble(
            "mixed_channels",
            f"the images have different numbers of channels: {said}",
            len(others),
            _names(others),
            "keep them apart, or say student.in_chans: grey becomes colour, more bands are refused" if serious else "",
            serious=serious,
        )
    deep = [one for one in facts.seen if one.bits > 8]
    if deep and len(deep) < len(facts.seen):
        shallow = len(facts.seen) - len(deep)
        said = (
            f"{_count(len(deep), 'image')} {_are(deep, 'has', 'have')} more than 8 bits, {_count(shallow, 'other')} "
            f"{'has' if shallow == 1 else 'have'} 8: brightness means another thing in each"
        )
        yield Trouble("mixed_depths", said, len(deep), _names(deep), "keep them apart, or give data.range")


def _of_values(facts: Facts) -> Iterator[Trouble]:
    for values in facts.values:
        of_type = [
            one
            for one in facts.seen
            if (one.type, one.bits, one.channels) == (values.type, values.bits, len(values.channels))
        ]
        what = f"{values.type}, {values.bits} bits" if values.bits < 8 * _bytes(values.type) else values.type
        low = min(channel.percentiles[0] for channel in values.channels)
        high = max(channel.percentiles[-1] for channel in values.channels)
        suspect = suspected_nodata(values)
        if suspect is not None:
            yield Trouble(
                "suspected_nodata",
                f"{what}: many values are {suspect:.10g}, far from all others, and no tag says that this means no data",
                values.images,
                _names(of_type),
                f"data.nodata={suspect:.10g}",
                serious=True,
            )
        is_ranged = bool(facts.range) and _takes_range(values)
        instead = f"; {facts.range}, {facts.range_by}, is used instead" if is_ranged else ""
        if facts.is_minmax and _deep(values):
            instead = "; data.sixteen_bit=minmax spreads each image by itself, and relative brightness is lost"
        if facts.range and _deep(values) and values.levels < NARROW and low < high:
            yield Trouble(
                "few_levels",
                f"{_count(values.images, 'image')} of {what}: nearly all values, {low:,.6g} to {high:,.6g}, become "
                f"{values.levels * 255:.0f} of 255 levels, since {facts.range}, {facts.range_by}, holds for all",
                values.images,
                _names(of_type),
                "keep images of different scales apart, or give another data.range",
                serious=True,
            )
        if not values.is_within:
            yield Trouble(
                "outside_range",
                f"{_count(values.images, 'image')} of {what}: values from {low:,.6g} to {high:,.6g} lie outside what "
                f"data.sixteen_bit=full takes, and it refuses them{instead}",
                values.images,
                _names(of_type),
                "" if instead else f"data.range=[{_rounded(low)},{_rounded(high)}]",
                serious=not instead,
            )
        elif 0 < values.fills < NARROW and values.type != "bool":  # one value for all is no matter of range
            yield Trouble(
                "narrow_range",
                f"{_count(values.images, 'image')} of {what}: nearly all values, {low:,.6g} to {high:,.6g}, fill "
                f"{values.fills:.1%} of the type's range, so data.sixteen_bit=full makes few levels of them{instead}",
                values.images,
                _names(of_type),
                "" if instead else f"data.range=[{_rounded(low)},{_rounded(high)}]",
                serious=not instead,
            )
        elif _deep(values) and values.type[0] != "f":
            small = [one for one in of_type if one.high < NARROW * ((1 << values.bits) - 1)]
            if small and len(small) < len(of_type):
                darkest = max(one.high for one in small)
                yield Trouble(
                    "narrow_range",
                    f"{_have(small)} {what} values of no more than {darkest:,.6g}, others up to {high:,.6g}: with one "
                    "range for all, these are dark",
                    len(small),
                    _names(small),
                    "keep images of different scales, such as 12 and 16 bits, apart",
                    serious=True,
                )
        clipped = max((channel.clipped for channel in values.channels), default=0.0)
        if clipped > _CLIPPED and (values.is_within or facts.range or facts.is_minmax):  # else they are refused
            yield Trouble(
                "clipped",
                f"{what}: up to {clipped:.1%} of a channel's values lie beyond what becomes 0 and 255, and are clipped",
                values.images,
                _names(of_type),
                "a wider data.range",
                serious=clipped > 10 * _CLIPPED,
            )
        if any(_is_hot(c.max - c.percentiles[-1], c.percentiles) for c in values.channels):
            top = max(channel.max for channel in values.channels)
            yield Trouble(
                "hot_pixels",
                f"{what}: a few values reach {top:,.6g}, far beyond nearly all others (99.9 % are below {high:,.6g})",
                values.images,
                _names(of_type),
                "data.range instead of data.sixteen_bit=minmax" if facts.is_minmax else "",
                serious=facts.is_minmax,
            )
    by: defaultdict[str, list[Seen]] = defaultdict(list)
    for one in facts.seen:
        if one.no_data_by:
            by[one.no_data_by].append(one)
    for told, group in sorted(by.items(), key=lambda item: -len(item[1]))[:_REASONS]:
        share = sum(one.no_data for one in group) / len(group)
        yield Trouble(
            "no_data",
            f"{_have(group)} no data in {share:.1%} of {_are(group, 'its', 'their')} values, by {told}: these become "
            f"level {facts.fill} (data.fill), and count in no range",
            len(group),
            _names(group),
        )
    yield from _those(facts, "blank", lambda one: one.is_blank, "{n} of one single colour", noun="image")


def _takes_range(values: Values) -> bool:
    """Whether a range is for values of this type: 8 bits are left alone by one that goes beyond 255."""
    return values.type not in ("uint8", "bool") or any((c.black, c.white) != (0, 255) for c in values.channels)


def _of_planes(facts: Facts) -> Iterator[Trouble]:
    groups: defaultdict[str, list[Seen]] = defaultdict(list)
    for one in facts.seen:
        if one.planes > 1:
            groups[one.along].append(one)
    for along, group in sorted(groups.items(), key=lambda item: -len(item[1])):
        fewest, most = min(one.planes for one in group), max(one.planes for one in group)
        number = f"{most:,}" if fewest == most else f"{fewest:,} to {most:,}"
        taken = {
            None: "the first is taken",
            "max": "the brightest value of all is taken",
            "each": "each is an image",
        }.get(facts.plane, f"number {facts.plane} is taken")
        said = f"{_count(len(group), 'file')} {_are(group, 'has', 'have')} {number} planes ({along}): {taken}"
        way = "data.plane=max, each, or a number" if facts.plane is None else ""
        if way and along == "page" and fewest == most:
            way += f"; student.in_chans={most} if they are the channels of one image"
        yield Trouble("planes", said, len(group), _names(group), way)


def _of_sizes(facts: Facts) -> Iterator[Trouble]:
    def sides(one: Seen) -> tuple[int, int]:
        return min(one.width, one.height), max(one.width, one.height)

    yield from _those(
        facts,
        "extreme_aspect",
        lambda one: sides(one)[1] > FLAT * sides(one)[0],
        f"{{n}} more than {FLAT:g} times as long as wide: crops show little of {{them}}, enlarged",
        way="cut into squares",
    )
    yield from _those(
        facts,
        "tiny",
        lambda one: sides(one)[0] < TINY,
        f"{{n}} below {TINY} pixels on the shorter side (crops have {facts.side})",
        way="leave out what shows nothing",
    )
    yield from _those(
        facts,
        "huge",
        lambda one: one.width * one.height > HUGE,
        f"{{n}} of more than {HUGE // 1_000_000} million pixels: each takes long to decode, for a few crops of it",
        way="cut into tiles of about 1,024 pixels, or for JPEG data.reduced_decode=true",
    )


def _of_labels(facts: Facts) -> Iterator[Trouble]:
    labels = facts.labels
    if not labels.classes:
        yield Trouble("no_labels", f"there are no labels: {labels.said.removeprefix('none: ')}", 0, sampled=False)
    elif labels.without:
        yield Trouble("strays", f"labels: {labels.said}", labels.without, sampled=False)
    if len(labels.parts) > 1:
        said = ", ".join(f"{count:,} in {part}" for part, count in labels.parts.items())
        yield Trouble(
            "split_folders", f"folders are parts of a split: {said}", sum(labels.parts.values()), sampled=False
        )


def _of_copies(copies: Copies) -> Iterator[Trouble]:
    words = {
        "files": ("same_files", "with the very same content"),
        "pixels": ("same_pixels", "with the same pixels in different files"),
        "near": ("near_duplicates", "that are nearly the same"),
    }
    for alike in copies.found:
        code, what = words[alike.how]
        yield from _alike(alike, code, what, sampled=not (alike.how == "files" and copies.files_complete))


def _alike(alike: Alike, code: str, what: str, *, sampled: bool) -> Iterator[Trouble]:
    if not alike.groups:
        return

    def pairs(groups: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
        return tuple(" = ".join(group) if code != "near_duplicates" else " ~ ".join(group) for group in groups)

    groups = _count(alike.groups, "group")
    yield Trouble(code, f"{groups} of images {what}", alike.images, pairs(alike.examples), sampled=sampled)
    if alike.across_parts:
        yield Trouble(
            f"{code}_across_parts",
            f"{_count(alike.across_parts, 'group')} of images {what} {_lie(alike.across_parts)} in more than one part "
            "of the split: measurements there are too good",
            alike.across_parts,
            pairs(alike.part_examples),
            "remove them from all parts but one",
            sampled=sampled,
            serious=True,
        )
    if alike.across_classes:
        yield Trouble(
            f"{code}_across_classes",
            f"{_count(alike.across_classes, 'group')} of images {what} {_lie(alike.across_classes)} in more than one "
            "class",
            alike.across_classes,
            pairs(alike.class_examples),
            "one label of each is wrong",
            sampled=sampled,
            serious=True,
        )


def _of_folder(facts: Facts) -> Iterator[Trouble]:
    if facts.left_out:
        total = sum(facts.left_out.values())
        yield Trouble("left_out", f"left out {left_out_in_words(facts.left_out)}", total, sampled=False)
    if facts.odd_names:
        yield Trouble(
            "odd_names",
            f"{_count(facts.odd_names, 'name')} with line ends, control characters, backslashes or bytes that are not "
            "UTF-8: written with escapes wherever names are listed",
            facts.odd_names,
            facts.odd_examples,
            sampled=False,
        )


def _those(
    facts: Facts, code: str, which: Which, said: str, *, noun: str = "image", way: str = "", serious: bool = False
) -> Iterator[Trouble]:
    """A trouble of those of the images that have it; `said` may use {n}, {are}, {their} and {them}."""
    group = [one for one in facts.seen if which(one)]
    if group:
        words = {"n": _count(len(group), noun), "are": _are(group), "their": _are(group, "its", "their")}
        words["them"] = _are(group, "it", "them")
        yield Trouble(code, said.format(**words), len(group), _names(group), way, serious=serious)


def _names(group: Sequence[Seen | Unread]) -> tuple[str, ...]:
    return tuple(one.name for one in group[:_EXAMPLES])


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _are(group: Sequence[object], one: str = "is", many: str = "are") -> str:
    return one if len(group) == 1 else many


def _have(group: Sequence[object]) -> str:
    return f"{_count(len(group), 'image')} {_are(group, 'has', 'have')}"


def _lie(number: int) -> str:
    return "lies" if number == 1 else "lie"


def _refuses(group: Sequence[object]) -> str:
    return f"refuses {_are(group, 'it', 'them')}"


def _bytes(of_type: str) -> int:
    return int(re.sub(r"\D", "", of_type) or 8) // 8


def _deep(values: Values) -> bool:
    """Whether a measured range is of such values."""
    return _bytes(values.type) > 1


def _is_hot(beyond: float, percentiles: Sequence[float]) -> bool:
    usual = percentiles[-1] - percentiles[0]
    return usual > 0 and beyond > _HOT * usual


def _rounded(value: float) -> str:
    return f"{value:.4g}"
