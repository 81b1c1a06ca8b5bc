"""The page, in real Chromium."""

import pytest


@pytest.fixture(params=[1200, 390], ids=["wide", "narrow"])
def page(request, browser, told):
    errors, requests = [], []
    context = browser.new_context(viewport={"width": request.param, "height": 900})
    opened = context.new_page()
    address = told.page.as_uri()
    opened.on("console", lambda message: errors.append(message.text))
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("request", lambda r: None if r.url.startswith(("data:", address)) else requests.append(r.url))
    opened.goto(address)
    yield opened
    context.close()
    assert errors == []
    assert requests == []


def test_sections_in_their_order(page):
    assert page.locator("h2").all_inner_texts() == [
        "What one has to know",
        "The images",
        "Their values",
        "What the network will see",
        "What is there more than once",
        "What cannot be used",
        "Keys",
    ]


def test_it_fits(page):
    width = page.evaluate("document.documentElement.clientWidth")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_pictures_are_there(page, told):
    """A sheet of an image has the image, two global and two local crops."""
    sheets = page.locator(".sheet")
    assert sheets.count() == 12
    assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert page.locator(".sheet img.whole").count() == 12
    assert page.locator(".sheet img.crop").count() == 24
    assert page.locator(".sheet img.local").count() == 24


def test_every_channel_has_a_histogram(page, told):
    channels = sum(len(values["channels"]) for values in told.json["values"])
    assert page.locator("svg[role=img]").count() == channels
    assert page.locator("svg[role=img] path").first.evaluate("p => p.getBBox().width") > 100
