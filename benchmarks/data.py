"""Times the making of crops on one core, beside the plain composition of torchvision and Pillow.

    python benchmarks/data.py [--large] [--images FOLDER] [--rounds N] [--json]
    python benchmarks/data.py --tiff [--rounds N] [--json]

One image becomes 2 crops of 224 and 8 of 98 pixels, from encoded bytes to uint8 tensors. Without --large the images
are JPEG files of 500 × 375 pixels, with it photos of at least 10 megapixels, for which ours may decode at a reduced
scale (`data.reduced_decode=true`). They are made from the photos in FOLDER, by default those that Debian's
plasma-workspace-wallpapers installs.

The plain composition is the reference's: Pillow decodes; each crop goes through torchvision's RandomResizedCrop, flip,
ColorJitter, RandomGrayscale on PIL images, GaussianBlur, RandomSolarize, and becomes a tensor. Both take turns,
round by round, on one thread. Ours is timed as training makes batches, masks included. Figures are medians over rounds.

With --tiff, tiles of 512 × 512 pixels and 5 channels of 16 bits are read by `decode`, to uint8 [512, 512, 5], and by
tifffile's own `imread`, to uint16 in the order of the file; from bytes in memory, in turns, for each layout of a TIFF.
"""

import argparse
import io
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tifffile
import torch
from PIL import Image
from torchvision.transforms import v2

from dinoforge.builders.data import build_data
from dinoforge.data.crops import MultiCrop, cut, on_reduced, reduction
from dinoforge.data.decode import decode
from dinoforge.data.headers import size_and_kind
from dinoforge.data.photometry import recolour
from dinoforge.data.sources import SequenceSource
from dinoforge.recipe.load import load_recipe

WALLPAPERS = Path("/usr/share/wallpapers")
KEYS = {
    "student.patch_size": 14,
    "crops.global_crops_size": 224,
    "crops.local_crops_size": 98,
    "crops.local_crops_number": 8,
}
LARGE_PIXELS = 10_000_000


