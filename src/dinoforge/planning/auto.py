"""Recipe ``auto``: hyper-parameters as functions of the images, the batch, the length of the run and the device.

``choose`` lays its choices over the recipe ``small``, each with a reason. It reads nothing but its arguments, and what
is measured of the images is no matter of chance or time, so the same images on the same kind of device get the same
recipe. What the user gives wins, and what depends on it follows:
with another batch come other prototypes, with another patch other crops. docs/small-data.md has the evidence.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from dinoforge.data.channels import Channels as Channels
from dinoforge.data.channels import Has, has_of, most
from dinoforge.data.channels import channels_of as channels_of
from dinoforge.data.channels import guess_channels as guess_channels
from dinoforge.data.headers import channels_said
from dinoforge.data.statistics import PixelStatistics, Symmetry
from dinoforge.errors import RecipeError
from dinoforge.models.vit import SIZES
from dinoforge.recipe.load import converted
from dinoforge.recipe.schema import Data, Train

BASE = "small"
LONG = 50_000  # steps: from here on, as the official recipes
SHALLOW = 6  # blocks: up to here, all learn alike

OF_PIXELS = ("data.mean", "data.std", "augment.vertical_flip", "augment.quarter_turns")
"""Keys that follow what is measured of the pixels."""

LENGTHS = ("train.steps", "train.epochs", "optim.epochs")

_DIVISORS = (
    "student.patch_size",
    "student.embed_dim",
    "crops.global_crops_size",
    "train.batch_size_per_gpu",
    "train.batch_size",
    "train.accumulate",
    "train.steps",
)
_FAR_MEAN, _FAR_STD = 0.15, 1.5  # difference to ImageNet's mean, and ratio to its deviation, of photographs
_FLAT = 0.02  # no deviation below five levels: it would turn rounding into a picture


@dataclass(frozen=True)
class Pixels:
    """Statistics of the pixels of a sample of images.

    Args:
        mean, std: Mean and standard deviation of each channel, on the range 0 to 1.
        images: Number of images that were measured, at least 1.
        kind: The kind of images that are no photographs by what their files say, such as ``uint16 x3, GeoTIFF``; or ''.
        symmetry: Whether the images have an up.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    images: int
    kind: str
    symmetry: Symmetry


@dataclass(frozen=True)
class Facts:
    """The facts that the rule looks at.

    Args:
        images: Number of images, at least 1.
        side: Typical shorter side in pixels, at least 1.
        channels: 1 grey, 3 colour, or any other number.
        device: One of ``cpu``, ``mps``, ``cuda`` and ``cuda:N``.
        ranks: Processes that share a batch.
        pixels: What was measured of their pixels; None: nothing.
        why: The reason for the number of channels.
    """

    images: int
    side: int
    channels: int
    device: str
    ranks: int = 1
    pixels: Pixels | None = None
    why: str = "the images' channels"

    @property
    def fast(self) -> bool:
        """Whether the device multiplies a hundred times as fast as a laptop's processor."""
        return self.device.startswith("cuda")


@dataclass(frozen=True)
class Choice:
    value: Any
    reason: str


class Sizes(Protocol):
    """Sizes and kinds of images, such as a ``DataSummary`` has."""

    @property
    def count(self) -> int: ...
    @property
    def widths(self) -> tuple[int, int]: ...
    @property
    def heights(self) -> tuple[int, int]: ...
    @property
    def modes(self) -> tuple[tuple[str, int], ...]: ...
    @property
    def side(self) -> int: ...


def facts_of(
    data: Sizes,
    device: str,
    ranks: int = 1,
    *,
    channels: Channels | None = None,
    statistics: PixelStatistics | None = None,
) -> Facts:
    """Turn what a look at some images found into facts for the rule.

    Args:
        data: Sizes and kinds of the images.
        device, ranks: See ``Facts``.
        channels: How many channels are read; None: as the kinds say.
        statistics: Statistics of the pixels, of as many channels; None where they were not measured.
    """
    if channels is None:
        have: Counter[Has] = Counter()
        for mode, number in data.modes:
            have[has_of(mode)] += number
        channels = most(have)
    pixels = None
    if statistics is not None and statistics.images:
        kind = next((mode for mode, _ in data.modes if not _may_be_photograph(mode)), "")
        pixels = Pixels(statistics.mean, statistics.std, statistics.images, kind, statistics.symmetry())
    sides = [min(data.widths[end], data.heights[end]) for end in (0, 1)]
    side = data.side or max(round(math.sqrt(sides[0] * sides[1])), 1)
    return Facts(data.count, side, channels.count, device, ranks, pixels, channels.reason)


