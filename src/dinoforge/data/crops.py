"""Multi-crop augmentation: one image to two global crops and L local crops (SwAV, arXiv 2006.09882; DINO, 2104.14294).

*Drawing* decides everything that is random about a crop and puts it into `CropParameters`; *applying* is a function of
the image and these parameters. Distributions are torchvision's, as the reference composes them: geometry (crop,
resize, flip), then photometry (see `photometry`). Quarter turns, which the reference lacks, come after the flip.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from dinoforge.data.photometry import JITTER, Photometry, as_uint8, recolour
from dinoforge.data.values import UInt8

BLUR_PROBABILITY: dict[str, tuple[float, float, float]] = {"released": (0.0, 0.9, 0.5), "stated": (1.0, 0.1, 0.5)}
"""Probability of Gaussian blur for the first global, the second global and the local crops.

The reference states 1.0, 0.1 and 0.5, but its code hands them on as the probability that blur is *not* applied, so its
published models were trained with the complement: ``released``. ``stated`` is what its source appears to say.
"""


Uniform = Callable[[], float]
"""A function that draws a number in 0…1, 1 excluded."""

_UNCHANGED = Photometry()


@dataclass(frozen=True, kw_only=True)
class CropParameters:
    """Everything that was drawn for one crop.

    Args:
        size: The edge of the crop in pixels.
        box: Top, left, height and width in the image, in pixels.
        horizontal_flip: Whether left and right are mirrored.
        vertical_flip: Whether top and bottom are mirrored.
        quarter_turns: The number of right angles by which the crop is turned counter-clockwise after flips, 0 to 3.
        photometry: The operations on its colours.
    """

    size: int
    box: tuple[int, int, int, int]
    horizontal_flip: bool = False
    vertical_flip: bool = False
    quarter_turns: int = 0
    photometry: Photometry = _UNCHANGED


@dataclass(frozen=True, kw_only=True)
class MultiCrop:
    """The augmentation to two global crops and `local_number` local ones; defaults are the official ones.

    Args:
        global_size: The edge of global crops in pixels.
        global_scale: The smallest and largest share of the image's area in a global crop.
        local_size: The edge of local crops in pixels.
        local_scale: The smallest and largest share of the image's area in a local crop.
        local_number: The number of local crops, L; 0 is valid.
        aspect: The smallest and largest width / height of a crop before it is resized to a square.
        horizontal_flip: The probability that left and right are mirrored.
        vertical_flip: The probability that top and bottom are mirrored.
        quarter_turns: The probability that a crop is turned by 90, 180 or 270 degrees, each as likely.
        jitter_probability: The probability that a crop's colours are jittered.
        brightness: The strength s of jitter; factors are uniform in max(0, 1 - s)…1 + s.
        contrast: The strength of jitter, likewise.
        saturation: The strength of jitter, likewise.
        hue: The strength s of jitter, at most 0.5; shifts are uniform in -s…s turns.
        grayscale_probability: The probability that a crop loses its colour.
        blur_probability: The probabilities of blur for the first global, the second global and the local crops; see
            `BLUR_PROBABILITY`.
        blur_sigma: The smallest and largest standard deviation of blur in pixels.
        blur_kernel: The edge of the blur's kernel in pixels, odd.
        solarize_probability: The probability that the second global crop is solarized; no other crop ever is.
        solarize_threshold: The value from which on values are inverted, 0…255.
    """

    global_size: int = 224
    global_scale: tuple[float, float] = (0.32, 1.0)
    local_size: int = 96
    local_scale: tuple[float, float] = (0.05, 0.32)
    local_number: int = 8
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    horizontal_flip: float = 0.5
    vertical_flip: float = 0.0
    quarter_turns: float = 0.0
    jitter_probability: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    grayscale_probability: float = 0.2
    blur_probability: tuple[float, float, float] = BLUR_PROBABILITY["released"]
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    blur_kernel: int = 9
    solarize_probability: float = 0.2
    solarize_threshold: int = 128

    def __post_init__(self) -> None:
        smallest = min(self.global_size, self.local_size) if self.local_number else self.global_size
        assert self.blur_kernel % 2 == 1, self.blur_kernel
        assert self.blur_kernel // 2 < smallest, "the blur would reach beyond the reflected crop"
        assert 0 <= self.hue <= 0.5, self.hue

    def __call__(self, image: UInt8, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw and make the crops of one image.

        Args:
            image: An image, uint8 [H, W, C].
            rng: The generator; the crops are a function of the image and the generator's state.

        Returns:
            Global crops, uint8 [2, C, G, G], and local crops, uint8 [L, C, l, l].
        """
        height, width, channels = image.shape
        global_crops, local_crops = self.empty(1, channels)
        self.make(image, self.draw(height, width, rng), global_crops[:, 0], local_crops[:, 0])
        return global_crops[:, 0], local_crops[:, 0]

    def empty(self, images: int, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Make room for the crops of B images: uint8 [2, B, C, G, G] and [L, B, C, l, l]."""
        kinds = (2, self.global_size), (self.local_number, self.local_size)
        first, second = (torch.empty(n, images, channels, edge, edge, dtype=torch.uint8) for n, edge in kinds)
        return first, second

    def make(
        self,
        image: UInt8,
        parameters: Sequence[CropParameters],
        global_crops: torch.Tensor,
        local_crops: torch.Tensor,
        *,
        photometry: bool = True,
    ) -> None:
        """Make the crops that `draw` decided on.

        Args:
            image: An image, uint8 [H, W, C].
            parameters: The parameters of the global crops, then of the local ones.
            global_crops: Room for the global crops, uint8 [2, C, G, G].
            local_crops: Room for the local crops, uint8 [L, C, l, l].
            photometry: Whether colours are changed.
        """
        for place, drawn in zip([*global_crops.numpy(), *local_crops.numpy()], parameters, strict=True):
            crop = cut(image, drawn)
            cv2.split(recolour(crop, drawn.photometry) if photometry else crop, list(place))  # [h, w, C] to [C, h, w]

    def draw(self, height: int, width: int, rng: np.random.Generator) -> list[CropParameters]:
        """Draw the parameters of the crops of an image of this size: two global ones, then the local ones."""
        uniform = _uniform(rng)
        blur_first, blur_second, blur_local = self.blur_probability
        local = (self.local_size, self.local_scale, blur_local, 0.0)
        crops = [
            self._draw_crop(height, width, uniform, *kind)
            for kind in (
                (self.global_size, self.global_scale, blur_first, 0.0),
                (self.global_size, self.global_scale, blur_second, self.solarize_probability),
                *[local] * self.local_number,
            )
        ]
        if self.quarter_turns > 0:  # drawn last, so that everything else stays as it is without turns
            crops = [replace(crop, quarter_turns=self._draw_turns(uniform)) for crop in crops]
        return crops

    def _draw_turns(self, uniform: Uniform) -> int:
        return 1 + int(3 * uniform()) if uniform() < self.quarter_turns else 0

    def _draw_crop(
        self,
        height: int,
        width: int,
        uniform: Uniform,
        size: int,
        scale: tuple[float, float],
        blur_probability: float,
        solarize_probability: float,
    ) -> CropParameters:
        return CropParameters(
            size=size,
            box=draw_box(height, width, uniform, scale=scale, aspect=self.aspect),
            horizontal_flip=uniform() < self.horizontal_flip,
            vertical_flip=uniform() < self.vertical_flip,
            photometry=Photometry(
                jitter=self._draw_jitter(uniform) if uniform() < self.jitter_probability else (),
                grayscale=uniform() < self.grayscale_probability,
                blur=(self.blur_kernel, _between(uniform, *self.blur_sigma)) if uniform() < blur_probability else None,
                solarize=self.solarize_threshold if uniform() < solarize_probability else None,
            ),
        )

    def _draw_jitter(self, uniform: Uniform) -> tuple[tuple[str, float], ...]:
        """Draw the order and the factors of colour operations; one of strength 0 is left out."""
        factors = []
        for name, strength in zip(JITTER, (self.brightness, self.contrast, self.saturation, self.hue), strict=True):
            if strength > 0:
                low, high = (-strength, strength) if name == "hue" else (max(0.0, 1 - strength), 1 + strength)
                factors.append((uniform(), (name, _between(uniform, low, high))))
        return tuple(factor for _, factor in sorted(factors))


def _uniform(rng: np.random.Generator) -> Uniform:
    """Draw a generator's numbers in 0…1 many at a time: one at a time costs as much as a blur."""

    def numbers() -> Iterator[float]:
        while True:
            yield from rng.random(256).tolist()

    return numbers().__next__


def _between(uniform: Uniform, low: float, high: float) -> float:
    return low + (high - low) * uniform()


def draw_box(
    height: int,
    width: int,
    uniform: Uniform,
    *,
    scale: tuple[float, float],
    aspect: tuple[float, float],
) -> tuple[int, int, int, int]:
    """Draw a random part of an image, distributed as torchvision's RandomResizedCrop.

    The area is uniform in `scale` and the aspect log-uniform. Where ten tries do not fit into the image, the largest
    centred part with an aspect in range is taken.

    Args:
        height: The image's height in pixels.
        width: The image's width in pixels.
        uniform: The source of random numbers.
        scale: The smallest and largest share of the image's area.
        aspect: The smallest and largest width / height.

    Returns:
        Top, left, height and width in pixels.
    """
    log_aspect = math.log(aspect[0]), math.log(aspect[1])
    for _ in range(10):
        area = height * width * _between(uniform, *scale)
        ratio = math.exp(_between(uniform, *log_aspect))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(uniform() * (height - h + 1)), int(uniform() * (width - w + 1)), h, w
    h, w = height, width
    if width < height * aspect[0]:
        h = round(width / aspect[0])
    elif width > height * aspect[1]:
        w = round(height * aspect[1])
    return (height - h) // 2, (width - w) // 2, h, w


def cut(image: UInt8, parameters: CropParameters) -> UInt8:
    """Cut out the box of [H, W, C], resize it to [size, size, C], flip and turn it."""
    top, left, height, width = parameters.box
    crop = resize(image[top : top + height, left : left + width], parameters.size, parameters.size)
    if parameters.horizontal_flip:
        crop = as_uint8(cv2.flip(crop, 1), crop.shape)
    if parameters.vertical_flip:
        crop = as_uint8(cv2.flip(crop, 0), crop.shape)
    if parameters.quarter_turns:
        crop = np.ascontiguousarray(np.rot90(crop, parameters.quarter_turns))
    return crop


def reduction(parameters: Sequence[CropParameters]) -> int:
    """Find the factor by which an image may be reduced before a crop would have to be enlarged, or enlarged further."""
    return max(min(min(p.box[2:]) // p.size for p in parameters), 1)


def on_reduced(parameters: CropParameters, image: tuple[int, int], reduced: tuple[int, int]) -> CropParameters:
    """Move a crop to an image that was reduced from (H, W) to (h, w), to the nearest pixel."""
    edges = []
    for start, length, full, now in zip(parameters.box[:2], parameters.box[2:], image, reduced, strict=True):
        first = min(round(start * now / full), now - 1)
        last = max(round((start + length) * now / full), first + 1)
        edges.append((first, last - first))
    (top, height), (left, width) = edges
    return replace(parameters, box=(top, left, height, width))


def resize(image: UInt8, height: int, width: int) -> UInt8:
    """Resize uint8 [H, W, C] to [height, width, C], bicubic with antialias, as Pillow does."""
    if image.shape[:2] == (height, width):
        return image
    # Permuted after the batch axis is added, torch sees channels_last and keeps to it, which is half as fast again.
    pixels = torch.from_numpy(image)[None].permute(0, 3, 1, 2)  # [1, C, H, W]
    resized = F.interpolate(pixels, size=(height, width), mode="bicubic", antialias=True)
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())


def whole(image: UInt8, size: int, *, center_crop: bool = False) -> torch.Tensor:
    """Prepare an image for evaluation.

    Args:
        image: An image, uint8 [H, W, C].
        size: The edge of the result in pixels.
        center_crop: Whether the official rule holds, by which the shorter side becomes round(size · 256 / 224) and the
            centre is cut out; otherwise the whole image is resized to a square.

    Returns:
        uint8 [C, size, size].
    """
    if not center_crop:
        return _channels_first(resize(image, size, size))
    shorter = round(size * 256 / 224)
    height, width, _ = image.shape
    scale = shorter / min(height, width)
    resized = resize(image, max(shorter, int(height * scale)), max(shorter, int(width * scale)))
    top, left = (round((edge - size) / 2) for edge in resized.shape[:2])
    return _channels_first(resized[top : top + size, left : left + size])


def _channels_first(image: UInt8) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1).contiguous()
