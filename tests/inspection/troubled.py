"""A folder with one of each kind of trouble that users' images have, made when it is needed."""

import io
import os
from pathlib import Path

import imagecodecs
import numpy as np
import pillow_heif
import tifffile
from PIL import Image, ImageChops, ImageCms

SIDE = 64
NOT_IMAGES = {
    "page.jpg": b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>\n",
    "pointer.jpg": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n",
    "empty.jpg": b"",
}
LEFT_OUT = {
    "scan.dcm": b"\0" * 128 + b"DICM",
    "notes.txt": b"notes",
    "film.mp4": b"\0\0\0\x18ftypmp42",
    ".hidden.jpg": b"x",
}


def picture(number: int) -> np.ndarray:
    """A smooth picture, unlike those of other numbers: uint8 [64, 64, 3]."""
    coarse = np.random.default_rng(number).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def encoded(pixels: np.ndarray | Image.Image, kind: str, **settings: object) -> bytes:
    file = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(file, kind, **settings)
    return file.getvalue()


def tiff(values: np.ndarray, **settings: object) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, values, **settings)
    return file.getvalue()


def npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def ramp(low: float, high: float, dtype: type, number: int = 0) -> np.ndarray:
    """Values from left to right, [64, 64]."""
    row = np.linspace(low, high, SIDE)
    return np.roll(np.tile(row, (SIDE, 1)), number, axis=1).astype(dtype)


def orientation(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x112] = number
    return exif


def files() -> dict[str, bytes]:
    """Relative path -> content of each file of the folder."""
    jpeg = encoded(picture(0), "JPEG", quality=95)
    nodata = ramp(100, 3000, np.int16)
    nodata[:16] = -9999
    holes = ramp(0, 1, np.float32)
    holes[:8] = np.nan
    bands = np.dstack([picture(20), picture(21)[:, :, :1]])
    alpha = np.dstack([picture(22), ramp(0, 255, np.uint8)])
    cmyk = encoded(ImageChops.invert(Image.fromarray(picture(23)).convert("CMYK")), "JPEG")
    adobe = cmyk.index(b"\xff\xee")  # Adobe's marker, of 16 bytes: only with it are inks stored inverted
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    heic = io.BytesIO()
    pillow_heif.from_pillow(Image.fromarray(picture(24))).save(heic, format="HEIF")
    made = {
        "twelve.png": encoded(ramp(100, 3900, np.uint16), "PNG"),
        "deep.png": imagecodecs.png_encode(picture(25).astype(np.uint16) * 257),
        "nodata.tif": tiff(nodata, extratags=[(42113, 2, 6, "-9999", True)]),
        "holes.tif": tiff(holes),
        "infrared.tif": tiff(bands, photometric="rgb", extrasamples=[2]),
        "five.ome.tif": tiff(
            np.stack([ramp(0, 50000, np.uint16, n) for n in range(5)]),
            ome=True,
            photometric="minisblack",
            metadata={"axes": "CYX"},
        ),
        "stack.ome.tif": tiff(
            np.stack([ramp(0, 60000, np.uint16, n) for n in range(7)]),
            ome=True,
            photometric="minisblack",
            metadata={"axes": "ZYX"},
        ),
        "ink.jpg": cmyk[:adobe] + cmyk[adobe + 16 :],
        "turned.jpg": encoded(picture(26), "JPEG", exif=orientation(99)),
        "upright.jpg": encoded(picture(27), "JPEG", exif=orientation(6)),
        "phone.jpg": heic.getvalue(),
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "endless.jpg": encoded(picture(28), "JPEG")[:-2],
        "glass.png": encoded(alpha, "PNG"),
        "profile.png": encoded(picture(29), "PNG", icc_profile=srgb),
        "long.png": encoded(picture(30)[:2], "PNG"),
        "dot.png": encoded(picture(31)[:1, :1], "PNG"),
        "blank.png": encoded(np.full((SIDE, SIDE, 3), 9, np.uint8), "PNG"),
        "line\nend.png": encoded(picture(32), "PNG"),
        "@eaDir/thumb.jpg": jpeg,
    }
    copied, near = encoded(picture(40), "PNG"), picture(41)
    sorted_into_classes = {f"train/cat/{n}.png": encoded(picture(50 + n), "PNG") for n in range(6)}
    sorted_into_classes |= {f"train/dog/{n}.png": encoded(picture(60 + n), "PNG") for n in range(6)}
    sorted_into_classes |= {
        f"val/{name}/{n}.png": encoded(picture(70 + n + 9 * (name == "cat")), "PNG")
        for name in ("cat", "dog")
        for n in range(3)
    }
    sorted_into_classes |= {
        "train/cat/copy.png": copied,
        "val/dog/copied.png": copied,
        "train/dog/near.png": encoded(near, "PNG"),
        "val/dog/nearly.jpg": encoded(near, "JPEG", quality=95, subsampling=0),
        "train/cat/bitmap.bmp": encoded(picture(50), "BMP"),
        "val/stray.png": encoded(picture(90), "PNG"),
    }
    odd = {
        name if name.startswith("@") else f"train/cat/{name}": content for name, content in (made | NOT_IMAGES).items()
    }
    return odd | LEFT_OUT | sorted_into_classes


def make(root: Path) -> Path:
    """Write the folder."""
    for name, content in files().items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


if __name__ == "__main__":
    make(Path(os.sys.argv[1]))
