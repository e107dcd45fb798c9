"""Draw MMVP, MMVP-VLM, POPE and CHAIR in the miniature world, in their official layouts, and say how to measure on them.

python recipes/draw_benchmarks.py runs/benchmarks
mof probe mmvp-vlm --data runs/benchmarks/MMVP_VLM --encoder mini-clip --encoder mini-dino
"""

import argparse
from pathlib import Path

from mof.miniature import write_benchmarks

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="new folder to write")
    parser.add_argument("--pairs", type=int, default=15, help="per pattern, for MMVP and MMVP-VLM")
    parser.add_argument("--scenes", type=int, default=100, help="for POPE and CHAIR")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = arguments.folder
    try:
        write_benchmarks(folder, pairs=arguments.pairs, scenes=arguments.scenes, seed=arguments.seed)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    print(f"""written to {folder}; to measure an encoder, and a model that recipes/train_llava_mof_vig.py trained:
  mof probe mmvp-vlm --data {folder}/MMVP_VLM --encoder mini-clip
  mof eval mmvp --data {folder}/MMVP --prompt question --model MODEL --out evals/mmvp
  mof eval pope --data {folder}/POPE --images {folder}/images --model MODEL --out evals/pope
  mof eval chair --instances {folder}/CHAIR/instances.json --captions {folder}/CHAIR/captions.json --synonyms {folder}/CHAIR/synonyms.txt \\
      --images {folder}/images --prompt "Describe the picture." --model MODEL --out evals/chair""")
