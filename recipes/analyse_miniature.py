"""Repeat the paper's analyses of VIG on held-out scenes of the miniature: image match, attention to the image, misleading text.

    python recipes/train_llava_mof_vig.py
    python recipes/analyse_miniature.py runs/miniature/seed-0/finetune-interleaved runs/miniature/seed-0/finetune-interleaved+vig

The scenes are drawn for the analyses, so all facts about them are known:
- a partly matching image shows the same object with four of its other facts changed; a conflicting image shows another object
  with all facts changed;
- a false statement names a fact of the pair's other scene, in the words of a training answer.
You can give any saved models of the miniature. The tables show all of them.
"""

import dataclasses
from typing import Any

import numpy as np

from mof.miniature.language import DESCRIBE, description
from mof.miniature.misleading import misleading_questions
from mof.miniature.scenes import KINDS, PATTERNS, VALUES, Scene, render, sample_scene
from study.command import analyse, analysis_options, run_recipe

CHANGED = 4  # number of changed facts, of nine, in a partly matching image


def with_changes(scene: Scene, count: int, rng: np.random.Generator) -> Scene:
    """Return the scene with `count` changed facts. A fact that is not visible stays invisible."""
    fields = [field for field in PATTERNS.values() if getattr(scene, field) is not None]
    chosen = [str(field) for field in rng.permutation(fields)[:count]]
    others = {field: [value for value in VALUES[field] if value not in (None, getattr(scene, field))] for field in chosen}
    return dataclasses.replace(scene, **{field: values[rng.integers(len(values))] for field, values in others.items()})


def draw_groups(count: int, rng: np.random.Generator) -> dict[str, list[dict[str, Any]]]:
    """Return kind of image -> records. The records of all kinds have the same descriptions of held-out scenes, but other images."""
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
    options = analysis_options(__doc__)
    options.add_argument("--scenes", type=int, default=200, help="held-out scenes to describe")
    options.add_argument("--pairs", type=int, default=40, help="pairs of questions for each of the nine patterns")
    args = options.parse_args()
    rng = np.random.default_rng([args.seed, 1])  # the pairs of the default run are other scenes
    groups, questions = draw_groups(args.scenes, rng), misleading_questions(args.pairs, rng)
    analyse(args, groups, questions)


if __name__ == "__main__":
    run_recipe(main)
