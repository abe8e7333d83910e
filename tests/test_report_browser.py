"""The page in a browser: on a phone and on a desk, in both themes, with nothing fetched."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.page_runs import folder, page_of
from tests.test_report_charts import contrast

__all__ = ["folder"]

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)

WIDTHS = (390, 1280)

# A window cannot be as narrow as a phone; a frame can, and has its own media queries.
FRAMES = """<!DOCTYPE html><meta charset="utf-8"><title>frames</title><body>
{frames}
<pre id="found"></pre>
<script>
const hex = text => "#" + text.match(/\\d+/g).slice(0, 3).map(
  part => (+part).toString(16).padStart(2, "0")).join("");
addEventListener("load", () => {{
  const found = [...document.querySelectorAll("iframe")].map(frame => {{
    const page = frame.contentDocument, view = frame.contentWindow;
    page.querySelectorAll("details").forEach(details => details.open = true);
    const root = page.documentElement, colour = (what, name) =>
      hex(view.getComputedStyle(page.querySelector(what))[name]);
    return {{
      width: view.innerWidth, overflow: root.scrollWidth - root.clientWidth,
      tables: [...page.querySelectorAll(".scroll")].every(box => box.clientWidth <= root.clientWidth),
      pictures: [...page.images].every(image => image.complete && image.naturalWidth > 0),
      charts: [...page.querySelectorAll("figure > svg")].map(svg => svg.getBoundingClientRect().width),
      resources: view.performance.getEntriesByType("resource").map(entry => entry.name.slice(0, 5)),
      page: colour("body", "backgroundColor"), text: colour("body", "color"),
      quiet: colour(".note", "color"), letters: colour("svg text", "fill"),
      line: colour(".line", "stroke"), link: colour("a", "color"),
    }};
  }});
  document.getElementById("found").textContent = JSON.stringify(found);
}});
</script>"""


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")
@pytest.mark.parametrize(("theme", "number"), [("dark", 0), ("light", 1)])
def test_it_fits_and_can_be_read(folder: Path, tmp_path: Path, theme: str, number: int) -> None:
    page = html.escape(page_of(folder))
    frames = "".join(
        f'<iframe width="{width}" height="800" style="border:0" srcdoc="{page}"></iframe>'
        for width in WIDTHS
    )
    file = tmp_path / "frames.html"
    file.write_text(FRAMES.format(frames=frames), encoding="utf-8")
    result = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--hide-scrollbars", "--window-size=1400,1000", "--virtual-time-budget=5000",
            f"--blink-settings=preferredColorScheme={number}", f"--user-data-dir={tmp_path / 'user'}",
            "--enable-logging=stderr", "--dump-dom", file.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )  # fmt: skip
    said = [line for line in result.stderr.splitlines() if "CONSOLE" in line]
    assert said == []
    [listing] = re.findall(r'<pre id="found">(.+?)</pre>', result.stdout, re.S)
    for width, found in zip(WIDTHS, json.loads(html.unescape(listing)), strict=True):
        assert found["width"] == width
        assert found["overflow"] == 0
        assert found["tables"]
        assert found["pictures"]
        assert set(found["resources"]) <= {"data:"}
        # Letters in charts are drawn at 11.5 pixels in a width of 380.
        assert all(0.85 * 380 <= drawn <= 1.7 * 380 for drawn in found["charts"])
        assert (contrast(found["page"], "#ffffff") < 2) == (theme == "light")
        for name in ("text", "quiet", "letters", "link"):
            assert contrast(found[name], found["page"]) >= 4.5, name
        assert contrast(found["line"], found["page"]) >= 3
