"""The rule of recipe `auto`: valid for anything, moved by what it says moves it, and overruled by the user."""

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dinoforge.builders.data import build_data
from dinoforge.builders.lengths import build_schedules, run_length
from dinoforge.builders.networks import vit_size
from dinoforge.commands.recipe import auto_recipe
from dinoforge.commands.train import train
from dinoforge.data import channels as channels_room
from dinoforge.data import statistics
from dinoforge.data.batches import make_loader
from dinoforge.data.channels import Channels, channels_of, guess_channels
from dinoforge.data.sampling import spread
from dinoforge.data.sources import open_source
from dinoforge.data.statistics import Symmetry, measure_pixels, read_sizes
from dinoforge.data.summary import DataSummary
from dinoforge.errors import DataError, RecipeError
from dinoforge.planning import auto
from dinoforge.recipe.load import load_recipe
from dinoforge.recipe.schema import Data, flatten
from dinoforge.report.analysis import seen_crops


def recipe_of(facts, **keys):
    keys = {name.replace("__", "."): value for name, value in keys.items()}
    choices = auto.choose(facts, keys)
    assert not set(choices) & set(keys)
    assert all(choice.reason for choice in choices.values())
    return load_recipe(auto.BASE, {key: choice.value for key, choice in choices.items()} | keys)[0]


@settings(max_examples=40)
@given(
    images=st.integers(2, 10_000_000),
    side=st.integers(1, 5000),
    channels=st.sampled_from((1, 3, 4, 13)),
    device=st.sampled_from(("cpu", "mps", "cuda", "cuda:1")),
    measured=st.none() | st.tuples(st.floats(0, 1), st.floats(0, 0.5), st.booleans()),
    keys=st.sampled_from(
        (
            {},
            {"student__patch_size": 14},
            {"student__patch_size": 7, "crops__global_crops_size": 98},
            {"train__steps": 1},
            {"train__steps": 600_000},
            {"train__epochs": 3},
            {"optim__epochs": 1},
            {"student__arch": "vit_giant2"},
            {"crops__local_crops_number": 0},
            {"student__embed_dim": 200},
        )
    ),
)
def test_the_recipe_is_valid_for_all_images(images, side, channels, device, measured, keys):
    pixels = None
    if measured is not None:
        mean, std, alike = measured
        pixels = auto.Pixels((mean,) * channels, (std,) * channels, 99, "", Symmetry(alike, alike, alike, "so"))
    recipe = recipe_of(auto.Facts(images, side, channels, device, pixels=pixels), **keys)
    length = run_length(recipe, images=images)
    build_schedules(recipe, length)
    width, _, heads = vit_size(recipe)
    assert width % heads == 0
    assert recipe.student.in_chans == channels
    assert len(recipe.data.mean) in (1, channels)
    assert min(recipe.data.std) >= 0.02
    assert recipe.teacher.momentum_teacher <= recipe.teacher.final_momentum_teacher <= 1
    assert recipe.teacher.warmup_teacher_temp <= recipe.teacher.teacher_temp


@pytest.mark.parametrize(
    ("keys", "share", "batch"),
    [
        ({}, 64, 128),
        ({"train__accumulate": 2}, 32, 128),
        ({"train__batch_size": 256}, 128, 256),
        ({"train__batch_size": 256, "train__accumulate": 4}, 32, 256),
    ],
)
def test_the_rule_knows_how_the_batch_is_cut(keys, share, batch):
    recipe = recipe_of(auto.Facts(512, 96, 3, "cpu", ranks=2), **keys)
    assert recipe.train.batch_size_per_gpu == share
    assert recipe.dino.head_n_prototypes == auto.prototypes(batch)


