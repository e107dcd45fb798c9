"""The tables of docs/results/noise.md hold the figures of noise*.json and separation.json in the same folder, recomputed here."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy.stats import sem, t
from support.code_blocks import ROOT

from vig.selection.summary import MUCH

RESULTS = ROOT / "docs/results"
NOISE = {"No noise": "0", "20 %": "0.2", "40 %": "0.4", "60 %": "0.6", "Mixed noise": "mixed"}
"""Begin of a heading or cell -> name of the noise."""
MEASURES = {
    "VIG": "vig", "VIC": "vic", "`gain`": "gain", "CAL": "cal", "entropy": "entropy", "VPPO": "vppo", "null loss": "highest null loss",
    "lowest loss": "lowest loss", "shuffled VIG": "shuffled vig",
}  # fmt: skip
"""Head of a column -> measure in separation.json."""
IMAGES = ("matching", "partly matching", "conflicting")
SCORERS = {"2,000": "short-125", "4,000": "short-250", "8,000": "aligned", "then 5 %": "warmed", "`everything`": "everything"}
"""Begin of a cell -> scorer in separation.json."""

Cells = dict[tuple[str, str, int], dict[str, Any]]
"""(way, noise, seed) -> row of results.json."""


@pytest.fixture(scope="module")
def cells() -> Cells:
    """The rows of the figures, and the rule of the default run: `vig`, or `vig-samples` where the paper's rule warns."""
    rows = json.loads((RESULTS / "noise.json").read_text())["rows"]
    figures = {(row["selection"], row["noise"], row["seed"]): row for row in rows}
    for way, noise, seed in list(figures):
        if way == "vig":
            heeded = "vig-samples" if figures[way, noise, seed]["helped_left_out"] >= MUCH else "vig"
            if (heeded, noise, seed) in figures:
                figures["default", noise, seed] = figures[heeded, noise, seed]
    return figures


def tables(page: str) -> list[tuple[str, list[list[str]]]]:
    """Return (heading of the section, cells of all lines) for each table of the page."""
    found = []
    for section in page.split("\n## ")[1:]:
        heading, _, text = section.partition("\n")
        for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
            found.append((heading, [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]))
    return found


def named(text: str) -> str | None:
    """Return the name of the noise with which a heading or cell begins."""
    return next((name for begin, name in NOISE.items() if text.startswith(begin)), None)


def ways_of(name: str) -> list[str]:
    """Return the ways that a cell names: `vig` - `random`, or `vig`: what it is."""
    before = name.partition(":")[0]
    return ["random"] if "random as" in before else re.findall(r"`([a-z-]+)`", before) or ["everything"]


def seeds(cells: Cells, *ways: str, noise: str) -> list[int]:
    """Return the seeds with which all of these ways were measured."""
    return sorted(set.intersection(*({seed for way, name, seed in cells if (way, name) == (wanted, noise)} for wanted in ways)))


def interval(values: Sequence[float]) -> str:
    """Return the 95 % interval of the mean by Student's t."""
    half = t.ppf(0.975, len(values) - 1) * sem(values)
    low, high = (round(np.mean(values) + side * half, 6) + 0 for side in (-1, 1))  # 0 has the sign +
    return f"[{low:+.1f}, {high:+.1f}]"


def way_cells(cells: Cells, way: str, noise: str) -> list[str]:
    """Return the cells that follow a way's name: active tokens, right pairs, right misled questions; means, then the seeds."""
    measured = seeds(cells, way, noise=noise)
    every = range(1 + max(seed for _, name, seed in cells if name == noise))
    written = [f"{statistics.fmean(cells[way, noise, seed]['active_tokens'] for seed in measured):,.0f}"]
    for measure in ("pair_accuracy", "misled_accuracy"):
        values = {seed: 100 * cells[way, noise, seed][measure] for seed in measured}
        listed = ", ".join(f"{values[seed]:.1f}" if seed in values else "-" for seed in every)
        written.append(f"{statistics.fmean(values.values()):.1f}" + (f" ({listed})" if len(every) > 1 else ""))
    return written


