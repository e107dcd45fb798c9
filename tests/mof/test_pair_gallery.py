"""What goes into the gallery: thumbnails, samples, charts, copies; and the page in a browser, where there is one."""

from __future__ import annotations

import functools
import io
import json
import re
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.spectra import embeddings

from encoders.pages.thumbnails import thumbnail
from mof import blind_pairs
from mof.pairs import similarity_sample
from mof.pairs.gallery import Gallery, share_text, similarity_chart
from mof.pairs.image_collection import SAME_PICTURE, ThumbnailEncoder
from mof.pairs.similarity_sample import sample_similarities


def photo(seed: int, side: int = 200) -> Image.Image:
    """Something smooth with structure, as photos are."""
    pixels = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((side * 4 // 3, side), Image.Resampling.BICUBIC)


def look(image: Image.Image) -> torch.Tensor:
    encoder = ThumbnailEncoder()
    return encoder.embed_image(encoder.pixels(image)[None])[0]  # [E]


@pytest.mark.parametrize("seed", range(5))
def test_a_copy_is_the_same_picture_and_a_change_is_not(seed: int) -> None:
    image, file = photo(seed), io.BytesIO()
    image.save(file, "JPEG", quality=40)
    copies = [Image.open(file), *(image.resize((w, h), Image.Resampling.LANCZOS) for w, h in ((89, 67), (400, 300), (266, 200)))]
    for copy in copies:
        assert look(image) @ look(copy) > SAME_PICTURE
    changed = image.copy()
    level = np.asarray(image.convert("L")).mean() < 128
    changed.paste((255,) * 3 if level else (0,) * 3, (100, 80, 140, 120))
    for other in (changed, photo(seed + 100), image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)):
        assert look(image) @ look(other) < SAME_PICTURE


def test_thumbnails_are_small_jpegs_and_never_larger_than_the_image() -> None:
    for size, expected in (((400, 300), (128, 96)), ((30, 300), (13, 128)), ((40, 40), (40, 40))):
        image = photo(0).resize(size)
        small = Image.open(io.BytesIO(thumbnail(image, 128)))
        assert (small.format, small.size) == ("JPEG", expected)
        grey = [np.asarray(one.convert("L"), dtype=float) for one in (small, image.resize(expected))]
        assert np.abs(grey[0] - grey[1]).mean() < 6
        assert image.size == size, "left as it was"


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 100), count=st.sampled_from([2, 3, 40]), several=st.booleans())
def test_all_pairs_of_a_small_collection_are_sampled(seed: int, count: int, several: bool) -> None:
    rng = np.random.default_rng(seed)
    clips = [embeddings(rng, count, 8, "usual") for _ in range(1 + several)]
    dinos = [embeddings(rng, count, 8, "flat") for _ in range(1 + several)]
    sample = sample_similarities(clips, dinos)
    upper = np.triu_indices(count, 1)
    np.testing.assert_allclose(sample.clip, np.min([x @ x.T for x in clips], 0)[upper], atol=1e-6)
    np.testing.assert_allclose(sample.dino, np.max([x @ x.T for x in dinos], 0)[upper], atol=1e-6)
    assert sample.pairs == count * (count - 1) // 2
    advised = sample.advice(0.99, -0.9)
    found = blind_pairs(clips, dinos, advised.clip_above, advised.dino_below)
    assert 0 < found.total == advised.pairs
    assert advised.clip_above <= 0.99 and advised.dino_below >= -0.9


def test_a_large_collection_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similarity_sample, "SAMPLE", 200)
    rng = np.random.default_rng(0)
    clip, dino = embeddings(rng, 2000, 16, "usual"), embeddings(rng, 2000, 16, "flat")
    sample = sample_similarities([clip], [dino])
    assert len(sample.clip) == 200 * 199 // 2 and sample.pairs == 2000 * 1999 // 2
    everything = (clip @ clip.T)[np.triu_indices(2000, 1)]
    assert np.median(sample.clip) == pytest.approx(np.median(everything), abs=0.02)
    advised = sample.advice(1.0, -1.0)
    assert blind_pairs(clip, dino, advised.clip_above, advised.dino_below).total == pytest.approx(advised.pairs, rel=0.5)
    assert f"1 % above {np.quantile(sample.clip, 0.99):.3f}" in sample.quantiles()


def test_no_pairs_no_advice() -> None:
    sample = sample_similarities([np.eye(1)], [np.eye(1)])
    assert sample.advice(0.9, 0.6) is None
    assert "kept: above 0.95" in similarity_chart(sample.clip, 0.95, "above", "CLIP", "orange")


@pytest.mark.parametrize(
    ("values", "cut", "kept"), [([], 0.5, "above"), ([0.25], 0.25, "below"), ([-1, 0.1, 0.1, 1], 0.1, "below"), ([0.2, 0.3], -0.9, "above")]
)
def test_charts_hold_their_values_and_their_cut(values: list[float], cut: float, kept: str) -> None:
    chart = similarity_chart(np.array(values, np.float32), cut, kept, "a <b>", "teal")
    counts = [int(count) for count in re.findall(r": (\d+) pairs</title>", chart)]
    assert sum(counts) == len(values) and f"kept: {kept} {cut}" in chart and "a &lt;b&gt;" in chart


def test_shares_are_said_in_plain_numbers() -> None:
    shares = [(0, 10), (10, 10), (9999, 10_000), (1, 8), (1, 10_000), (523, 524), (2, 1_000_000)]
    assert [share_text(np.arange(whole) < part) for part, whole in shares] == [
        "0",
        "100",
        "more than 99.9",
        "12.5",
        "0.01",
        "99.8",
        "0.0002",
    ]