@given(st.integers(2, 10_000_000), st.integers(1, 5000), st.integers(1, 4096), st.integers(1, 1_000_000), st.booleans())
def test_what_grows_with_what(images, side, batch, steps, fast):
    assert auto.batch_size(images, fast=fast) <= auto.batch_size(2 * images, fast=fast)
    assert auto.run_steps(images, 64, fast=fast) <= auto.run_steps(2 * images, 64, fast=fast)
    assert auto.network(images, fast=fast) <= auto.network(2 * images, fast=fast)
    assert auto.patch_size(side, fast=fast) <= auto.patch_size(side + 1, fast=fast)
    assert auto.crop_size(side, fast=fast) <= auto.crop_size(side + 1, fast=fast)
    assert auto.blur_kernel(side) <= auto.blur_kernel(side + 1)
    assert auto.prototypes(batch) <= auto.prototypes(batch + 1)
    assert auto.teacher_temp(batch) <= auto.teacher_temp(batch + 1)
    assert auto.teacher_momentum(steps) <= auto.teacher_momentum(steps + 1) <= auto.final_momentum(steps + 1)


def test_it_meets_the_official_values_at_the_official_size():
    """A batch of 2,048 on a GPU for 125,000 steps of a million large photos: DINOv2's own setting."""
    facts = auto.Facts(1_281_167, 400, 3, "cuda")
    auto_flat = flatten(recipe_of(facts, train__batch_size_per_gpu=2048, train__steps=125_000, student__patch_size=16))
    official = flatten(load_recipe("dinov2")[0])
    for key in (
        "dino.head_n_prototypes teacher.teacher_temp teacher.warmup_teacher_temp student.layerscale optim.base_lr "
        "optim.layerwise_decay optim.patch_embed_lr_mult optim.weight_decay_end student.drop_path_rate train.centering "
        "crops.global_crops_size crops.local_crops_size crops.local_crops_number augment.blur_sigma "
        "augment.blur_kernel ibot.loss_weight dino.koleo_loss_weight"
    ).split():
        assert auto_flat[key] == official[key], key


def test_only_small_networks_weigh_the_patch_loss_and_koleo_less():
    facts, small = auto.Facts(20_000, 300, 3, "cpu"), load_recipe("small")[0]
    shallow, deep = recipe_of(facts), recipe_of(facts, student__arch="vit_small")
    assert small.ibot.loss_weight == shallow.ibot.loss_weight < deep.ibot.loss_weight == 1
    assert small.dino.koleo_loss_weight == shallow.dino.koleo_loss_weight < deep.dino.koleo_loss_weight == 0.1


def test_ranks_share_a_batch():
    alone, together = (auto.Facts(1_000_000, 300, 3, "cuda", ranks) for ranks in (1, 8))
    assert recipe_of(together).train.batch_size_per_gpu == recipe_of(alone).train.batch_size_per_gpu == 256
    assert recipe_of(together).dino.head_n_prototypes == auto.prototypes(8 * 256)


def test_other_choices_follow_what_the_user_gives():
    facts = auto.Facts(20_000, 300, 3, "cpu")
    given = recipe_of(facts, train__batch_size_per_gpu=1024, student__patch_size=14)
    assert given.dino.head_n_prototypes == auto.prototypes(1024) != auto.prototypes(128)
    assert given.crops.global_crops_size % 14 == 0
    with pytest.raises(RecipeError, match="patch_size: expected at least 1"):
        recipe_of(facts, student__patch_size=0)


