"""The page of a run, in real Chromium."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

import dinoforge
from dinoforge.cli.main import main
from dinoforge.commands.report import open_run, report
from dinoforge.errors import RecipeError, RunError
from dinoforge.health.rules import Finding
from report_sizes import SIZES


@pytest.fixture(scope="module")
def path(run):
    """The page that the run wrote by itself."""
    return run / "report.html"


def text_of(page) -> str:
    return page.locator("main").inner_text()


def reveal(locator):
    """Scrolls there, and waits until the page was told: scrolling hides what the pointer shows, a frame later."""
    locator.scroll_into_view_if_needed()
    locator.evaluate("() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return locator


def test_sections_in_their_order(path, show):
    page = show(path)
    titles = page.locator("h2").all_inner_texts()
    assert titles == ["Is it learning?", "What the network saw", "What it learned", "How it ran", "What it was"]
    hinted = page.evaluate("[...document.querySelectorAll('h2')].every(h => h.nextElementSibling.matches('p.hint'))")
    assert hinted  # each with a sentence on what to look for
    parts = page.locator("h3").all_inner_texts()
    for part in ("Patch features as colours", "Similarity to a patch", "Attention of the cls token, per head"):
        assert part in parts
    for part in ("Nearest neighbours", "Map of the images", "Losses and gradients", "Schedules", "Parameter groups"):
        assert part in parts


def test_names_are_text(run, path, evil, show):
    page = show(path)
    assert page.locator("img[src=x]").count() == 0
    assert page.get_by_text(evil).count() > 0
    text = path.read_text()
    assert evil not in text
    assert "\\u003cimg src=x" in text
    assert page.locator("h1").inner_text() == str(run)  # its name has marks of the page's own template, too
    assert "@DATA@ · dinoforge" in page.title()


def test_the_page_says_what_the_run_was(run, path, show):
    text = text_of(show(path))
    info = json.loads((run / "run.json").read_text())
    assert info["data"]["fingerprint"] in text
    low, high = info["data"]["look"]["widths"]
    assert 60 <= low < high <= 99
    assert f"{low} to {high} × 40 pixels" in text
    assert "what differs from small" in text  # the recipe that the run was made from
    assert f"dinoforge export '{run}' --to hf" in text
    assert "of 512 global crops" in text  # masks, measured
    assert f"torch {info['starts'][0]['versions']['torch']}" in text
    assert "no probes" in text


def test_clicking_a_patch_changes_every_map(path, show):
    page = show(path)
    drawn = "[...document.querySelectorAll('#similarity canvas')].map(c => c.toDataURL())"
    before = page.evaluate(drawn)
    page.locator("#similarity img").nth(1).click(position={"x": 5, "y": 5})
    after = page.evaluate(drawn)
    assert len(before) == len(after) == 6
    assert all(a != b for a, b in zip(before, after, strict=True))
    page.locator("#similarity canvas").nth(2).click(position={"x": 90, "y": 40})
    assert page.evaluate(drawn) != after


def test_maps_have_the_shape_of_their_images(path, show):
    page = show(path)
    for canvas in page.locator("#pca canvas").all():
        columns, rows = canvas.evaluate("c => [c.width, c.height]")
        width, height = canvas.evaluate("c => [c.clientWidth, c.clientHeight]")
        assert columns == 16  # four times the resolution of training
        assert rows == pytest.approx(columns * height / width, abs=1)
        assert rows < columns


def test_similarity_in_the_page_is_the_cosine(run, path, show):
    page = show(path)
    found = open_run(run).learned
    m = found.maps[0]
    reveal(page.locator("#similarity img").first).click(position={"x": 1, "y": 1})
    box = page.locator("#similarity canvas").first.bounding_box()
    row, column = m.grid[0] // 2, m.grid[1] // 3
    x, y = ((place + 0.5) / count for place, count in zip((column, row), reversed(m.grid), strict=True))
    page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"])
    a, b = m.tokens[0], m.tokens[row * m.grid[1] + column]
    cosine = float(a @ b / (a.norm() * b.norm()))
    assert float(page.locator("#tip").inner_text()) == pytest.approx(cosine, abs=0.02)  # of bytes


def test_pointing_at_a_dot_shows_its_image(path, show):
    page = show(path)
    assert not page.locator("#tip").is_visible()
    reveal(page.locator("#map circle").first).hover(force=True)  # another dot may lie on it
    assert page.locator("#tip").is_visible()
    assert page.locator("#tip img").evaluate("image => image.naturalWidth") > 0
    shown = page.locator("#tip div").all_inner_texts()
    assert shown[0].split("/")[0] == shown[1]  # the name of the file, and its label: the folder
    page.mouse.move(0, 0)
    assert not page.locator("#tip").is_visible()


def test_curves_can_be_read_off_and_not_smoothed(run, path, show):
    page = show(path)
    chart = page.locator("[data-title=Loss]")
    drawn = "chart => chart.querySelector('canvas').toDataURL()"
    smooth = chart.evaluate(drawn)
    page.get_by_label("smooth").uncheck()
    page.wait_for_timeout(100)
    assert chart.evaluate(drawn) != smooth
    chart.locator(".u-over").hover()
    totals = [json.loads(line)["total"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    shown = chart.locator(".u-series:not(.running) .u-value").last.inner_text()
    assert float(shown) in [float(f"{total:.4g}") for total in totals]


def luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_no_sideways_scroll_and_enough_contrast(path, show, scheme, width):
    page = show(path, color_scheme=scheme, viewport={"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (luminance(paper) > 0.5) == (scheme == "light")
    for place, least in (("body", 7), (".hint", 4.5), (".verdict", 4.5), ("td", 4.5), (".u-legend th", 4.5)):  # WCAG 2
        ink = page.locator(place).first.evaluate("node => getComputedStyle(node).color")
        bright, deep = sorted([luminance(ink), luminance(paper)], reverse=True)
        assert (bright + 0.05) / (deep + 0.05) > least, place
    axes = page.evaluate("charts[0].plot.axes[0].stroke()")  # drawn on a canvas, so not by style
    assert axes == ("#5d6878" if scheme == "light" else "#a3aebc")


def test_in_print_it_is_light(path, show):
    page = show(path, color_scheme="dark")
    page.emulate_media(media="print")
    ink = page.evaluate("getComputedStyle(document.body).color")
    assert luminance(ink) < 0.1


def test_runs_side_by_side(run, images, tmp_path, evil, show):
    other = dinoforge.train(images, "small", tmp_path / evil, **SIZES | {"optim.base_lr": 1e-2}).out
    metrics = [json.loads(line) for line in (other / "metrics.jsonl").read_text().splitlines()]
    metrics[-1] |= {"probe.knn": 0.9, "probe.pixels.knn": 0.5, "probe.untrained.knn": 0.4}
    (other / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    path = report(run, other).page
    assert path.name == "comparison.html"
    page = show(path, viewport={"width": 360, "height": 800})
    assert page.locator("[data-title=Loss] tr.u-series:not(.running)").count() == 3  # steps, and a curve of each
    verdicts = page.locator("table").first.inner_text()
    assert "Yes, it is learning" in verdicts
    assert "Not known yet" in verdicts
    assert "90.0 %" in verdicts
    table = page.locator("h3", has_text="Recipe differences").locator("xpath=following-sibling::div[1]").inner_text()
    assert "optim.base_lr" in table
    assert "optim.epochs" not in table
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_probes_and_findings_are_the_first_to_be_seen(run, tmp_path, show, monkeypatch):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    metrics = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    for line, accuracy in zip(metrics[1::2], (0.3, 0.8, 0.7), strict=True):
        line |= {"probe.knn": accuracy, "probe.pixels.knn": 0.5, "probe.untrained.knn": 0.4}
    (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics) + '{"step": 7, "tot')
    finding = Finding("uniform_collapse", 4, "Targets are <b>uniform</b>.", ())
    monkeypatch.setattr("dinoforge.commands.report.diagnose", lambda metrics, recipe: [finding])
    page = show(report(copy).page)
    text = text_of(page)
    assert "Step 4: Targets are <b>uniform</b>." in text
    assert "Yes, it is learning. By k-NN it is right on 70.0 % of the images at step 6" in text
    assert "The best k-NN result was 80.0 %, at step 4." in text
    assert "1 lines of metrics.jsonl cannot be read" in text
    assert page.locator("[data-title='k-NN probe, accuracy'] tr.u-series").count() == 4


def test_a_run_of_which_much_is_missing(run, tmp_path, show):
    """No checkpoint, no images, no metrics: the page comes, and says so."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("recipe.yaml", "run.json"):
        shutil.copy(run / name, bare)
    info = json.loads((bare / "run.json").read_text())
    (bare / "run.json").write_text(json.dumps(info | {"data": info["data"] | {"path": str(tmp_path / "gone")}}))
    text = text_of(show(report(bare).page))
    assert "the images are not found" in text
    assert "no checkpoint yet" in text
    assert "has not logged a step yet" in text
    assert f"dinoforge train {tmp_path / 'gone'} --recipe {bare}/recipe.yaml --out {bare}" in text


