"""What notebooks show of encoders, pairs, scores and selections: all of it as text that cannot become markup, and of bounded size."""

from __future__ import annotations

import base64
import io
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from encoders import Encoder
from mof.pairs.pair_table import BlindPairs, PairTable
from vig import Score, Scores, select

HOSTILE = """</style><script>alert("x")</script><img src=x onerror='alert(1)'>"""
TAGS = {"div", "style", "h3", "table", "tr", "th", "td", "p", "span", "article", "img"}


class Shown(HTMLParser):
    """The elements, texts, images and spans of HTML."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.texts: list[str] = []
        self.images: list[Image.Image] = []
        self.tokens: list[tuple[str, str]] = []  # class and style of each answer token
        self.feed(html)
        self.text = "".join(self.texts)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.tags.add(tag)
        self.attributes |= values.keys()
        if tag == "img":
            self.images.append(Image.open(io.BytesIO(base64.b64decode(values["src"].partition("base64,")[2]))).convert("RGB"))
        if values.get("title", "").endswith("nats"):
            self.tokens.append((values["class"], values["style"]))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem is None:
            self.texts.append(data)


def shown(value: Any) -> Shown:
    html = value._repr_html_()
    assert len(html) < 200_000
    parsed = Shown(html)
    assert parsed.tags <= TAGS and parsed.attributes <= {"class", "style", "src", "alt", "title"}
    style = html[html.index("<style>") + 7 : html.index("</style>")]
    assert html.count("<style>") == 1 and style.count("{") == style.count("}")
    assert style.startswith(".mof-vig {") and ":root" not in style and "body {" not in style  # the notebook keeps its own style
    return parsed


def score(id: str, texts: list[str], values: list[float]) -> Score:
    ends = np.cumsum([len(text) for text in texts])
    vig, no_ends = np.array(values, np.float32), np.array([], int)
    starts = ends - [len(text) for text in texts]
    return Score(id, float(vig.mean()), 1.0, 1.0, vig, np.arange(len(vig)), no_ends, "0", "".join(texts), starts, ends)


def scores(*items: Score) -> Scores:
    return Scores(items, {"identity": {}, "complete": True, "text_only": [], "failures": {}})


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Twenty images, one with a hostile name, and a file that is no image."""
    names = ["red.png", HOSTILE.replace("/", "") + ".png", *(f"{n}.png" for n in range(18))]
    for n, name in enumerate(names):
        Image.new("RGB", (500, 300), ((255, 0, 0), (0, 0, 255))[n] if n < 2 else "white").save(tmp_path / name)
    (tmp_path / "no.png").write_text("no image")
    return [tmp_path / name for name in [*names, "no.png"]]


def pairs_of(images: int, count: int) -> BlindPairs:
    similarity = np.linspace(0.99, 0.96, count, dtype=np.float32)
    return BlindPairs(np.zeros(count, np.int64), np.arange(1, count + 1), similarity, similarity - np.float32(0.5), images, count)


def test_pairs_show_both_images(files: list[Path]) -> None:
    pairs = pairs_of(21, 20).with_files(files)
    parsed = shown(pairs)
    assert len(parsed.images) == 16 and "The first 8 of 20 pairs" in parsed.text
    red, blue = (np.array(image).reshape(-1, 3).mean(axis=0) for image in parsed.images[:2])
    assert red == pytest.approx([254, 0, 0], abs=3) and blue == pytest.approx([0, 0, 254], abs=3)
    assert max(parsed.images[0].size) <= 160
    assert all(number in parsed.text for number in ("0.990", "0.490", "0.500"))
    last = shown(pairs[-1:])
    assert len(last.images) == 1 and "no.png (cannot be read)" in last.text
    with pytest.raises(ValueError, match="3 names for 21 images"):
        pairs.with_files(files[:3])


def test_pairs_without_files_show_numbers() -> None:
    parsed = shown(pairs_of(3, 2))
    assert not parsed.images and "2 blind pairs among 3 images" in parsed.text and "0.990" in parsed.text
    assert "0 blind pairs" in shown(pairs_of(3, 0)).text


def test_table_of_pairs_shows_images(files: list[Path], tmp_path: Path) -> None:
    pairs_of(21, 2).to_parquet(tmp_path / "pairs.parquet", [file.name for file in files])
    parsed = shown(PairTable(tmp_path))
    assert len(parsed.images) == 4 and f"2 pairs in {tmp_path}" in parsed.text


def test_scores_show_coloured_answers() -> None:
    parsed = shown(scores(score("a", ["the ", "red ", HOSTILE], [0.0, 2.0, -1.0]), score("b <i>", ["no"], [0.5])))
    assert HOSTILE in parsed.text and "the red " in parsed.text and "b <i>: VIG +0.500 nats" in parsed.text
    # The quantile 0.98 of |VIG| = 0, 0.5, 1, 2 is 1.94; the scale is 1.9, and full colour is 0.62. "a" has the mean 0.33, so "b" is first.
    assert parsed.tokens == [("t help", f"--a:{share:.2f}") for share in (0.5 / 1.9 * 0.62, 0, 0.62)] + [
        ("t harm", f"--a:{0.62 / 1.9:.2f}")
    ]
    one = shown(score("a", ["x"], [0.5]))
    assert "a: VIG +0.500 nats" in one.text and len(one.tokens) == 1
    assert "Scores of 0 records" in shown(scores()).text


def test_many_and_long_scores_stay_small() -> None:
    parsed = shown(scores(*(score(f"r{n}", [f"t{n} "] * 5000, [n / 50] * 5000) for n in range(50))))
    assert [f"r{n}: VIG" in parsed.text for n in (49, 48, 47, 46, 3, 2, 1, 0)] == [True] * 3 + [False] * 2 + [True] * 3
    assert len(parsed.tokens) == 6 * 300 and "4,700 more tokens" in parsed.text
    assert "x" * 100 in shown(score("i" * 9999, ["x" * 99_999], [1.0])).text


def test_selection_shows_counts_and_sources() -> None:
    every = scores(*(score(f"r{n}", ["x"] * 2, [float(n)] * 2) for n in range(30)))
    sources = {f"r{n}": f"{HOSTILE}{n}" for n in range(30)}
    parsed = shown(select(every, keep=0.5, sources=sources))
    assert "15 of 30 samples" in parsed.text and "10 more sources" in parsed.text
    assert {"all", "15", "30", "60", "50.0%"} <= set(parsed.texts)
    warned = shown(select(scores(score("a", ["x", "y", "z"], [9.0, 0.1, 0.1]), score("b", ["x"], [0.0])), keep=0.5))
    assert "the image helped get no loss" in warned.text


def test_encoder_shows_its_card(tiny_encoders: dict[str, Encoder]) -> None:
    encoder = tiny_encoders["b"]
    parsed = shown(encoder)
    assert "TinyEncoder tiny-b" in parsed.text and "24 x 24 pixels -> 6 x 6 tokens of 24 channels" in parsed.text
    encoder.name = f"{HOSTILE}\n{HOSTILE}"
    assert "</script>" in shown(encoder).text
