"""An inspection as one self-contained HTML page, without scripts."""

import html
import re
import time
from collections.abc import Iterable, Sequence
from importlib.resources import files

from dinoforge.data.folders import left_out_in_words
from dinoforge.inspection import text
from dinoforge.inspection.result import Channel, Inspection, Trouble

_CHANNELS = 16  # whose histograms are drawn, of each type
_LISTED = 100  # unreadable images
_CLASSES = 30


def page(found: Inspection) -> str:
    """The HTML of an inspection."""
    title = html.escape(found.data)
    style = files("dinoforge.report").joinpath("page.css").read_text(encoding="utf-8")
    style += files("dinoforge.inspection").joinpath("page.css").read_text(encoding="utf-8")
    body = "\n".join(
        [
            f"<h1>{title}</h1>",
            f'<p class="hint">dinoforge inspect, {time.strftime("%Y-%m-%d %H:%M")} · {_text(text.sampled(found))}</p>',
            _troubles(found.troubles),
            _images(found),
            _values(found),
            _crops(found),
            _copies(found),
            _unreadable(found),
            _keys(found),
        ]
    )
    values = {"TITLE": title, "STYLE": style, "BODY": body}
    return re.sub(r"@([A-Z]+)@", lambda mark: values[mark[1]], _PAGE)  # nothing put in is replaced again


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>@TITLE@ · dinoforge inspect</title>
<style>@STYLE@</style>
</head>
<body>
<main>
@BODY@
</main>
</body>
</html>
"""


def _troubles(troubles: Sequence[Trouble]) -> str:
    head = '<h2>What one has to know</h2><p class="hint">What costs images, or makes them wrong, comes first.</p>'
    if not troubles:
        return f"{head}<p>Nothing is wrong with what was looked at.</p>"
    items = []
    for one in troubles:
        such = f'<p class="hint">such as {_names(one.examples)}</p>' if one.examples else ""
        way = f'<p class="hint">Way out: <code>{_text(one.way)}</code></p>' if one.way else ""
        mark = "note finding" if one.serious else "note"
        items.append(
            f'<div class="{mark}"><p>{_text(one.said)} <span class="code">{_text(one.code)}</span></p>{such}{way}</div>'
        )
    return head + "".join(items)


def _images(found: Inspection) -> str:
    total = "" if found.bytes is None else f", {text.size(found.bytes)}"
    readable = found.sampling.images - len(found.unreadable)
    rows = [
        ("images", f"{found.images:,}{total}; by name {text.listed(found.ends, 20)}"),
        ("left out", left_out_in_words(found.left_out) if found.left_out else "nothing"),
        ("looked at", text.sampled(found)),
        ("readable", f"{readable:,}; by content {text.listed(found.kinds, 20)}"),
        ("kinds of pixels", text.listed(text.modes_in_words(found.modes), 20)),
    ]
    if (sizes := found.sizes) is not None:
        rows += [
            (name, f"{spread.min:,.0f} to {spread.max:,.0f}, median {spread.median:,.0f} pixels")
            for name, spread in (("width", sizes.width), ("height", sizes.height), ("shorter side", sizes.side))
        ]
        rows += [
            ("most oblong", f"{sizes.flattest.value:.3g} : 1, {sizes.flattest.name}"),
            ("smallest", f"{sizes.smallest.value:,.0f} pixels, {sizes.smallest.name}"),
            ("largest", f"{sizes.largest.value:,.0f} pixels, {sizes.largest.name}"),
            ("a file", f"{text.size(sizes.bytes.min)} to {text.size(sizes.bytes.max)}"),
        ]
    if found.profiles:
        rows.append(("colour profiles", f"{text.listed(found.profiles, 20)}; none is applied"))
    if found.orientations:
        turned = {f"orientation {number}": count for number, count in found.orientations.items()}
        rows.append(("EXIF", f"{text.listed(turned)}; 2 to 8 are turned upright"))
    rows.append(("labels", found.labels.said))
    if found.labels.classes:
        rows.append(("classes", text.listed(found.labels.classes, _CLASSES, "classes")))
    rows += [("", note) for note in found.labels.notes]
    if found.labels.parts:
        rows.append(("split", text.listed(found.labels.parts)))
    if text.reading(found):
        rows.append(("reading", text.reading(found)))
    head = '<h2>The images</h2><p class="hint">Names are those of all images, what is inside is that of the sample.</p>'
    return head + _table(rows)


def _values(found: Inspection) -> str:
    parts = [
        '<h2>Their values</h2><p class="hint">As the files store them. The dashed lines are what becomes 0 and 255; '
        "what lies beyond is clipped.</p>"
    ]
    for values in found.values:
        parts.append(f"<h3>{_text(text.values_said(values))}</h3>")
        head = "".join(f"<th>{_text(name)}</th>" for name in text.HEADERS)
        rows = "".join(
            f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in text.channel_row(number, channel))}</tr>"
            for number, channel in enumerate(values.channels[:_CHANNELS])
        )
        parts.append(f'<div class="scroll"><table class="numbers"><tr>{head}</tr>{rows}</table></div>')
        charts = "".join(
            f'<figure class="card"><figcaption>channel {number}</figcaption>{_histogram(channel)}</figure>'
            for number, channel in enumerate(values.channels[:_CHANNELS])
        )
        parts.append(f'<div class="histograms">{charts}</div>')
        if rest := values.channels[_CHANNELS:]:
            parts.append(f'<p class="hint">and {len(rest):,} more channels</p>')
    if found.no_data:
        parts.append(f"<p>No data: {found.no_data:.2%} of the values.</p>")
    if (pixels := found.pixels) is not None:
        mean, std = (", ".join(f"{x:.3f}" for x in row[:_CHANNELS]) for row in (pixels.mean, pixels.std))
        rows_of_pixels = [("mean", mean), ("deviation", std), ("is there an up?", text.upright(found))]
        parts.append(
            f"<h3>As training gets them</h3>{_table(rows_of_pixels)}"
            f'<p class="hint">On the range 0 to 1, of {pixels.images:,} images.</p>'
        )
    return "".join(parts)


def _histogram(channel: Channel) -> str:
    """Bars, and dashed lines at what becomes 0 and 255 where it is in view."""
    counts, low, high = channel.histogram.counts, channel.histogram.low, channel.histogram.high
    top = max(max(counts), 1)
    width, height = 256.0, 64.0
    step = width / len(counts)
    bars = "".join(
        f"M{number * step:.1f} {height}v{-height * count / top:.2f}h{step:.1f}V{height}z"
        for number, count in enumerate(counts)
        if count
    )
    ends = [
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height}" class="end"/>'
        for value in (channel.black, channel.white)
        if value is not None and 0 <= (x := (value - low) / (high - low) * width) <= width
    ]
    left, right = f"{low:,.6g}", f"{min(high, 255) if high == 256 else high:,.6g}"  # the last bin of bytes is of 255
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" preserveAspectRatio="none" role="img" '
        f'aria-label="histogram from {left} to {right}"><path d="{bars}"/>{"".join(ends)}</svg>'
        f'<div class="axis"><span>{left}</span><span>{right}</span></div>'
    )


def _crops(found: Inspection) -> str:
    head = (
        '<h2>What the network will see</h2><p class="hint">The first images of a run with the keys below: the image, '
        "two global crops and the local ones, after their colours have changed.</p>"
    )
    if not found.crops:
        return f"{head}<p>There are none: no image could be read in time.</p>"
    said = f'<p class="note">In false colour: {_text(found.shown_channels)}.</p>' if found.shown_channels else ""
    sheets = []
    for one in found.crops:
        crops = "".join(
            f'<img class="{"crop" if number < 2 else "local"}" src="{crop}" alt="">'
            for number, crop in enumerate(one.crops)
        )
        height, width = one.size
        caption = f"{_text(one.name)} · {width:,} × {height:,}"
        sheets.append(
            f'<figure class="card sheet"><figcaption class="name">{caption}</figcaption>'
            f'<div class="row"><img class="whole" src="{one.image}" alt="">{crops}</div></figure>'
        )
    return f'{head}{said}<div class="wide grid">{"".join(sheets)}</div>'


def _copies(found: Inspection) -> str:
    parts = [f'<h2>What is there more than once</h2><p class="hint">{_text(text.compared(found).capitalize())}.</p>']
    words = {"files": "equal files", "pixels": "equal pixels in different files", "near": "nearly equal"}
    rows = []
    for alike in found.copies.found:
        sign = " ~ " if alike.how == "near" else " = "
        said = f"{alike.groups:,} group{'' if alike.groups == 1 else 's'} of {alike.images:,} images"
        said += f", {alike.across_parts:,} across parts of a split" if alike.across_parts else ""
        said += f", {alike.across_classes:,} across classes" if alike.across_classes else ""
        examples = "; ".join(sign.join(group) for group in alike.examples)
        rows.append((words[alike.how], f"{said}, such as {examples}" if alike.groups else "none"))
    return "".join(parts) + _table(rows)


def _unreadable(found: Inspection) -> str:
    lost = [*found.unreadable, *found.refused]
    if not lost:
        return ""
    rest = f'<p class="hint">and {len(lost) - _LISTED:,} more: see --json</p>' if len(lost) > _LISTED else ""
    return (
        '<h2>What cannot be used</h2><p class="hint">Each image that was looked at and cannot be read, or that '
        f"training refuses, with its reason.</p>{_table(lost[:_LISTED])}{rest}"
    )


def _keys(found: Inspection) -> str:
    head = (
        '<h2>Keys</h2><p class="hint">Those in bold have to be said; the recipe auto chooses the others by itself.</p>'
    )
    if not found.advice:
        return f"{head}<p>No key is advised: nothing could be read.</p>"
    rows = "".join(
        f"<tr><td>{_bold(f'{one.key}={one.value}', one.by == 'inspect')}</td><td>{_text(one.reason)}</td></tr>"
        for one in found.advice
    )
    command = f'<p class="command"><code>{_text(found.command)}</code></p>'
    return f'{head}<table class="keys">{rows}</table>{command}'


def _bold(words: str, is_bold: bool) -> str:
    code = f"<code>{_text(words)}</code>"
    return f"<strong>{code}</strong>" if is_bold else code


def _table(rows: Iterable[tuple[str, str]]) -> str:
    lines = "".join(f"<tr><th>{_text(name)}</th><td>{_text(said)}</td></tr>" for name, said in rows)
    return f'<div class="scroll"><table class="facts">{lines}</table></div>'


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"<code>{_text(name)}</code>" for name in names)


def _text(words: str) -> str:
    return html.escape(words)
