import pytest
from PIL import Image

from mof.miniature.scenes import PATTERNS
from mof.training.plots import plot_study

pytest.importorskip("matplotlib")


def test_both_pictures_are_written(tmp_path):
    rows = [
        {"name": name, "seed": seed, "visual_tokens": 25, "pair_accuracy": 0.1 * seed, "by_pattern": dict.fromkeys(PATTERNS, 0.1 * seed)}
        for name in ("clip", "interleaved")
        for seed in (1, 2)
    ]
    written = plot_study(rows, tmp_path / "plots")
    assert [path.name for path in written] == ["pair_accuracy.png", "by_pattern.png"]
    for path in written:
        assert len(Image.open(path).convert("L").getcolors()) > 10  # something was drawn
