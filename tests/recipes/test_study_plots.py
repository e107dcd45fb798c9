import numpy as np
import pytest
from PIL import Image

from mof.miniature.scenes import PATTERNS
from study.plots import gains, plot_noise, plot_selection, plot_study
from study.ways import NOISE_WAYS


def test_both_pictures_are_written(tmp_path):
    rows = [
        {
            "name": name,
            "seed": seed,
            "visual_tokens": 25,
            "active_tokens": 9,
            "pair_accuracy": 0.1 * seed,
            "misled_accuracy": 0.5,
            "by_pattern": dict.fromkeys(PATTERNS, 0.1 * seed),
        }
        for name in ("clip", "interleaved")
        for seed in (1, 2)
    ]
    written = plot_study(rows, tmp_path / "plots")
    assert [path.name for path in written] == ["accuracy.png", "by_pattern.png"]
    for path in written:
        assert len(Image.open(path).convert("L").getcolors()) > 10  # something was drawn


def test_selections_are_drawn_as_one_line_per_way_and_panel(tmp_path):
    rows = [
        {"name": f"{way}", "seed": seed, "selection": way, "keep": keep, "noise": str(0.2 * seed), "active_tokens": 100 * (keep or 1) + seed,
         "visual_tokens": 50, "pair_accuracy": 0.5, "question_accuracy": 0.6, "misled_accuracy": 0.1 * seed}
        for way, keeps in ((None, [None]), ("vig", [0.3, 0.7]), ("random", [0.7, 0.3]))
        for keep in keeps
        for seed in (1, 2)
    ]  # fmt: skip
    mixed = [row | {"noise": "mixed"} for row in rows]
    assert [path.stem for path in plot_noise(mixed, tmp_path)] == ["noise-mixed"]
    written = [*plot_selection(rows, tmp_path), *plot_noise([*rows, *mixed], tmp_path)]
    assert [path.stem for path in written] == ["selection", "noise-0.2", "noise-0.4", "noise-mixed", "noise"]
    for path in written:
        assert len(Image.open(path).convert("L").getcolors()) > 10
    every_way = [rows[0] | {"selection": way, "noise": noise} for way in NOISE_WAYS for noise in ("0.2", "0.4")]
    assert plot_noise(every_way, tmp_path)[-1].stem == "noise"


def test_gains_are_paired_over_seeds():
    right = {
        ("everything", "0", 1): 0.5, ("vig", "0", 1): 0.4, ("everything", "0.4", 1): 0.2, ("everything", "0.4", 2): 0.3,
        ("random", "0.4", 1): 0.2, ("vig", "0.4", 1): 0.5, ("vig", "0.4", 2): 0.4, ("vig", "0.4", 3): 0.9, ("grounded", "0.4", 1): 0.9,
    }  # fmt: skip
    rows = [{"selection": way, "noise": noise, "seed": seed, "pair_accuracy": value} for (way, noise, seed), value in right.items()]
    over_all, over_random = gains(rows).axes
    [line] = [line for line in over_all.lines if line.get_label() == "vig"]
    assert line.get_xydata() == pytest.approx(np.array([[0, -10], [40, 20]]))  # 30 and 10 points; seed 3 has nothing to compare with
    assert {line.get_label() for line in over_all.lines if not line.get_label().startswith("_")} == {"vig"}  # others have one share
    assert len(over_random.lines) == 1  # the zero: `random` was trained at one share
