"""Photograph the gallery of blind pairs, the VIG report and the page of `mof demo` for the README and the documentation.

    python docs/scripts/screenshots.py runs/miniature

It needs the default run, playwright and chromium, and writes docs/images/gallery.webp, report.webp, demo.webp and demo-pair.webp, each
below 300 KB.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from mof.miniature import write_dataset

IMAGES = Path(__file__).parent.parent / "images"
MOF = [sys.executable, "-c", "from mof.cli.app import main; main()"]
LARGEST = 300_000


def main() -> None:
    """Write the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the default run")
    run = parser.parse_args().run
    browser = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        options = ["--clip", "mini-clip", "--dino", "mini-dino", "--clip-above", "0.9", "--one-per-image", "-o", folder]
        subprocess.run([*MOF, "blind-pairs", "--images", str(run / "data" / "MMVP"), *options], check=True)
        with (Path(folder) / "pairs.csv").open(newline="") as table:
            pair = next(csv.DictReader(table))
        page = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"]).new_page(device_scale_factor=1.5)
        photograph(page, Path(folder) / "gallery.html", "gallery", 560, ":has(> label > #sort)")
        photograph(page, report_of_captions(run / "seed-0" / "align-interleaved", Path(folder)), "report", 760, "#samples")
        photograph_demo(page, run / "seed-0", (pair["image_i"], pair["image_j"]))


def report_of_captions(model: Path, folder: Path) -> Path:
    """Write the VIG report of 200 captions that the model was not trained on, and return its path."""
    write_dataset(folder / "data", align=200, finetune=1, pairs=1, seed=77)
    records = ["--records", str(folder / "data" / "align.json"), "--images", str(folder / "data" / "images")]
    scores = str(folder / "scores")
    subprocess.run([*MOF, "vig", "score", "--model", str(model), *records, "--output", scores, "--no-calibrate"], check=True)
    subprocess.run([*MOF, "vig", "report", scores, *records, "--output", str(folder / "report.html")], check=True)
    return folder / "report.html"


def photograph(page: Page, file: Path, name: str, height: int, part: str) -> None:
    """Write a page from an element on, `height` pixels of it, as WebP."""
    page.set_viewport_size({"width": 1000, "height": height})
    page.goto(file.resolve().as_uri())
    page.wait_for_timeout(1000)
    page.locator(part).first.evaluate("element => window.scrollTo(0, element.getBoundingClientRect().top + window.scrollY - 12)")
    page.wait_for_timeout(1000)
    save(page, name)


def photograph_demo(page: Page, models: Path, images: tuple[str, str]) -> None:
    """Write both parts of the page of `mof demo`, with a pair of images and the model that learned from captions."""
    command = [*MOF, "demo", "align-interleaved", "--clip-above", "0.9", "--no-browser"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=models) as server:
        assert server.stdout is not None
        page.set_viewport_size({"width": 1000, "height": 1150})
        page.goto(server.stdout.readline().split()[0])
        page.locator("#asking [type=file]").set_input_files(images[0])
        page.locator("#asking [type=text]").fill("Describe the picture.")
        page.locator("#asking form button").click()
        page.locator("iframe").wait_for(timeout=60_000)
        page.wait_for_timeout(1000)
        save(page, "demo")
        page.click("#tab-comparing")
        for place, image in enumerate(images):
            page.locator("#comparing [type=file]").nth(place).set_input_files(image)
        page.locator(".verdict").wait_for(timeout=60_000)
        page.locator(".warn").evaluate("warning => warning.hidden = true")  # the caveat about photos: these are no photos
        page.set_viewport_size({"width": 1000, "height": 740})
        save(page, "demo-pair")
        server.send_signal(signal.SIGINT)


def save(page: Page, name: str) -> None:
    """Write what the browser shows."""
    target = IMAGES / f"{name}.webp"
    Image.open(io.BytesIO(page.screenshot())).convert("RGB").save(target, quality=80, method=6)
    if target.stat().st_size > LARGEST:
        raise ValueError(f"{target} has {target.stat().st_size:,} bytes, expected at most {LARGEST:,}: lower the height")


if __name__ == "__main__":
    main()
