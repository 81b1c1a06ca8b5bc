"""Multi-crop augmentation: one image to two global crops and L local crops (SwAV, arXiv 2006.09882; DINO, 2104.14294).

Two halves: *drawing* decides everything that is random about a crop and puts it into `CropParameters`; *applying* is
a function of the image and those. Distributions are torchvision's, as the reference composes them: geometry (crop,
resize, flip), then colour (jitter in random order, grayscale), then blur, then solarize.

Hue, saturation and grayscale mean something for three channels only; with any other number they are left out.
Brightness and contrast treat all channels of an image alike.
"""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as TF

BLUR_PROBABILITY: dict[str, tuple[float, float, float]] = {"released": (0.0, 0.9, 0.5), "stated": (1.0, 0.1, 0.5)}
"""Probability of Gaussian blur for the first global, the second global and the local crops.

The reference states 1.0, 0.1 and 0.5, but its code hands them on as the probability that blur is *not* applied, so its
published models were trained with the complement: ``released``. ``stated`` is what its source appears to say.
"""


@dataclass(frozen=True, kw_only=True)
class CropParameters:
    """Everything that was drawn for one crop.

    Args:
        size: Edge of the crop, pixels.
        box: Top, left, height, width in the image, pixels.
        horizontal_flip: Mirror left and right.
        vertical_flip: Mirror up and down.
        jitter: Colour operations in order, each (``brightness`` | ``contrast`` | ``saturation`` | ``hue``, factor).
        grayscale: Replace the colour by its luma.
        blur: Kernel edge and standard deviation in pixels, or None.
        solarize: Invert values from this threshold on, or None.
    """

    size: int
    box: tuple[int, int, int, int]
    horizontal_flip: bool = False
    vertical_flip: bool = False
    jitter: tuple[tuple[str, float], ...] = ()
    grayscale: bool = False
    blur: tuple[int, float] | None = None
    solarize: int | None = None