def choose(facts: Facts, given: Mapping[str, Any]) -> dict[str, Choice]:
    """Choose keys to lay over the recipe ``small``, beneath what the user gave.

    Args:
        facts: What is known of images and device.
        given: The user's values by dotted key; none of the keys is in the result.

    Raises:
        RecipeError: A key is unknown, or a value is impossible.
    """
    given = {key: value for key, value in given.items() if value is not None}
    said = converted(given)
    for key in _DIVISORS:
        if said.get(key, 1) < 1:
            raise RecipeError(f"{key}: expected at least 1, got {said[key]}")
    choices: dict[str, Choice] = {}

    def settle(key: str, value: Any, reason: str) -> Any:
        """The value of a key, of which the user has the first say."""
        if key in given:
            return said[key]
        choices[key] = Choice(value, reason)
        return value

    def length(key: str, share: float, reason: str) -> None:
        """A warm-up as a share of the run, unless the user gave it in nominal epochs."""
        if f"{key}_epochs" not in given:
            settle(f"{key}_length", f"{share:.3g}%", reason)

    # Images
    channels = settle("student.in_chans", facts.channels, facts.why)
    for key, choice in _normalisation(facts, channels, said).items():
        settle(key, choice.value, choice.reason)
    if facts.pixels is not None:
        found = facts.pixels.symmetry
        settle("augment.vertical_flip", 0.5 if found.upside_down else 0.0, found.reason)
        turned = "each of four directions as often" if found.quarter_turns else "official; see augment.vertical_flip"
        settle("augment.quarter_turns", 0.75 if found.quarter_turns else 0.0, turned)
    if channels != 3:
        settle("augment.grayscale_probability", 0.0, "without three colours there is none to take away")
        settle("augment.solarize_probability", 0.0, "makes no picture that a camera would take")

    # Crops and patches
    patch = settle("student.patch_size", patch_size(facts.side, fast=facts.fast), "crops of 4 to 16 patches a side")
    crop = multiple(crop_size(facts.side, fast=facts.fast), patch)
    crop = settle("crops.global_crops_size", crop, f"for images of {facts.side} pixels; small crops are many")
    local = settle("crops.local_crops_size", multiple(0.45 * crop, patch), "nearly half of a global crop's side")
    number = settle("crops.local_crops_number", 8 if facts.fast else 2, "official" if facts.fast else "each costs time")
    if not facts.fast:
        settle("crops.global_crops_scale", (0.4, 1.0), "in a smaller part small objects are often not in view")
        settle("crops.local_crops_scale", (0.15, 0.4), "in a smaller part small objects are often not in view")
    smallest = min(crop, local) if number else crop
    settle("augment.blur_kernel", blur_kernel(smallest), f"9 at the official sizes, less at {smallest} pixels")
    settle("augment.blur_sigma", (0.1, blur_sigma(crop)), f"up to 2 at 224 pixels, less at {crop}")
    patches = max(crop // patch, 1) ** 2
    settle("ibot.mask_min_patches", max(min(4, patches // 8), 1), f"a small share of {patches} patches")

    # Batch and length
    parts = facts.ranks * said.get("train.accumulate", 1)
    if "train.batch_size" in said:
        share = max(said["train.batch_size"] // parts, 1)
        settle("train.batch_size_per_gpu", share, f"train.batch_size over {parts} ranks and micro-batches")
    else:
        share = batch_size(max(facts.images // parts, 1), fast=facts.fast)
        share = settle("train.batch_size_per_gpu", share, f"{facts.images:,} images; small batches make more steps")
    batch = share * parts
    if "train.epochs" in said:
        steps = max(math.ceil(said["train.epochs"] * facts.images / batch), 1)
    elif "optim.epochs" in said:
        nominal = said.get("train.OFFICIAL_EPOCH_LENGTH", Train.OFFICIAL_EPOCH_LENGTH)
        steps = max(math.ceil(said["optim.epochs"] * nominal), 1)
    else:
        steps = run_steps(facts.images, batch, fast=facts.fast)
        steps = settle("train.steps", steps, f"{steps * batch / facts.images:.0f} passes over the images")
    long = steps >= LONG

    # Network
    arch = said.get("student.arch", "vit_custom")
    if arch == "vit_custom":
        dim, depth = network(facts.images, fast=facts.fast)
        why = f"for {facts.images:,} images" if facts.fast else "what two cores can teach in a quarter of an hour"
        dim = settle("student.embed_dim", dim, why)
        depth = settle("student.depth", depth, why)
        heads = next(n for n in range(max(dim // 64, 1), 0, -1) if dim % n == 0)
        settle("student.num_heads", heads, f"{dim // heads} values for a head")
    else:
        _, depth, _ = SIZES.get(arch, (0, 12, 0))  # an unknown one is refused later
        for key in ("student.embed_dim", "student.depth", "student.num_heads"):
            settle(key, None, f"that of {arch}")
    deep = depth > SHALLOW
    settle("student.layerscale", 1e-5 if long and deep else 1.0, "1e-5 takes tens of thousands of steps to wake up")
    settle("student.drop_path_rate", (0.3 if depth > 12 else 0.1) if deep else 0.0, f"{depth} blocks")

    # Losses
    prototypes_why = f"as many as {batch} images can fill"
    settle("dino.head_n_prototypes", prototypes(batch), prototypes_why)
    settle("ibot.head_n_prototypes", prototypes(batch), prototypes_why)
    hidden, bottleneck = (2048, 256) if deep else (512, 64)
    settle("dino.head_hidden_dim", hidden, "official" if deep else "a smaller head makes quicker steps")
    settle("dino.head_bottleneck_dim", bottleneck, "official" if deep else "a smaller head makes quicker steps")
    weights_why = "official" if deep else "more costs a small network accuracy where labels are few"
    settle("ibot.loss_weight", 1.0 if deep else 0.25, weights_why)
    settle("dino.koleo_loss_weight", 0.1 if deep else 0.01, weights_why)
    targets = "sinkhorn_knopp" if batch < 1024 else "centering"
    settle("train.centering", targets, f"a centre of {batch} images is noise" if batch < 1024 else "official")
    temp = teacher_temp(batch)
    temp = settle(
        "teacher.teacher_temp",
        temp,
        "at more, targets of a young network are nearly uniform" if temp < 0.04 else "official",
    )
    warm = temp > 0.04
    settle("teacher.warmup_teacher_temp", min(0.04, temp), "official" if warm else "no warm-up")
    length("teacher.warmup_teacher_temp", 30 if warm else 0, "official share" if warm else "no warm-up")
    momentum = teacher_momentum(steps)
    settle("teacher.momentum_teacher", momentum, f"a teacher that follows within a run of {steps:,} steps")
    settle("teacher.final_momentum_teacher", final_momentum(steps), "the last half of the run, averaged")

    # Optimizer
    settle("optim.base_lr", 0.004 if deep else 0.005, "official" if deep else "small networks bear more")
    settle("optim.layerwise_decay", 0.9 if deep else 1.0, "official" if deep else f"{depth} blocks learn alike")
    settle("optim.patch_embed_lr_mult", 0.2 if deep else 1.0, "official" if deep else f"{depth} blocks learn alike")
    settle("optim.weight_decay_end", 0.4 if long else 0.2, "official" if long else "a short run needs less")
    length("optim.warmup", 10, "official share")
    length("optim.freeze_last_layer", 1, "official share")
    return choices


def patch_size(side: int, *, fast: bool) -> int:
    """Side of a patch for images of ``side`` pixels; grows with it."""
    for largest, patch in ((7, 1), (15, 2), (23, 4), (31, 7), (64, 8)):
        if side <= largest:
            return patch
    if fast:
        return 14
    return 8 if side <= 96 else 12


def crop_size(side: int, *, fast: bool) -> float:
    """Side of a global crop, before it is made a multiple of the patch; grows with ``side``.

    On a processor two thirds of the side: a step is then done in half the time, and more images teach more than more
    pixels. Never more than 224, or 96.
    """
    return min(side, 224) if fast else min(max(side * 2 / 3, min(side, 28)), 96)


def multiple(side: float, patch: int) -> int:
    """The nearest multiple of the patch, at least one patch."""
    return max(round(side / patch), 1) * patch


def blur_kernel(size: int) -> int:
    """Side of the blur's kernel: 9 where crops have 45 pixels or more, an odd number around a fifth of less."""
    return min(9, size // 10 * 2 + 1)


def blur_sigma(size: int) -> float:
    """Largest standard deviation of the blur: 2 at 224 pixels, never below 0.5."""
    return round(min(max(2 * size / 224, 0.5), 2.0), 2)


def batch_size(images: int, *, fast: bool) -> int:
    """A power of two, up to 128 or, on fast devices, 256, and no more than a quarter of the images where it can be."""
    quarter = 1 << int(math.log2(max(images // 4, 1)))
    return max(min(quarter, 256 if fast else 128), min(images, 8))


def run_steps(images: int, batch: int, *, fast: bool) -> int:
    """A hundred passes over the images, but no fewer than 1,000 steps, and no more than 5,000 or, fast, 125,000."""
    return min(max(math.ceil(100 * images / batch), 1000), 125_000 if fast else 5000)


def network(images: int, *, fast: bool) -> tuple[int, int]:
    """Width and depth; more for more images where the device is fast."""
    if not fast:
        return 128, 4
    return (384, 12) if images < 100_000 else (768, 12) if images < 1_000_000 else (1024, 24)


def prototypes(batch: int) -> int:
    """Number of prototypes: batch² / 64 as a power of two, 256 to 65,536, which a batch of 2,048 is official for."""
    return min(max(1 << max(round(2 * math.log2(batch) - 6), 0), 256), 65536)


def teacher_temp(batch: int) -> float:
    """0.01 up to 256 images, the official 0.07 from 1,024 on, in between a power of the batch."""
    return round(min(max(0.01 * math.pow(batch / 256, math.log(7, 4)), 0.01), 0.07), 4)


def teacher_momentum(steps: int) -> float:
    """1 - 0.65 / √steps: 0.97 for 500 steps, 0.99 for 4,000; from 0.9 to 0.996."""
    return round(min(max(1 - 0.65 / math.sqrt(steps), 0.9), 0.996), 4)


def final_momentum(steps: int) -> float:
    """1 - 2 / steps: the average at the end reaches over half of the run."""
    return max(round(1 - 2 / max(steps, 2), 6), teacher_momentum(steps))


def _normalisation(facts: Facts, channels: int, said: Mapping[str, Any]) -> dict[str, Choice]:
    """``data.mean`` and ``data.std``: ImageNet's for photographs, else what was measured."""
    pixels = facts.pixels
    if pixels is None or len(pixels.mean) != channels:
        if channels == 3:
            return {}
        why = "the default is ImageNet's, of three colours"
        return {"data.mean": Choice(0.5, why), "data.std": Choice(0.25, why)}
    if channels == 3 and said.get("init.weights"):
        return {}  # what the given backbone knows
    mean, std = (tuple(round(x, 3) for x in values) for values in (pixels.mean, pixels.std))
    found = f"of {pixels.images} images that were measured"
    if channels != 3:
        why = f"{found}; ImageNet's are of three colours"
    elif pixels.kind:
        why = f"{found}, which are no photographs ({pixels.kind})"
    elif difference := _far(pixels):
        why = f"{found}; {difference}"
    else:
        why = f"ImageNet's; those {found} are near it: mean {_plain(mean)}, deviation {_plain(std)}"
        return {"data.mean": Choice(Data.mean, why), "data.std": Choice(Data.std, why)}
    raised = f"; raised to {_FLAT} where nearly even" if min(std) < _FLAT else ""
    return {
        "data.mean": Choice(mean, why),
        "data.std": Choice(tuple(max(x, _FLAT) for x in std), why + raised),
    }


def _far(pixels: Pixels) -> str:
    """How the pixels differ from ImageNet's more than photographs do, in words; '' where they do not."""
    off = max(abs(a - b) for a, b in zip(pixels.mean, Data.mean, strict=True))
    if off > _FAR_MEAN:
        return f"ImageNet's mean is off by {off:.2f}, more than {_FAR_MEAN} in a channel"
    ratios = [a / b for a, b in zip(pixels.std, Data.std, strict=True)]
    for ratio in (min(ratios), max(ratios)):
        if not 1 / _FAR_STD <= ratio <= _FAR_STD:
            return f"in a channel {ratio:.2f} of ImageNet's deviation, outside {1 / _FAR_STD:.2f} to {_FAR_STD}"
    return ""


def _may_be_photograph(kind: str) -> bool:
    """Whether 8-bit pictures of cameras have that kind, as ``describe`` names it."""
    if channels_said(kind) is None:
        return not (kind.endswith(";16") or kind.startswith(("I", "F")))
    return kind.startswith("uint8 x") and "TIFF" not in kind and "ImageJ" not in kind


def choices_text(choices: Mapping[str, Choice]) -> str:
    """Every choice with its reason, as aligned lines."""
    texts = {key: _plain(choice.value) for key, choice in choices.items()}
    width = max(map(len, texts))
    values = max((len(text) for text in texts.values() if len(text) <= 24), default=0)  # lists may be longer
    return "\n".join(f"{key:<{width}}  {texts[key]:<{values}}  {choice.reason}" for key, choice in choices.items())


def _plain(value: Any) -> str:
    return f"[{', '.join(map(str, value))}]" if isinstance(value, tuple) else str(value)
