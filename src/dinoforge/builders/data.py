"""The training data of a recipe."""

import math
from functools import partial

from dinoforge.data.batches import DrawMasks, TrainingData
from dinoforge.data.crops import BLUR_PROBABILITY, MultiCrop
from dinoforge.data.image_input import ImageInput
from dinoforge.data.masks import batch_masks, max_num_patches
from dinoforge.data.sources import Source
from dinoforge.recipe.schema import Recipe


def image_input(recipe: Recipe) -> ImageInput:
    """Collect the image format that the backbone of a run expects."""
    return ImageInput(
        size=recipe.crops.global_crops_size,
        in_chans=recipe.student.in_chans,
        mean=recipe.data.mean,
        std=recipe.data.std,
        sixteen_bit=recipe.data.sixteen_bit,
        max_pixels=recipe.data.max_pixels,
        range=recipe.data.range,
        nodata=recipe.data.nodata,
        fill=recipe.data.fill,
        plane=recipe.data.plane,
    )


def build_masks(recipe: Recipe) -> DrawMasks:
    """Make the function that draws the masks of all global crops of a batch."""
    i = recipe.ibot
    return partial(
        batch_masks,
        kind=i.mask_kind,
        ratio=i.mask_ratio_min_max,
        probability=i.mask_sample_probability,
        max_patches=max_num_patches(recipe.crops.global_crops_size, recipe.student.patch_size),
        min_patches=i.mask_min_patches,
        min_aspect=i.mask_min_aspect,
    )


def least_reduction(recipe: Recipe, width: int, height: int) -> int:
    """Compute the smallest divisor of edges at which training decodes large JPEG files of this size.

    Args:
        recipe: The recipe.
        width, height: The size of the files, in pixels.
    """
    if not recipe.data.reduced_decode:
        return 1
    c = recipe.crops
    areas = {c.global_crops_size: c.global_crops_scale[0]}
    if c.local_crops_number:
        areas[c.local_crops_size] = min(c.local_crops_scale[0], areas.get(c.local_crops_size, 1.0))
    narrow = min(c.aspect_ratio[0], 1 / c.aspect_ratio[1])
    return max(1, min(int(math.sqrt(area * width * height * narrow) / size) for size, area in areas.items()))


def build_data(recipe: Recipe, source: Source, *, rank: int = 0, world_size: int = 1) -> TrainingData:
    """Make the training batches of a source for one rank."""
    c, a = recipe.crops, recipe.augment
    crops = MultiCrop(
        global_size=c.global_crops_size,
        global_scale=c.global_crops_scale,
        local_size=c.local_crops_size,
        local_scale=c.local_crops_scale,
        local_number=c.local_crops_number,
        aspect=c.aspect_ratio,
        horizontal_flip=a.horizontal_flip,
        vertical_flip=a.vertical_flip,
        quarter_turns=a.quarter_turns,
        jitter_probability=a.jitter_probability,
        brightness=a.brightness,
        contrast=a.contrast,
        saturation=a.saturation,
        hue=a.hue,
        grayscale_probability=a.grayscale_probability,
        blur_probability=a.blur_probability or BLUR_PROBABILITY[a.blur],
        blur_sigma=a.blur_sigma,
        blur_kernel=a.blur_kernel,
        solarize_probability=a.solarize_probability,
        solarize_threshold=a.solarize_threshold,
    )
    return TrainingData(
        source,
        crops,
        build_masks(recipe),
        patch_size=recipe.student.patch_size,
        channels=recipe.student.in_chans,
        decoding=image_input(recipe).decoding,
        reduced_decode=recipe.data.reduced_decode,
        photometry=a.device == "workers",
        seed=recipe.train.seed,
        batch_size=recipe.train.batch_size_per_gpu * world_size * recipe.train.accumulate,
        rank=rank,
        world_size=world_size,
    )
