"""Compare the images per second through two encoders: `encode_images` against an ordinary loop with transformers' models and processors.

    python benchmarks/encode.py --images ../shared/data/coco
    python benchmarks/encode.py --images ../shared/data/coco --both       # embeddings besides patch tokens

The encoders have random weights in the shapes of CLIP ViT-B/16 (patch tokens after the last block but one) and DINOv2 ViT-S/14 (patch
tokens after the last block), at 224 pixels, the same in all methods. Each method changes a single thing of the method above it:

    transformers    per encoder: PIL, image processor, model(..., output_hidden_states=True), float32, batch after batch
    layer           our encoders in the same loop: no block runs after the wanted layer
    one decode      each image is opened once for both encoders
    encode_images   images are decoded in threads, batches run side by side, and features are written to a store as float16
    bfloat16        the same method with dtype=torch.bfloat16

Every measurement runs in a separate process, so that its peak memory can be read. The methods take turns, and the least of --repeats
counts. Other processes disturb the wall clock on shared cores, so the CPU's seconds per image are shown too. Compare the ratios.
"""

import argparse
import contextlib
import functools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from transformers import BitImageProcessor, CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model

from encoders import Encoder, build_encoder, encode_images, read_image
from encoders.images.sources import ImageSources
from encoders.store.items import ItemEncoder

LAYERS = {"clip": -2, "dino": -1}
BATCH = 16


def save_models(folder: Path) -> None:
    """Save both encoders with their processors in transformers' format."""
    torch.manual_seed(0)
    clip = CLIPVisionModel(CLIPVisionConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, patch_size=16))
    dino = Dinov2Model(Dinov2Config(hidden_size=384, num_attention_heads=6, patch_size=14, image_size=518))
    square, statistics = {"height": 224, "width": 224}, {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    bit = BitImageProcessor(size={"shortest_edge": 256}, crop_size=square, **statistics)
    for name, model, processor in (("clip", clip, CLIPImageProcessor()), ("dino", dino, bit)):
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)


class Clock:
    """Clock counts the CPU's seconds for pixels and for the network."""

    def __init__(self) -> None:
        self.seconds = {"pixels": 0.0, "network": 0.0}

    @contextlib.contextmanager
    def __call__(self, part: str, timer: Callable[[], float] = time.process_time) -> Iterator[None]:
        start = timer()
        yield
        self.seconds[part] += timer() - start


def batches(files: list[Path]) -> list[list[Path]]:
    return [files[start : start + BATCH] for start in range(0, len(files), BATCH)]


@functools.cache
def theirs(folder: Path) -> list[tuple[str, Any, Any]]:
    kinds = (("clip", CLIPVisionModel, CLIPImageProcessor), ("dino", Dinov2Model, BitImageProcessor))
    return [(name, kind.from_pretrained(folder / name).eval(), process.from_pretrained(folder / name)) for name, kind, process in kinds]


@functools.cache
def ours(folder: Path) -> dict[str, Encoder]:
    return {name: build_encoder(f"hf:{folder / name}", image_size=224, layer=layer) for name, layer in LAYERS.items()}


def transformers_way(folder: Path, files: list[Path], both: bool, clock: Clock) -> list[Tensor]:
    features = []
    for name, model, processor in theirs(folder):
        for batch in batches(files):
            with clock("pixels"):
                inputs = processor([Image.open(file).convert("RGB") for file in batch], return_tensors="pt")
            with clock("network"), torch.no_grad():
                output = model(**inputs, output_hidden_states=True)
            features.append(output.hidden_states[LAYERS[name]][:, 1:].half())  # [B, h*w, D]
            if both:
                features.append(output.pooler_output)  # [B, E]
    return features


def encoded(encoder: Encoder, pixels: Tensor, both: bool) -> list[Tensor]:
    with torch.no_grad():
        tokens = encoder(pixels).tokens.half()  # [B, h*w, D]
        return [tokens, encoder.embed_image(pixels)] if both else [tokens]  # [B, E]


def layer(folder: Path, files: list[Path], both: bool, clock: Clock) -> list[Tensor]:
    features = []
    for encoder in ours(folder).values():
        for batch in batches(files):
            with clock("pixels"):
                pixels = torch.stack([encoder.pixels(file) for file in batch])  # [B, 3, S, S]
            with clock("network"):
                features += encoded(encoder, pixels, both)
    return features


