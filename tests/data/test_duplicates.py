"""Equal and nearly equal images are found, those that merely look alike are not."""

import io
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dinoforge.data.duplicates import Fingerprint, fingerprint, groups, same

SIDE = 240


def picture(seed, height=SIDE, width=SIDE, channels=3):
    """A picture with as much contrast at each scale as photographs have, uint8 [height, width, channels]."""
    rng = np.random.default_rng(seed)
    f = np.hypot(np.fft.fftfreq(height)[:, None] * height, np.fft.fftfreq(width) * width)
    f[0, 0] = np.inf
    shape = np.stack([np.fft.ifft2(np.fft.fft2(rng.normal(size=(height, width))) / f).real for _ in range(channels)], 2)
    return np.clip(128 + 45 * (shape - shape.mean()) / shape.std(), 0, 255).astype(np.uint8)


def as_pillow(pixels):
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def as_array(image):
    array = np.asarray(image)
    return array[:, :, None] if array.ndim == 2 else array


def jpeg(pixels, quality):
    file = io.BytesIO()
    as_pillow(pixels).save(file, "JPEG", quality=quality)
    return as_array(Image.open(file))


def resized(pixels, height, width, how=Image.Resampling.BICUBIC):
    return as_array(as_pillow(pixels).resize((width, height), how))


CHANGES = {
    "quality 90": lambda a: jpeg(a, 90),
    "quality 50": lambda a: jpeg(a, 50),
    "half": lambda a: resized(a, a.shape[0] // 2, a.shape[1] // 2),
    "odd size": lambda a: resized(a, 131, 173, Image.Resampling.BILINEAR),
    "thumbnail": lambda a: resized(a, 64, 64, Image.Resampling.LANCZOS),
    "larger": lambda a: resized(a, 2 * a.shape[0], 2 * a.shape[1]),
    "brighter": lambda a: np.clip(a * 1.05 + 0.5, 0, 255).astype(np.uint8),
    "darker": lambda a: (a * 0.95 + 0.5).astype(np.uint8),
    "grey levels added": lambda a: np.clip(a.astype(int) + 10, 0, 255).astype(np.uint8),
}


def pairs_found(originals, changed):
    """Originals that are with their own changed picture; and pairs of different pictures that are together."""
    n = len(originals)
    found = wrong = 0
    for group in groups([fingerprint(a) for a in (*originals, *changed)]):
        pairs = [(i, j) for i in group for j in group if i < j]
        found += sum(j - i == n for i, j in pairs)
        wrong += sum((j - i) % n != 0 for i, j in pairs)
    return found, wrong


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_pictures_that_were_changed_a_little_are_found(change, channels):
    originals = [picture(seed, channels=channels) for seed in range(12)]
    assert pairs_found(originals, [change(a) for a in originals]) == (12, 0)


def test_solar_cells_that_all_look_alike_are_different(solar_cells):
    cells = [as_array(Image.open(file).convert("L")) for file in sorted(solar_cells.rglob("*.png"))]
    prints = [fingerprint(cell) for cell in cells]
    assert groups(prints) == []
    some = cells[::8]
    for name in ("quality 50", "half", "thumbnail"):
        found, wrong = pairs_found(some, [CHANGES[name](cell) for cell in some])
        assert wrong == 0
        assert found >= 0.99 * len(some), name


def test_images_of_one_camera_that_share_its_shading_are_different():
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE - 0.5
    shading = 40 + 70 * np.exp(-3 * (x**2 + y**2))
    rng = np.random.default_rng(0)
    prints = [
        fingerprint(np.clip(shading + rng.normal(0, 3, (SIDE, SIDE)), 0, 255).astype(np.uint8)[:, :, None])
        for _ in range(40)
    ]
    assert all(one.near for one in prints)
    assert groups(prints) == []


def test_other_colours_make_another_picture():
    one = picture(0)
    assert groups([fingerprint(one), fingerprint(one[:, :, ::-1])]) == []
    assert groups([fingerprint(one), fingerprint(one.mean(2, keepdims=True).astype(np.uint8))]) == []


@pytest.mark.parametrize("channels", [1, 2, 4, 5, 13, 70, 200])
def test_any_number_of_channels(channels):
    a, b = picture(0, 90, 150, channels), picture(1, 90, 150, channels)
    noisy = np.clip(a + np.random.default_rng(0).normal(0, 2, a.shape), 0, 255).astype(np.uint8)
    assert groups([fingerprint(x) for x in (a, b, noisy)]) == [[0, 2]]


def test_the_order_of_bands_and_one_pixel_matter_to_equality():
    a = picture(0, 50, 70, 5)
    changed = a.copy()
    changed[31, 17, 3] ^= 1
    others = [a[:, :, ::-1], changed, a.reshape(70, 50, 5), a[:, :, :4]]
    assert same([fingerprint(x) for x in (a, *others, a.copy())]) == [[0, 5]]
    assert {len(fingerprint(x).exact) for x in (a, *others)} == {16}


def test_memory_layout_does_not_matter():
    a = picture(0, 50, 70)
    assert fingerprint(np.asfortranarray(a)) == fingerprint(a)
    assert fingerprint(np.ascontiguousarray(a[::-1])[::-1]) == fingerprint(a)


def test_images_of_one_colour_are_in_no_group_and_say_so():
    blank = np.full((40, 40, 3), 7, np.uint8)
    colour = np.broadcast_to(np.array([200, 10, 30], np.uint8), (40, 40, 3))
    prints = [fingerprint(a) for a in (blank, blank, colour, colour, np.zeros((90, 64, 1), np.uint8))]
    assert all(one.is_constant and one.near == 0 for one in prints)
    assert same(prints) == groups(prints) == []


def test_images_that_are_nearly_flat_are_together_only_where_they_are_equal():
    rng = np.random.default_rng(0)
    flat = [rng.integers(100, 103, (200, 200, 1), dtype=np.uint8) for _ in range(5)]
    one_dot = np.full((400, 400, 1), 9, np.uint8)
    one_dot[200, 200] = 255
    prints = [fingerprint(a) for a in (*flat, one_dot, flat[2], one_dot)]
    assert not any(one.is_constant or one.near for one in prints)
    assert same(prints) == groups(prints) == [[2, 6], [5, 7]]


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 500, 3), (3, 2, 4), (31, 33, 1), (65, 64, 3), (1, 4000, 1)])
def test_every_size(shape):
    a = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    assert fingerprint(a) == fingerprint(a.copy())
    assert fingerprint(a).is_constant == (a.size == 1)


