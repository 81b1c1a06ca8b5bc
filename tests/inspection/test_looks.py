"""A look at one image gives what training gets of it, from one decoding."""

import imagecodecs
import numpy as np
import pytest
from PIL import Image, ImageFile

from dinoforge.data import looks
from dinoforge.data.decode import decode
from dinoforge.data.headers import size_and_kind
from dinoforge.data.looks import look_at
from dinoforge.data.sources import OnePlane
from dinoforge.errors import ImageError

from . import troubled as made

FILES = {name: content for name, content in made.files().items() if name.startswith("train/cat/")}
FILES = {name: content for name, content in FILES.items() if name[10] not in "12345"}  # more of the same
MORE = {
    "turned_deep.png": made.encoded(made.ramp(0, 60000, np.uint16), "PNG", exif=made.orientation(6)),
    "turned.tif": made.encoded(made.picture(1)[:40], "TIFF", exif=made.orientation(8)),
    "palette.png": made.encoded(Image.fromarray(made.picture(2)).quantize(9), "PNG"),
    "grey.png": made.encoded(made.picture(3)[:, :, 0], "PNG"),
    "glass_deep.png": imagecodecs.png_encode(
        np.dstack([made.picture(4), made.picture(5)[:, :, :1]]).astype(np.uint16) * 257
    ),
    "array.npy": made.npy(made.picture(6).astype(np.float32) / 255),
    "planes.gif": made.encoded(
        Image.fromarray(made.picture(7)), "GIF", save_all=True, append_images=[Image.fromarray(made.picture(8))]
    ),
    "picture.webp": made.encoded(made.picture(9), "WEBP", lossless=True),
    "wavelet.jp2": imagecodecs.jpeg2k_encode(made.picture(10), level=0),
}
KEYS = [
    {},
    {"sixteen_bit": "minmax"},
    {"value_range": (50.0, 200.0)},
    {"value_range": (0.0, 4095.0), "nodata": 100.0, "fill": 7},
    {"plane": "max"},
    {"plane": 1},
]


@pytest.mark.parametrize("keys", KEYS, ids=str)
@pytest.mark.parametrize("channels", [1, 3, 4, 5])
@pytest.mark.parametrize("name", FILES | MORE)
def test_pixels_are_those_of_decode(name, channels, keys):
    data = (FILES | MORE)[name]
    try:
        expected, why = decode(data, channels=channels, **keys), ""
    except ImageError as error:
        expected, why = None, str(error)
    try:
        found, refused = look_at(data, channels=channels, decoding=keys), ""
    except ImageError as error:
        found, refused = None, str(error)
    assert (refused or found.refused) == why
    if expected is None:
        assert found is None or found.pixels is None
        return
    np.testing.assert_array_equal(found.pixels, expected)
    assert (found.height, found.width) == expected.shape[:2]
    assert found.mode == size_and_kind(data, channels)[2]


@pytest.mark.parametrize(
    "name", ["train/cat/0.png", "train/cat/upright.jpg", "train/cat/twelve.png", "train/cat/bitmap.bmp"]
)
def test_pillow_decodes_once(name, monkeypatch):
    decoded = []
    load = ImageFile.ImageFile.load

    def counted(self):
        if self.tile:
            decoded.append(self)
        return load(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", counted)
    look_at(FILES[name], channels=3)
    assert len(decoded) == 1


def test_one_plane_of_several():
    data = FILES["train/cat/stack.ome.tif"]
    found = look_at(OnePlane(data, 3), channels=1)
    np.testing.assert_array_equal(found.pixels, decode(OnePlane(data, 3), channels=1))
    assert (found.header.planes, found.header.along) == (7, "z")


def test_a_thumbnail_has_its_own_end():
    """The end of the picture is missing, that of the thumbnail in its header is there."""
    thumbnail = made.encoded(made.picture(1)[:16, :16], "JPEG")
    body = made.encoded(made.picture(2), "JPEG")
    segment = b"\xff\xe2" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    whole = body[:2] + segment + body[2:]
    assert not look_at(whole, channels=3).repaired
    assert look_at(whole[:-2], channels=3).repaired


def test_an_animation_says_its_frames():
    found = look_at(MORE["planes.gif"], channels=3)
    assert (found.header.planes, found.header.along) == (2, "frame")


def test_transparency_is_measured():
    pixels = np.dstack([made.picture(1), np.full((64, 64), 255, np.uint8)])
    pixels[:16, :, 3] = 40
    assert look_at(made.encoded(pixels, "PNG"), channels=3).transparent == 0.25
    assert look_at(FILES["train/cat/infrared.tif"], channels=3).transparent is None


@pytest.mark.parametrize(
    "data", [b"\xff\xd8\xff\xe1\0\x10Exif\0\0II*\0\xff\xff\xff\xff", b"II*\0\x08\0\0\0\0\0", b"GIF89a"]
)
def test_a_damaged_header_is_an_error_of_the_image(data):
    with pytest.raises(ImageError):
        look_at(data, channels=3)


def test_objects_are_looked_at():
    values = made.ramp(0, 1, np.float32)
    found = look_at(values, channels=1)
    assert found.kind is looks.OBJECT
    np.testing.assert_array_equal(found.pixels, decode(values, channels=1))
