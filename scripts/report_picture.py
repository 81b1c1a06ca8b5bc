"""Takes the picture of a report that stands in README.md: its beginning, and beside it what was learned.

    python scripts/report_picture.py runs/demo/report.html docs/images/report.png

Needs the extra ``dev`` and Debian's Chromium.
"""

import io
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

WIDTH, HEIGHT = 900, 1180  # pixels of each half
COLOURS = 192  # few, so that the file is small


def main() -> None:
    page_path, out = map(Path, sys.argv[1:])
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
        page.goto(page_path.resolve().as_uri())
        halves = [page.screenshot()]
        page.get_by_role("heading", name="What it learned").evaluate("heading => heading.scrollIntoView()")
        halves.append(page.screenshot())
        browser.close()
    both = Image.new("RGB", (2 * WIDTH, HEIGHT))
    for i, half in enumerate(halves):
        both.paste(Image.open(io.BytesIO(half)), (i * WIDTH, 0))
    out.parent.mkdir(parents=True, exist_ok=True)
    both.quantize(COLOURS, dither=Image.Dither.NONE).save(out, optimize=True)


if __name__ == "__main__":
    main()
