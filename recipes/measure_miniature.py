"""Measure what the miniature's frozen networks can and cannot tell apart, and write their cards.

    python recipes/measure_miniature.py

Held-out pairs of scenes that differ in one thing only, 100 for each of the nine patterns:
- cosine of the two image embeddings, beside that of two drawings of one scene;
- a linear probe (ridge regression, penalty fixed beforehand) on all patch tokens at the layer that language models read,
  trained on 6,000 training scenes: how often it picks the right one of a pair's two options, for both pictures (chance 25 %).
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

import encoders
import mof.miniature
from encoders import Encoder, build_encoder
from mof.language_models import load_language_model
from mof.miniature.language import answer, options, patterns_of, question, word
from mof.miniature.scenes import PATTERNS, VALUES, Scene, habit, render, sample_pair, sample_scene

WEIGHTS = {
    "mini-clip": Path(encoders.__file__).parent / "weights/mini-clip",
    "mini-dino": Path(encoders.__file__).parent / "weights/mini-dino",
    "mini-lm": Path(mof.miniature.__file__).parent / "weights/mini-lm",
}
ABOUT = {
    "mini-clip": "open_clip's CLIP class around a 4-block, 192-wide vision transformer (timm), 40 px, 5 x 5 patches. Trained "
    "contrastively on drawn scenes with captions that name the object always, its colour half of the time and nothing else.",
    "mini-dino": "The same vision transformer without a text tower. Trained by self-distillation on drawn scenes alone (DINOv2's "
    "image and masked-patch losses, Sinkhorn-Knopp targets, crops and light changed, never mirrored or turned).",
    "mini-lm": "A 4-layer, 192-wide Llama with a byte-level BPE of at most 512 entries. Trained on text about scenes: "
    "descriptions, questions with answers, and questions about a description. Its world has habits: in seven of ten texts a "
    "thing is as it usually is for its kind of object. It has never seen a picture.",
}
PENALTY = 30.0
console = Console()


def pixels_of(scenes: list[Scene], rng: np.random.Generator) -> Tensor:
    pictures = np.stack([np.asarray(render(scene, rng)) for scene in scenes])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()  # [N, 3, 40, 40]


def patch_features(encoder: Encoder, pixels: Tensor) -> Tensor:
    """All patch tokens of a picture as one vector, [N, 25 * 192 + 1] with a constant."""
    tokens = torch.cat([encoder(chunk).tokens.flatten(1) for chunk in pixels.split(256)])
    return F.pad(tokens, (0, 1), value=1.0)


def measure_encoder(name: str, pairs: int, probe_scenes: int) -> dict[str, dict[str, float]]:
    encoder = build_encoder(name)
    rng = np.random.default_rng(7)
    scenes = [sample_scene(rng) for _ in range(probe_scenes)]
    raw = patch_features(encoder, pixels_of(scenes, rng))
    mean, scale = raw.mean(0), raw.std(0).clamp(min=1e-4)
    mean[-1], scale[-1] = 0, 1
    features = (raw - mean) / scale  # [N, D]
    factor = torch.linalg.cholesky(features.T @ features + PENALTY * torch.eye(features.shape[1]))  # [D, D], for all patterns
    table = {}
    for pattern, field in PATTERNS.items():
        values = [value for value in VALUES[field] if value is not None]
        targets = torch.tensor([[float(getattr(scene, field) == value) for value in values] for scene in scenes])  # [N, K]
        weights = torch.cholesky_solve(features.T @ targets, factor)  # [D, K]
        both = [sample_pair(rng, pattern) for _ in range(pairs)]
        first, second = (pixels_of([pair[k] for pair in both], rng) for k in (0, 1))
        again = pixels_of([pair[0] for pair in both], rng)
        a, b, same = (encoder.embed_image(x) for x in (first, second, again))
        index = torch.tensor([[values.index(getattr(scene, field)) for scene in pair] for pair in both])  # [P, 2]
        scores = [((patch_features(encoder, x) - mean) / scale) @ weights for x in (first, second)]  # 2 of [P, K]
        right = [scores[k].gather(1, index[:, k : k + 1]) > scores[k].gather(1, index[:, 1 - k : 2 - k]) for k in (0, 1)]  # [P, 1]
        cosine, redrawn = (a * b).sum(1), (a * same).sum(1)
        table[pattern] = {
            "cosine of the pair": cosine.mean().item(),
            "cosine of one scene drawn twice": redrawn.mean().item(),
            "pairs above 0.95": (cosine > 0.95).float().mean().item(),
            "probe, pairs right": (right[0] & right[1]).float().mean().item(),
            "probe, pictures right": torch.cat(right).float().mean().item(),
        }
    return table


def measure_language_model(pairs: int) -> dict[str, dict[str, float]]:
    """How the model answers without a picture: how sure it is of the usual answer, and what knowing that costs it on pairs."""
    model, tokenizer = load_language_model("mini-lm")
    rng = np.random.default_rng(8)
    table: dict[str, list[tuple[float, float]]] = {pattern: [] for pattern in PATTERNS}
    for pattern in PATTERNS:
        for _ in range(pairs):
            scene = sample_scene(rng)
            while pattern not in patterns_of(scene):
                scene = sample_scene(rng)
            talk = [{"role": "user", "content": question(scene, pattern, rng)}]
            told = {}
            for option in options(pattern):
                value = next(v for v in VALUES[PATTERNS[pattern]] if v is not None and word(pattern, v) == option)
                said = answer(Scene(**(asdict(scene) | {PATTERNS[pattern]: value})), pattern)
                ids = tokenizer.apply_chat_template([*talk, {"role": "assistant", "content": said}], return_tensors="pt", return_dict=True)
                prompt = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=True)["input_ids"]
                labels = ids["input_ids"].clone()
                labels[:, : len(prompt)] = -100
                with torch.inference_mode():
                    count = (labels != -100).sum()
                    told[option] = -(model(**ids, labels=labels).loss * count).item()
            shares = torch.tensor(list(told.values())).softmax(0)
            usual = list(told).index(word(pattern, habit(scene.kind, PATTERNS[pattern])))
            table[pattern].append((shares[usual].item(), 1 / len(told)))
    return {
        pattern: {"share of the usual answer": float(np.mean([a for a, _ in rows])), "by chance": rows[0][1]}
        for pattern, rows in table.items()
    }


def write_card(name: str, measured: dict[str, dict[str, float]]) -> None:
    training = json.loads((WEIGHTS[name] / "training.json").read_text())
    columns = list(next(iter(measured.values())))
    shown = Table("pattern", *columns, title=name)
    lines = ["| pattern | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for pattern, values in measured.items():
        cells = [f"{value:.2f}" for value in values.values()]
        shown.add_row(pattern, *cells)
        lines.append(f"| {pattern} | " + " | ".join(cells) + " |")
    console.print(shown)
    card = f"""# {name}

{ABOUT[name]}

Trained with `recipes/train_miniature.py`: {training["samples"]:,} samples in {training["minutes"]} minutes on one CPU core, final {training["losses"]}.
Apache-2.0, made by this project from nothing. Good for showing and testing, for nothing else.

Measured with `recipes/measure_miniature.py` on scenes that no training shows:

{chr(10).join(lines)}
"""
    (WEIGHTS[name] / "README.md").write_text(card)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=100, help="held-out pairs per pattern")
    parser.add_argument("--probe_scenes", type=int, default=6000, help="training scenes for the linear probes")
    parser.add_argument("--only", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    arguments = parser.parse_args()
    for network in arguments.only:
        if network == "mini-lm":
            write_card(network, measure_language_model(arguments.pairs))
        else:
            write_card(network, measure_encoder(network, arguments.pairs, arguments.probe_scenes))