@dataclass(frozen=True, kw_only=True)
class MultiCrop:
    """Two global crops and `local_number` local ones; defaults are the official ones (DINOv2, section 4 and code).

    Args:
        global_size, local_size: Edges of the crops, pixels.
        global_scale, local_scale: Smallest and largest share of the image's area in a crop.
        local_number: Number of local crops, L; 0 is valid.
        aspect: Smallest and largest width / height of a crop before it is resized to a square.
        horizontal_flip, vertical_flip: Probabilities.
        jitter_probability: Probability that a crop's colours are jittered.
        brightness, contrast, saturation: Factors are uniform in max(0, 1 - s)…1 + s.
        hue: Shifts are uniform in -s…s turns; at most 0.5.
        grayscale_probability: Probability that a crop loses its colour.
        blur_probability: For the first global, the second global and the local crops; see `BLUR_PROBABILITY`.
        blur_sigma: Smallest and largest standard deviation, pixels.
        blur_kernel: Edge of the blur's kernel, pixels, odd.
        solarize_probability: For the second global crop; no other crop is solarized.
        solarize_threshold: Values from here on are inverted, 0…255.
    """

    global_size: int = 224
    global_scale: tuple[float, float] = (0.32, 1.0)
    local_size: int = 96
    local_scale: tuple[float, float] = (0.05, 0.32)
    local_number: int = 8
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    horizontal_flip: float = 0.5
    vertical_flip: float = 0.0
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

    def __call__(self, image: npt.NDArray[np.uint8], rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw and cut the crops of one image.

        Args:
            image: uint8 [H, W, C].
            rng: Source of randomness; the crops are a function of the image and its state.

        Returns:
            Global crops uint8 [2, C, G, G] and local crops uint8 [L, C, l, l].
        """
        height, width, channels = image.shape
        parameters = self.draw(height, width, rng)
        pixels = torch.from_numpy(image).permute(2, 0, 1)  # [C, H, W], in memory still [H, W, C]
        crops = [apply(pixels, crop) for crop in parameters]
        empty = pixels.new_empty((0, channels, self.local_size, self.local_size))
        return torch.stack(crops[:2]), torch.stack(crops[2:]) if self.local_number else empty

    def draw(self, height: int, width: int, rng: np.random.Generator) -> list[CropParameters]:
        """Draw the parameters of the crops of an image of this size: two global ones, then the local ones."""
        blur_first, blur_second, blur_local = self.blur_probability
        local = (self.local_size, self.local_scale, blur_local, 0.0)
        return [
            self._draw_crop(height, width, rng, *kind)
            for kind in (
                (self.global_size, self.global_scale, blur_first, 0.0),
                (self.global_size, self.global_scale, blur_second, self.solarize_probability),
                *[local] * self.local_number,
            )
        ]

    def _draw_crop(
        self,
        height: int,
        width: int,
        rng: np.random.Generator,
        size: int,
        scale: tuple[float, float],
        blur_probability: float,
        solarize_probability: float,
    ) -> CropParameters:
        return CropParameters(
            size=size,
            box=draw_box(height, width, rng, scale=scale, aspect=self.aspect),
            horizontal_flip=rng.random() < self.horizontal_flip,
            vertical_flip=rng.random() < self.vertical_flip,
            jitter=self._draw_jitter(rng) if rng.random() < self.jitter_probability else (),
            grayscale=rng.random() < self.grayscale_probability,
            blur=(self.blur_kernel, rng.uniform(*self.blur_sigma)) if rng.random() < blur_probability else None,
            solarize=self.solarize_threshold if rng.random() < solarize_probability else None,
        )

    def _draw_jitter(self, rng: np.random.Generator) -> tuple[tuple[str, float], ...]:
        """Draw order and factors; an operation of strength 0 is left out."""
        ranges = [
            ("brightness", self.brightness, max(0.0, 1 - self.brightness), 1 + self.brightness),
            ("contrast", self.contrast, max(0.0, 1 - self.contrast), 1 + self.contrast),
            ("saturation", self.saturation, max(0.0, 1 - self.saturation), 1 + self.saturation),
            ("hue", self.hue, -self.hue, self.hue),
        ]
        factors = [(name, rng.uniform(low, high)) for name, strength, low, high in ranges if strength > 0]
        return tuple(factors[i] for i in rng.permutation(len(factors)))


def draw_box(
    height: int,
    width: int,
    rng: np.random.Generator,
    *,
    scale: tuple[float, float],
    aspect: tuple[float, float],
) -> tuple[int, int, int, int]:
    """Draw a random part of an image, distributed as torchvision's RandomResizedCrop.

    Area uniform in `scale`, aspect log-uniform; up to ten tries until it fits into the image; else the largest centred
    part with an aspect in range.

    Returns:
        Top, left, height, width, pixels.
    """
    log_aspect = math.log(aspect[0]), math.log(aspect[1])
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(*log_aspect))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    h, w = height, width
    if width < height * aspect[0]:
        h = round(width / aspect[0])
    elif width > height * aspect[1]:
        w = round(height * aspect[1])
    return (height - h) // 2, (width - w) // 2, h, w


def apply(image: torch.Tensor, parameters: CropParameters) -> torch.Tensor:
    """Cut one crop.

    Args:
        image: uint8 [C, H, W].
        parameters: What was drawn.

    Returns:
        uint8 [C, size, size].
    """
    crop = cut(image, parameters)
    crop = recolour(crop, parameters)
    if parameters.blur is not None:
        kernel, sigma = parameters.blur
        crop = TF.gaussian_blur(crop, [kernel, kernel], [sigma, sigma])
    if parameters.solarize is not None:
        crop = TF.solarize(crop, parameters.solarize)
    return crop


def cut(image: torch.Tensor, parameters: CropParameters) -> torch.Tensor:
    """Cut out the box of [C, H, W], resize it to [C, size, size], flip it."""
    top, left, height, width = parameters.box
    crop = resize(image[:, top : top + height, left : left + width], parameters.size, parameters.size)
    flipped = [axis for axis, flip in ((-1, parameters.horizontal_flip), (-2, parameters.vertical_flip)) if flip]
    return crop.flip(flipped) if flipped else crop


def recolour(crop: torch.Tensor, parameters: CropParameters) -> torch.Tensor:
    """Jitter and grayscale [C, h, w]."""
    channels, height, width = crop.shape
    for operation, factor in parameters.jitter:
        # torchvision adjusts one or three channels: any other number is laid out as one tall grey image.
        grey = crop if channels in (1, 3) else crop.reshape(1, channels * height, width)
        if operation == "brightness":
            crop = TF.adjust_brightness(grey, factor).reshape(crop.shape)
        elif operation == "contrast":
            crop = TF.adjust_contrast(grey, factor).reshape(crop.shape)
        elif operation == "saturation" and channels == 3:
            crop = TF.adjust_saturation(crop, factor)
        elif operation == "hue" and channels == 3:
            crop = TF.adjust_hue(crop, factor)
    if parameters.grayscale and channels == 3:
        crop = TF.rgb_to_grayscale(crop, num_output_channels=3)
    return crop


def resize(image: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resize uint8 [C, H, W] to [C, height, width], bicubic with antialias, as Pillow does."""
    if image.shape[1:] == (height, width):
        return image.contiguous()
    resized = F.interpolate(image[None], size=(height, width), mode="bicubic", antialias=True)
    return resized[0].contiguous()


def whole(image: npt.NDArray[np.uint8], size: int, *, center_crop: bool = False) -> torch.Tensor:
    """Prepare an image for evaluation.

    Args:
        image: uint8 [H, W, C].
        size: Edge of the result, pixels.
        center_crop: False: the whole image, resized to a square. True: the official rule, shorter side to
            round(size · 256 / 224), then the centre.

    Returns:
        uint8 [C, size, size].
    """
    pixels = torch.from_numpy(image).permute(2, 0, 1)  # [C, H, W]
    if not center_crop:
        return resize(pixels, size, size)
    shorter = round(size * 256 / 224)
    height, width, _ = image.shape
    scale = shorter / min(height, width)
    resized = resize(pixels, max(shorter, int(height * scale)), max(shorter, int(width * scale)))
    top, left = (round((edge - size) / 2) for edge in resized.shape[1:])
    return resized[:, top : top + size, left : left + size].contiguous()
