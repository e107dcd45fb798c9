"""Train the miniature's three networks from nothing and measure them: mini-clip, mini-dino, mini-lm.

    python recipes/train_miniature.py --output_dir runs/miniature
    python recipes/train_miniature.py --only dino --output_dir runs/miniature

No training shows a scene of the held-out tenth (`Scene.held_out`). Each network takes 10 to 40 minutes on one CPU core. To ship
the result, copy mini-clip/ and mini-dino/ to encoders/weights/ and mini-lm/ to mof/miniature/weights/; then
`recipes/measure_miniature.py` writes their cards.
"""

import argparse
import logging
from pathlib import Path

from mof.miniature.training.clip import train_clip
from mof.miniature.training.dino import train_dino
from mof.miniature.training.lm import train_lm

TRAININGS = {"clip": train_clip, "dino": train_dino, "lm": train_lm}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--only", choices=TRAININGS, nargs="+", default=list(TRAININGS), help="train just these")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full length, to try the code")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    for name in arguments.only:
        TRAININGS[name](arguments.output_dir, arguments.scale)
