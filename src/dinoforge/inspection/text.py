"""An inspection as text for a terminal: aligned, of bounded length; what is cut is in the JSON."""

import textwrap
from collections.abc import Iterator, Mapping, Sequence

from dinoforge.data.folders import left_out_in_words
from dinoforge.inspection.result import Channel, Extreme, Inspection, Spread, Trouble, Values
from dinoforge.system.terminal import table

_WIDTH, _INDENT = 110, 11
_LISTED = 8  # items of a list in a line
_TYPES, _CHANNELS = 6, 13  # most types and channels in tables of values
_TROUBLES = 40
_BARS = " ▁▂▃▄▅▆▇█"


def inspection_text(found: Inspection) -> str:
    """Everything in words."""
    return "\n".join(
        [
            *_of_images(found),
            *_of_values(found),
            *_of_pixels(found),
            *_of_troubles(found.troubles),
            *_of_advice(found),
        ]
    )


def size(count: float) -> str:
    """A number of bytes in words."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:,.3g} {unit}"
    return f"{count:,.0f} bytes"


def listed(counts: Mapping[str, int], most: int = _LISTED, noun: str = "kinds") -> str:
    """The most frequent things with their number, such as ``510 JPEG, 1 PNG``."""
    shown = [f"{number:,} {thing}" for thing, number in list(counts.items())[:most]]
    if rest := list(counts.values())[most:]:
        shown.append(f"{sum(rest):,} of {len(rest):,} more {noun}")
    return "; ".join(shown) if any(", " in thing for thing in counts) else ", ".join(shown)


_MODES = {
    "1": "black and white",
    "L": "grey",
    "LA": "grey with transparency",
    "P": "palette",
    "RGBA": "RGB with transparency",
    "I": "grey, 32 bits",
    "I;16": "grey, 16 bits",
    "I;16B": "grey, 16 bits",
    "F": "grey, float32",
    "RGB;16": "RGB, 16 bits",
    "RGBA;16": "RGB with transparency, 16 bits",
}


def modes_in_words(modes: Mapping[str, int]) -> dict[str, int]:
    """Kinds of pixels as people call them, where Pillow has a code for them."""
    found: dict[str, int] = {}
    for mode, number in modes.items():
        words = _MODES.get(mode, mode)
        found[words] = found.get(words, 0) + number
    return found


def sampled(found: Inspection) -> str:
    """Which images were looked at."""
    sampling = found.sampling
    which = "all images" if sampling.is_all else f"{sampling.images:,} of {sampling.of:,} images"
    if sampling.is_all:
        return f"{which}, in {sampling.seconds:.1f} s"
    how = f"{which}, evenly spaced and each with its neighbour, in {sampling.seconds:.1f} s"
    if sampling.time_was_up:
        return f"{how}: time was up (--seconds {sampling.seconds_limit:g})"
    return f"{how} (--images {sampling.limit:,} --seconds {sampling.seconds_limit:g})"


def compared(found: Inspection) -> str:
    """Say where copies were looked for."""
    said = f"pixels of the {found.sampling.images:,} sampled images"
    if not found.copies.files_compared:
        return f"compared {said}"
    number = found.copies.files_compared
    files = f"all {number:,} files" if found.copies.files_complete else f"{number:,} files, until time was up,"
    return f"compared the content of {files} and the {said}"


def reading(found: Inspection) -> str:
    """Say what reading takes; '' where nothing could be read."""
    cost = found.cost
    if cost is None:
        return ""
    once = _duration(found.images / cost.images_per_second)
    said = (
        f"{_short(cost.median_seconds * 1e3)} ms an image (median), slowest {_extreme(cost.slowest, 1e3, 'ms')}; "
        f"{_short(cost.images_per_second)} images a second by one core, {once} for all of them once"
    )
    if cost.peak_bytes.value:
        said += f"; decoding takes up to {size(cost.peak_bytes.value)} in each worker ({cost.peak_bytes.name})"
    return said


def channel_row(number: int, channel: Channel) -> list[str]:
    """One channel's line of the table of values."""
    low, _, median, _, high = channel.percentiles
    ends = ["own min", "own max"] if channel.black is None else [_number(channel.black), _number(channel.white or 0.0)]
    return [
        str(number),
        *map(_number, (channel.min, low, median, high, channel.max)),
        *ends,
        f"{channel.clipped:.1%}" if channel.clipped else "none",
    ]


HEADERS = ("channel", "min", "0.1 %", "median", "99.9 %", "max", "becomes 0", "becomes 255", "clipped")


def values_said(values: Values) -> str:
    """Describe the values of one type."""
    kind = f"{values.type} x{len(values.channels)}"
    if values.type != "bool" and values.bits != 8 * int("".join(filter(str.isdigit, values.type)) or 8) // 8:
        kind += f", {values.bits} bits"
    images = f"{values.images:,} image{'' if values.images == 1 else 's'}"
    if values.is_within:
        return f"{kind} in {images}: nearly all lie within {values.fills:.1%} of the type's range"
    return f"{kind} in {images}: some lie outside what data.sixteen_bit=full takes"


