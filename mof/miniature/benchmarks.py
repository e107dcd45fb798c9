"""write_benchmarks draws held-out scenes as benchmarks in the layouts of MMVP, MMVP-VLM, POPE and CHAIR, with exact labels."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from encoders.progress import tracked
from mof.evals.benchmark_folders import DescribedPair, save_image, write_mmvp, write_mmvp_vlm
from mof.evals.pope import STRATEGIES
from mof.miniature.language import IS_THERE, description, question, statement, things, word
from mof.miniature.scenes import KINDS, PATTERNS, SIZE, Scene, render, sample_pair, sample_scene

MMVP, MMVP_VLM, POPE, CHAIR, IMAGES = "MMVP", "MMVP_VLM", "POPE", "CHAIR", "images"
SYNONYMS = {
    "fish": (), "key": (), "rocket": ("spaceship",), "mushroom": ("toadstool",), "hammer": ("mallet",), "tree": (), "heart": (),
    "bell": (), "ball": (), "sign": ("signboard",),
}  # fmt: skip
"""Thing that can be in a scene -> other words for it."""


def write_benchmarks(folder: str | Path, *, pairs: int = 15, scenes: int = 100, seed: int = 0, progress: bool = False) -> None:
    """Draw four benchmarks and write each into a folder. The images of POPE and CHAIR are in the folder `images/`.

    - `MMVP_VLM/` and `MMVP/` have the same pairs, which differ in a single pattern;
    - `POPE/` has `miniature_pope_random.json`, `..._popular.json` and `..._adversarial.json`; the answer to half of the questions is "yes";
    - `CHAIR/` has `instances.json` and `captions.json` in COCO's layout (without boxes), and `synonyms.txt`.

    Args:
        pairs: number of pairs for each pattern; the original MMVP-VLM has 15.
        scenes: number of scenes for POPE and CHAIR.
        seed: the same seed draws the same benchmarks.
        progress: show a bar.

    Raises:
        ValueError: for a folder that is not empty, or a number below 1.
    """
    folder = Path(folder)
    if pairs < 1 or scenes < 1:
        raise ValueError(f"expected at least one pair and one scene, got {pairs} and {scenes}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty: choose another folder to write")
    rng = np.random.default_rng(seed)
    chosen = [pattern for pattern in PATTERNS for _ in range(pairs)]
    described = [described_pair(pattern, rng) for pattern in tracked(chosen, "pairs", shown=progress)]
    write_mmvp(folder / MMVP, described)
    write_mmvp_vlm(folder / MMVP_VLM, described)
    drawn = {f"{i:06d}.jpg": sample_scene(rng, held_out=True) for i in range(1, scenes + 1)}
    (folder / IMAGES).mkdir(parents=True)
    for name, scene in tracked(drawn.items(), "scenes", shown=progress):
        save_image(render(scene, rng), folder / IMAGES / name)
    _write_pope(folder / POPE, drawn, rng)
    _write_chair(folder / CHAIR, drawn, rng)


def described_pair(pattern: str, rng: np.random.Generator) -> DescribedPair:
    """Return images of two held-out scenes that differ only in this pattern, with statements, question and answers.

    Both images have the same question, which names two options. All options are equally likely, usual or not.
    """
    first, second = sample_pair(rng, pattern)
    answers = [word(pattern, getattr(scene, PATTERNS[pattern])) for scene in (first, second)]
    asked = question(first, pattern, rng, other=answers[1])
    a, b = sorted(answers)
    right = ("a", "b") if answers[0] == a else ("b", "a")
    images = render(first, rng), render(second, rng)
    return DescribedPair(pattern, images, (statement(first, pattern), statement(second, pattern)), asked, (a, b), right)


def objects(scene: Scene) -> Counter[str]:
    """Return thing -> its number in the scene."""
    return Counter({scene.kind: 1, "ball": scene.count, "sign": int(scene.letter is not None)})


# --- POPE does not ask about balls, because they are in every scene, so the answer would always be yes.
def _write_pope(folder: Path, drawn: dict[str, Scene], rng: np.random.Generator) -> None:
    """Write, for each object in a scene, a question about this object and a question about an absent object.

    The absent object is random ("random"), the most frequent in all scenes ("popular"), or the most frequent together with the objects
    in the scene ("adversarial").
    """
    asked = [*KINDS, "sign"]
    present = {name: things(scene) for name, scene in drawn.items()}
    frequency = Counter(thing for there in present.values() for thing in there)
    together = Counter((thing, other) for there in present.values() for thing in there for other in there)
    folder.mkdir()
    for strategy in STRATEGIES:
        rows: list[dict[str, Any]] = []
        for name, there in present.items():
            absent = [str(thing) for thing in rng.permutation([thing for thing in asked if thing not in there])]
            if strategy == "popular":
                absent.sort(key=lambda thing: -frequency[thing])
            elif strategy == "adversarial":
                absent.sort(key=lambda thing, there=there: -sum(together[thing, other] for other in there))
            for thing, label in [pair for both in zip(there, absent, strict=False) for pair in zip(both, ("yes", "no"), strict=True)]:
                rows.append({"question_id": len(rows) + 1, "image": name, "text": IS_THERE.format(thing), "label": label})
        (folder / f"miniature_pope_{strategy}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_chair(folder: Path, drawn: dict[str, Scene], rng: np.random.Generator) -> None:
    images = [{"id": i, "file_name": name, "width": SIZE, "height": SIZE} for i, name in enumerate(drawn, start=1)]
    categories = [{"id": i, "name": name} for i, name in enumerate(SYNONYMS, start=1)]
    number = {category["name"]: category["id"] for category in categories}
    things = [(i, number[name]) for i, scene in enumerate(drawn.values(), start=1) for name in objects(scene).elements()]
    instances = [{"id": i, "image_id": image, "category_id": category} for i, (image, category) in enumerate(things, start=1)]
    captions = [{"id": i, "image_id": i, "caption": description(scene, rng)} for i, scene in enumerate(drawn.values(), start=1)]
    folder.mkdir()
    (folder / "instances.json").write_text(json.dumps({"images": images, "categories": categories, "annotations": instances}))
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    (folder / "synonyms.txt").write_text("".join(", ".join((name, *others)) + "\n" for name, others in SYNONYMS.items()))
