"""The cards of the shipped networks, measured on very few scenes: every pattern gets a line, shares are shares."""

import re

import pytest

import measure_miniature
from mof.miniature.scenes import PATTERNS


@pytest.mark.slow
def test_a_card_has_a_line_for_every_pattern(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["measure_miniature.py", "--pairs", "2", "--probe-scenes", "40", "--output", str(tmp_path)])
    measure_miniature.main()
    for network in ("mini-clip", "mini-dino", "mini-lm"):
        card, shipped = ((folder / "README.md").read_text() for folder in (tmp_path / network, measure_miniature.WEIGHTS[network]))
        assert card.split("\n\n")[:3] == shipped.split("\n\n")[:3]  # title, description, training
        for pattern in PATTERNS:
            (line,) = re.findall(rf"^\| {pattern} \|(.*)\|$", card, re.MULTILINE)
            assert all(-1 <= float(cell) <= 1 for cell in line.split("|"))