@pytest.mark.parametrize(
    ("modes", "channels"),
    [
        ((("L", 3),), 1),
        ((("L", 3), ("RGB", 1)), 3),
        ((("I;16", 3),), 1),
        ((("uint8 x1", 3),), 1),
        ((("uint8 x5", 3),), 5),
        ((("P", 1),), 3),
        ((("LA", 3),), 1),
        ((("RGBA", 3),), 3),
        ((("RGB;16", 3), ("I;16", 1)), 3),
        ((("L, HEIC", 3),), 1),
        ((("uint16 x5, OME-TIFF, axes CYX", 2), ("uint16 x5, TIFF", 2)), 5),
        ((("uint16 x2, ImageJ, axes CYX", 3),), 2),
        ((("int16 x13, GeoTIFF, nodata -9999", 3), ("RGB", 1)), 13),
        ((("uint16 x5, TIFF", 3), ("uint16 x4, TIFF", 2)), 5),
        ((("uint16 x5, TIFF", 2), ("L", 2), ("RGB", 1)), 3),
        ((("uint8 x4, GeoTIFF, RGB and 1 more band", 3),), 4),
        ((("uint8 x4, GeoTIFF, RGB and 1 more band", 1), ("RGB", 3)), 3),
    ],
)
def test_channels_are_the_images(modes, channels):
    summary = DataSummary(10, 4, (100, 400), (200, 300), modes, (0, 255), ())
    facts = auto.facts_of(summary, "cpu")
    assert replace(facts, why="") == auto.Facts(10, 173, channels, "cpu", why="")  # √(100 · 300)
    assert facts.why


def texture(rng, channels=1, side=64):
    """Smooth noise without any direction, 0 to 1, [side, side, C]."""
    noise = rng.normal(size=(side + 40, side + 40, channels)).astype(np.float32)
    smooth = np.stack([cv2.GaussianBlur(noise[:, :, c], (0, 0), 4)[20:-20, 20:-20] for c in range(channels)], axis=2)
    return np.clip(smooth / smooth.std() * 0.15 + 0.5, 0, 1)


