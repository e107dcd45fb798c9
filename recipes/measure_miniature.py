"""Measure which differences the miniature's frozen networks see, and write their cards.

    python recipes/measure_miniature.py

Encoders are measured on held-out pairs of scenes that differ in a single fact, 100 pairs for each of the nine patterns. The measures are
- the cosine of the two image embeddings, beside the cosine of two drawings of the same scene;
- the accuracy of a linear probe (ridge regression, penalty fixed beforehand) on all patch tokens at the layer that language models
  read, trained on 6,000 training scenes. It must choose the right one of the pair's two options for both images (chance 25 %).
The language model answers the same questions from habit alone, and from facts in soft tokens.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import encoders
import mof.miniature
from encoders import Encoder, build_encoder
from encoders.console import Console
from mof.language_models import load_language_model
from mof.miniature.language import answer, question, word
from mof.miniature.scenes import PATTERNS, VALUES, Scene, habit, render, sample_pair, sample_scene
from mof.miniature.training.lm import soft_tokens, told_embeddings
from study.command import Options, run_recipe

WEIGHTS = {
    "mini-clip": Path(encoders.__file__).parent / "weights/mini-clip",
    "mini-dino": Path(encoders.__file__).parent / "weights/mini-dino",
    "mini-lm": Path(mof.miniature.__file__).parent / "weights/mini-lm",
}
PENALTY = 30.0


def pixels_of(scenes: list[Scene], rng: np.random.Generator) -> Tensor:
    pictures = np.stack([np.asarray(render(scene, rng)) for scene in scenes])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()  # [N, 3, 40, 40]


def patch_features(encoder: Encoder, pixels: Tensor) -> Tensor:
    """Return [N, 25 * 192 + 1]: all patch tokens of each image in a row, and a constant 1."""
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


def option_shares(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, scene: Scene, pattern: str, asked: str, told: Tensor | None = None
) -> dict[str, float]:
    """Return option -> probability of its answer after the question. The probabilities of the pattern's options have the sum 1.

    Args:
        told: soft tokens [K, V] before the question; None for no soft tokens.
    """
    talk = [{"role": "user", "content": asked if told is None else f"{'<image>' * len(told)}\n{asked}"}]
    prompt = len(tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=True)["input_ids"])
    logs = {}
    for value in (value for value in VALUES[PATTERNS[pattern]] if value is not None):
        turn = {"role": "assistant", "content": answer(replace(scene, **{PATTERNS[pattern]: value}), pattern)}
        ids = tokenizer.apply_chat_template([*talk, turn], return_tensors="pt", return_dict=True)
        labels = ids["input_ids"].clone()
        labels[:, :prompt] = -100
        with torch.inference_mode():
            embeddings = told_embeddings(model, ids.pop("input_ids"), [] if told is None else [told], tokenizer)
            logs[word(pattern, value)] = -model(inputs_embeds=embeddings, labels=labels, **ids).loss * (labels != -100).sum()
    shares = torch.stack(list(logs.values())).softmax(0).tolist()
    return dict(zip(logs, shares, strict=True))


def measure_language_model(pairs: int) -> dict[str, dict[str, float]]:
    """Return pattern -> probability of the usual answer without a context, and accuracy after soft tokens."""
    model, tokenizer = load_language_model("mini-lm")
    rng = np.random.default_rng(8)
    table = {}
    for pattern, field in PATTERNS.items():
        usual, read = [], []
        for _ in range(pairs):
            both = sample_pair(rng, pattern)
            right = [word(pattern, getattr(scene, field)) for scene in both]
            asked = question(both[0], pattern, rng, other=right[1])
            shares = option_shares(model, tokenizer, both[0], pattern, asked)
            usual.append(shares[word(pattern, habit(both[0].kind, field))])
            a, b = (option_shares(model, tokenizer, scene, pattern, asked, soft_tokens(scene, rng, tokenizer)) for scene in both)
            read.append(a[right[0]] > a[right[1]] and b[right[1]] > b[right[0]])
        table[pattern] = {
            "told nothing: share of the usual answer": float(np.mean(usual)),
            "by chance": 1 / len(shares),
            "told in soft tokens: pairs right": float(np.mean(read)),
        }
    return table


def write_card(name: str, measured: dict[str, dict[str, float]], file: Path) -> None:
    """Print the measures, and write a card with them. Its description of the network is copied from the card beside the weights."""
    training = json.loads((WEIGHTS[name] / "training.json").read_text())
    columns = ["pattern", *next(iter(measured.values()))]
    rows = [[pattern, *(f"{value:.2f}" for value in values.values())] for pattern, values in measured.items()]
    shown = Table(*columns, title=name)
    for cells in rows:
        shown.add_row(*cells)
    Console().print(shown)
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in [columns, ["---"] * len(columns), *rows])
    about, _, _ = (WEIGHTS[name] / "README.md").read_text().partition("Trained with `")  # this part is written by hand
    card = f"""{about}Trained with `recipes/train_miniature.py`: {training["samples"]:,} samples in {training["minutes"]} minutes on one CPU core, final {training["losses"]}.
Apache-2.0, made by this project from nothing. Good for showing and testing, for nothing else.

Measured with `recipes/measure_miniature.py` on scenes that no training shows:

{table}
"""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(card)


def main() -> None:
    options = Options(__doc__)
    options.add_argument("--pairs", type=int, default=100, help="held-out pairs per pattern")
    options.add_argument("--probe-scenes", type=int, default=6000, help="training scenes for the linear probes")
    options.add_argument("--only", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    options.output("write NETWORK/README.md into this folder; default: beside the weights")
    args = options.parse_args()
    for network in args.only:
        is_encoder = network != "mini-lm"
        measured = measure_encoder(network, args.pairs, args.probe_scenes) if is_encoder else measure_language_model(args.pairs)
        write_card(network, measured, (args.output / network if args.output else WEIGHTS[network]) / "README.md")


if __name__ == "__main__":
    run_recipe(main)
