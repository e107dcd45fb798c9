"""The paper's analyses of VIG on held-out scenes of the miniature: what fits the image, who looks at it, who believes the text.

    python recipes/train_llava_mof_vig.py
    python recipes/analyse_miniature.py runs/miniature/seed-0/finetune-interleaved runs/miniature/seed-0/finetune-interleaved+vig

The scenes are drawn for the purpose, so that it is known what is true of them:
- a partly matching image shows the same object with four of its other facts changed, a conflicting one another object with all of
  them changed;
- a false statement names what is true of the pair's other scene, in the words of a training answer.
Any saved models of the miniature can be given; the tables show all of them.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from rich.console import Console

from mof.miniature.language import DESCRIBE, description
from mof.miniature.misleading import misleading_questions
from mof.miniature.scenes import KINDS, PATTERNS, VALUES, Scene, render, sample_scene
from vig.analyses.comparison import compare_models

CHANGED = 4  # of the nine facts, in a partly matching image
console = Console()


def with_changes(scene: Scene, count: int, rng: np.random.Generator) -> Scene:
    """The scene with `count` of its facts changed; what cannot be seen in it stays so."""
    fields = [field for field in PATTERNS.values() if getattr(scene, field) is not None]
    chosen = [str(field) for field in rng.permutation(fields)[:count]]
    others = {field: [value for value in VALUES[field] if value not in (None, getattr(scene, field))] for field in chosen}
    return dataclasses.replace(scene, **{field: values[rng.integers(len(values))] for field, values in others.items()})


def draw_groups(count: int, rng: np.random.Generator) -> dict[str, list[dict[str, Any]]]:
    """Descriptions of held-out scenes, with three images each."""
    groups: dict[str, list[dict[str, Any]]] = {"matching": [], "partly matching": [], "conflicting": []}
    for i in range(count):
        scene = sample_scene(rng, held_out=True)
        another = [kind for kind in KINDS if kind != scene.kind]
        wrong = dataclasses.replace(with_changes(scene, len(PATTERNS), rng), kind=another[rng.integers(len(another))])
        turns = [{"from": "human", "value": f"<image>\n{DESCRIBE}"}, {"from": "gpt", "value": description(scene, rng)}]
        for name, shown in zip(groups, (scene, with_changes(scene, CHANGED, rng), wrong), strict=True):
            groups[name].append({"id": f"scene-{i}", "image": render(shown, rng), "conversations": turns})
    return groups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help="folders of saved models")
    parser.add_argument("--scenes", type=int, default=200, help="held-out scenes to describe")
    parser.add_argument("--pairs", type=int, default=40, help="pairs of questions for each of the nine patterns")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    rng = np.random.default_rng([args.seed, 1])  # other scenes than those of the default run's own pairs
    groups, questions = draw_groups(args.scenes, rng), misleading_questions(args.pairs, rng)
    found = compare_models(args.models, groups, questions)
    console.print(*found.tables())
    if args.output:
        args.output.write_text(json.dumps(found.figures(), indent=1) + "\n")


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