def _of_images(found: Inspection) -> Iterator[str]:
    total = "" if found.bytes is None else f", {size(found.bytes)}"
    yield from _row("data", f"{found.data}: {found.images:,} images{total}; by name {listed(found.ends)}")
    if found.left_out:
        yield from _row("left out", left_out_in_words(found.left_out))
    yield from _row("looked at", sampled(found))
    readable = found.sampling.images - len(found.unreadable)
    yield from _row("readable", f"{readable:,} of {found.sampling.images:,}; by content {listed(found.kinds)}")
    if found.modes:
        yield from _row("pixels", listed(modes_in_words(found.modes)))
    if found.sizes is not None:
        s = found.sizes
        yield from _row(
            "sizes",
            f"width {_spread(s.width)}, height {_spread(s.height)}, shorter side {_spread(s.side)} pixels; "
            f"most oblong {s.flattest.value:.3g} : 1 ({s.flattest.name}); smallest {s.smallest.name}, largest "
            f"{s.largest.name} ({s.largest.value / 1e6:,.3g} megapixels); files {size(s.bytes.min)} to "
            f"{size(s.bytes.max)}, median {size(s.bytes.median)}",
        )
    if found.profiles:
        yield from _row("profiles", f"{listed(found.profiles)}; none is applied")
    if found.orientations:
        turned = {f"orientation {number}": count for number, count in found.orientations.items()}
        yield from _row("EXIF", f"{listed(turned)}; 2 to 8 are turned upright")
    yield from _row("labels", found.labels.said)
    if found.labels.classes:
        yield from _row("", listed(found.labels.classes, noun="classes"))
    for note in found.labels.notes:
        yield from _row("", note)
    if found.labels.parts:
        yield from _row("split", listed(found.labels.parts))
    counts = [
        f"{alike.groups:,} group{'' if alike.groups == 1 else 's'} of {_HOW[alike.how]}"
        for alike in found.copies.found
        if alike.groups
    ]
    yield from _row("copies", f"{', '.join(counts) or 'none'}; {compared(found)}")
    if reading(found):
        yield from _row("reading", reading(found))


_HOW = {"files": "equal files", "pixels": "equal pixels", "near": "nearly equal pixels"}


def _of_values(found: Inspection) -> Iterator[str]:
    for values in found.values[:_TYPES]:
        yield ""
        yield from _row("values", values_said(values))
        rows = [[*channel_row(i, c), _bars(c)] for i, c in enumerate(values.channels[:_CHANNELS])]
        for line in table([[*HEADERS, ""], *rows], right=range(len(HEADERS))).splitlines():
            yield f"{' ' * _INDENT}{line}"
        if rest := len(values.channels) - _CHANNELS:
            yield from _row("", f"and {rest:,} more channels") if rest > 0 else ()
    if rest := len(found.values[_TYPES:]):
        yield from _row("", f"and {rest:,} more types of values")


def _of_pixels(found: Inspection) -> Iterator[str]:
    if found.pixels is None:
        return
    yield ""
    mean, std = (", ".join(f"{x:.3f}" for x in row[:_CHANNELS]) for row in (found.pixels.mean, found.pixels.std))
    yield from _row("mean", f"{mean} (range 0 to 1); deviation {std}; of {found.pixels.images:,} images")
    yield from _row("up", upright(found))


def upright(found: Inspection) -> str:
    """Whether the images have an up, and what was measured."""
    pixels = found.pixels
    if pixels is None:
        return ""
    said = "there is none" if pixels.upside_down else "there is one, or too little to tell"
    if pixels.quarter_turns:
        said += ", and quarter turns change nothing"
    return f"{said}: {pixels.symmetry}"


def _of_troubles(troubles: Sequence[Trouble]) -> Iterator[str]:
    yield ""
    if not troubles:
        yield "Nothing is wrong with what was looked at."
        return
    yield "What one has to know (! costs images, or makes them wrong)"
    for trouble in troubles[:_TROUBLES]:
        mark = "!" if trouble.serious else "-"
        yield from _wrapped(f"{mark} {trouble.said}", "  ", "    ")
        if trouble.examples:
            yield from _wrapped(f"such as {', '.join(trouble.examples)}", "    ", "    ")
        if trouble.way:
            yield from _wrapped(f"way out: {trouble.way}", "    ", "    ")
    if rest := len(troubles[_TROUBLES:]):
        yield f"  and {rest:,} more: see --json"


def _of_advice(found: Inspection) -> Iterator[str]:
    yield ""
    if not found.advice:
        yield "No key is advised: nothing could be read."
        return
    yield "Keys (* has to be said; the recipe auto chooses the others by itself)"
    said = [f"{one.key}={one.value}" for one in found.advice]
    width = min(max(map(len, said)), 44)
    for text, one in zip(said, found.advice, strict=True):
        mark = "*" if one.by == "inspect" else " "
        yield from _wrapped(f"{mark} {text:<{width}}  {one.reason}", "  ", " " * (width + 6))
    yield ""
    yield found.command


def _row(label: str, text: str) -> Iterator[str]:
    yield from _wrapped(text, f"{label:<{_INDENT}}", " " * _INDENT)


def _wrapped(text: str, first: str, rest: str) -> list[str]:
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
        drop_whitespace=True,
    ) or [first.rstrip()]


def _bars(channel: Channel) -> str:
    """The histogram in 16 characters."""
    counts = channel.histogram.counts
    step = max(len(counts) // 16, 1)
    sums = [sum(counts[start : start + step]) for start in range(0, len(counts), step)]
    top = max(max(sums), 1)
    return "".join(_BARS[-(-count * (len(_BARS) - 1) // top)] for count in sums)


def _spread(s: Spread) -> str:
    return f"{s.min:,.0f}" if s.min == s.max else f"{s.min:,.0f} to {s.max:,.0f} (median {s.median:,.0f})"


def _extreme(e: Extreme, scale: float, unit: str) -> str:
    return f"{_short(e.value * scale)} {unit} ({e.name})"


def _short(value: float) -> str:
    """Three digits that count, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e12 else f"{value:,.4g}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{_short(seconds)} s"
    return f"{_short(seconds / 60)} min" if seconds < 7200 else f"{_short(seconds / 3600)} h"
