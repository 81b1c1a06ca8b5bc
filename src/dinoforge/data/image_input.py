"""What a backbone expects of images."""

from dataclasses import dataclass

from dinoforge.data.values import Decoding, pairs_of, plane_of


@dataclass(frozen=True)
class ImageInput:
    """How an image has to be made for a backbone."""

    size: int  # side in pixels it was trained at (global crops)
    in_chans: int
    mean: tuple[float, ...]  # on the range 0..1
    std: tuple[float, ...]
    sixteen_bit: str
    max_pixels: int
    range: tuple[float, ...] | None = None  # files of earlier versions do not say it, nor what follows
    nodata: float | None = None
    fill: int = 0
    plane: str | None = None

    @property
    def rule(self) -> str | None:
        """How values become levels, as arguments of ``dinoforge.read_image``; None where 8-bit values stay as they are.

        Other libraries do not know it.
        """
        rules = {"sixteen_bit": "full", "range": None, "nodata": None, "fill": 0, "plane": None}
        said = {key: value for key, usual in rules.items() if (value := getattr(self, key)) != usual}
        return ", ".join(f"{key}={value!r}" for key, value in said.items()) or None

    @property
    def decoding(self) -> Decoding:
        """How values become pixels."""
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
