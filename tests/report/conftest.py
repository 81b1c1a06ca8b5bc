"""Images, a run on them, and pages in a browser."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import dinoforge
from report_sizes import SIZES

EVIL = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="session")
def evil():
    """A name that would be markup."""
    return EVIL


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """40 images of many sizes, in two classes of which one, and one image, have names that would be markup."""
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for index in range(40):
        place = folder / ("plain" if index % 2 else EVIL)
        place.mkdir(exist_ok=True)
        pixels = generator.integers(0, 256, (6, 9, 3), dtype=np.uint8)
        name = f"{EVIL}.png" if index == 0 else f"{index:02d}.png"
        Image.fromarray(pixels).resize((60 + index, 40)).save(place / name)
    return folder


@pytest.fixture(scope="session")
def run(images, tmp_path_factory):
    return dinoforge.train(images, "small", tmp_path_factory.mktemp("runs") / f"run {EVIL[:4]} @DATA@", **SIZES).out


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
        address = path.resolve().as_uri()
        page.on("request", lambda r: None if r.url.startswith(("data:", address)) else told.append(f"request: {r.url}"))
        page.goto(address)
        return page

    yield show
    for context in contexts:
        context.close()
    assert told == []