def difference_cells(cells: Cells, way: str, control: str, noise: str) -> list[str]:
    """Return the cells that follow a difference's name: seeds, pairs, intervals over seeds and over held-out pairs, misled questions."""
    measured = seeds(cells, way, control, noise=noise)
    rows = [(cells[way, noise, seed], cells[control, noise, seed]) for seed in measured]
    pairs, misled = ([100 * (row[key] - other[key]) for row, other in rows] for key in ("pair_accuracy", "misled_accuracy"))
    right = [[np.array([*map(int, row["pairs_right"])]) for row in both] for both in rows]  # [seeds, 2, pairs]
    by_pair = 100 * np.mean([first - second for first, second in right], axis=0)  # [pairs]
    several = len(measured) > 1
    over_seeds = [interval(values) if several else "-" for values in (pairs, misled)]
    return [
        ", ".join(map(str, measured)), f"{np.mean(pairs):+.1f}", over_seeds[0], interval(by_pair),
        f"{np.mean(misled):+.1f}" + (f" {over_seeds[1]}" if several else ""),
    ]  # fmt: skip


def gain_cell(cells: Cells, way: str, control: str, noise: str, only: int | None = None) -> str:
    """Return the mean gain in right pairs, then the gain with each seed if there are several; "-" where nothing was measured."""
    measured = [seed for seed in seeds(cells, way, control, noise=noise) if only in (None, seed)]
    gains = [100 * (cells[way, noise, seed]["pair_accuracy"] - cells[control, noise, seed]["pair_accuracy"]) for seed in measured]
    listed = f" ({', '.join(f'{gain:+.1f}' for gain in gains)})" if len(gains) > 1 else ""
    return f"{np.mean(gains):+.1f}{listed}" if gains else "-"


def threshold_cells(cells: Cells, noise: str, seed: int) -> list[str]:
    """Return the cells that follow the name of noise and seed: threshold, shares, AUROC, and gains over all tokens."""
    row = cells["vig", noise, seed]
    auroc = f"{row['auroc']['ungrounded']:.2f}" if "ungrounded" in row["auroc"] else "-"
    gains = [gain_cell(cells, way, "everything", noise, seed) for way in ("vig", "floor-samples")]
    shares = [f"{row[name]:.0%}".replace("%", " %") for name in ("negative", "helped_left_out")]
    return [f"{row['threshold']:.4f}", *shares, auroc, *gains]


def separated(scorer: str, null: str, kind: str, measure: str) -> str:
    """Return the mean AUROC over the models of a scorer, in %."""
    rows = json.loads((RESULTS / "separation.json").read_text())["rows"]
    values = [row["table"][kind][measure] for row in rows if (row["scorer"], row["null"]) == (scorer, null)]
    return f"{100 * statistics.fmean(values):.0f}"


def separation_cells(head: list[str], name: str) -> list[str]:
    """Return the cells of a table of AUROC: of a kind of noise with each measure (null images blur and drop), or of a scorer's VIG."""
    if head[0] == "scorer":
        scorer = next(scorer for begin, scorer in SCORERS.items() if name.startswith(begin))
        return [separated(scorer, "blur", kind, "vig") for kind in head[1:]]
    unit = "token " if head[0].startswith("words") else ""
    both = ([separated("aligned", null, name, f"{unit}{MEASURES[column]}") for null in ("blur", "drop")] for column in head[1:])
    return [" / ".join(cell) for cell in both]


