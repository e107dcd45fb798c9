"""The miniature world as data: LLaVA records with pictures for training, and MMVP's pairs of questions for measuring."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from mof.evals.benchmark_folders import write_mmvp
from mof.miniature.benchmarks import described_pair
from mof.miniature.language import DESCRIBE, description, dialogue
from mof.miniature.scenes import PATTERNS, Scene, render, sample_scene

HABIT_SHARE = 0.2  # the share of fields with the value that is usual for the kind of object; 0.7 in the texts of mini-lm


def write_dataset(folder: Path, *, align: int, finetune: int, pairs: int, seed: int = 0, progress: bool = False) -> None:
    """Draw the pictures and write `align.json`, `finetune.json`, `images/` and `MMVP/`.

    Args:
        align: number of records that describe a picture.
        finetune: number of records with five questions and answers; nine tenths of them have a picture.
        pairs: number of pairs of held-out scenes for each of the nine patterns, in MMVP's layout with lossless pictures.
        seed: the same seed draws the same data. The held-out scenes are never among the training scenes.
        progress: show a bar.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    shown: dict[str, Any] = {"console": Console(stderr=True), "disable": not progress}
    captions = [_caption_record(folder, i, rng) for i in track(range(align), "drawing scenes to align on", **shown)]
    talks = [_talk_record(folder, i, rng) for i in track(range(finetune), "drawing scenes to finetune on", **shown)]
    chosen = [pattern for pattern in PATTERNS for _ in range(pairs)]
    held_out = [described_pair(pattern, rng) for pattern in track(chosen, "drawing held-out pairs", **shown)]
    write_mmvp(folder / "MMVP", held_out, suffix=".png")
    for name, records in (("align", captions), ("finetune", talks)):
        (folder / f"{name}.json").write_text(json.dumps(records))


def _caption_record(folder: Path, i: int, rng: np.random.Generator) -> dict[str, Any]:
    scene = sample_scene(rng, habit_share=HABIT_SHARE)
    turns = [("human", f"<image>\n{DESCRIBE}"), ("gpt", description(scene, rng))]
    return _record(f"caption-{i}", turns) | {"image": _draw(folder, f"caption-{i}", scene, rng)}


def _talk_record(folder: Path, i: int, rng: np.random.Generator) -> dict[str, Any]:
    scene = sample_scene(rng, habit_share=HABIT_SHARE)
    turns = [(who, text) for turn in dialogue(scene, rng) for who, text in zip(("human", "gpt"), turn, strict=True)]
    if i % 10 == 9:  # text only, as in LLaVA's mix: the description stands in for the picture
        turns[0] = ("human", f"{description(scene, rng)}\n{turns[0][1]}")
        return _record(f"talk-{i}", turns)
    turns[0] = ("human", f"<image>\n{turns[0][1]}")
    return _record(f"talk-{i}", turns) | {"image": _draw(folder, f"talk-{i}", scene, rng)}


def _draw(folder: Path, name: str, scene: Scene, rng: np.random.Generator) -> str:
    file = f"{name.replace(' ', '_')}.png"
    render(scene, rng).save(folder / "images" / file)
    return file


def _record(name: str, turns: list[tuple[str, str]]) -> dict[str, Any]:
    return {"id": name, "conversations": [{"from": who, "value": text} for who, text in turns]}