def test_a_run_of_an_earlier_version_and_a_damaged_network_cost_only_what_they_lack(run, tmp_path, show):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    info = json.loads((copy / "run.json").read_text())
    del info["base"], info["data"]["look"]
    (copy / "teacher.safetensors").write_bytes(b"damaged")
    (copy / "run.json").write_text(json.dumps(info))
    text = text_of(show(report(copy).page))
    assert "what differs from dinov2" in text
    assert "There are no maps of features" in text


@pytest.mark.processes
def test_a_killed_run(images, tmp_path, show):
    """Killed without a checkpoint, while the page was being written again and again."""
    out = tmp_path / "run"
    keys = SIZES | {"train.steps": 100_000, "report.every_minutes": 1e-4}
    command = [sys.executable, "-m", "dinoforge", "train", images, "--out", out, *(f"{k}={v}" for k, v in keys.items())]
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not (out / "report.html").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    text = text_of(show(out / "report.html"))
    assert "no checkpoint yet" in text
    assert "What the network saw" in text
    assert "What it learned" not in text
    assert "continue" in text_of(show(report(out).page))


@pytest.mark.slow
def test_one_channel_and_one_readable_image(tmp_path, show):
    (tmp_path / "data").mkdir()
    Image.new("L", (50, 40), 90).save(tmp_path / "data" / "only.png")
    settings = SIZES | {"student.in_chans": 1, "data.mean": [0.5], "data.std": [0.2], "train.batch_size_per_gpu": 1}
    run = dinoforge.train(tmp_path / "data", "small", tmp_path / "run", **settings).out
    assert "need at least four readable images" in text_of(show(run / "report.html"))
    (tmp_path / "data" / "broken.png").write_bytes(b"no image")
    assert "1 of 2 sampled images cannot be read, such as broken.png" in text_of(show(report(run).page))
    (tmp_path / "data" / "only.png").write_bytes(b"no image, either")
    assert "Pictures are left out" in text_of(show(report(run).page))


