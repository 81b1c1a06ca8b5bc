import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from dinoforge.data.batch import collate_photometry
from dinoforge.data.crops import (
    BLUR_PROBABILITY,
    CropParameters,
    MultiCrop,
    cut,
    draw_box,
    on_reduced,
    reduction,
    resize,
    whole,
)
from dinoforge.data.photometry import Photometry, recolour, recolour_batch

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
    resized = resize(part, size, size)
    for channel in range(channels):
        expected = Image.fromarray(part[:, :, channel].copy()).resize((size, size), Image.Resampling.BICUBIC)
        assert_almost_equal(resized[:, :, channel], np.asarray(expected))


@pytest.mark.parametrize(
    ("height", "width", "scale"), [(224, 224, (0.32, 1.0)), (375, 500, (0.05, 0.32)), (60, 300, (0.32, 1.0))]
)
def test_boxes_are_distributed_as_torchvisions(height: int, width: int, scale: tuple[float, float]) -> None:
    rng = np.random.default_rng(0)
    draws = 4000
    ours = np.array([draw_box(height, width, rng.random, scale=scale, aspect=(3 / 4, 4 / 3)) for _ in range(draws)])
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
    top, left, h, w = draw_box(height, width, np.random.default_rng(0).random, scale=(0.9, 1.0), aspect=(3 / 4, 4 / 3))
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
    blurs = [np.mean([p.photometry.blur is not None for p in column]) for column in columns]
    expected = {"released": (0.0, 0.9, 0.5, 0.5, 0.5), "stated": (1.0, 0.1, 0.5, 0.5, 0.5)}[kind]
    assert np.abs(np.subtract(blurs, expected)).max() < 0.045
    assert blurs[0] == expected[0]
    solarized = [np.mean([p.photometry.solarize is not None for p in column]) for column in columns]
    assert solarized[0] == 0
    assert solarized[2:] == [0, 0, 0]
    assert abs(solarized[1] - 0.2) < 0.04
    flat = [parameters for image in images for parameters in image]
    for frequency, probability in (
        (np.mean([p.horizontal_flip for p in flat]), 0.5),
        (np.mean([p.vertical_flip for p in flat]), 0.1),
        (np.mean([p.photometry.grayscale for p in flat]), 0.2),
        (np.mean([bool(p.photometry.jitter) for p in flat]), 0.8),
    ):
        assert abs(frequency - probability) < 0.02
    sigmas = [p.photometry.blur[1] for p in flat if p.photometry.blur]
    assert 0.1 <= min(sigmas) < 0.12
    assert 1.98 < max(sigmas) <= 2.0
    assert abs(np.mean(sigmas) - 1.05) < 0.03


def test_jitter_factors_and_order() -> None:
    jitters = [p.photometry.jitter for image in drawn(SMALL, 1500) for p in image if p.photometry.jitter]
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
    assert {name for image in images for p in image for name, _ in p.photometry.jitter} == {"contrast", "saturation"}
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


def made(
    crop: MultiCrop, images: list[np.ndarray], drawn: list[list[CropParameters]], **options: bool
) -> list[torch.Tensor]:
    """The crops of some images as a batch holds them."""
    rooms = crop.empty(len(images), images[0].shape[2])
    for place, (image, parameters) in enumerate(zip(images, drawn, strict=True)):
        crop.make(image, parameters, *(room[:, place] for room in rooms), **options)
    return [room.flatten(0, 1) for room in rooms]


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_crops_as_composed_by_hand(channels: int) -> None:
    image = smooth(60, 76, channels)
    photometry = Photometry(jitter=(("brightness", 1.2),), blur=(9, 1.3), solarize=128)
    drawn = [
        CropParameters(size=32, box=(3, 5, 50, 61), horizontal_flip=True, vertical_flip=True, photometry=photometry),
        CropParameters(size=32, box=(0, 0, 60, 76)),
        *[CropParameters(size=16, box=(9, 4, 16, 16), horizontal_flip=True)] * 3,
    ]
    globals_, locals_ = made(SMALL, [image], [drawn])
    flipped = resize(image[3:53, 5:66], 32, 32)[::-1, ::-1]
    assert np.array_equal(globals_[0].numpy().transpose(1, 2, 0), recolour(flipped.copy(), photometry))
    assert np.array_equal(globals_[1].numpy().transpose(1, 2, 0), resize(image, 32, 32))
    for crop in locals_:
        assert np.array_equal(crop.numpy().transpose(1, 2, 0), image[9:25, 4:20][:, ::-1])
    plain, _ = made(SMALL, [image], [drawn], photometry=False)
    assert np.array_equal(plain[0].numpy().transpose(1, 2, 0), flipped)


