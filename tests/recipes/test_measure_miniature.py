"""The cards of the shipped networks, measured on very few scenes: every pattern gets a line, shares are shares."""

import os
import re
import subprocess
import sys
from pathlib import Path

from mof.miniature.scenes import PATTERNS

ROOT = Path(__file__).parents[2]


def test_a_card_has_a_line_for_every_pattern(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        str(ROOT / "recipes/measure_miniature.py"),
        "--pairs",
        "2",
        "--probe_scenes",
        "40",
        "--output_dir",
        str(tmp_path),
    ]
    subprocess.run(command, check=True, env=environment, capture_output=True, timeout=600)
    for network in ("mini-clip", "mini-dino", "mini-lm"):
        card = (tmp_path / network / "README.md").read_text()
        for pattern in PATTERNS:
            (line,) = re.findall(rf"^\| {pattern} \|(.*)\|$", card, re.MULTILINE)
            assert all(-1 <= float(cell) <= 1 for cell in line.split("|"))