def test_no_axis_goes_beyond_what_a_cosine_can_be() -> None:
    for values, cut in ((np.linspace(0.2, 1, 50), 0.95), (np.linspace(-1, 1, 50), 0.6), (np.array([0.999, 1.0]), 0.999)):
        chart = similarity_chart(values.astype(np.float32), float(cut), "above", "CLIP", "orange")
        ends = [float(number) for pair in re.findall(r"<title>([-.\d]+) to ([-.\d]+):", chart) for number in pair]
        assert max(ends) <= 1 and min(ends) >= -1 and "log scale" in chart


@pytest.mark.slow
@pytest.mark.browser
def test_full_photos_are_shown_where_the_folder_is_served(browser: Any, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    names = [str(tmp_path / f"photos/{n} #%?.png") for n in range(4)]
    for n, name in enumerate(names):
        photo(n, 500).save(name)
    rng = np.random.default_rng(0)
    clip, dino = embeddings(rng, 4, 16, "usual"), embeddings(rng, 4, 16, "flat")
    gallery = Gallery(blind_pairs(clip, dino, -1, 1.1), names, "a", "b", -1.0, 1.1, sample_similarities([clip], [dino]), None, 0, {})
    gallery.write(tmp_path / "out.html", tmp_path / "photos")
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(SimpleHTTPRequestHandler, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    page = browser.new_page()
    page.goto(f"http://127.0.0.1:{server.server_port}/out.html")
    page.click(".photos")
    page.wait_for_load_state("networkidle")
    widths = page.evaluate("[...document.querySelectorAll('#viewer img')].map((img) => img.naturalWidth)")
    page.close()
    server.shutdown()
    server.server_close()
    assert widths == [666, 666]


@pytest.mark.slow
@pytest.mark.browser
def test_the_page_in_a_browser(browser: Any, tmp_path: Path) -> None:
    """1,000 pairs: drawn as one scrolls, sorted, filtered, enlarged, blinked; a name with markup in it is text."""
    count = 46
    names = [str(tmp_path / f"photos/{n:02d}<img src=q onerror=alert(1)>&amp;.png") for n in range(count)]
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for n, name in enumerate(names):
        if n != 5:
            photo(n, 60).save(name)
    clip, dino = embeddings(rng, count, 16, "usual"), embeddings(rng, count, 16, "flat")
    pairs = blind_pairs(clip, dino, -1, 1.1)
    sample = sample_similarities([clip], [dino])
    gallery = Gallery(pairs, names, "left </script>", "right", -1.0, 1.1, sample, None, 0, {})
    gallery.write(tmp_path / "gallery.html", tmp_path / "photos")
    page = browser.new_page(viewport={"width": 1200, "height": 800})
    trouble: list[str] = []
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("dialog", lambda dialog: (trouble.append(dialog.message), dialog.dismiss()))
    page.goto((tmp_path / "gallery.html").as_uri())
    used: set[int] = set()
    for pair in zip(pairs.i.tolist(), pairs.j.tolist(), strict=True):
        used |= set(pair) if not used & set(pair) else set()
    assert page.inner_text("#count") == f"{len(used) // 2} of 1,035 pairs"  # each image once
    page.uncheck("#once")
    assert page.inner_text("#count") == f"{len(pairs):,} pairs" == "1,035 pairs"
    assert page.evaluate("['clip', 'dino'].map((id) => document.getElementById(id).nextElementSibling.value)") == ["-1", "1.1"]
    assert page.locator("article").count() < 300
    for _ in range(100):
        page.evaluate("scrollTo(0, 1e9)")
        page.wait_for_timeout(20)
        if page.locator("article").count() == len(pairs):
            break
    assert page.locator("article").count() == len(pairs)
    assert page.locator("article img:not([src])").count() == sum(5 in pair for pair in zip(pairs.i, pairs.j, strict=True)), "no file"
    page.select_option("#sort", "dino")
    first = float(page.locator("article b.dino").first.text_content())
    assert first == pytest.approx(pairs.dino_similarity.min(), abs=1e-3)
    page.fill("#search", "07<IMG")
    assert page.inner_text("#count") == f"{count - 1} of 1,035 pairs"
    page.fill("#search", "")
    page.evaluate("Object.assign(document.getElementById('clip'), {value: 0.9}).dispatchEvent(new Event('input'))")
    assert page.inner_text("#count") == f"{int((pairs.clip_similarity.round(4) >= 0.9).sum())} of 1,035 pairs"
    page.locator("article .tick input").nth(1).check()
    page.locator("article .tick select").nth(1).select_option("Text")
    page.click(".photos")
    assert page.inner_text("#place").startswith("1 of ")
    page.keyboard.press("t")
    sources = "[...document.querySelectorAll('#viewer img')].map((img) => img.src)"
    one, other = page.evaluate(sources)
    assert one.startswith("file:///") and one.endswith(".png")
    page.keyboard.press("Space")
    page.keyboard.press("Space")
    assert page.evaluate(sources) == [other, one] and page.locator("#viewer figure:visible").count() == 1
    page.keyboard.press("ArrowRight")
    assert page.evaluate(sources) != [one, other]
    page.keyboard.press("Escape")
    assert not page.locator("#viewer").is_visible()
    assert page.locator("article").first.get_attribute("class") == "card ticked"
    page.check("#only")
    assert page.inner_text("#count") == "2 of 1,035 pairs"
    with page.expect_download() as saved:
        page.click("#save")
    rows = json.loads(Path(saved.value.path()).read_text())
    assert sorted(str(row["pattern"]) for row in rows) == ["None", "Text"] and {row["image_i"] for row in rows} <= set(names)
    before = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != before
    page.close()
    assert trouble == []
