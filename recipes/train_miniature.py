"""Train the miniature's three networks from nothing: mini-clip, mini-dino and mini-lm.

    python recipes/train_miniature.py --output runs/miniature
    python recipes/train_miniature.py --only dino --output runs/miniature

No training shows a scene of the held-out tenth (`Scene.held_out`). Each network takes 10 to 40 minutes on a single CPU core. To ship
the networks, copy mini-clip/ and mini-dino/ to encoders/weights/ and mini-lm/ to mof/miniature/weights/. Then
`recipes/measure_miniature.py` measures them and writes their cards.
"""

import logging

from mof.miniature.training.clip import train_clip
from mof.miniature.training.dino import train_dino
from mof.miniature.training.lm import train_lm
from study.command import Options, run_recipe

TRAININGS = {"clip": train_clip, "dino": train_dino, "lm": train_lm}


def main() -> None:
    options = Options(__doc__)
    options.output("folder for the networks", required=True)
    options.add_argument("--only", choices=TRAININGS, nargs="+", default=list(TRAININGS), help="train just these networks")
    options.add_argument("--scale", type=float, default=1.0, help="share of the full length, to try the code")
    args = options.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args.output.mkdir(parents=True, exist_ok=True)
    for name in args.only:
        TRAININGS[name](args.output, args.scale)


if __name__ == "__main__":
    run_recipe(main)
