"""The images that a backbone expects."""

from dataclasses import dataclass

from dinoforge.data.values import Decoding, pairs_of, plane_of


@dataclass(frozen=True)
class ImageInput:
    """The images that a backbone expects, and how values become their pixels.

    Args:
        size: The side in pixels of the images that it was trained on (global crops).
        in_chans: The number of channels.
        mean: The mean of each channel on the range 0..1, or one for all.
        std: The standard deviation on the same range, likewise.
        sixteen_bit: The rule for values deeper than 8 bits, ``full`` or ``minmax``.
        max_pixels: The largest H·W that is decoded.
        range: The values that become 0 and 255, for all channels or for each in turn.
        nodata: A value that means no data.
        fill: The level of pixels without data.
        plane: The plane of a file with several, as the recipe has it.
    """

    size: int
    in_chans: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    sixteen_bit: str
    max_pixels: int
    range: tuple[float, ...] | None = None  # files of earlier versions lack it, and the fields below
    nodata: float | None = None
    fill: int = 0
    plane: str | None = None

    @property
    def rule(self) -> str | None:
        """The arguments of ``dinoforge.read_image`` that scale values; None where 8-bit values stay as they are.

        Other libraries do not have such rules.
        """
        rules = {"sixteen_bit": "full", "range": None, "nodata": None, "fill": 0, "plane": None}
        said = {key: value for key, usual in rules.items() if (value := getattr(self, key)) != usual}
        return ", ".join(f"{key}={value!r}" for key, value in said.items()) or None

    @property
    def decoding(self) -> Decoding:
        """The keywords of ``decode`` by which values become pixels."""
        return Decoding(
            sixteen_bit=self.sixteen_bit,
            max_pixels=self.max_pixels,
            value_range=pairs_of(self.range),
            nodata=self.nodata,
            fill=self.fill,
            plane=plane_of(self.plane),
        )


IMAGE_KEYS = ("mean", "std", "range", "sixteen_bit", "nodata", "fill", "plane", "max_pixels")
"""Fields of ``ImageInput`` that files of other libraries do not say."""
