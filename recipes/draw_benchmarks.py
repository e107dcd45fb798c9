"""Draw MMVP, MMVP-VLM, POPE and CHAIR in the miniature world, in their official layouts, and print the commands that measure with them.

python recipes/draw_benchmarks.py runs/benchmarks
mof probe mmvp-vlm --data runs/benchmarks/MMVP_VLM --encoder mini-clip --encoder mini-dino
"""

from pathlib import Path

from mof.miniature import write_benchmarks
from study.command import Options, run_recipe


def main() -> None:
    options = Options(__doc__)
    options.add_argument("folder", type=Path, help="new folder to write")
    options.add_argument("--pairs", type=int, default=15, help="pairs per pattern, for MMVP and MMVP-VLM")
    options.add_argument("--scenes", type=int, default=100, help="scenes for POPE and CHAIR")
    options.add_argument("--seed", type=int, default=0)
    args = options.parse_args()
    folder = args.folder
    write_benchmarks(folder, pairs=args.pairs, scenes=args.scenes, seed=args.seed, progress=True)
    print(f"""written to {folder}; to measure an encoder, and a model that recipes/train_llava_mof_vig.py trained:
  mof probe mmvp-vlm --data {folder}/MMVP_VLM --encoder mini-clip
  mof eval mmvp --data {folder}/MMVP --prompt question --model MODEL --output evals/mmvp
  mof eval pope --data {folder}/POPE --images {folder}/images --model MODEL --output evals/pope
  mof eval chair --instances {folder}/CHAIR/instances.json --captions {folder}/CHAIR/captions.json --synonyms {folder}/CHAIR/synonyms.txt \\
      --images {folder}/images --prompt "Describe the picture." --model MODEL --output evals/chair""")


if __name__ == "__main__":
    run_recipe(main)
