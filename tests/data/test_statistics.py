"""Mean, deviation and symmetry of images."""

import cv2
import numpy as np
import pytest

from dinoforge.data.statistics import ENOUGH, PixelStatistics, Symmetry


def gathered(images, valid=None):
    statistics = PixelStatistics()
    for i, image in enumerate(images):
        statistics.add(image, None if valid is None else valid[i])
    return statistics


def texture(rng, side=96):
    """Smooth noise without any direction, uint8 [side, side, 1]."""
    noise = cv2.GaussianBlur(rng.normal(size=(side + 40, side + 40)).astype(np.float32), (0, 0), 5)[20:-20, 20:-20]
    return np.clip(noise / noise.std() * 40 + 128, 0, 255).astype(np.uint8)[:, :, np.newaxis]


def landscape(rng, height=72, width=96):
    """A bright even upper part over dark texture, the horizon somewhere."""
    image = texture(rng, max(height, width))[:height, :width] // 2
    horizon = int(rng.integers(height // 4, 3 * height // 4))
    image[:horizon] = rng.integers(150, 220)
    return image


def symmetry(make, count=ENOUGH, seed=0) -> Symmetry:
    rng = np.random.default_rng(seed)
    return gathered([make(rng) for _ in range(count)]).symmetry()


@pytest.mark.parametrize("channels", [1, 2, 3, 5, 13])
def test_mean_and_deviation_are_those_of_all_pixels(channels):
    rng = np.random.default_rng(0)
    images = rng.integers(0, rng.integers(1, 256, channels) + 1, (7, 20, 30, channels)).astype(np.uint8)
    statistics = gathered(images)
    assert statistics.images == 7
    np.testing.assert_allclose(statistics.mean, images.reshape(-1, channels).mean(axis=0) / 255, rtol=1e-12)
    np.testing.assert_allclose(statistics.std, images.reshape(-1, channels).std(axis=0) / 255, rtol=1e-12)


def test_each_image_counts_alike_whatever_its_size():
    statistics = gathered([np.zeros((10, 10, 1), np.uint8), np.full((100, 300, 1), 255, np.uint8)])
    assert statistics.mean == (0.5,)
    assert statistics.std == (0.5,)


def test_deviation_of_nearly_even_images_does_not_drown_in_rounding():
    images = [np.full((50, 50, 1), 250, np.uint8) for _ in range(1000)]
    assert gathered(images).std == (0.0,)
    images[0][0, 0] = 251
    expected = np.sqrt(1 / 2_500_000 * (1 - 1 / 2_500_000)) / 255
    np.testing.assert_allclose(gathered(images).std, [expected], rtol=1e-9)


def test_no_data_counts_for_nothing():
    image = np.full((40, 40, 2), 100, np.uint8)
    image[:10, :, 0] = 0
    image[:20, :, 1] = 255
    valid = np.ones((40, 40, 2), bool)
    valid[:10, :, 0] = False
    valid[:20, :, 1] = False
    empty = np.zeros((40, 40), bool)
    statistics = gathered([image, image], valid=[valid, empty])
    assert statistics.images == 1
    assert statistics.mean == pytest.approx((100 / 255, 100 / 255))
    assert statistics.std == (0.0, 0.0)


def test_before_the_first_image_there_is_nothing():
    statistics = PixelStatistics()
    assert (statistics.images, statistics.mean, statistics.std) == (0, (), ())
    assert symmetry(texture, count=0).reason.startswith("0 images")


@pytest.mark.parametrize("count", [ENOUGH, 100, 300])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_textures_have_no_up(count, seed):
    found = symmetry(texture, count, seed)
    assert (found.upside_down, found.quarter_turns) == (True, True), found.reason


@pytest.mark.parametrize("count", [ENOUGH, 100, 300])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_landscapes_have_an_up_and_no_left(count, seed):
    found = symmetry(landscape, count, seed)
    assert (found.upside_down, found.quarter_turns) == (False, False), found.reason
    assert found.mirrored or count == ENOUGH, found.reason  # of so few one in a hundred seems to have a left
    assert f"of {count} images: not alike upside down (T = " in found.reason
    turned = symmetry(lambda rng: np.rot90(landscape(rng)), count, seed)
    assert (turned.mirrored, turned.quarter_turns) == (False, False), turned.reason
    assert turned.upside_down or count == ENOUGH, turned.reason


def test_up_is_seen_by_contrast_alone():
    def half_rough(rng):
        image = texture(rng)
        image[48:] = np.clip(128 + 0.2 * (image[48:].astype(float) - 128), 0, 255).astype(np.uint8)
        return image

    assert not symmetry(half_rough, 100).upside_down


def test_stripes_that_lie_anywhere_forbid_quarter_turns_and_no_flip():
    def stripes(rng):
        return np.ascontiguousarray(np.broadcast_to(texture(rng)[:1], (96, 96, 1)))

    found = symmetry(stripes, 100)
    assert (found.upside_down, found.quarter_turns) == (True, False), found.reason


def test_quarter_turns_of_oblong_images_are_judged_on_their_central_square():
    def framed(rng):
        image = np.full((60, 140, 1), 30, np.uint8)  # even at both ends, and only there
        image[:, 40:100] = texture(rng, 60)
        return image

    assert symmetry(framed, 100).quarter_turns


def test_too_few_images_claim_nothing():
    found = symmetry(texture, ENOUGH - 1)
    assert (found.upside_down, found.mirrored, found.quarter_turns) == (False, False, False)
    assert found.reason == "31 images with a picture are too few to tell whether there is an up (at least 32)"


def test_even_images_do_not_count_as_pictures():
    rng = np.random.default_rng(0)
    images = [np.full((40, 40, 1), 9, np.uint8)] * 500 + [texture(rng) for _ in range(10)]
    statistics = gathered(images)
    assert statistics.images == 510
    assert not statistics.symmetry().upside_down
    assert statistics.symmetry().reason.startswith("10 images")


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (5, 3), (28, 28), (200, 17)])
def test_any_size_will_do(shape):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (ENOUGH, *shape, 3)).astype(np.uint8)
    assert gathered(images).symmetry().reason


def test_symmetry_does_not_depend_on_chance():
    assert symmetry(texture) == symmetry(texture)
