"""The tables of the default run, of fusions and of photos hold the figures of docs/results/*.json, recomputed here."""

from __future__ import annotations

import json
import re
import statistics

import pytest
from scipy.stats import ttest_1samp
from support.code_blocks import ROOT

RESULTS = ROOT / "docs/results"


def lines(page: str) -> list[list[str]]:
    """Return the cells of all lines of the page's tables."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]


@pytest.mark.parametrize("page", ["README.md", "docs/results/index.md"])
def test_the_default_run(page):
    rows = json.loads((RESULTS / "default.json").read_text())["rows"]
    expected = [
        [f"{100 * row[key]:.1f} %" for key in ("pair_accuracy", "misled_accuracy")]
        + [f"{row[key]:,}" for key in ("visual_tokens", "active_tokens")]
        for row in rows
    ]
    assert [row["pairs_right"].count("1") / len(row["pairs_right"]) for row in rows] == [row["pair_accuracy"] for row in rows]
    assert [cells[1:] for cells in lines((ROOT / page).read_text()) if cells[1:] in expected] == expected


def test_the_fusions():
    by_name: dict[str, list[dict]] = {}
    for row in sorted(json.loads((RESULTS / "fusion.json").read_text())["rows"], key=lambda row: row["seed"]):
        by_name.setdefault(row["name"], []).append(row)
    pairs = {name: [100 * row["pair_accuracy"] for row in rows] for name, rows in by_name.items()}
    checked = []
    for first, *written in lines((RESULTS / "fusion.md").read_text()):
        name = re.split(r"[ :]", first)[0]
        if name in by_name and len(written) == 4 and "(" in written[2]:
            mean = statistics.fmean(pairs[name])
            seeds = ", ".join(f"{value:.1f}" for value in pairs[name])
            [row, *_] = by_name[name]
            assert written[:3] == [str(row["visual_tokens"]), f"{row['adapter_parameters']:,}", f"{mean:.1f} ({seeds})"]
            assert name == "interleaved" or written[3].split()[0] == f"{mean - statistics.fmean(pairs['interleaved']):+.1f}"
            checked.append(name)
    assert sorted(checked) == sorted(name for name, rows in by_name.items() if len(rows) == 3)


def test_the_photos():
    by_way: dict[str, list[dict]] = {}
    for row in sorted(json.loads((RESULTS / "photos.json").read_text())["rows"], key=lambda row: row["noise"]):
        by_way.setdefault(row["selection"], []).append(row["held_out"] | {"tokens": row["active_tokens"]})
    differences = {way: [held["loss_other_photo"] - held["loss_right_photo"] for held in rows] for way, rows in by_way.items()}
    checked = []
    for first, *written in lines((RESULTS / "photos.md").read_text()):
        way = first.split(":")[0].strip("`")
        if way in by_way and len(written) == 5:
            losses = [statistics.fmean(held[key] for held in by_way[way]) for key in ("loss_right_photo", "loss_other_photo")]
            seeds = ", ".join(f"{value:.3f}" for value in differences[way])
            assert written[:3] == [*(f"{loss:.3f}" for loss in losses), f"{statistics.fmean(differences[way]):.3f} ({seeds})"]
            gains = [value - other for value, other in zip(differences[way], differences["random"], strict=True)]
            low, high = ttest_1samp(gains, 0).confidence_interval(0.95)
            assert way == "random" or written[3] == f"{statistics.fmean(gains):+.3f} [{low:+.3f}, {high:+.3f}]"
            assert written[4] == f"{statistics.fmean(held['tokens'] for held in by_way[way]):,.0f}"
            checked.append(way)
    assert sorted(checked) == sorted(by_way) and len(by_way) == 6 and {len(rows) for rows in by_way.values()} == {3}


@pytest.mark.parametrize(("study", "page"), [("noise", "noise"), ("fusions", "fusion"), ("layers", "layers"), ("decoding", "decoding")])
def test_each_prediction_has_an_outcome(study, page):
    [section] = re.findall(
        rf"^## The study of {study}\n(.*?)(?=^## |\Z)", (ROOT / "recipes/predictions.md").read_text(), re.MULTILINE | re.DOTALL
    )
    predicted = set(re.findall(r"^(\d+)\. ", section, re.MULTILINE))
    told = {number for first, *_ in lines((RESULTS / f"{page}.md").read_text()) for number in re.findall(r"(?<!\d)(\d+)\.(?= |,)", first)}
    assert predicted <= told | ({"1"} if study == "noise" else set())  # number 7 predicts the same, for the second run
    assert len(predicted) >= 5
