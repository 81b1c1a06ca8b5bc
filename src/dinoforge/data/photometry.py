"""Colour jitter, grayscale, blur and solarize, one crop at a time in a data worker or many at once on a device.

Both compute with 8-bit values between operations, as Pillow does and with it the reference: products are cut off, not
rounded; luma is ITU-R 601, rounded; hue has 256 steps a turn. They agree with each other, with torchvision and with
Pillow to within a few levels; the tests state the tolerances.

Hue, saturation and grayscale mean something for three channels only; with any other number they are left out.
Brightness and contrast treat all channels of an image alike.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

UInt8 = npt.NDArray[np.uint8]

JITTER = ("brightness", "contrast", "saturation", "hue")

_LUMA = (0.299, 0.587, 0.114)
_LEVELS = np.arange(256, dtype=np.float32)


@dataclass(frozen=True, kw_only=True)
class Photometry:
    """The photometric operations that were drawn for one crop, in the order in which they are applied.

    Args:
        jitter: Colour operations in order, each (name out of `JITTER`, factor). A hue's factor is in turns.
        grayscale: Replace the colour by its luma.
        blur: Kernel edge and standard deviation in pixels, or None.
        solarize: Invert values from this threshold on, or None.
    """

    jitter: tuple[tuple[str, float], ...] = ()
    grayscale: bool = False
    blur: tuple[int, float] | None = None
    solarize: int | None = None


def recolour(crop: UInt8, drawn: Photometry) -> UInt8:
    """Apply what was drawn to one crop.

    Args:
        crop: uint8 [h, w, C].
        drawn: The operations.

    Returns:
        uint8 [h, w, C]; may be `crop` itself.
    """
    colour = crop.shape[2] == 3
    for name, factor in drawn.jitter:
        if name == "brightness":
            crop = _look_up(crop, _LEVELS * np.float32(factor))
        elif name == "contrast":
            mean = round(float((cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY) if colour else crop).mean()))
            crop = _look_up(crop, _LEVELS * np.float32(factor) + np.float32((1 - factor) * mean))
        elif name == "saturation" and colour:
            luma = cv2.cvtColor(cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
            # OpenCV rounds: just under half a level less cuts off instead.
            crop = _uint8(cv2.addWeighted(crop, factor, luma, 1 - factor, -0.499))
        elif name == "hue" and colour:
            turned = _uint8(cv2.cvtColor(crop, cv2.COLOR_RGB2HSV_FULL))
            turned[:, :, 0] += np.uint8(round(factor * 256) % 256)  # wraps round
            crop = _uint8(cv2.cvtColor(turned, cv2.COLOR_HSV2RGB_FULL))
    if drawn.grayscale and colour:
        crop = _uint8(cv2.cvtColor(cv2.cvtColor(crop, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB))
    if drawn.blur is not None:
        kernel, sigma = drawn.blur
        blurred = cv2.GaussianBlur(crop, (kernel, kernel), sigma, borderType=cv2.BORDER_REFLECT_101)
        crop = _uint8(blurred).reshape(crop.shape)  # OpenCV drops a single channel's axis
    if drawn.solarize is not None:
        crop = _look_up(crop, np.where(drawn.solarize <= _LEVELS, 255 - _LEVELS, _LEVELS))
    return crop


def _look_up(crop: UInt8, values: npt.NDArray[np.float32]) -> UInt8:
    """Replace each level by its value, limited and cut off to 8 bits."""
    table = values.clip(0, 255).astype(np.uint8)
    return _uint8(cv2.LUT(crop, table)).reshape(crop.shape)


def _uint8(array: npt.NDArray[np.generic]) -> UInt8:
    """OpenCV's stubs promise arrays of any type; of uint8 it makes uint8."""
    assert array.dtype == np.uint8, array.dtype
    return array  # type: ignore[return-value]


@dataclass(frozen=True)
class PhotometryBatch:
    """What was drawn for N crops, as tensors. They stay on the CPU, so that no step waits to learn who needs what.

    Args:
        operations: int8 [N, 4], position in `JITTER` of the first, second… operation; -1 for none.
        factors: float32 [N, 4].
        grayscale: bool [N].
        sigma: float32 [N], standard deviation of the blur, pixels; 0 for none.
        kernel: Edge of the blur's kernel, pixels, odd.
        threshold: int16 [N], of solarize; 256 for none.
    """

    operations: torch.Tensor
    factors: torch.Tensor
    grayscale: torch.Tensor
    sigma: torch.Tensor
    kernel: int
    threshold: torch.Tensor

    @staticmethod
    def of(drawn: Sequence[Photometry]) -> "PhotometryBatch":
        """Lay out what was drawn for each crop. All blurs have kernels of one size."""
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
    """Apply what was drawn to each of many crops, on the device where they are.

    Args:
        crops: uint8 [N, C, h, w].
        drawn: The operations for each.

    Returns:
        uint8 [N, C, h, w]; `crops` itself is left alone.
    """
    crops = crops.clone()
    colour = crops.shape[1] == 3

    def change(wanted: torch.Tensor, operation: Callable[..., torch.Tensor], *values: torch.Tensor) -> None:
        """Replace the crops where `wanted` [N] is true by `operation` of them and of their values."""
        rows = wanted.nonzero()[:, 0]
        if len(rows):
            places = rows.to(crops.device, non_blocking=True)
            own = [v[rows].to(crops.device, non_blocking=True).float().view(-1, 1, 1, 1) for v in values]
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
    """ITU-R 601 luma of [n, 3, h, w], rounded: [n, 1, h, w]; of any other number of channels, themselves."""
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
    """Turn the hue, through HSV of 8 bits each."""
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
    span = (span * 255 / value.clamp(min=1)).round() * value / 255  # as from a saturation of 8 bits
    # Each channel is the value less the span, but for the part of the circle near its own hue.
    place = (hue + x.new_tensor([5.0, 3.0, 1.0]).view(1, 3, 1, 1)).remainder(6)
    return (value - span * torch.minimum(place, 4 - place).clamp(0, 1)).round()


def _blur(x: torch.Tensor, sigma: torch.Tensor, kernel: int) -> torch.Tensor:
    """Gaussian blur of [n, C, h, w], each with its own sigma [n, 1, 1, 1]; edges are reflected. Rounded."""
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