def one_decode(folder: Path, files: list[Path], both: bool, clock: Clock) -> list[Tensor]:
    features, encoders = [], ours(folder).values()
    for batch in batches(files):
        with clock("pixels"):
            images = [read_image(file) for file in batch]
            pixels = [torch.stack([encoder.pixels(image) for image in images]) for encoder in encoders]  # of [B, 3, S, S]
        with clock("network"):
            for encoder, encoder_pixels in zip(encoders, pixels, strict=True):
                features += encoded(encoder, encoder_pixels, both)
    return features


def stored(folder: Path, files: list[Path], both: bool, clock: Clock, dtype: torch.dtype | None = None) -> None:
    encode = ItemEncoder._features

    def timed(self: ItemEncoder, name: str, images: list[Tensor]) -> Any:
        with clock("network", time.thread_time):
            return encode(self, name, images)

    ItemEncoder._features = timed  # type: ignore[method-assign]
    start = time.process_time()
    with tempfile.TemporaryDirectory() as out:
        encode_images(files, ours(folder), out, embeddings=both, tokens="float16", batch_size=BATCH, dtype=dtype)
    clock.seconds["pixels"] = time.process_time() - start - clock.seconds["network"]  # with the time for hashing and writing
    ItemEncoder._features = encode  # type: ignore[method-assign]


METHODS: dict[str, Callable[..., object]] = {
    "transformers": transformers_way,
    "layer": layer,
    "one decode": one_decode,
    "encode_images": stored,
    "bfloat16": lambda *arguments: stored(*arguments, dtype=torch.bfloat16),
}


def measure(method: str, folder: Path, files: list[Path], both: bool, threads: int) -> dict[str, float]:
    """Run a method in this process. Return seconds, the CPU's seconds, the network's share of these, and peak memory in GB."""
    torch.set_num_threads(threads)
    METHODS[method](folder, files[:BATCH], both, Clock())  # a first run for imports and thread pools
    clock, start, cpu = Clock(), time.perf_counter(), time.process_time()
    METHODS[method](folder, files, both, clock)
    return {
        "seconds": time.perf_counter() - start,
        "cpu": time.process_time() - cpu,
        "network": clock.seconds["network"] / sum(clock.seconds.values()),
        "gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of photos")
    parser.add_argument("--count", type=int, default=80, help="number of photos, in whole batches")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--both", action="store_true", help="embeddings besides patch tokens")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # a measurement in a separate process
    arguments = parser.parse_args()
    files = [Path(name) for name, _ in ImageSources(arguments.images)][: arguments.count // BATCH * BATCH]
    if arguments.one:
        print(json.dumps(measure(arguments.one[0], Path(arguments.one[1]), files, arguments.both, arguments.threads)))
        return
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in METHODS}
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    kinds = "embeddings and patch tokens" if arguments.both else "patch tokens"
    with tempfile.TemporaryDirectory() as folder:
        save_models(Path(folder))
        for done in range(1, arguments.repeats + 1):
            for name, results in runs.items():
                command = [sys.executable, __file__, *sys.argv[1:], "--one", name, folder]
                out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
                results.append(json.loads(out.splitlines()[-1]))
            print(f"{len(files)} images, {arguments.threads} threads, {kinds}, least of {done}")
            report(runs, len(files))


def report(runs: dict[str, list[dict[str, float]]], images: int) -> None:
    """Print the least value of each figure, and its ratio to the figure of the first method."""
    best = {name: {key: min(run[key] for run in results) for key in results[0]} for name, results in runs.items()}
    first = best["transformers"]
    print(f"{'':<14} images/s   ratio   CPU ms/image   ratio   in the network   peak memory")
    for name, least in best.items():
        print(
            f"{name:<14} {images / least['seconds']:8.1f} {first['seconds'] / least['seconds']:6.1f}x {1000 * least['cpu'] / images:13.0f} "
            f"{first['cpu'] / least['cpu']:7.1f}x {least['network']:15.0%} {least['gigabytes']:11.2f} GB",
            flush=True,
        )


if __name__ == "__main__":
    main()
