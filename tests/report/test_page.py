"""The page of a run, in real Chromium."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dinoforge
from dinoforge import api, cli
from dinoforge.errors import RunError

EVIL = "<img src=x onerror=alert(1)>"
SIZES = {
    "student.embed_dim": 48,
    "student.depth": 2,
    "student.num_heads": 2,
    "student.patch_size": 8,
    "crops.global_crops_size": 32,
    "crops.local_crops_size": 16,
    "crops.local_crops_number": 2,
    "dino.head_n_prototypes": 32,
    "dino.head_hidden_dim": 32,
    "dino.head_bottleneck_dim": 8,
    "train.batch_size_per_gpu": 8,
    "train.steps": 6,
    "train.num_workers": 0,
    "train.threads": 1,
    "log.every_steps": 1,
    "precision": "fp32",
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """40 images of two classes, one of which, and one image, have names that would be markup."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for index in range(40):
        place = folder / ("plain" if index % 2 else EVIL)
        place.mkdir(exist_ok=True)
        pixels = generator.integers(0, 256, (6, 9, 3), dtype=np.uint8)
        name = f"{EVIL}.png" if index == 0 else f"{index:02d}.png"
        Image.fromarray(pixels).resize((60 + index, 40)).save(place / name)
    return folder


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    return dinoforge.train(images, "small", tmp_path_factory.mktemp("runs") / f"run {EVIL[:4]}", **SIZES).out


@pytest.fixture(scope="module")
def browser(require_system):
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the Python package playwright")
    path = require_system("/usr/bin/chromium", "chromium")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=str(path), args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def show(browser):
    """Opens a page; after the test there must have been no error, no dialog, and no request but for the page."""
    told, contexts = [], []

    def show(path: Path, **settings):
        context = browser.new_context(**settings)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: told.append(f"console: {message.text}") if message.type == "error" else None)
        page.on("pageerror", lambda error: told.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (told.append("dialog"), dialog.dismiss()))
        page.on("request", lambda r: None if r.url.startswith(("file:", "data:")) else told.append(f"request: {r.url}"))
        page.goto(path.resolve().as_uri())
        return page

    yield show
    for context in contexts:
        context.close()
    assert told == []


def test_sections_in_their_order(run, show):
    page = show(api.report(run).page)
    titles = page.locator("h2").all_inner_texts()
    assert titles == ["Is it learning?", "What the network saw", "What it learned", "How it ran", "What it was"]
    assert page.locator("h2 + p.hint").count() == len(titles)  # each with a sentence on what to look for


def test_names_are_text(run, show):
    page = show(api.report(run).page)
    assert page.locator("img[src=x]").count() == 0
    assert page.get_by_text(EVIL).count() > 0
    text = (run / "report.html").read_text()
    assert EVIL not in text
    assert "\\u003cimg src=x" in text


def test_clicking_a_patch_changes_every_map(run, show):
    page = show(api.report(run).page)
    drawn = "[...document.querySelectorAll('#similarity canvas')].map(c => c.toDataURL())"
    before = page.evaluate(drawn)
    page.locator("#similarity img").nth(1).click(position={"x": 5, "y": 5})
    after = page.evaluate(drawn)
    assert len(before) == len(after) > 2
    assert all(a != b for a, b in zip(before, after, strict=True))


def test_pointing_at_a_dot_shows_its_image(run, show):
    page = show(api.report(run).page)
    assert not page.locator("#tip").is_visible()
    page.locator("#map circle").first.hover(force=True)  # another dot may lie on it
    assert page.locator("#tip").is_visible()
    assert page.locator("#tip img").evaluate("image => image.naturalWidth") > 0
    shown = page.locator("#tip div").all_inner_texts()
    assert shown[0].split("/")[0] == shown[1]  # the name of the file, and its label: the folder
    page.mouse.move(0, 0)
    assert not page.locator("#tip").is_visible()


def test_curves_can_be_read_off_and_not_smoothed(run, show):
    page = show(api.report(run).page)
    chart = page.locator("[data-title=Loss]")
    drawn = "chart => chart.querySelector('canvas').toDataURL()"
    smooth = chart.evaluate(drawn)
    page.get_by_label("smooth").uncheck()
    page.wait_for_timeout(100)
    assert chart.evaluate(drawn) != smooth
    chart.locator(".u-over").hover()
    totals = [json.loads(line)["total"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert float(chart.locator(".u-series:not(.running) .u-value").last.inner_text()) in [float(f"{total:.4g}") for total in totals]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_no_sideways_scroll_and_enough_contrast(run, show, scheme, width):
    page = show(api.report(run).page, color_scheme=scheme, viewport={"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    ink, paper = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )

    def luminance(colour):
        parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    bright, deep = sorted([luminance(ink), luminance(paper)], reverse=True)
    assert (bright + 0.05) / (deep + 0.05) > 7  # WCAG 2, level AAA
    assert (luminance(paper) > 0.5) == (scheme == "light")


def test_runs_side_by_side(run, images, tmp_path, show):
    other = dinoforge.train(images, "small", tmp_path / "other", **SIZES | {"optim.base_lr": 1e-2}).out
    path = api.report(run, other).page
    assert path.name == "comparison.html"
    page = show(path)
    assert page.locator("[data-title=Loss] tr.u-series:not(.running)").count() == 3  # steps, and a curve of each
    table = page.locator("h3", has_text="Recipe differences").locator("xpath=following-sibling::div[1]").inner_text()
    assert "optim.base_lr" in table
    assert "optim.epochs" not in table


def test_a_run_of_which_much_is_missing(run, tmp_path, show):
    """No checkpoint, no images, no metrics: the page comes, and says so."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("recipe.yaml", "run.json"):
        shutil.copy(run / name, bare)
    info = json.loads((bare / "run.json").read_text())
    (bare / "run.json").write_text(json.dumps(info | {"data": info["data"] | {"path": str(tmp_path / "gone")}}))
    page = show(api.report(bare).page)
    text = page.locator("main").inner_text()
    assert "the images are not found" in text
    assert "no checkpoint yet" in text
    assert "has not logged a step yet" in text


def test_one_channel_and_one_readable_image(tmp_path, show):
    (tmp_path / "data").mkdir()
    Image.new("L", (50, 40), 90).save(tmp_path / "data" / "only.png")
    settings = SIZES | {"student.in_chans": 1, "data.mean": [0.5], "data.std": [0.2], "train.batch_size_per_gpu": 1}
    run = dinoforge.train(tmp_path / "data", "small", tmp_path / "run", **settings).out
    (tmp_path / "data" / "broken.png").write_bytes(b"no image")
    page = show(api.report(run).page)
    assert "cannot be read" in page.locator("main").inner_text()


def test_more_than_three_channels_say_which_are_shown(tmp_path, show):
    class Satellite:
        def __len__(self):
            return 20

        def __getitem__(self, index):
            return np.random.default_rng(index).integers(0, 256, (40, 40, 13), dtype=np.uint8)

    settings = SIZES | {"student.in_chans": 13, "data.mean": [0.5], "data.std": [0.2], "augment.saturation": 0.0}
    run = dinoforge.train(Satellite(), "small", tmp_path / "run", **settings).out
    page = show(api.report(run, data=Satellite()).page)
    assert "Of the 13 channels, pictures show the first three" in page.locator("main").inner_text()


def test_the_command(run, tmp_path, capsys):
    assert cli.main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert (run / "report.html").stat().st_size < 10_000_000
    with pytest.raises(RunError, match="holds no run"):
        api.report(tmp_path)