def photos(folder: Path, count: int) -> list[Image.Image]:
    """The largest different pictures below a folder, in RGB."""
    found: dict[str, tuple[int, Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in (".jpg", ".jpeg", ".png"):
            with Image.open(path) as picture:
                pixels = picture.width * picture.height
            # Debian's packages hold each picture in many sizes, in one folder of its own.
            name = path.relative_to(folder).parts[0]
            found[name] = max(found.get(name, (0, path)), (pixels, path))
    largest = sorted(found.values(), reverse=True)[:count]
    return [Image.open(path).convert("RGB") for _, path in largest]


def encode(picture: Image.Image, size: tuple[int, int]) -> bytes:
    """A JPEG of that size, out of the middle of a picture."""
    scale = max(size[0] / picture.width, size[1] / picture.height)
    width, height = size[0] / scale, size[1] / scale
    left, top = (picture.width - width) / 2, (picture.height - height) / 2
    part = picture.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
    buffer = io.BytesIO()
    part.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def plain_composition() -> Callable[[bytes], list[torch.Tensor]]:
    """The augmentation of the reference, for one image."""

    def crop(size: int, scale: tuple[float, float], blur: float, solarize: float) -> v2.Compose:
        jitter = v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
        return v2.Compose(
            [
                v2.RandomResizedCrop(size, scale=scale, interpolation=v2.InterpolationMode.BICUBIC),
                v2.RandomHorizontalFlip(0.5),
                v2.RandomApply([jitter], p=0.8),
                v2.RandomGrayscale(0.2),
                v2.RandomApply([v2.GaussianBlur(9, (0.1, 2.0))], p=blur),
                v2.RandomSolarize(128, solarize),
                v2.PILToTensor(),
            ]
        )

    first, second = crop(224, (0.32, 1.0), 0.0, 0.0), crop(224, (0.32, 1.0), 0.9, 0.2)
    local = crop(98, (0.05, 0.32), 0.5, 0.0)

    def crops(data: bytes) -> list[torch.Tensor]:
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        return [first(picture), second(picture), *(local(picture) for _ in range(8))]

    return crops


def parts(images: list[bytes], crops: MultiCrop, *, reduced_decode: bool) -> dict[str, float]:
    """Median milliseconds of the parts of making an image's crops."""
    rng = np.random.default_rng(0)
    times: dict[str, list[float]] = {"decode": [], "geometry": [], "photometry": []}
    for data in images:
        marks = [time.perf_counter()]
        width, height, _ = size_and_kind(data)
        drawn = crops.draw(height, width, rng)
        image = decode(data, channels=3, reduction=reduction(drawn) if reduced_decode else 1)
        drawn = [on_reduced(p, (height, width), (image.shape[0], image.shape[1])) for p in drawn]
        marks.append(time.perf_counter())
        pieces = [cut(image, p) for p in drawn]
        marks.append(time.perf_counter())
        for piece, p in zip(pieces, drawn, strict=True):
            recolour(piece, p.photometry)
        marks.append(time.perf_counter())
        for name, (start, end) in zip(times, itertools.pairwise(marks), strict=True):
            times[name].append(1e3 * (end - start))
    return {name: statistics.median(values) for name, values in times.items()}


def tiffs() -> dict[str, bytes]:
    """One tile, written in every common way."""
    rng = np.random.default_rng(0)
    shapes = [cv2.GaussianBlur(rng.normal(size=(512, 512)), (0, 0), 3) for _ in range(5)]
    bands = np.stack([6000 + 20000 * shape + rng.normal(0, 30, shape.shape) for shape in shapes])
    bands = np.clip(bands, 1, 65000).astype(np.uint16)  # [C, H, W]
    pixels = np.ascontiguousarray(np.moveaxis(bands, 0, -1))  # [H, W, C]
    contiguous: dict[str, Any] = {"photometric": "minisblack", "planarconfig": "contig"}
    planar: dict[str, Any] = {"photometric": "minisblack", "planarconfig": "separate"}
    pages: dict[str, Any] = {"photometric": "minisblack"}
    # GeoTIFF: the size of a pixel; GDAL's tag for no data.
    place = {"extratags": [(33550, "d", 3, (10.0, 10.0, 0.0), True), (42113, "s", 0, "0", True)]}
    empty = bands.copy()
    empty[:, :40] = 0
    made: dict[str, tuple[Any, dict[str, Any]]] = {
        "pixel by pixel": (pixels, contiguous),
        "in strips of 16 rows": (pixels, contiguous | {"rowsperstrip": 16}),
        "big-endian": (pixels, contiguous | {"byteorder": ">"}),
        "GeoTIFF, no data 0": (np.ascontiguousarray(np.moveaxis(empty, 0, -1)), contiguous | place),
        "band by band": (bands, planar),
        "GeoTIFF by band, no data 0": (empty, planar | place),
        "OME-TIFF, CYX": (bands, pages | {"ome": True, "metadata": {"axes": "CYX"}}),
        "ImageJ, CYX": (bands, pages | {"imagej": True, "metadata": {"axes": "CYX"}}),
        "pages": (bands, pages | {"metadata": None}),
        "in tiles of 256": (pixels, contiguous | {"tile": (256, 256)}),
        "by band, in tiles of 256": (bands, planar | {"tile": (256, 256)}),
        "deflate": (pixels, contiguous | {"compression": "zlib", "predictor": True, "rowsperstrip": 16}),
        "LZW": (pixels, contiguous | {"compression": "lzw", "predictor": True, "rowsperstrip": 16}),
        "zstd, in tiles": (pixels, contiguous | {"compression": "zstd", "tile": (256, 256)}),
        "OME-TIFF, deflate": (bands, pages | {"ome": True, "metadata": {"axes": "CYX"}, "compression": "zlib"}),
    }
    files = {}
    for name, (values, options) in made.items():
        buffer = io.BytesIO()
        tifffile.imwrite(buffer, values, **options)
        files[name] = buffer.getvalue()
    return files


def tiff_reading(rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of tifffile's read and of ours, by layout, and their ratio: medians over rounds."""
    results = {}
    for name, data in tiffs().items():
        bare_ms, our_ms = [], []
        for step in range(-2, rounds):  # the first two rounds warm up
            started = time.perf_counter()
            tifffile.imread(io.BytesIO(data))
            read = time.perf_counter()
            pixels = decode(data, channels=5)
            done = time.perf_counter()
            assert pixels.shape == (512, 512, 5)
            if step >= 0:
                bare_ms.append(1e3 * (read - started))
                our_ms.append(1e3 * (done - read))
        results[name] = {
            "tifffile_ms": statistics.median(bare_ms),
            "ms": statistics.median(our_ms),
            "ratio": statistics.median(b / o for b, o in zip(bare_ms, our_ms, strict=True)),
        }
    return results


def print_tiffs(results: dict[str, dict[str, float]]) -> None:
    print("TIFF tiles of 512×512 pixels, 5 channels of 16 bits, one core")
    print(f"{'':<28}{'tifffile':>12}{'dinoforge':>12}{'times as fast':>16}")
    for name, one in results.items():
        print(f"{name:<28}{one['tifffile_ms']:>9.2f} ms{one['ms']:>9.2f} ms{one['ratio']:>16.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true", help="photos of 10 megapixels and more, decoded reduced")
    parser.add_argument("--full-decode", action="store_true", help="decode large photos whole nevertheless")
    parser.add_argument("--images", type=Path, default=WALLPAPERS, metavar="FOLDER")
    parser.add_argument(
        "--rounds", type=int, help="times that each image is taken; default: 10; 2 with --large, 101 with --tiff"
    )
    parser.add_argument("--tiff", action="store_true", help="time the reading of TIFFs, beside tifffile's own")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    options = parser.parse_args()

    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    if options.tiff:
        results = tiff_reading(options.rounds or 101)
        print(json.dumps(results)) if options.json else print_tiffs(results)
        return
    pictures = photos(options.images, 8 if options.large else 32)
    if options.large:
        pictures = [p for p in pictures if p.width * p.height >= LARGE_PIXELS]
        images = [encode(p, p.size) for p in pictures]
    else:
        images = [encode(p, (500, 375)) for p in pictures]
    if not images:
        parser.error(
            f"no photos{' of 10 megapixels' if options.large else ''} in {options.images}: give --images FOLDER"
        )

    reduced = options.large and not options.full_decode
    keys = {"train.batch_size_per_gpu": len(images), "data.reduced_decode": reduced}
    ours = build_data(load_recipe("dinov2", KEYS | keys)[0], SequenceSource(images))
    plain = plain_composition()
    our_ms, plain_ms = [], []
    for step in range(-1, options.rounds or (2 if options.large else 10)):  # the first round warms up
        started = time.perf_counter()
        ours[step + 1]
        made = time.perf_counter()
        for data in images:
            plain(data)
        done = time.perf_counter()
        if step >= 0:
            our_ms.append(1e3 * (made - started) / len(images))
            plain_ms.append(1e3 * (done - made) / len(images))
    result = {
        "images": len(images),
        "pixels": [Image.open(io.BytesIO(data)).size for data in images],
        "reduced_decode": reduced,
        "ms_per_image": statistics.median(our_ms),
        "plain_ms_per_image": statistics.median(plain_ms),
        "ratio": statistics.median(p / o for p, o in zip(plain_ms, our_ms, strict=True)),
        "parts_ms": parts(images * (2 if options.large else 5), ours.crops, reduced_decode=reduced),
    }
    if options.json:
        print(json.dumps(result))
        return
    sizes = sorted({f"{width}×{height}" for width, height in result["pixels"]})
    print(f"{len(images)} JPEG files of {', '.join(sizes)} pixels, one core{', decoded reduced' if reduced else ''}")
    print(f"plain composition   {result['plain_ms_per_image']:8.2f} ms per image")
    print(f"dinoforge           {result['ms_per_image']:8.2f} ms per image, {result['ratio']:.1f} times as fast")
    for name, ms in result["parts_ms"].items():
        print(f"  {name:<17} {ms:8.2f} ms")


if __name__ == "__main__":
    main()