def analysis_cells(name: str) -> list[str]:
    """Return the cells of a model of the analyses, means over the seeds: mean VIG with three images, and four shares in %."""
    seeds = json.loads((RESULTS / "noise_analyses.json").read_text())["seeds"].values()
    model = "align-interleaved" if name == "stage 1" else f"finetune-{ways_of(name)[0]} 0.4"
    vig = [statistics.fmean(seed["image match"][model][image]["vig"][0] for seed in seeds) for image in IMAGES]
    attention = statistics.fmean(statistics.fmean(seed["attention"][model]["layers"]) for seed in seeds)
    alone, misled = ([seed["misleading text"][model][asked] for seed in seeds] for asked in ("alone", "misled"))
    shares = [
        attention,
        statistics.fmean(row["question_accuracy"] for row in alone),
        statistics.fmean(row["question_accuracy"] for row in misled),
        statistics.fmean(row["wrong_option"] for row in misled),
    ]
    return [" / ".join(f"{value:+.2f}" for value in vig), *(f"{100 * share:.1f}" for share in shares)]


def expected(cells: Cells, heading: str, head: list[str], name: str) -> list[str] | None:
    """Return the cells that must follow the first cell of a line; None for a table of other figures."""
    if noise := named(heading):
        ways = ways_of(name)
        if head[0] not in ("stage 2", "difference"):
            return None
        return difference_cells(cells, *ways, noise=noise) if len(ways) == 2 else way_cells(cells, *ways, noise=noise)
    if head[0] in ("records and noise", "words and noise", "scorer"):
        return separation_cells(head, name)
    if head[0] == "model":
        return analysis_cells(name)
    noise = named(name)
    assert noise or not heading.startswith(("What selection gains", "The threshold")), name
    if heading.startswith("What selection gains") and noise:
        return [gain_cell(cells, *ways_of(column), noise=noise) for column in head[1:]]
    if heading.startswith("The threshold") and noise:
        return threshold_cells(cells, noise, int(name[-1]))
    return None


def test_the_tables_are_computed_from_the_figures(cells):
    checked = {}
    for heading, (head, _, *lines) in tables((RESULTS / "noise.md").read_text()):
        for name, *written in lines:
            if (right := expected(cells, heading, head, name)) is not None:
                checked[heading, head[0], name] = (written, right)
    assert {place: written for place, (written, _) in checked.items()} == {place: right for place, (_, right) in checked.items()}
    assert {named(heading) for heading, *_ in checked} >= {noise for _, noise, _ in cells} and len(checked) > 40


def test_the_table_in_the_readme(cells):
    text = (ROOT / "README.md").read_text()
    lines = re.search(r"^\| answers written without looking.*\n\|.*\n((?:\|.*\n)+)", text, re.MULTILINE)[1].splitlines()
    for line in lines:
        name, *written = [cell.strip() for cell in line.strip("|").split("|")]
        noise = "0" if name == "none" else NOISE[name]
        for way, cell in zip(("vig", "floor-samples", "drop-samples", "lowest-loss"), written, strict=True):
            gains = [
                100 * (cells[way, noise, seed]["pair_accuracy"] - cells["everything", noise, seed]["pair_accuracy"])
                for seed in seeds(cells, way, "everything", noise=noise)
            ]
            right = f"{round(statistics.fmean(gains)):+d} ({len(gains)} seed{'s'[: len(gains) > 1]})" if gains else "-"
            assert cell == right.replace("+0", "0"), (name, way)


def test_a_line_of_means_and_intervals_against_hand_worked_numbers():
    right = {("vig", 0): "1110", ("everything", 0): "1000", ("vig", 1): "1100", ("everything", 1): "0100"}
    cells = {
        (way, "0.4", seed): {"pair_accuracy": bits.count("1") / 4, "misled_accuracy": 0.5, "active_tokens": 10, "pairs_right": bits}
        for (way, seed), bits in right.items()
    }
    assert way_cells(cells, "vig", "0.4") == ["10", "62.5 (75.0, 50.0)", "50.0 (50.0, 50.0)"]
    half = 12.706 * 12.5  # t of one degree of freedom, times the error of the mean of 50 and 25
    assert difference_cells(cells, "vig", "everything", "0.4")[1:3] == ["+37.5", f"[{37.5 - half:+.1f}, {37.5 + half:+.1f}]"]