def test_flips() -> None:
    plain = CropParameters(size=24, box=(0, 0, 40, 56))
    upright = cut(PIXELS, plain)
    assert np.array_equal(cut(PIXELS, replace(plain, horizontal_flip=True)), upright[:, ::-1])
    assert np.array_equal(cut(PIXELS, replace(plain, vertical_flip=True)), upright[::-1])


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_quarter_turns_are_exact_and_come_after_the_flips(channels: int) -> None:
    image = smooth(40, 56, channels)
    plain = CropParameters(size=24, box=(2, 3, 30, 40), horizontal_flip=True)
    upright = cut(image, plain)
    for turns in range(4):
        crop = cut(image, replace(plain, quarter_turns=turns))
        assert np.array_equal(crop, np.rot90(upright, turns))
        assert crop.flags.c_contiguous
    drawn = [replace(plain, size=32, quarter_turns=1), replace(plain, size=32, quarter_turns=2)]
    drawn += [replace(plain, size=16, quarter_turns=3)] * 3
    globals_, locals_ = made(SMALL, [image], [drawn], photometry=False)
    for crop, parameters in zip([*globals_, *locals_], drawn, strict=True):
        expected = np.rot90(cut(image, replace(parameters, quarter_turns=0)), parameters.quarter_turns)
        assert np.array_equal(crop.numpy().transpose(1, 2, 0), expected)


def test_quarter_turns_are_drawn_after_all_else() -> None:
    """With the key everything else is drawn as without it, and without it nothing is drawn for it."""
    crop = MultiCrop(global_size=32, local_size=16, local_number=8)
    turned = replace(crop, quarter_turns=0.75)
    for seed in range(20):
        with_turns = turned.draw(300, 400, np.random.default_rng(seed))
        assert [replace(p, quarter_turns=0) for p in with_turns] == crop.draw(300, 400, np.random.default_rng(seed))


@pytest.mark.parametrize("probability", [0.0, 0.3, 0.75, 1.0])
def test_frequencies_of_quarter_turns(probability: float) -> None:
    columns = list(zip(*drawn(replace(SMALL, quarter_turns=probability)), strict=True))  # [2 + L][images]
    for column in columns:
        shares = np.bincount([p.quarter_turns for p in column], minlength=4) / len(column)
        assert np.abs(shares - [1 - probability, *[probability / 3] * 3]).max() < 0.045
        assert len(shares) == 4
    if probability in (0, 1):
        assert all((p.quarter_turns > 0) == bool(probability) for column in columns for p in column)
    if probability == 1:  # the crops of an image are turned independently
        first, second = ([p.quarter_turns for p in column] for column in columns[:2])
        assert abs(np.mean(np.equal(first, second)) - 1 / 3) < 0.045


def test_turns_stay_when_the_image_is_reduced() -> None:
    parameters = CropParameters(size=32, box=(80, 40, 160, 240), quarter_turns=3)
    assert on_reduced(parameters, (800, 800), (100, 100)) == replace(parameters, box=(10, 5, 20, 30))


