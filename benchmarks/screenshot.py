"""A picture of a report's top, from the decision to the plot: what the README shows.

    python -m mpa_edge.benchmarks.screenshot runs/demo/report/report.html docs/report.png

Needs `pip install playwright` and a Chromium (`playwright install chromium`, or the system's).
"""

from __future__ import annotations

import shutil
from io import BytesIO
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from mpa_edge.errors import MissingExtra

WIDTH = 1080
COLOURS = 96  # the page has few, and their shades at the letters' edges
LAST = ".plot"  # the element that ends the picture


def screenshot(page: Path, out: Path, *, width: int = WIDTH, dark: bool = False) -> Path:
    """Write the top of a report.html as a PNG of few colours."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise MissingExtra("playwright", "dev") from None
    with sync_playwright() as driver:
        program = shutil.which("chromium") or shutil.which("google-chrome")
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        shown = browser.new_page(viewport={"width": width, "height": 1000}, color_scheme="dark" if dark else "light")
        shown.goto(page.resolve().as_uri())
        end = shown.evaluate(f"""() => {{
            const last = document.querySelector({LAST!r}) ?? document.querySelector("header");
            return last.closest("section, header").getBoundingClientRect().bottom + 28;
        }}""")
        shot = shown.screenshot(full_page=True, clip={"x": 0, "y": 0, "width": width, "height": end})
        browser.close()
    with Image.open(BytesIO(shot)) as image:
        few = image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    out.parent.mkdir(parents=True, exist_ok=True)
    few.save(out, optimize=True)
    return out


def main(
    page: Annotated[Path, typer.Argument(help="report.html", exists=True)],
    out: Annotated[Path, typer.Argument(help="The picture.")] = Path("docs/report.png"),
    width: Annotated[int, typer.Option(help="Of the page, in points.")] = WIDTH,
    dark: Annotated[bool, typer.Option(help="The dark theme.")] = False,
) -> None:
    """Take the picture."""
    path = screenshot(page, out, width=width, dark=dark)
    typer.echo(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    typer.run(main)