def landscape(rng, channels=3, side=64):
    """Bright above a horizon."""
    image = texture(rng, channels, side)
    image[: int(rng.integers(side // 4, side // 2))] *= 0.3
    return image[::-1]


def levels(image, top=255, dtype=np.uint8):
    return np.rint(image * top).astype(dtype)


def write_tiffs(folder, count, make, **keys):
    """TIFFs of what make(i) gives, [H, W, C]."""
    folder.mkdir(exist_ok=True)
    for i in range(count):
        tifffile.imwrite(folder / f"{i:03}.tif", make(i), **{"photometric": "minisblack", "metadata": None, **keys})
    return folder


NIR = {"photometric": "rgb", "extrasamples": ["unassalpha"]}


@pytest.mark.parametrize("channels", [2, 4, 5, 13])
def test_tiffs_have_as_many_channels_as_they_say(tmp_path, channels):
    rng = np.random.default_rng(0)
    images = write_tiffs(
        tmp_path / "x", 6, lambda i: levels(texture(rng, channels), 65535, np.uint16), planarconfig="contig"
    )
    found = channels_of(open_source(images))
    assert found == Channels(channels, "as all 6 images that were looked at")


@pytest.mark.parametrize(
    ("band", "channels"),
    [
        (lambda image: image, 4),  # infrared that is marked as alpha
        (lambda image: np.full_like(image, 255), 3),
        (lambda image: np.zeros_like(image), 3),
        (lambda image: np.where(image > 100, 255, 0).astype(np.uint8), 3),  # a mask
    ],
)
def test_a_band_beside_rgb_is_a_channel_unless_it_is_a_mask(tmp_path, band, channels):
    rng = np.random.default_rng(0)

    def make(_):
        image = levels(texture(rng, 4))
        image[:, :, 3] = band(image[:, :, 3])
        return image

    found = channels_of(open_source(write_tiffs(tmp_path / "x", 6, make, **NIR)))
    assert found.count == channels
    assert ("is a mask or a transparency" in found.reason) == (channels == 3)


def test_one_file_with_infrared_makes_it_a_channel(tmp_path):
    """Opaque in one tile and not in the next."""
    rng = np.random.default_rng(0)

    def make(i):
        image = levels(texture(rng, 4))
        if i < 3:
            image[:, :, 3] = 255
        return image

    assert guess_channels(open_source(write_tiffs(tmp_path / "x", 6, make, **NIR))) == 4


def test_arrays_of_four_channels_are_never_taken_for_transparent():
    images = np.random.default_rng(0).integers(0, 256, (4, 20, 20, 4), dtype=np.uint8)
    images[..., 3] = 255
    assert guess_channels(open_source(images)) == 4


@pytest.mark.parametrize(
    ("modes", "channels"),
    [
        (["RGBA", "RGBA"], 3),
        (["LA"], 1),
        (["L", "L", "I;16"], 1),
        (["L", "L", "L", "RGB"], 3),
        (["L", "RGBA"], 3),
        (["P"], 3),
        (["1"], 1),
    ],
)
def test_channels_of_pictures(tmp_path, modes, channels):
    for i, mode in enumerate(modes):
        Image.new(mode, (20, 20)).save(tmp_path / f"{i}.png")
    found = channels_of(open_source(tmp_path))
    assert found.count == channels
    assert ("(grey and colour)" in found.reason) == (channels == 3 and "L" in modes)


def test_files_of_other_channels_are_counted_and_the_most_are_read(tmp_path):
    rng = np.random.default_rng(0)
    images = write_tiffs(
        tmp_path / "x",
        20,
        lambda i: levels(texture(rng, 4 if i in (0, 10) else 5), 65535, np.uint16),
        planarconfig="contig",
    )
    Image.new("RGB", (64, 64)).save(images / "x.png")
    recipe, choices = auto_recipe(images)
    assert recipe.student.in_chans == 5
    assert choices["student.in_chans"].reason == (
        "as 18 of 21 images that were looked at; the others will be refused: 1 with 3, 2 with 4 channels"
    )


def test_no_readable_image_is_an_error_that_says_why(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
    with pytest.raises(DataError, match=r"none of 1 images .* could be read.*a\.png"):
        auto_recipe(tmp_path)


def test_a_given_number_of_channels_is_kept(tmp_path):
    rng = np.random.default_rng(0)
    images = [levels(texture(rng, 3)) for _ in range(6)]
    recipe, choices = auto_recipe(images, student={"in_chans": 1})
    assert (recipe.student.in_chans, len(recipe.data.mean)) == (1, 1)
    assert "student.in_chans" not in choices


@pytest.mark.parametrize("recipe", ["small", "auto"])
def test_a_wrong_number_of_channels_is_told_before_work_starts(tmp_path, recipe):
    rng = np.random.default_rng(0)
    images = write_tiffs(tmp_path / "x", 6, lambda i: levels(texture(rng, 5), 65535, np.uint16), planarconfig="contig")
    keys = {"student.in_chans": 4, "data.mean": 0.5, "data.std": 0.5}
    for dry_run in (True, False):
        with pytest.raises(DataError, match=r"has 5 channels.*expected 4.*student\.in_chans=5"):
            train(images, recipe, tmp_path / "run", dry_run=dry_run, **keys)


# Mean, deviation and symmetry.


def chosen(images, **keys):
    """Recipe and choices of images in memory or in a folder."""
    return auto_recipe(images, **{"train.steps": 3, **keys})


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_mean_and_deviation_are_measured_where_there_are_not_three_colours(channels):
    rng = np.random.default_rng(0)
    images = np.stack([levels(texture(rng, channels) * rng.uniform(0.2, 1, channels)) for _ in range(40)])
    recipe, choices = chosen(images)
    flat = images.reshape(-1, channels) / 255
    assert recipe.data.mean == pytest.approx(flat.mean(axis=0), abs=0.0006)
    assert recipe.data.std == pytest.approx(flat.std(axis=0), abs=0.0006)
    assert choices["data.mean"].reason == "of 40 images that were measured; ImageNet's are of three colours"


def photographs(rng, mean=Data.mean, std=Data.std, count=8, dtype=np.uint8, top=255):
    images = rng.normal(size=(count, 50, 60, 3)) * std + np.array(mean)
    return [levels(np.clip(image, 0, 1), top, dtype) for image in images]


def test_photographs_keep_imagenets():
    recipe, choices = chosen(photographs(np.random.default_rng(0), (0.40, 0.44, 0.47), (0.29, 0.26, 0.27)))
    assert (recipe.data.mean, recipe.data.std) == (Data.mean, Data.std)
    assert choices["data.mean"].reason.startswith(
        "ImageNet's; those of 8 images that were measured are near it: mean [0.4"
    )


@pytest.mark.parametrize(
    ("mean", "std", "why"),
    [
        ((0.70, 0.54, 0.69), Data.std, "ImageNet's mean is off by 0.2"),
        (Data.mean, (0.12, 0.13, 0.12), "of ImageNet's deviation, outside 0.67 to 1.5"),
    ],
)
def test_colours_far_from_imagenets_are_measured(mean, std, why):
    images = photographs(np.random.default_rng(0), mean, std)
    recipe, choices = chosen(images)
    assert recipe.data.mean == pytest.approx(np.mean(images, axis=(0, 1, 2)) / 255, abs=0.0006)
    assert recipe.data.std == pytest.approx(np.std(images, axis=(0, 1, 2)) / 255, abs=0.0006)
    assert why in choices["data.mean"].reason


def test_deep_colours_and_rasters_are_no_photographs(tmp_path):
    deep = photographs(np.random.default_rng(0), dtype=np.uint16, top=65535)
    recipe, choices = chosen(deep)
    assert recipe.data.mean == pytest.approx(np.mean(deep, axis=(0, 1, 2)) / 65535, abs=0.001)
    assert "no photographs (uint16 x3" in choices["data.mean"].reason
    shallow = photographs(np.random.default_rng(0))
    tags = [(42113, "s", 0, "0", True), (33550, "d", 3, (10.0, 10.0, 0.0), True)]
    folder = write_tiffs(
        tmp_path / "x",
        8,
        lambda i: shallow[i].transpose(2, 0, 1),
        photometric="rgb",
        planarconfig="separate",
        extratags=tags,
    )
    assert "no photographs (uint8 x3, GeoTIFF, nodata 0)" in chosen(folder)[1]["data.mean"].reason


def test_what_has_no_data_is_not_measured():
    rng = np.random.default_rng(0)
    images = np.stack([levels(texture(rng, 2), 200) for _ in range(8)]).astype(np.float32) / 255
    expected = images[:, 16:].reshape(-1, 2)
    images[:, :16] = np.nan
    recipe, _ = chosen(images, **{"data.range": (0, 1)})
    assert recipe.data.mean == pytest.approx(expected.mean(axis=0), abs=0.0006)
    assert recipe.data.std == pytest.approx(expected.std(axis=0), abs=0.0006)
    given_number = np.where(np.isnan(images), 7, np.rint(images * 255) + 10).astype(np.uint8)
    recipe, _ = chosen(given_number, **{"data.nodata": 7})
    assert recipe.data.mean == pytest.approx(expected.mean(axis=0) + 10 / 255, abs=0.0006)


def test_long_lists_do_not_push_all_reasons_aside():
    choices = {"a": auto.Choice(1, "one"), "bc": auto.Choice((0.5,) * 13, "two"), "d": auto.Choice("xyz", "three")}
    long = ", ".join(["0.5"] * 13)
    assert auto.choices_text(choices) == f"a   1    one\nbc  [{long}]  two\nd   xyz  three"


def test_an_even_channel_does_not_blow_up():
    images = np.random.default_rng(0).integers(0, 256, (8, 20, 20, 2), dtype=np.uint8)
    images[..., 1] = 90
    recipe, choices = chosen(images)
    assert recipe.data.std[1] == 0.02
    assert "raised to 0.02" in choices["data.std"].reason


def test_a_given_mean_and_given_weights_win():
    images = np.random.default_rng(0).integers(0, 256, (8, 20, 20, 5), dtype=np.uint8)
    recipe, choices = chosen(images, **{"data.mean": 0.25})
    assert (recipe.data.mean, len(recipe.data.std)) == ((0.25,), 5)
    assert "data.mean" not in choices
    far = photographs(np.random.default_rng(0), (0.8, 0.8, 0.8))
    recipe, choices = chosen(far, **{"init.weights": "backbone.safetensors"})
    assert recipe.data.mean == Data.mean
    assert "data.mean" not in choices


def test_images_without_an_up_are_flipped_and_turned():
    rng = np.random.default_rng(0)
    recipe, choices = chosen([levels(texture(rng)) for _ in range(100)])
    assert (recipe.augment.vertical_flip, recipe.augment.quarter_turns) == (0.5, 0.75)
    assert "of 100 images: alike upside down (T = " in choices["augment.vertical_flip"].reason
    recipe, choices = chosen([levels(landscape(rng)) for _ in range(100)])
    assert (recipe.augment.vertical_flip, recipe.augment.quarter_turns) == (0.0, 0.0)
    assert "of 100 images: not alike upside down (T = " in choices["augment.vertical_flip"].reason
    recipe, choices = chosen([levels(texture(rng)) for _ in range(20)])
    assert recipe.augment.vertical_flip == 0.0
    assert "too few" in choices["augment.vertical_flip"].reason
    recipe, _ = chosen([levels(texture(rng)) for _ in range(100)], augment={"vertical_flip": 0.1, "quarter_turns": 0.0})
    assert (recipe.augment.vertical_flip, recipe.augment.quarter_turns) == (0.1, 0.0)


def test_stripes_are_flipped_and_not_turned():
    facts = auto.Facts(
        1000, 64, 1, "cpu", pixels=auto.Pixels((0.5,), (0.2,), 99, "", Symmetry(True, True, False, "so"))
    )
    recipe = recipe_of(facts)
    assert (recipe.augment.vertical_flip, recipe.augment.quarter_turns) == (0.5, 0.0)


@pytest.mark.slow
def test_large_jpegs_are_measured_small_and_large_images_seldom(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for i in range(9):
        picture = cv2.resize(levels(texture(rng, 3)), (1600, 1100), interpolation=cv2.INTER_CUBIC)
        Image.fromarray(picture).save(tmp_path / f"{i}.jpg")
    source = open_source(tmp_path)
    small = measure_pixels(source, 3, {})
    whole = [np.asarray(Image.open(path)) for path in sorted(tmp_path.iterdir())]
    assert small.images == 9
    assert small.mean == pytest.approx(np.mean(whole, axis=(0, 1, 2)) / 255, abs=0.002)
    assert small.std == pytest.approx(np.std(whole, axis=(0, 1, 2)) / 255, abs=0.004)
    assert measure_pixels(source, 3, {"nodata": 255.0}).mean == pytest.approx(small.mean, abs=0.002)
    monkeypatch.setattr(statistics, "_EFFORT", 1600 * 1100)
    assert measure_pixels(source, 3, {}).images == 9
    assert measure_pixels(open_source(whole), 3, {}).images == 4  # none can be decoded small
    monkeypatch.setattr(statistics, "ENOUGH", 1)
    assert measure_pixels(source, 3, {}).images == 4
    assert measure_pixels(open_source(whole), 3, {}).images == 2  # enough, at least
    found = read_sizes(source, 3, {})
    assert (found.widths, found.heights, found.modes) == ((1600, 1600), (1100, 1100), (("RGB", 9),))
    assert channels_of(source).reason.startswith("as all 9 ")


def test_few_files_are_read_where_they_are_stacks_of_many_planes(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    keys = {"metadata": {"axes": "ZYX"}, "ome": True}
    stacks = write_tiffs(tmp_path / "x", 8, lambda i: levels(texture(rng, 30)).transpose(2, 0, 1), **keys)
    source = open_source(stacks)
    size = (stacks / "000.tif").stat().st_size
    assert size > 4 * 64 * 64 * 4
    monkeypatch.setattr(statistics, "_EFFORT", size / 4)  # 4 times that until there are enough to tell an up
    assert measure_pixels(source, 1, {}).images == 4
    monkeypatch.setattr(channels_room, "_BYTES", 2.5 * size)
    assert channels_of(source) == Channels(1, "as all 3 images that were looked at")


@pytest.mark.parametrize("count", [1, 2, 3, 5, 64, 100, 256])
def test_every_beginning_of_the_order_is_spread_over_all(count):
    order = spread(range(count))
    assert sorted(order) == list(range(count))
    for number in (2, 4, 8, 16, 32):
        if number <= count:
            gaps = np.diff([0, *sorted(order[:number]), count])
            assert gaps.max() <= 2 * 2 * count / number


@pytest.mark.slow
def test_a_run_keeps_what_it_began_with(tmp_path, monkeypatch, capsys):
    """Runs of earlier versions, whose rule measured nothing, are continued with what they had."""
    rng = np.random.default_rng(0)
    images = [levels(texture(rng, 1, 28)) for _ in range(64)]
    keys = {
        "train.steps": 2,
        "train.threads": 1,
        "train.num_workers": 0,
        "student.depth": 1,
        "probe.every_minutes": None,
    }
    with monkeypatch.context() as before:
        before.setattr("dinoforge.commands.recipe.measure_pixels", lambda *_: None)
        assert train(images, "auto", tmp_path / "run", **keys, **{"train.max_minutes": 1e-9}).steps < 2
    assert train(images, "auto", tmp_path / "run", **keys).finished
    recipe = json.loads(json.dumps(flatten(load_recipe(tmp_path / "run" / "recipe.yaml")[0])))
    assert (recipe["data.mean"], recipe["augment.vertical_flip"]) == ([0.5], 0.0)
    fresh, _ = auto_recipe(images, **keys)
    assert (fresh.augment.vertical_flip, fresh.augment.quarter_turns) == (0.5, 0.75)
    capsys.readouterr()
    train(images, "auto", tmp_path / "run", dry_run=True, **keys)
    assert "as the run began" in capsys.readouterr().out


@pytest.mark.processes
def test_a_run_with_quarter_turns_has_one_stream(tmp_path):
    """Whatever worker makes a batch and wherever the run starts, it is the same; and the report shows it as it is."""
    rng = np.random.default_rng(0)
    images = [levels(texture(rng, 3)) for _ in range(20)]
    keys = {"train.batch_size_per_gpu": 4, "train.steps": 6, "augment.quarter_turns": 0.75}
    keys |= {"augment.blur_probability": (0, 0, 0)}
    keys |= {f"augment.{kind}_probability": 0.0 for kind in ("jitter", "grayscale", "solarize")}
    data = build_data(load_recipe("small", keys)[0], open_source(images))
    without = build_data(load_recipe("small", keys | {"augment.quarter_turns": 0.0})[0], open_source(images))
    batches = [data[step] for step in range(6)]
    again = list(make_loader(data, start_step=2, end_step=6, num_workers=2))
    for one, two in zip(batches[2:], again, strict=True):
        assert torch.equal(one.global_crops, two.global_crops)
        assert torch.equal(one.local_crops, two.local_crops)
        assert torch.equal(one.masks, two.masks)
    turns: list[list[int]] = []
    for step, batch in enumerate(batches):
        plain = without[step]
        assert torch.equal(batch.masks, plain.masks)
        assert torch.equal(batch.indices, plain.indices)
        places = zip([*batch.global_crops, *batch.local_crops], [*plain.global_crops, *plain.local_crops], strict=True)
        for crop, other in places:
            turns.append([k for k in range(4) if torch.equal(crop, torch.rot90(other, k, (1, 2)))])
    assert all(len(found) == 1 for found in turns)  # the same crops, turned
    shares = np.bincount(np.ravel(turns), minlength=4) / len(turns)
    assert np.abs(shares - 0.25).max() < 0.15
    seen = seen_crops(data, 3, 2)
    crops = [*batches[3].global_crops[2::4], *batches[3].local_crops[2::4]]
    assert all(torch.equal(a, b) for a, b in zip(seen.after, crops, strict=True))


@pytest.mark.slow
def test_microscopy_satellite_and_deep_grey_are_trained(tmp_path):
    rng = np.random.default_rng(0)
    write_tiffs(
        tmp_path / "ome",
        36,
        lambda i: levels(texture(rng, 5), 4000, np.uint16).transpose(2, 0, 1),
        metadata={"axes": "CYX"},
        ome=True,
    )
    corners = [(slice(None, 20), slice(None, 30)), (slice(-30, None), slice(-20, None))]

    def tile(i):
        values = levels(texture(rng, 13), 9000, np.int16)
        values[corners[i % 2]] = -9999
        return values

    tags = [(42113, "s", 0, "-9999", True), (33550, "d", 3, (10.0, 10.0, 0.0), True)]
    write_tiffs(tmp_path / "geo", 36, tile, planarconfig="contig", extratags=tags)
    (tmp_path / "grey").mkdir()
    for i in range(36):
        Image.fromarray(levels(texture(rng), 4095, np.uint16)[:, :, 0]).save(tmp_path / "grey" / f"{i}.png")
    for name, channels, high in (("ome", 5, 4095), ("geo", 13, 16383), ("grey", 1, 4095)):
        keys = {"train.steps": 3, "train.threads": 1, "train.num_workers": 0, "student.depth": 1}
        assert train(
            tmp_path / name, "auto", tmp_path / f"run-{name}", **keys, **{"probe.every_minutes": None}
        ).finished
        recipe, _ = load_recipe(tmp_path / f"run-{name}" / "recipe.yaml")
        assert recipe.student.in_chans == len(recipe.data.mean) == len(recipe.data.std) == channels
        assert recipe.data.range == (0, high)
        top = {"ome": 4000, "geo": 9000, "grey": 4095}[name]
        assert recipe.data.mean == pytest.approx([0.5 * top / high] * channels, abs=0.02)
        assert recipe.data.std == pytest.approx([0.15 * top / high] * channels, abs=0.02)
        assert recipe.augment.vertical_flip == 0.5


def test_arrays_of_five_channels_are_read_as_such():
    images = np.random.default_rng(0).integers(0, 256, (12, 20, 30, 5), dtype=np.uint8)
    recipe, choices = auto_recipe(images, train={"steps": 3})
    assert recipe.student.in_chans == 5
    assert recipe.train.steps == 3
    assert "train.steps" not in choices


def test_a_run_is_planned_with_reasons_and_continues(tmp_path, capsys):
    images = np.random.default_rng(0).integers(0, 256, (12, 28, 28), dtype=np.uint8)
    keys = {"train.steps": 2, "train.threads": 1, "train.num_workers": 0, "student.depth": 1}
    train(images, "auto", tmp_path / "run", dry_run=True, **keys)
    said = capsys.readouterr().out
    assert "teacher.teacher_temp" in said
    assert "student.depth  " not in said
    assert not (tmp_path / "run").exists()
    assert train(images, "auto", tmp_path / "run", **keys).finished
    assert train(images, "auto", tmp_path / "run", **keys).finished  # the same recipe again, else an error


@pytest.mark.slow
def test_minutes_become_steps_once(tmp_path):
    """A second measurement of the step would give another number of steps, and with it another recipe."""
    images = np.random.default_rng(0).integers(0, 256, (12, 16, 16), dtype=np.uint8)
    keys = {"train.max_minutes": 0.02, "train.threads": 1, "train.num_workers": 0, "student.depth": 1}
    first = train(images, "auto", tmp_path / "run", **keys)
    assert first.total_steps >= 1
    assert train(images, "auto", tmp_path / "run", **keys).total_steps == first.total_steps