def test_reduction_leaves_every_crop_enough() -> None:
    crop = MultiCrop(global_size=64, local_size=32)
    rng = np.random.default_rng(0)
    for height, width in ((3000, 4000), (800, 900), (70, 4000), (20, 30)):
        drawn = crop.draw(height, width, rng)
        factor = reduction(drawn)
        assert factor == 1 or all(min(p.box[2:]) >= p.size * factor for p in drawn)
        assert any(min(p.box[2:]) < p.size * (factor + 1) for p in drawn)  # and no more than that
        reduced = -(-height // 8), -(-width // 8)
        for p in drawn:
            top, left, h, w = on_reduced(p, (height, width), reduced).box
            assert 0 <= top < top + h <= reduced[0]
            assert 0 <= left < left + w <= reduced[1]
            for ours, full in zip(
                (top, left, top + h, left + w), (*p.box[:2], p.box[0] + p.box[2], p.box[1] + p.box[3]), strict=True
            ):
                assert abs(ours - full / 8) <= 1


def plain_composition(kind: str) -> v2.Compose:
    """The augmentation of the reference, as it is composed of torchvision's for PIL images (second global crop)."""
    scale = (0.32, 1.0) if kind == "global" else (0.05, 0.32)
    jitter = v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
    return v2.Compose(
        [
            v2.RandomResizedCrop(
                32 if kind == "global" else 16, scale=scale, interpolation=v2.InterpolationMode.BICUBIC
            ),
            v2.RandomHorizontalFlip(0.5),
            v2.RandomApply([jitter], p=0.8),
            v2.RandomGrayscale(p=0.2),
            v2.RandomApply([v2.GaussianBlur(kernel_size=9, sigma=(0.1, 2.0))], p=0.9 if kind == "global" else 0.5),
            *([v2.RandomSolarize(threshold=128, p=0.2)] if kind == "global" else []),
            v2.PILToTensor(),
        ]
    )


@pytest.mark.parametrize("on_device", [False, True])
def test_moments_are_those_of_the_reference_composition(on_device: bool) -> None:
    """Means, spreads and relations of channels and neighbours, over many crops of a colourful image."""
    image = smooth(90, 120, 3)
    rng, draws = np.random.default_rng(0), 1500
    drawn = [SMALL.draw(90, 120, rng) for _ in range(draws)]
    ours = made(SMALL, [image] * draws, drawn, photometry=not on_device)
    if on_device:
        batches = collate_photometry([[p.photometry for p in parameters] for parameters in drawn], global_number=2)
        ours = [recolour_batch(c, b) for c, b in zip(ours, batches, strict=True)]
    torch.manual_seed(0)
    picture = Image.fromarray(image)
    for crops, kind in ((ours[0][draws:], "global"), (ours[1], "local")):
        transform = plain_composition(kind)
        theirs = torch.stack([transform(picture) for _ in range(draws)])
        a, b = statistics(crops), statistics(theirs)
        error = (a.var(dim=0) / len(a) + b.var(dim=0) / len(b)).sqrt()
        assert ((a.mean(dim=0) - b.mean(dim=0)).abs() <= 4.5 * error + 0.1).all(), (a.mean(dim=0), b.mean(dim=0), error)


def statistics(crops: torch.Tensor) -> torch.Tensor:
    """Numbers that tell of each kind of operation, per crop: [N, S]."""
    x = crops.double()
    red, green, blue = x.unbind(1)
    columns = [
        *x.mean(dim=(2, 3)).unbind(1),  # brightness
        *x.std(dim=(2, 3)).unbind(1),  # contrast
        *(
            (first - second).abs().mean(dim=(1, 2)) for first, second in ((red, green), (green, blue), (blue, red))
        ),  # saturation, hue
        ((red - green) * (green - blue)).mean(dim=(1, 2)) / 100,  # hue
        (x[..., 1:] - x[..., :-1]).abs().mean(dim=(1, 2, 3)),  # blur
        (x[..., 1:, :] - x[..., :-1, :]).abs().mean(dim=(1, 2, 3)),
        (x[:, :, :, : x.shape[3] // 2] - x[:, :, :, x.shape[3] // 2 :]).mean(dim=(1, 2, 3)),  # flips
        (x < 5).double().mean(dim=(1, 2, 3)) * 100,
        (x > 250).double().mean(dim=(1, 2, 3)) * 100,
    ]
    return torch.stack(columns, dim=1)


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
