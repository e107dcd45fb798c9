"""The parts of the comparison of decoding methods: its ways, its controls and its figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from compare_decoding import YesBias, draw, gain_in_pairs, known_rows, remember, table_of, ways
from encoders.whole_files import write_json
from study.decoding_plot import plot_decoding
from vig.decoding import build_decoding


def test_ways_have_names_of_their_own_and_methods_that_exist() -> None:
    every = ways(192)
    assert len({way.name for way in every}) == len(every)
    methods = {build_decoding(way.decoding).name for way in every if way.decoding}
    assert methods == {"vcd", "icd", "m3id", "pai", "var", "lacing"}


def test_the_constant_is_added_where_yes_and_no_part() -> None:
    bias, scores = YesBias(3, 1, 0.5), torch.zeros(2, 4)
    assert bias(torch.zeros(2, 2, dtype=torch.long), scores.clone()).equal(scores)
    assert bias(torch.zeros(2, 3, dtype=torch.long), scores.clone()).tolist() == [[0, 0.5, 0, 0]] * 2


def test_a_mixer_that_remembers_gives_the_same_tokens(tiny_model: Any) -> None:
    mixer, calls = tiny_model.mixer, []
    pixels = torch.randint(0, 256, (3, 3, mixer.image_size, mixer.image_size), dtype=torch.uint8)
    pixels[2] = pixels[0]
    with torch.no_grad():
        expected = mixer(pixels)
        genuine = mixer.forward
        mixer.forward = lambda images: calls.append(len(images)) or genuine(images)
        remember(mixer)
        for part in (pixels, pixels[1:]):
            torch.testing.assert_close(mixer(part), expected[-len(part) :])
    assert calls == [2]


def test_right_answers_get_full_marks(tmp_path: Path) -> None:
    benchmarks = draw(tmp_path / "drawn", pairs=1, scenes=4, seed=3)
    assert len(benchmarks["pairs"].asked) == len(benchmarks["misled"].asked) == 18
    told = benchmarks["yes or no"]
    figures = told.figures(["Yes."] * len(told.asked))
    assert (figures["accuracy"], figures["yes_ratio"], figures["neither"]) == (pytest.approx(0.5), 1, 0)
    captions = benchmarks["captions"]
    assert captions.figures(["A ball."] * 4)["chair_s"] == 0  # a ball is in every scene


def row(model: str, seed: str, way: str, right: list[bool]) -> dict[str, Any]:
    shares = {"accuracy": float(np.mean(right)), "right": right}
    yes = {"accuracy": 0.5, "yes_ratio": 0.25, "f1": 0.4}
    return {"model": model, "seed": seed, "way": way, "pairs": shares, "misled": shares, "yes or no": yes}


def test_gains_table_and_chart(tmp_path: Path) -> None:
    rows = [
        row("m", "0", "greedy", [True, False, True, True]), row("m", "0", "vcd", [True, True, True, True]),
        row("m", "1", "greedy", [True, True, False, True]), row("m", "1", "vcd", [True, False, False, True]),
    ]  # fmt: skip
    gains = np.array([100, 0, -100, 0])
    assert gain_in_pairs(rows, "vcd") == f"+0.0 ±{1.96 * gains.std(ddof=1) / 2:.1f}" and gain_in_pairs(rows, "greedy") == ""
    assert gain_in_pairs(rows[1:2], "vcd") == ""
    console = Console(width=200, record=True, file=(tmp_path / "out").open("w"))
    console.print(table_of(rows, "m"))
    assert "75.0" in console.export_text()
    plot_decoding([*rows, row("m", "0", "yes +1", [True, False])], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_answers_to_other_questions_are_not_joined(tmp_path: Path) -> None:
    assert known_rows(tmp_path / "no.json", {"pairs": 1}) == []
    write_json(tmp_path / "a.json", {"rows": [1], "drawn": {"pairs": 2}})
    assert known_rows(tmp_path / "a.json", {"pairs": 2}) == [1]
    with pytest.raises(ValueError, match="other questions"):
        known_rows(tmp_path / "a.json", {"pairs": 1})
