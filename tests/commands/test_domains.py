"""Images of microscopes, satellites and 12-bit cameras from the first look to the export."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest
import tifffile
import torch
from PIL import Image
from rich.console import Console

import dinoforge
from dinoforge.builders.data import build_data
from dinoforge.commands.embed import embed, write_features
from dinoforge.commands.export import export
from dinoforge.commands.report import report
from dinoforge.data.sources import open_source
from dinoforge.errors import WeightsError
from dinoforge.runs import directory
from report_sizes import SIZES

PLACE = (33550, "d", 3, (10.0, 10.0, 0.0), True)  # GeoTIFF: metres of a pixel
SIDE, IMAGES = 40, 24


def scene(number: int, channels: int) -> np.ndarray:
    """A blob on a slope, on 0..1: [H, W, C]; its size is the class."""
    g = np.random.default_rng(number)
    y, x = np.mgrid[:SIDE, :SIDE]
    row, column = g.uniform(12, 28, 2)
    width = 4 if number % 2 else 9
    blob = np.exp(-((x - column) ** 2 + (y - row) ** 2) / (2 * width**2))
    bands = [0.6 * blob * (1 + band) / channels + 0.3 * x / SIDE for band in range(channels)]
    return np.stack(bands, -1) + g.uniform(0, 0.05, (SIDE, SIDE, channels))


def microscope(path: Path, number: int) -> np.ndarray:
    values = (scene(number, 5) * 65535).astype(np.uint16)
    tifffile.imwrite(path.with_suffix(".ome.tif"), np.moveaxis(values, -1, 0), metadata={"axes": "CYX"}, ome=True)
    return np.rint(values / 257)


def satellite(path: Path, number: int) -> np.ndarray:
    values = (scene(number, 13) * 10_000).astype(np.uint16)
    values[:6, :6] = 65535  # outside of the scene
    tags = [PLACE, (42113, "s", 0, "65535", True)]
    tifffile.imwrite(
        path.with_suffix(".tif"), values, photometric="minisblack", planarconfig="contig", extratags=tags, metadata=None
    )
    levels = np.rint(np.clip(values / 10_000, 0, 1) * 255)
    levels[:6, :6] = 7
    return levels


def camera(path: Path, number: int) -> np.ndarray:
    values = (scene(number, 1)[:, :, 0] * 4095).astype(np.uint16)
    Image.fromarray(values).save(path.with_suffix(".png"))
    return np.rint(values / 4095 * 255)[:, :, None]


DOMAINS = {
    "microscope": (microscope, 5, {}, "channel 0 as red, 1 as green, 2 as blue"),
    "satellite": (
        satellite,
        13,
        {"data.range": [0, 10_000], "data.fill": 7, "report.channels": [3, 2, 1]},
        "of 13 channels, counted from 0, channel 3 as red, 2 as green, 1 as blue",
    ),
    "camera": (camera, 1, {}, None),
}


@pytest.fixture(scope="module", params=DOMAINS)
def domain(request, tmp_path_factory):
    """Folder, levels of each image by name, run, and what was printed."""
    make, channels, keys, colours = DOMAINS[request.param]
    root = tmp_path_factory.mktemp(request.param)
    levels = {}
    for number in range(IMAGES):
        folder = root / "data" / ("small" if number % 2 else "large")
        folder.mkdir(parents=True, exist_ok=True)
        made = make(folder / f"{number:02}", number)
        (name,) = (str(p.relative_to(root / "data")) for p in folder.glob(f"{number:02}*"))
        levels[name] = made
    console = Console(record=True, width=200)
    settings = SIZES | {"student.in_chans": channels, "data.mean": [0.4], "data.std": [0.3], "probe.every_steps": 3}
    result = dinoforge.train(root / "data", "small", root / "run", console=console, **settings | keys)
    assert result.finished
    return root, levels, result, console.export_text(), colours


@pytest.mark.slow
def test_training_sees_the_right_values(domain) -> None:
    root, levels, result, _, _ = domain
    recipe = directory.RunDirectory(result.out).recipe()
    data = build_data(recipe, open_source(root / "data"))
    seen = set()
    for position in range(2 * IMAGES):
        index, pixels, _ = data.sample(position, [])
        name = data.source.name(index)
        np.testing.assert_array_equal(pixels, levels[name])
        keys = {key: getattr(recipe.data, key) for key in ("range", "fill")}
        np.testing.assert_array_equal(dinoforge.read_image(root / "data" / name, **keys), levels[name])
        seen.add(name)
    assert len(seen) == IMAGES


def test_the_plan_says_what_was_found(domain) -> None:
    root, _, _, printed, _ = domain
    expected = {
        "microscope": ["uint16 x5, OME-TIFF, axes CYX"],
        "satellite": ["uint16 x13, GeoTIFF"],
        "camera": ["I;16", "values   uint16", "0 becomes 0 and 4,095 becomes 255"],
    }
    for words in expected[root.name.rstrip("0123456789")]:
        assert words in printed, printed


def test_it_was_measured_while_it_trained(domain) -> None:
    _, _, result, printed, _ = domain
    measured = [json.loads(line) for line in (result.out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in measured if "probe.knn" in line] == [3, 6], printed


def test_the_report_says_which_channels_it_shows(domain) -> None:
    _, _, result, _, colours = domain
    page = report(result.out).page.read_text()
    assert '"learned"' in page
    assert '"seen"' in page
    assert ("false colour" in page) == (colours is not None)
    assert colours is None or colours in page


def test_its_features_and_exports(domain) -> None:
    root, levels, result, _, _ = domain
    written = write_features(result.out, root / "data", root / "features.parquet", precision="fp32")
    assert not written.skipped
    table = parquet.read_table(root / "features.parquet")
    assert table["name"].to_pylist() == sorted(levels)
    exported = root / "backbone.pth"
    export(result.out, "official", exported)
    projection = torch.load(exported, weights_only=True)["patch_embed.proj.weight"]
    assert projection.shape[1] == next(iter(levels.values())).shape[2]
    backbone = dinoforge.load(exported, num_heads=2)
    shown = torch.stack([dinoforge.load(result.out).preprocess(root / "data" / name) for name in sorted(levels)])
    np.testing.assert_allclose(backbone(shown).numpy(), np.stack(table["cls"].to_pylist()), atol=1e-4)


def test_other_libraries_are_told_how_values_become_levels(domain, capsys) -> None:
    root, _, result, _, _ = domain
    rule = {
        "microscope": None,
        "satellite": "range=(0.0, 10000.0), fill=7",
        "camera": "range=(0.0, 4095.0)",
    }[root.name.rstrip("0123456789")]
    for format, name in (("safetensors", "own.safetensors"), ("timm", "timm.safetensors")):
        notes = " ".join(export(result.out, format, root / name).notes)
        assert ("levels 0 to 255" in notes) == (rule is not None and format == "timm")
        assert rule is None or format != "timm" or f"dinoforge.read_image(image, {rule}) gives them" in notes
    given = {"student.num_heads": 2, "data.mean": 0.4, "data.std": 0.3, "precision": "fp32"}
    capsys.readouterr()
    dark = embed(root / "timm.safetensors", root / "data", **given)
    warned = "this backbone's file says no range for them: data.range=[0,4095]" in capsys.readouterr().err
    assert warned == root.name.startswith("camera")
    data = directory.RunDirectory(result.out).recipe().data
    range_given = {} if data.range is None else {"data.range": list(data.range), "data.fill": data.fill}
    right = embed(root / "timm.safetensors", root / "data", **given, **range_given)
    assert "no range" not in capsys.readouterr().err
    expected = embed(result.out, root / "data", precision="fp32")
    np.testing.assert_allclose(right, expected, atol=1e-5)
    assert rule is None or np.abs(dark - expected).max() > 0.01
    if rule is not None:
        with pytest.raises(WeightsError, match=r"says range=.*, not \(0.0, 9.0\): what a file says"):
            embed(root / "own.safetensors", root / "data", data={"range": [0, 9]})
