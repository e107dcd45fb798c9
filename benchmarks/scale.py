"""Print the tables of docs/scale.md: unit costs that are measured here on a core, and the stages for 1e6, 1e8 and 1e9 images.

    python benchmarks/scale.py                                  # about three minutes of a core
    python benchmarks/scale.py --gpu-hour 2.0 --core-hour 0.02  # your prices

Times are processor seconds of one core, which other work on the machine hardly disturbs. No line of a GPU is measured: its time is the
operations of the networks, counted by torch, divided by --utilisation of the peak of an H200. The prices are assumptions, too.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

import numpy as np
import torch
from blind_pairs import ABOVE, BELOW, embeddings
from memory import peak, resident
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from encoders import Encoder, build_encoder, encode_images
from encoders.images.reading import read_image
from encoders.images.sources import content_key
from mof.pairs.choice import PAIR
from mof.pairs.comparison import PairComparison
from mof.pairs.embedding_rows import EmbeddingRows

PHOTOS = Path(__file__).parents[2] / "shared" / "data" / "photos"
PRESETS = {"clip-vit-l14-336": {}, "dinov2-vit-l14": {"image_size": 336}}
SIZES = (10**6, 10**8, 10**9)
BF16, INT8, BANDWIDTH = 989e12, 1979e12, 4.8e12
"""Published peaks of an H200: dense products per second, bytes per second."""
HOUR = 3600
RECORD, LLM = 1152 + 200, 6_738_415_616 - 32000 * 4096
"""Tokens of a record on two encoders, and the weights of a 7B model that each token is multiplied with."""


class Mean(Encoder):
    """An encoder that costs nothing: one patch, the mean colour."""

    def __init__(self) -> None:
        tower = nn.Conv2d(3, 8, 16, 16)
        super().__init__(tower, width=8, depth=1, patch_size=16, image_size=16, embed_dim=8, mean=(0.5,) * 3, std=(0.5,) * 3)

    def patch_tokens(self, x: Tensor) -> Tensor:
        return self.tower(x).flatten(2).transpose(1, 2)

    def image_embedding(self, x: Tensor) -> Tensor:
        return self.patch_tokens(x).mean(1)


def photos() -> list[bytes]:
    """Return photos as JPEG files of 640 x 480."""
    files = []
    for path in sorted(PHOTOS.rglob("*.jpg")):
        with Image.open(path) as image:
            buffer = io.BytesIO()
            image.convert("RGB").resize((640, 480)).save(buffer, "JPEG", quality=90)
        files.append(buffer.getvalue())
    return files


def seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """Return the least processor seconds of a call."""
    least = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        work()
        least = min(least, time.process_time() - start)
    return least


def image_costs() -> dict[str, float]:
    files = photos()
    encoders = [build_encoder(name, pretrained=False, **options) for name, options in PRESETS.items()]
    images = [read_image(file, "x") for file in files]
    count = len(files)
    flops = {}
    torch.backends.mha.set_fastpath_enabled(False)  # the counter does not see into it
    for name, encoder in zip(PRESETS, encoders, strict=True):
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            encoder.embed_image(torch.zeros(1, 3, 336, 336, dtype=torch.uint8))
        flops[name] = float(counter.get_total_flops())
    return {
        "bytes of a JPEG of 640 x 480": float(np.mean([len(file) for file in files])),
        "decode, s": seconds(lambda: [read_image(file, "x") for file in files]) / count,
        "resize for two encoders, s": seconds(lambda: [encoder.pixels(image) for image in images for encoder in encoders]) / count,
        "hash, s": seconds(lambda: [content_key(file) for file in files]) / count,
        **{f"operations of {name}": value for name, value in flops.items()},
        **row_bytes(encoders),
    }


def row_bytes(encoders: list[Encoder]) -> dict[str, float]:
    """Return the bytes of an image in a store of both encoders, by what is stored."""
    keys = 16 * len(encoders)
    embedded = sum(4 * encoder.embed_dim for encoder in encoders) + keys
    tokens = {"float16": 2.0, "bfloat16": 2.0, "int8": 1.0}
    sizes = {"embeddings": float(embedded)}
    for kind, width in tokens.items():
        scale = 4 if kind == "int8" else 0
        sizes[f"embeddings and {kind} tokens"] = embedded + sum(
            encoder.grid[0] * encoder.grid[1] * (width * encoder.width + scale) for encoder in encoders
        )
    return {f"bytes of {kind}": size for kind, size in sizes.items()}


def driver_costs(count: int) -> dict[str, float]:
    """Encode so many tiny images with an encoder that costs nothing, twice: the second run only reads, hashes and keeps the names."""
    with tempfile.TemporaryDirectory() as name:
        tar = Path(name, "x.tar")
        with tarfile.open(tar, "w") as archive:
            for number in range(count):
                content = b"P6 16 16 255\n" + number.to_bytes(4, "big") + bytes(764)
                member = tarfile.TarInfo(f"{number:09d}.ppm")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        encoder = Mean()

        def encode() -> None:
            encode_images(tar, {"a": encoder}, Path(name, "store"), batch_size=256, progress=False)

        encode()
        before = resident()
        spent = seconds(encode, 1)
        size = sum(file.stat().st_size for file in Path(name, "store").rglob("*.parquet"))
        return {"seconds": spent, "gigabytes": peak() - before, "index": size}


def pair_costs(count: int) -> dict[str, float]:
    clip, dino = embeddings(count, "realistic")
    comparison = PairComparison([EmbeddingRows(clip, "clip", "cpu")], [EmbeddingRows(dino, "dino", "cpu")], ABOVE, BELOW)
    columns = comparison.sieve.left.shape[1]
    survivors = compared = blind = 0

    def survive() -> None:
        nonlocal survivors, compared, blind
        for first in range(0, count, 1024):
            rows = slice(first, min(first + 1024, count))
            for start in range(first, count, 1024):
                i, j = comparison.sieve.close(rows, slice(start, min(start + 1024, count)))
                survivors, blind = survivors + len(i), blind + len(comparison._blind(i, j))
        compared = count * (count - 1) // 2

    spent = seconds(survive, 1)
    return {
        "columns of the sieve": columns,
        "comparison of a pair, s": spent / compared,
        "survivors of a million of these pairs": 1e6 * survivors / compared,
        "blind pairs of a million of these pairs": 1e6 * blind / compared,
    }


def measured() -> dict[str, float]:
    """Return all units. Each measurement has a process of its own."""
    units: dict[str, float] = {}
    for part in ("images", "pairs"):
        units |= part_of(part)
    few, many = part_of("driver 4000"), part_of("driver 24000")
    each = {name: (many[name] - few[name]) / 20_000 for name in many}
    return units | {
        "read from a tar and keep the name, s": each["seconds"],
        "memory of the driver for a name, bytes": 2**30 * each["gigabytes"],
        "index on disk, bytes": each["index"],
    }


def part_of(part: str) -> dict[str, float]:
    out = subprocess.run([sys.executable, __file__, "--part", part], check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(out.splitlines()[-1])


def stages(units: dict[str, float], args: argparse.Namespace) -> list[list[str]]:
    """Return a row for each stage: its rate, and the hours and the price for each number of images."""
    flops = sum(value for name, value in units.items() if name.startswith("operations of"))
    sieve = max(8 / (BANDWIDTH * args.utilisation), 2 * units["columns of the sieve"] / (INT8 * args.utilisation))
    record = 2 * (2 * LLM * RECORD + flops)  # two passes
    reading = units["read from a tar and keep the name, s"] + units["hash, s"]
    decoding = units["decode, s"] + units["resize for two encoders, s"]
    per_image = {
        "read, hash, keep names (driver)": (reading, "core"),
        "decode and resize": (decoding, "core"),
        "encode: CLIP-L/14-336, DINOv2-L/14": (flops / (BF16 * args.utilisation), "GPU"),
        "VIG of a record per image, 7B": (record / (BF16 * args.utilisation), "GPU"),
    }
    prices = {"core": args.core_hour, "GPU": args.gpu_hour}

    def taken(seconds: float, unit: str) -> str:
        hours = seconds / HOUR
        return f"{short(hours)} {unit} h, ${short(hours * prices[unit])}"

    rows = [
        [name, f"{1 / each:,.0f} images/s a {unit}", *(taken(each * n, unit) for n in SIZES)] for name, (each, unit) in per_image.items()
    ]
    rows.append(["blind pairs, sieve", f"{1 / sieve:.2g} pairs/s a GPU", *(taken(pairs(n) * sieve, "GPU") for n in SIZES)])
    rows.append(
        [
            "blind pairs, if a millionth is found",
            f"{PAIR.itemsize} bytes a pair",
            *(f"{short(1e-6 * PAIR.itemsize * pairs(n) / 1e9)} GB" for n in SIZES),
        ]
    )
    rows.append(["memory of the driver", "", *(f"{short(units['memory of the driver for a name, bytes'] * n / 1e9)} GB" for n in SIZES)])
    for kind in ("embeddings", "embeddings and int8 tokens", "embeddings and float16 tokens"):
        size = units[f"bytes of {kind}"]
        sizes = (f"{short(size * n / 1e12)} TB, ${short(size * n / 1e12 * args.tb_month)} a month" for n in SIZES)
        rows.append([f"store: {kind}", f"{size / 1e3:,.1f} kB an image", *sizes])
    return rows


def short(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def pairs(images: int) -> float:
    return images * (images - 1) / 2


def table(headings: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [headings, ["---"] * len(headings), *rows])


def _shown(name: str, value: float) -> list[str]:
    if not name.endswith(", s"):
        return [name, f"{value:,.0f}" if value < 1e8 else f"{value:.3g}"]
    return [name.removesuffix(", s"), f"{1e3 * value:.3g} ms" if value > 1e-6 else f"{1e9 * value:.2g} ns"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--utilisation", type=float, default=0.35, help="share of the GPU's peaks that is assumed")
    parser.add_argument("--gpu-hour", type=float, default=3.0, help="price of an hour of a GPU")
    parser.add_argument("--core-hour", type=float, default=0.04, help="price of an hour of a core")
    parser.add_argument("--tb-month", type=float, default=23.0, help="price of a TB on disk for a month")
    parser.add_argument("--units", type=Path, help="JSON of units of an earlier run, in place of measuring")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.part:
        name, _, count = args.part.partition(" ")
        print(json.dumps({"images": image_costs, "pairs": lambda: pair_costs(20_000), "driver": lambda: driver_costs(int(count))}[name]()))
        return
    units = json.loads(args.units.read_text()) if args.units else measured()
    print(json.dumps(units, indent=1), "\n", flush=True)
    print(table(["unit", "value"], [_shown(name, value) for name, value in units.items()]))
    print()
    print(table(["stage", "rate", *(f"{images:.0e} images" for images in SIZES)], stages(units, args)))


if __name__ == "__main__":
    main()