@pytest.mark.slow
def test_more_than_three_channels_say_which_are_shown(tmp_path, show):
    class Satellite:
        def __len__(self):
            return 20

        def __getitem__(self, index):
            return np.random.default_rng(index).integers(0, 256, (40, 40, 13), dtype=np.uint8)

    settings = SIZES | {"student.in_chans": 13, "data.mean": [0.5], "data.std": [0.2], "augment.saturation": 0.0}
    run = dinoforge.train(Satellite(), "small", tmp_path / "run", **settings).out
    page = show(run / "report.html")
    assert "of 13 channels, counted from 0, channel 0 as red, 1 as green, 2 as blue" in text_of(page)
    assert page.locator("#pca canvas").count() == 6
    page = show(report(run, data=Satellite(), channels=[12, 7, 1]).page)
    assert "channel 12 as red, 7 as green, 1 as blue" in text_of(page)
    with pytest.raises(RecipeError, match=r"channels: expected one channel, or three .* from 0 to 12, got \[13\]"):
        report(run, channels=[13])


def test_labels_from_a_table(run, images, tmp_path, evil, show):
    table = tmp_path / "labels.csv"
    names = sorted(path.relative_to(images) for path in images.rglob("*.png"))
    table.write_text("".join(f'"{name}",{evil if i % 3 else "b"}\n' for i, name in enumerate(names)))
    page = show(report(run, labels=table).page)
    assert page.locator(".key").all_inner_texts() == [f"{evil} (26)", "b (14)"]


def test_the_command(run, tmp_path, capsys, monkeypatch):
    opened = []
    monkeypatch.setattr("webbrowser.open", lambda address: opened.append(address) or True)
    assert main(["report", str(run), "--open"]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert opened == [(run / "report.html").resolve().as_uri()]
    assert (run / "report.html").stat().st_size < 10_000_000
    with pytest.raises(RunError, match="holds no run"):
        report(tmp_path)
    with pytest.raises(RunError, match="of one run"):
        report(run, run, figures=tmp_path)
