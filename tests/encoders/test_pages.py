"""What all pages share: the template's environment, and charts whose colours are the style sheet's."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from encoders.pages import charts, data_uri, render, signed, write_page
from encoders.pages.charts import Bar, column_edges, counts_of, histogram, interval_bars, save, to_svg


def test_a_page_holds_the_style_and_escapes_its_values(tmp_path: Path) -> None:
    (tmp_path / "t.html").write_text(
        """<style>{% include "style.css" %}</style>{{ name }} {{ 12345 | count }} {{ 0.5 | percent }} {{ minus | signed }}"""
    )
    write_page(tmp_path / "x.html", tmp_path / "t.html", name="<b>", minus=-1)
    text = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert text == render(tmp_path / "t.html", name="<b>", minus=-1) and "light-dark(" in text
    assert text.endswith("&lt;b&gt; 12,345 50.0% \u22121.000") and signed(None) == "\u2013"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.html", "x.html"]
    assert data_uri(b"\x00\x01", "png") == "data:image/png;base64,AAE="


def test_who_draws_nothing_loads_no_matplotlib() -> None:
    code = "import sys; import encoders.pages.charts; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_each_colour_has_a_light_value_of_its_own() -> None:
    assert set(charts.LINES) < charts.COLOURS.keys()
    assert max(Counter(charts.COLOURS.values()).values()) == 1


@example(low=1.0, width=3e-15, cut=None, values=[0.0])
@example(low=1.0, width=3e-9, cut=1.0 + 1e-9, values=[0.0])
@given(low=st.floats(-10, 10), width=st.floats(0, 10), cut=st.none() | st.floats(-20, 20), values=st.lists(st.floats(-30, 30), min_size=1))
def test_columns_count_every_value_once_and_part_at_the_cut(low: float, width: float, cut: float | None, values: list[float]) -> None:
    edges = column_edges(low, low + width, cut)
    counts = counts_of(np.array(values), edges)
    assert len(edges) == 49 and np.all(np.diff(edges) > 0) and edges[0] <= low + 1e-9 and edges[-1] >= low + width - 1e-9
    assert counts.sum() == len(values)
    if cut is not None and low < cut < low + width:
        assert cut in edges
        assert counts[edges[:-1] >= cut].sum() == sum(value >= cut for value in values)


@pytest.mark.parametrize(("kept", "colour"), [("above", "blue"), ("below", "teal")])
@pytest.mark.parametrize("log", [False, True])
def test_a_histogram_says_its_numbers(kept: str, colour: str, log: bool) -> None:
    values = np.random.default_rng(0).normal(size=2000)
    edges = column_edges(-2, 2, 0.5)

    def draw() -> str:
        drawn = histogram(values, edges, label="nats <x>", unit="records", cut=0.5, kept=kept, note="threshold", colour=colour, log=log)
        return to_svg(drawn, 'says "it"')

    svg = draw()
    tips = [int(count) for count in re.findall(r"<title>\S+ to \S+: (\d+) records</title>", svg)]
    assert tips == np.histogram(values.clip(-2, edges[-1]), edges)[0].tolist()
    inside = (edges[:-1] >= 0.5) if kept == "above" else (edges[1:] <= 0.5)
    assert svg.count(f"fill: var(--{colour})") == inside.sum() and svg.count("fill: var(--idle)") == (~inside).sum()
    assert "threshold" in svg and "nats &lt;x&gt;" in svg and ("log scale" in svg) == log and 'aria-label="says &quot;it&quot;"' in svg
    assert svg == draw(), "the same bytes every time"
    assert not re.search(r"#[0-9a-f]{6}\b", svg), "colours are the page's"
    assert "url(" not in svg and "<style" not in svg and "http" not in svg


def test_bars_with_intervals() -> None:
    bars = [Bar("$hi$", 2.0, (1.5, 2.5), "+2.00"), Bar("\u4e2d/" + "long" * 9, -1.0, None, "\u22121.00 <3>")]
    svg = to_svg(interval_bars(bars, "mean", chance=0.5), "bars")
    assert svg.count("var(--blue)") == svg.count("var(--orange)") == 1
    assert "<title>$hi$: +2.00</title>" in svg and "\u2026ong" + "long" * 6 in svg and "chance 0.5" in svg and "\u22121.00 &lt;3&gt;" in svg


@pytest.mark.parametrize("name", ["x.png", "x.svg"])
def test_charts_are_saved(tmp_path: Path, name: str) -> None:
    drawn = interval_bars([Bar("a", 1.0, None, "1")], "x")
    save(drawn, tmp_path / "plots" / name)
    first = (tmp_path / "plots" / name).read_bytes()
    if name.endswith("png"):
        assert Image.open(tmp_path / "plots" / name).size == (1125, 189)
    else:
        assert charts.COLOURS["blue"] in first.decode()
