"""Made images: two kinds of patterns that a network can tell apart."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

KINDS = {"rings": (60, 90, 190), "stripes": (190, 130, 60)}
"""Each with its colour, red, green and blue, about which those of its images lie."""


def make_images(folder: Path, *, of_each: int, first: int = 0, side: int = 112) -> Path:
    """Write images of each kind into a sub-folder of its name, PNG and JPEG in turn; always the same.

    Args:
        folder: The folder to make.
        of_each: Number of images of each kind.
        first: Number of the first image; another number makes other images.
        side: Side of an image in pixels.
    """
    for number, (kind, colour) in enumerate(KINDS.items()):
        (folder / kind).mkdir(parents=True)
        for index in range(first, first + of_each):
            image = Image.fromarray(_pattern(kind, colour, side, np.random.default_rng([number, index])))
            image.save(folder / kind / f"{index:03d}.{('png', 'jpg')[index % 2]}")
    return folder


def _pattern(kind: str, colour: tuple[int, ...], side: int, random: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Waves of one colour on another, with noise [side, side, 3]."""
    y, x = (np.mgrid[:side, :side] - side * random.uniform(0.3, 0.7, (2, 1, 1))) / side
    angle, waves = random.uniform(0, np.pi), random.uniform(4, 7)
    distance = np.hypot(x, y) if kind == "rings" else x * np.cos(angle) + y * np.sin(angle)
    wave = 0.5 + 0.5 * np.sin(2 * np.pi * waves * distance)
    colours = np.array(colour) + random.uniform(-60, 60, (2, 3))
    image = colours[0] + wave[..., None] * (colours[1] - colours[0]) + random.normal(0, 12, (side, side, 3))
    pixels: npt.NDArray[np.uint8] = image.clip(0, 255).astype(np.uint8)
    return pixels
