"""A page in a real browser: Chromium without a screen and without a network. It is measured and photographed."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome")
NARROWEST = 500  # pixels of a window: Chromium makes none narrower, so that a phone is a frame in one
MEASURE = """
const frame = document.querySelector("iframe"), told = document.querySelector("pre");
const box = node => { const r = node.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
frame.onload = () => {
  const page = frame.contentDocument;
  told.textContent = JSON.stringify({
    width: page.documentElement.scrollWidth,
    height: page.documentElement.scrollHeight,
    fetched: frame.contentWindow.performance.getEntriesByType("resource").map(entry => entry.name),
    broken: [...page.images].filter(image => !(image.complete && image.naturalWidth)).length,
    pictures: [...page.querySelectorAll("img, svg")].map(box),
    icons: [...page.querySelectorAll("svg.icons")].map(box),
  });
};
frame.srcdoc = PAGE;
"""


@dataclass(frozen=True)
class Seen:
    """What a browser made of a page; places in pixels of the page.

    Attributes:
        width, height: of all that can be scrolled to.
        fetched: addresses asked for.
        console: lines of errors and warnings.
        broken: images that did not load.
        pictures, icons: (left, top, right, bottom) of each.
        screenshot: of the frame.
        scale: pixels of the screenshot for one of the page.
    """

    width: int
    height: int
    fetched: list[str]
    console: list[str]
    broken: int
    pictures: list[list[float]]
    icons: list[list[float]]
    screenshot: Image.Image
    scale: int

    def shows(self, box: list[float]) -> bool:
        """Whether something is drawn in a box: more than one colour."""
        part = self.screenshot.crop(tuple(round(place * self.scale) for place in box))
        return len(part.getcolors(1 << 24)) > 1


def look_at(page: str, folder: Path, width: int, height: int, scale: int = 1) -> Seen:
    """Show a page of HTML in a frame of width x height and tell what became of it. Writes into `folder`."""
    wrapper, screenshot = folder / "wrapper.html", folder / f"page-{width}.png"
    script = MEASURE.replace("PAGE", json.dumps(page).replace("</", r"<\/").replace("<!--", r"<\!--"))
    frame = f'<iframe style="border: 0; width: {width}px; height: {height}px"></iframe>'
    wrapper.write_text(f'<!doctype html><body style="margin: 0">{frame}<pre></pre><script>{script}</script>')
    command = [
        chromium(), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
        "--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}", f"--window-size={max(width, NARROWEST)},{height}",
        f"--force-device-scale-factor={scale}", f"--screenshot={screenshot}", "--dump-dom", wrapper.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    measured = json.loads(html.unescape(re.search(r"<pre>(.+?)</pre>", done.stdout, re.DOTALL)[1]))
    with Image.open(screenshot) as whole:
        picture = whole.convert("RGB").crop((0, 0, width * scale, height * scale))
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Seen(**measured, console=console, screenshot=picture, scale=scale)


def chromium() -> str:
    """The browser. Without one the test fails: a page that nobody looked at is not tested."""
    for name in NAMES:
        if path := shutil.which(name):
            return path
    pytest.fail("no Chromium to look at report.html. Type: apt-get install chromium (or leave out: -k 'not browser').")