def test_groups_are_those_of_comparing_every_pair():
    rng = np.random.default_rng(0)
    centres = rng.integers(1, 2**63, 16)
    near = []
    for i in range(120):
        flips = sum(1 << int(bit) for bit in rng.choice(64, rng.integers(0, 14), replace=False))
        near.append(int(centres[i % 16]) ^ flips)
    prints = [Fingerprint(i.to_bytes(16, "big"), near[i]) for i in range(120)]
    for distance in (0, 3, 7, 8):
        together = {i: {i} for i in range(120)}
        for i in range(120):
            for j in range(i):
                if (near[i] ^ near[j]).bit_count() <= distance and together[i] is not together[j]:
                    together[i] |= together[j]
                    for k in together[j]:
                        together[k] = together[i]
        expected = sorted({tuple(sorted(group)) for group in together.values() if len(group) > 1})
        assert [tuple(group) for group in groups(prints, distance=distance)] == expected


def test_the_small_pictures_have_the_last_word():
    prints = [fingerprint(picture(seed)) for seed in range(6)]
    as_one = [Fingerprint(one.exact, 1, one.is_constant, one.small) for one in prints]
    assert groups(as_one) == []
    assert groups([Fingerprint(one.exact, 1) for one in prints]) == [[0, 1, 2, 3, 4, 5]]


def test_look_ups_and_not_pairs_grow_with_the_images(monkeypatch):
    from dinoforge.data import duplicates

    looked_at = []
    count = duplicates._count
    monkeypatch.setattr(duplicates, "_count", lambda words: looked_at.append(len(words)) or count(words))
    rng = np.random.default_rng(0)
    prints = [Fingerprint(i.to_bytes(16, "big"), int(one)) for i, one in enumerate(rng.integers(1, 2**63, 20_000))]
    prints.append(Fingerprint(b"last", prints[17].near ^ 0b111))
    assert groups(prints) == [[17, 20_000]]
    assert sum(looked_at) < 0.02 * 20_000**2


def test_a_thousand_equal_images_are_one_group_at_once():
    one = fingerprint(picture(0))
    assert groups([one] * 1000) == same([one] * 1000) == [list(range(1000))]


@pytest.mark.processes
def test_fingerprints_are_the_same_in_another_process():
    code = (
        "import numpy as np; from dinoforge.data.duplicates import fingerprint;"
        "f = fingerprint((np.arange(30 * 40 * 3) % 251).astype(np.uint8).reshape(30, 40, 3));"
        "print(f.exact.hex(), f.near)"
    )
    here = fingerprint((np.arange(30 * 40 * 3) % 251).astype(np.uint8).reshape(30, 40, 3))
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.split() == [here.exact.hex(), str(here.near)]
