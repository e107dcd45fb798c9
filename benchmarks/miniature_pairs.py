"""Measure in which patterns the blind pairs of the miniature differ, which mini-clip confuses.

    python benchmarks/miniature_pairs.py --count 3000 --output runs/miniature_pairs
    python benchmarks/miniature_pairs.py --count 100000 --output runs/miniature_pairs    # goes on from the 3,000

Held-out scenes are drawn in blocks of 1,000, each with its own random seed, and embedded by mini-clip and mini-dino. A block is a file,
and is not done again. Then all pairs are compared. For each pattern, a table shows the share of pairs in which its field differs: among
the blind pairs of the largest gap (at most --max-pairs), the same number of random blind pairs, and the same number of random pairs. A
scene that is drawn twice differs only in background, place, light and noise. 100,000 scenes take about a quarter of an hour on two cores.
"""

import argparse
import json
import time
from dataclasses import astuple
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table

from encoders import Encoder, build_encoder
from encoders.whole_files import write_whole
from mof import blind_pairs
from mof.miniature.scenes import PATTERNS, VALUES, Scene, render, sample_scene
from mof.pairs.gallery import SHOWN, Gallery
from mof.pairs.pair_table import BlindPairs
from mof.pairs.similarity_sample import sample_similarities

# Shapes: N scenes, F = 10 fields of a scene, E width of an embedding, M pairs.

BLOCK = 1000
FIELDS = list(Scene.__dataclass_fields__)
NAMES = {"kind": "(kind)"} | {field: pattern for pattern, field in PATTERNS.items()}
ROUNDS = 80  # largest number of rounds, each with 250,000 random pairs
QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)


def draw(number: int) -> tuple[list[Scene], list[Image.Image]]:
    """Return the scenes of a block and their images, which are the same in every run."""
    rng = np.random.default_rng([0, number])
    scenes = [sample_scene(rng, held_out=True) for _ in range(BLOCK)]
    return scenes, [render(scene, rng) for scene in scenes]


def block(number: int, encoders: dict[str, Encoder], folder: Path) -> dict[str, NDArray]:
    """Return "fields" [BLOCK, F] of a block, as indices into `VALUES`, and the embeddings [BLOCK, E] of each encoder by its name.

    They are read from the block's file. If the file is missing, it is written first.
    """
    file = folder / f"block-{number:05d}.npz"
    if not file.is_file():
        scenes, images = draw(number)
        pictures = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)  # [BLOCK, 3, H, W]
        fields = [[VALUES[name].index(value) for name, value in zip(FIELDS, astuple(scene), strict=True)] for scene in scenes]
        arrays = {"fields": np.array(fields, dtype=np.int8)}
        for name, encoder in encoders.items():
            arrays[name] = torch.cat([encoder.embed_image(part) for part in pictures.split(250)]).float().cpu().numpy()
        write_whole(file, lambda temporary: np.savez(temporary, **arrays))
    with np.load(file) as arrays:
        return dict(arrays)


