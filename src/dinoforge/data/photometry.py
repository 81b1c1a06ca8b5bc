"""Colour jitter, grayscale, blur and solarize, one crop at a time in a data worker or many at once on a device.

Both ways compute with 8-bit values between operations, as Pillow and the reference do: products are truncated, not
rounded; luma is ITU-R 601, rounded; hue has 256 steps a turn. They agree with each other, with torchvision and with
Pillow to within a few levels; the tests state the tolerances.

Hue, saturation and grayscale are defined for three channels only, and left out for any other number.
Brightness and contrast treat all channels of an image alike.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from dinoforge.data.values import UInt8
from dinoforge.system.transfer import to_device

JITTER = ("brightness", "contrast", "saturation", "hue")

_LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True, kw_only=True)
class Photometry:
    """The photometric operations that were drawn for one crop, in the order in which they are applied.

    Args:
        jitter: Colour operations in order, each a name out of `JITTER` and a factor; a hue's factor is in turns.
        grayscale: Whether luma replaces colour.
        blur: The kernel's edge and the standard deviation in pixels, or None.
        solarize: The value from which on values are inverted, or None.
    """

    jitter: tuple[tuple[str, float], ...] = ()
    grayscale: bool = False
    blur: tuple[int, float] | None = None
    solarize: int | None = None


def recolour(crop: UInt8, drawn: Photometry) -> UInt8:
    """Apply the operations that were drawn to one crop.

    Args:
        crop: A crop, uint8 [h, w, C].
        drawn: The operations.

    Returns:
        The changed crop, uint8 [h, w, C]; it may be `crop` itself.
    """
    colour = crop.shape[2] == 3
    for name, factor in drawn.jitter:
        if name == "brightness":
            crop = _blend(crop, factor, crop, 0.0)
        elif name == "contrast":
            mean = round(cv2.mean(_grey(crop) if colour else crop.reshape(1, -1))[0])
            crop = _blend(crop, factor, crop, 0.0, (1 - factor) * mean)
        elif name == "saturation" and colour:
            crop = _blend(crop, factor, cv2.cvtColor(_grey(crop), cv2.COLOR_GRAY2RGB), 1 - factor)
        elif name == "hue" and colour:
            turned = cv2.cvtColor(crop, cv2.COLOR_RGB2HSV_FULL).reshape(len(crop), -1)  # H, S, V, H, S, V…
            turned += np.tile(np.array([round(factor * 256) % 256, 0, 0], np.uint8), crop.shape[1])  # wraps round
            crop = as_uint8(cv2.cvtColor(turned.reshape(crop.shape), cv2.COLOR_HSV2RGB_FULL), crop.shape)
    if drawn.grayscale and colour:
        crop = as_uint8(cv2.cvtColor(_grey(crop), cv2.COLOR_GRAY2RGB), crop.shape)
    if drawn.blur is not None:
        weights = cv2.getGaussianKernel(*drawn.blur)
        blurred = cv2.sepFilter2D(crop, -1, weights, weights, borderType=cv2.BORDER_REFLECT_101)
        crop = as_uint8(blurred, crop.shape)
    if drawn.solarize is not None:
        levels = np.arange(256, dtype=np.uint8)
        table = np.where(levels >= np.uint8(drawn.solarize), 255 - levels, levels)
        crop = as_uint8(cv2.LUT(crop, table), crop.shape)
    return crop


def _grey(crop: UInt8) -> UInt8:
    return as_uint8(cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY), crop.shape[:2])


def _blend(crop: UInt8, factor: float, other: cv2.typing.MatLike, weight: float, shift: float = 0.0) -> UInt8:
    """Compute factor · crop + weight · other + shift, limited to 8 bits and truncated."""
    # OpenCV rounds; just under half a level less makes that a truncation.
    return as_uint8(cv2.addWeighted(crop, factor, other, weight, shift - 0.499), crop.shape)


def as_uint8(array: npt.NDArray[np.generic], shape: tuple[int, ...]) -> UInt8:
    """Restore type and shape of OpenCV's result: its stubs promise any type, and it drops the axis of one channel."""
    assert array.dtype == np.uint8, array.dtype
    return array.reshape(shape)  # type: ignore[return-value]


