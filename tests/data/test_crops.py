import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from dinoforge.data.crops import (
    BLUR_PROBABILITY,
    CropParameters,
    MultiCrop,
    apply,
    draw_box,
    recolour,
    resize,
    whole,
)

SMALL = MultiCrop(global_size=32, local_size=16, local_number=3)
PIXELS = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)


def smooth(height: int, width: int, channels: int) -> np.ndarray:
    """An image with structure at several scales, uint8 [H, W, C]."""
    y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(channels), indexing="ij")
    return (127 + 60 * np.sin(x / 7 + c) + 60 * np.cos(y / 11 - x / 23 + 2 * c)).astype(np.uint8)


def assert_almost_equal(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Equal but for rounding: two passes of two implementations."""
    difference = np.abs(ours.astype(int) - theirs)
    assert ours.shape == theirs.shape
    assert difference.max() <= 2
    assert difference.mean() < 0.1


def as_tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)


@pytest.mark.parametrize("channels", [1, 3, 4, 5])
@pytest.mark.parametrize("local_number", [0, 3])
def test_shapes_and_types(channels: int, local_number: int) -> None:
    crop = replace(SMALL, local_number=local_number)
    global_crops, local_crops = crop(smooth(30, 50, channels), np.random.default_rng(0))
    assert global_crops.shape == (2, channels, 32, 32)
    assert local_crops.shape == (local_number, channels, 16, 16)
    assert global_crops.dtype == local_crops.dtype == torch.uint8
    assert global_crops.is_contiguous()


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (7, 5), (500, 700)])
def test_any_image_size(shape: tuple[int, int]) -> None:
    global_crops, local_crops = SMALL(smooth(*shape, 3), np.random.default_rng(0))
    assert global_crops.shape == (2, 3, 32, 32)
    assert local_crops.shape == (3, 3, 16, 16)


def test_crops_are_a_function_of_image_and_generator() -> None:
    (first, first_local), (second, second_local) = (SMALL(PIXELS, np.random.default_rng(5)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(first_local, second_local)
    other, _ = SMALL(PIXELS, np.random.default_rng(6))
    assert not torch.equal(first, other)


def test_image_and_global_generators_are_left_alone() -> None:
    image, torch_state, numpy_state = PIXELS.copy(), torch.get_rng_state(), np.random.get_state()[1].copy()
    SMALL(image, np.random.default_rng(0))
    assert np.array_equal(image, PIXELS)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])


@pytest.mark.parametrize("channels", [1, 3, 4, 5])
@pytest.mark.parametrize("size", [17, 64, 150])
def test_resize_as_pillow(channels: int, size: int) -> None:
    image = smooth(90, 120, channels)
    part = image[10:80, 20:117]  # not contiguous, as crops are
    resized = resize(as_tensor(image)[:, 10:80, 20:117], size, size)
    for channel in range(channels):
        expected = Image.fromarray(part[:, :, channel].copy()).resize((size, size), Image.Resampling.BICUBIC)
        assert_almost_equal(resized[channel].numpy(), np.asarray(expected))


@pytest.mark.parametrize(
    ("height", "width", "scale"), [(224, 224, (0.32, 1.0)), (375, 500, (0.05, 0.32)), (60, 300, (0.32, 1.0))]
)
def test_boxes_are_distributed_as_torchvisions(height: int, width: int, scale: tuple[float, float]) -> None:
    rng = np.random.default_rng(0)
    draws = 4000
    ours = np.array([draw_box(height, width, rng, scale=scale, aspect=(3 / 4, 4 / 3)) for _ in range(draws)])
    torch.manual_seed(0)
    image = torch.empty(1, height, width, dtype=torch.uint8)
    transform = v2.RandomResizedCrop(8, scale=scale)
    boxes = [transform.make_params([image]) for _ in range(draws)]
    theirs = np.array([[box[key] for key in ("top", "left", "height", "width")] for box in boxes])
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()
    assert ours.min() >= 0
    assert ours[:, 2:].min() >= 1
    for moment in (lambda x: x, np.square, lambda x: x[:, 2:] / x[:, 3:1:-1], lambda x: x[:, 2:3] * x[:, 3:]):
        a, b = moment(ours.astype(float)), moment(theirs.astype(float))
        error = np.sqrt((a.var(axis=0) + b.var(axis=0)) / draws)
        assert (np.abs(a.mean(axis=0) - b.mean(axis=0)) <= 5 * error + 1e-9).all()


@pytest.mark.parametrize(("height", "width"), [(10, 400), (400, 10), (1, 1)])
def test_box_that_never_fits_is_the_centre(height: int, width: int) -> None:
    top, left, h, w = draw_box(height, width, np.random.default_rng(0), scale=(0.9, 1.0), aspect=(3 / 4, 4 / 3))
    assert abs(2 * top + h - height) <= 1
    assert abs(2 * left + w - width) <= 1
    assert (h, w) == (min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3)))


def drawn(crop: MultiCrop, images: int = 3000) -> list[list[CropParameters]]:
    rng = np.random.default_rng(0)
    return [crop.draw(40, 40, rng) for _ in range(images)]


@pytest.mark.parametrize("kind", ["released", "stated"])
def test_frequencies(kind: str) -> None:
    images = drawn(replace(SMALL, blur_probability=BLUR_PROBABILITY[kind], vertical_flip=0.1))
    columns = list(zip(*images, strict=True))  # [2 + L][images]
    blurs = [np.mean([p.blur is not None for p in column]) for column in columns]
    expected = {"released": (0.0, 0.9, 0.5, 0.5, 0.5), "stated": (1.0, 0.1, 0.5, 0.5, 0.5)}[kind]
    assert np.abs(np.subtract(blurs, expected)).max() < 0.045
    assert blurs[0] == expected[0]
    solarized = [np.mean([p.solarize is not None for p in column]) for column in columns]
    assert solarized[0] == 0
    assert solarized[2:] == [0, 0, 0]
    assert abs(solarized[1] - 0.2) < 0.04
    flat = [parameters for image in images for parameters in image]
    for frequency, probability in (
        (np.mean([p.horizontal_flip for p in flat]), 0.5),
        (np.mean([p.vertical_flip for p in flat]), 0.1),
        (np.mean([p.grayscale for p in flat]), 0.2),
        (np.mean([bool(p.jitter) for p in flat]), 0.8),
    ):
        assert abs(frequency - probability) < 0.02
    sigmas = [p.blur[1] for p in flat if p.blur]
    assert 0.1 <= min(sigmas) < 0.12
    assert 1.98 < max(sigmas) <= 2.0
    assert abs(np.mean(sigmas) - 1.05) < 0.03


def test_jitter_factors_and_order() -> None:
    jitters = [p.jitter for image in drawn(SMALL, 1500) for p in image if p.jitter]
    ranges = {"brightness": (0.6, 1.4), "contrast": (0.6, 1.4), "saturation": (0.8, 1.2), "hue": (-0.1, 0.1)}
    for name, (low, high) in ranges.items():
        factors = np.array([dict(jitter)[name] for jitter in jitters])
        assert low <= factors.min() < low + 0.01
        assert high - 0.01 < factors.max() <= high
        assert abs(factors.mean() - (low + high) / 2) < 5 * (high - low) / math.sqrt(12 * len(factors))
        first = np.mean([jitter[0][0] == name for jitter in jitters])
        assert abs(first - 0.25) < 0.03
    assert len({tuple(name for name, _ in jitter) for jitter in jitters}) == 24


def test_operations_of_no_strength_are_not_drawn() -> None:
    images = drawn(replace(SMALL, hue=0.0, brightness=0.0), 50)
    assert {name for image in images for p in image for name, _ in p.jitter} == {"contrast", "saturation"}
    off = replace(
        SMALL,
        jitter_probability=0.0,
        grayscale_probability=0.0,
        blur_probability=(0.0, 0.0, 0.0),
        solarize_probability=0.0,
        horizontal_flip=0.0,
    )
    for image in drawn(off, 50):
        for p in image:
            assert p == CropParameters(size=p.size, box=p.box)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("operation", "factor", "torchvision"),
    [
        ("brightness", 1.3, TF.adjust_brightness),
        ("contrast", 0.7, TF.adjust_contrast),
        ("saturation", 1.2, TF.adjust_saturation),
        ("hue", -0.08, TF.adjust_hue),
    ],
)
def test_jitter_as_torchvision(channels: int, operation: str, factor: float, torchvision) -> None:  # type: ignore[no-untyped-def]
    crop = as_tensor(PIXELS[:, :, :channels]).contiguous()
    ours = recolour(crop, CropParameters(size=1, box=(0, 0, 1, 1), jitter=((operation, factor),)))
    assert torch.equal(ours, torchvision(crop, factor))


def test_jitter_runs_in_its_order() -> None:
    crop = as_tensor(PIXELS)
    jitter = (("contrast", 1.4), ("brightness", 1.4), ("hue", 0.1))
    ours = recolour(crop, CropParameters(size=1, box=(0, 0, 1, 1), jitter=jitter, grayscale=True))
    theirs = TF.adjust_hue(TF.adjust_brightness(TF.adjust_contrast(crop, 1.4), 1.4), 0.1)
    assert torch.equal(ours, TF.rgb_to_grayscale(theirs, num_output_channels=3))


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_brightness_and_contrast_of_any_number_of_channels(channels: int) -> None:
    crop = as_tensor(smooth(20, 24, channels))
    for jitter, expected in (
        ((("brightness", 1.3),), crop * 1.3),
        ((("contrast", 0.7),), crop * 0.7 + crop.float().mean() * 0.3),
        ((("hue", 0.1), ("saturation", 1.2)), crop.float()),
    ):
        ours = recolour(crop, CropParameters(size=1, box=(0, 0, 1, 1), jitter=jitter, grayscale=True))
        assert ours.dtype == torch.uint8
        assert ours.shape == crop.shape
        assert (ours.float() - expected.clamp(0, 255)).abs().max() <= 1


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_whole_crop_as_composed_by_hand(channels: int) -> None:
    image = as_tensor(smooth(40, 56, channels))
    parameters = CropParameters(
        size=32, box=(3, 5, 30, 41), horizontal_flip=True, vertical_flip=True, blur=(9, 1.3), solarize=128
    )
    expected = resize(image[:, 3:33, 5:46], 32, 32).flip(-1).flip(-2)
    expected = TF.solarize(TF.gaussian_blur(expected, [9, 9], [1.3, 1.3]), 128)
    assert torch.equal(apply(image, parameters), expected)


def test_flips() -> None:
    image = as_tensor(PIXELS)
    plain = CropParameters(size=24, box=(0, 0, 40, 56))
    assert torch.equal(apply(image, replace(plain, horizontal_flip=True)), apply(image, plain).flip(-1))
    assert torch.equal(apply(image, replace(plain, vertical_flip=True)), apply(image, plain).flip(-2))


def test_against_the_reference_composition_on_pil_images() -> None:
    """The reference augments PIL images; uint8 tensors must come out the same to within rounding."""
    image = smooth(120, 160, 3)
    picture = Image.fromarray(image)
    parameters = CropParameters(
        size=64,
        box=(10, 20, 100, 90),
        horizontal_flip=True,
        jitter=(("brightness", 1.2), ("contrast", 0.8), ("saturation", 1.1)),
        blur=(9, 1.0),
        solarize=128,
    )
    expected = TF.resized_crop(picture, 10, 20, 100, 90, [64, 64], interpolation=v2.InterpolationMode.BICUBIC)
    expected = TF.adjust_saturation(TF.adjust_contrast(TF.adjust_brightness(TF.hflip(expected), 1.2), 0.8), 1.1)
    expected = TF.solarize(TF.gaussian_blur(expected, [9, 9], [1.0, 1.0]), 128)
    difference = np.abs(
        apply(as_tensor(image), parameters).numpy().transpose(1, 2, 0).astype(int) - np.asarray(expected)
    )
    assert np.quantile(difference, 0.99) <= 4  # a value at the threshold may be solarized on one side only


def test_whole_image_and_centre_crop() -> None:
    image = smooth(300, 500, 3)
    picture = Image.fromarray(image)
    expected = np.asarray(picture.resize((98, 98), Image.Resampling.BICUBIC))
    assert_almost_equal(whole(image, 98).numpy().transpose(1, 2, 0), expected)
    official = v2.Compose([v2.Resize(256, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(224)])
    centred = whole(image, 224, center_crop=True).numpy().transpose(1, 2, 0)
    assert_almost_equal(centred, np.asarray(official(picture)))
    for shape in ((1, 1), (3, 200), (56, 56)):
        assert whole(smooth(*shape, 1), 56, center_crop=True).shape == (1, 56, 56)
        assert whole(smooth(*shape, 1), 56).shape == (1, 56, 56)