def write_gallery(folder: Path, pairs: BlindPairs, clip: NDArray, dino: NDArray, above: float, below: float) -> None:
    """Write gallery.html with the pairs of the largest gap, whose scenes are drawn again."""
    folder.mkdir(exist_ok=True)
    names = [str((folder / f"scene-{i:06d}.png").resolve()) for i in range(len(clip))]
    shown = np.unique(np.concatenate([pairs.i[:SHOWN], pairs.j[:SHOWN]]))
    for number in track(np.unique(shown // BLOCK).tolist(), "drawing pairs"):
        _, images = draw(number)
        for i in shown[shown // BLOCK == number].tolist():
            images[i % BLOCK].save(names[i])
    sample = sample_similarities([clip], [dino])
    Gallery(pairs, names, "mini-clip", "mini-dino", above, below, sample, None, 0, {}).write(folder.parent / "gallery.html", folder)


def differing(fields: NDArray[np.int8], i: NDArray[np.int64], j: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return [M, F]: whether the scenes of each pair differ in each field."""
    return fields[i] != fields[j]


def random_pairs(images: int, count: int, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return `count` random pairs of two different scenes."""
    i = rng.integers(images, size=count)
    return i, (i + rng.integers(1, images, size=count)) % images


def sample_blind(clip: NDArray, dino: NDArray, above: float, below: float, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return at most `count` random blind pairs, which are the blind pairs among random pairs."""
    rng, chosen, blind_count = np.random.default_rng(2), [], 0
    for _ in track(range(ROUNDS), "sampling blind pairs"):
        i, j = random_pairs(len(clip), BLOCK * BLOCK // 4, rng)
        blind = np.flatnonzero((np.einsum("md,md->m", clip[i], clip[j]) > above) & (np.einsum("md,md->m", dino[i], dino[j]) < below))
        chosen.append(np.stack([i[blind], j[blind]]))
        blind_count += len(blind)
        if blind_count >= count:
            break
    return tuple(np.concatenate(chosen, axis=1)[:, :count])


def compare(differ: dict[str, NDArray[np.bool_]]) -> dict[str, dict[str, float]]:
    """Return field -> kind of pairs -> share of the pairs [M, F] in which the field differs."""
    shares = {NAMES[field]: {name: float(pairs[:, k].mean()) for name, pairs in differ.items()} for k, field in enumerate(FIELDS)}
    return shares | {
        "fields that differ, of 10": {name: float(pairs.sum(1).mean()) for name, pairs in differ.items()},
        "the same scene": {name: float((~pairs.any(1)).mean()) for name, pairs in differ.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=3000, help=f"scenes, in blocks of {BLOCK}")
    parser.add_argument("--output", "-o", type=Path, default=Path("runs/miniature_pairs"), help="folder of the blocks and the results")
    parser.add_argument("--clip-above", type=float, default=0.95)
    parser.add_argument("--dino-below", type=float, default=0.6)
    parser.add_argument("--max-pairs", type=int, default=100_000, help="number of pairs of the largest gap to keep")
    args = parser.parse_args()
    if args.count < BLOCK or args.count % BLOCK:
        raise SystemExit(f"error: --count should be a multiple of {BLOCK}, got {args.count}")
    args.output.mkdir(parents=True, exist_ok=True)
    console, device = Console(), "cuda" if torch.cuda.is_available() else "cpu"
    encoders = {name: build_encoder(f"mini-{name}").to(device) for name in ("clip", "dino")}
    start = time.monotonic()
    numbers = track(range(args.count // BLOCK), "drawing and embedding")
    blocks = [block(number, encoders, args.output) for number in numbers]
    fields, clip, dino = (
        np.concatenate([arrays[name] for arrays in blocks]) for name in ("fields", "clip", "dino")
    )  # [N, F], [N, E] twice
    embedded = time.monotonic()
    pairs = blind_pairs(clip, dino, args.clip_above, args.dino_below, max_pairs=args.max_pairs, device=device, progress=True)
    searched = time.monotonic()
    i, j = random_pairs(len(fields), args.max_pairs, np.random.default_rng(1))
    for name, x in (("clip", clip), ("dino", dino)):
        cosines = np.einsum("md,md->m", x[i], x[j])
        console.print(f"{name}: cosine of random pairs, quantiles {QUANTILES}: {np.quantile(cosines, QUANTILES).round(3).tolist()}")
    console.print(pairs.summary())
    console.print(f"drawn and embedded in {embedded - start:.0f} s, searched in {searched - embedded:.0f} s")
    result = {"scenes": len(fields), "blind": pairs.total, "kept": len(pairs), "clip_above": args.clip_above, "dino_below": args.dino_below}
    if len(pairs):
        any_blind = sample_blind(clip, dino, args.clip_above, args.dino_below, len(pairs))
        kinds = {"largest gap": (pairs.i, pairs.j), "any blind": any_blind, "random": (i[: len(pairs)], j[: len(pairs)])}
        result["differ"] = compare({name: differing(fields, *indices) for name, indices in kinds.items()})
        table = Table("share that differs in", *(f"{name} ({len(first):,})" for name, (first, _) in kinds.items()), box=SIMPLE)
        for name, shares in result["differ"].items():
            table.add_row(name, *(f"{share:.4f}" for share in shares.values()))
        console.print(table)
        pairs.to_parquet(args.output / "pairs.parquet")
        write_gallery(args.output / "images", pairs, clip, dino, args.clip_above, args.dino_below)
        console.print(f"to look at: {args.output / 'gallery.html'}")
    (args.output / "result.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