@dataclass(frozen=True)
class PhotometryBatch:
    """The operations that were drawn for N crops, as tensors.

    They stay on the CPU, so that no step waits to learn which crops need which.

    Args:
        operations: Positions in `JITTER` of the first, second… operation, int8 [N, 4]; -1 for none.
        factors: The factors of these operations, float32 [N, 4].
        grayscale: Whether luma replaces colour, bool [N].
        sigma: The standard deviation of the blur in pixels, float32 [N]; 0 for none.
        kernel: The edge of the blur's kernel in pixels, odd.
        threshold: The threshold of solarize, int16 [N]; 256 for none.
    """

    operations: torch.Tensor
    factors: torch.Tensor
    grayscale: torch.Tensor
    sigma: torch.Tensor
    kernel: int
    threshold: torch.Tensor

    @staticmethod
    def of(drawn: Sequence[Photometry]) -> "PhotometryBatch":
        """Lay out the operations of each crop; all blurs have kernels of one size."""
        operations = torch.full((len(drawn), len(JITTER)), -1, dtype=torch.int8)
        factors = torch.zeros(len(drawn), len(JITTER))
        for row, crop in enumerate(drawn):
            for place, (name, factor) in enumerate(crop.jitter):
                operations[row, place], factors[row, place] = JITTER.index(name), factor
        kernels = {crop.blur[0] for crop in drawn if crop.blur} or {1}
        (kernel,) = kernels
        return PhotometryBatch(
            operations,
            factors,
            torch.tensor([crop.grayscale for crop in drawn], dtype=torch.bool),
            torch.tensor([crop.blur[1] if crop.blur else 0.0 for crop in drawn]),
            kernel,
            torch.tensor([256 if crop.solarize is None else crop.solarize for crop in drawn], dtype=torch.int16),
        )


def recolour_batch(crops: torch.Tensor, drawn: PhotometryBatch) -> torch.Tensor:
    """Apply the operations that were drawn to many crops, on the device where they are.

    Args:
        crops: Crops, uint8 [N, C, h, w]; they are left alone.
        drawn: The operations of each crop.

    Returns:
        The changed crops, uint8 [N, C, h, w].
    """
    crops = crops.clone()
    colour = crops.shape[1] == 3

    def change(wanted: torch.Tensor, operation: Callable[..., torch.Tensor], *values: torch.Tensor) -> None:
        """Apply `operation`, with a crop's own values, to the crops where `wanted` [N] is true."""
        rows = wanted.nonzero()[:, 0]
        if len(rows):
            places = to_device(rows, crops.device)
            own = [to_device(v[rows], crops.device).float().view(-1, 1, 1, 1) for v in values]
            crops[places] = operation(crops[places].float(), *own).clamp(0, 255).to(torch.uint8)

    jitter = (_brightness, _contrast, _saturation, _hue)
    for place in range(len(JITTER)):
        for number, operation in enumerate(jitter if colour else jitter[:2]):
            change(drawn.operations[:, place] == number, operation, drawn.factors[:, place])
    if colour:
        change(drawn.grayscale, lambda x: _luma(x).expand_as(x))
    change(drawn.sigma > 0, lambda x, sigma: _blur(x, sigma, drawn.kernel), drawn.sigma)
    change(drawn.threshold < 256, lambda x, least: torch.where(x >= least, 255 - x, x), drawn.threshold)
    return crops


def _luma(x: torch.Tensor) -> torch.Tensor:
    """Compute the rounded ITU-R 601 luma [n, 1, h, w] of [n, 3, h, w]; other numbers of channels stay as they are."""
    if x.shape[1] != 3:
        return x
    red, green, blue = (x[:, i : i + 1] * weight for i, weight in enumerate(_LUMA))
    return (red + green + blue).round()


def _brightness(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return x * factor


def _contrast(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    mean = _luma(x).mean(dim=(1, 2, 3), keepdim=True).round()
    return x * factor + (1 - factor) * mean


def _saturation(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    return x * factor + (1 - factor) * _luma(x)


def _hue(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Turn the hue, through HSV of 8 bits per channel."""
    value, least = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    span = value - least
    red, green, blue = x.split(1, dim=1)
    divisor = span.clamp(min=1)
    sixth = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    hue = ((sixth * (256 / 6)).round() + (turns * 256).round()).remainder(256) * (6 / 256)  # 0…6
    span = (span * 255 / value.clamp(min=1)).round() * value / 255  # rounded like a saturation of 8 bits
    # Each channel is the value less the span, but for the part of the circle near its own hue.
    turned = torch.arange(5, 0, -2, dtype=x.dtype, device=x.device)  # 5, 3, 1, without a copy to the device
    place = (hue + turned.view(1, 3, 1, 1)).remainder(6)
    return (value - span * torch.minimum(place, 4 - place).clamp(0, 1)).round()


def _blur(x: torch.Tensor, sigma: torch.Tensor, kernel: int) -> torch.Tensor:
    """Blur [n, C, h, w], each with its own sigma [n, 1, 1, 1], with reflected edges and rounded values."""
    n = len(x)
    reach = kernel // 2
    distance = torch.arange(-reach, reach + 1, device=x.device)
    weights = torch.exp(-0.5 * (distance / sigma.view(n, 1)) ** 2)
    weights = weights / weights.sum(1, keepdim=True)  # [n, kernel]
    # Crops become groups of a convolution, their channels a batch.
    padded = F.pad(x, [reach] * 4, mode="reflect").transpose(0, 1)  # [C, n, h + 2r, w + 2r]
    rows = F.conv2d(padded, weights.view(n, 1, kernel, 1), groups=n)
    blurred = F.conv2d(rows, weights.view(n, 1, 1, kernel), groups=n)
    return blurred.transpose(0, 1).round()
