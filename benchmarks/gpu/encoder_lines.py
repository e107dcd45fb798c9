"""Images per second through encoders with random weights: from pixels on the device, compiled, and from JPEG files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import Bench, Figure, TooSlow, operations
from PIL import Image
from torch import Tensor

from encoders import Encoder, ImageLoader, build_encoder, encode_images

ENCODERS: dict[str, dict[str, Any]] = {
    "CLIP ViT-L/14-336": {"name": "clip-vit-l14-336"},
    "SigLIP SO400M/14-384": {"name": "siglip-so400m-14-384"},
    "DINOv2 ViT-L/14-336": {"name": "dinov2-vit-l14", "image_size": 336},
    "DINOv3 ViT-L/16-384": {"name": "dinov3-vit-l16", "image_size": 384},
}
TINY: dict[str, dict[str, Any]] = {
    "CLIP ViT-L/14-336": {"name": "mini-clip"},
    "SigLIP SO400M/14-384": {"name": "mini-clip"},
    "DINOv2 ViT-L/14-336": {"name": "mini-dino"},
    "DINOv3 ViT-L/16-384": {"name": "dinov3-vit-s16", "image_size": 32},
}


def built(options: dict[str, Any], device: torch.device) -> Encoder:
    """Return an encoder with random weights in bfloat16 on the device."""
    with torch.device(device):  # random numbers are drawn there, which takes a second instead of ten
        return build_encoder(**options, pretrained=False).to(device, torch.bfloat16)


def add_pixel_lines(bench: Bench) -> None:
    for name, options in (TINY if bench.tiny else ENCODERS).items():
        bench.add(f"{name}, pixels", partial(_pixels, bench, options, compiled=False))


def add_compiled_lines(bench: Bench) -> None:
    for name, options in list((TINY if bench.tiny else ENCODERS).items())[: 1 if bench.tiny else None]:
        bench.add(f"{name}, pixels, compiled", partial(_pixels, bench, options, compiled=True))


def _pixels(bench: Bench, options: dict[str, Any], *, compiled: bool) -> Figure:
    encoder, size = built(options, bench.device), 2 if bench.tiny else 64
    pixels = torch.randint(0, 256, (size, 3, encoder.image_size, encoder.image_size), dtype=torch.uint8, device=bench.device)
    work = operations(lambda: encoder(pixels))
    run = torch.compile(encoder, fullgraph=True, dynamic=False) if compiled else encoder

    @torch.inference_mode()
    def forward() -> Tensor:
        return run(pixels).tokens

    rate = size / bench.seconds(forward)
    return Figure(rate, "images/s", rate * work / size, note=f"batches of {size}, {encoder.grid[0] ** 2} tokens")


def add_file_lines(bench: Bench) -> None:
    chosen, workers = TINY if bench.tiny else ENCODERS, min(os.cpu_count() or 1, 32)
    count, size = (12, (64, 48)) if bench.tiny else (2048, (640, 480))
    files = cache(partial(_draw_photos, bench.scratch / "photos", count, size, workers))
    bench.add(f"decode and resize alone, {workers} threads", partial(_decoded, bench, chosen, files, workers))
    for name, options in chosen.items():
        bench.add(f"{name}, JPEG files to embeddings", partial(_encoded, bench, options, files, workers, None))
    name, options = next(iter(chosen.items()))
    bench.add(f"{name}, JPEG files to patch tokens", partial(_encoded, bench, options, files, workers, "float16"))


def _draw_photos(folder: Path, count: int, size: tuple[int, int], workers: int) -> list[Path]:
    """Write JPEG files about as large and as hard to decode as photos: random colours, enlarged, with some noise."""
    folder.mkdir(exist_ok=True)

    def draw(index: int) -> Path:
        rng = np.random.default_rng(index)
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
        noisy = np.asarray(coarse) + rng.integers(-12, 13, (size[1], size[0], 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{index}.jpg", quality=90)
        return folder / f"{index}.jpg"

    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(draw, range(count)))


def _decoded(bench: Bench, chosen: dict[str, dict[str, Any]], files: Callable[[], list[Path]], workers: int) -> Figure:
    encoder = build_encoder(**next(iter(chosen.values())), pretrained=False)
    loader = ImageLoader(files(), workers, strict=True, transform=encoder.pixels, prefetch=4 * workers)
    rate = len(files()) / bench.seconds(lambda: sum(1 for _ in loader))
    bytes_each = sum(file.stat().st_size for file in files()) / len(files())
    return Figure(rate, "images/s", note=f"{bytes_each / 1e3:.0f} kB a file, to {encoder.image_size} pixels")


def _encoded(bench: Bench, options: dict[str, Any], files: Callable[[], list[Path]], workers: int, tokens: Any) -> Figure:
    encoder, size, taken = built(options, bench.device), 2 if bench.tiny else 64, files()[: 8 if tokens and bench.tiny else None]
    if bench.left < 4:
        raise TooSlow(f"{bench.left:.0f} s are left of the budget")
    pixels = torch.zeros(1, 3, encoder.image_size, encoder.image_size, dtype=torch.uint8, device=bench.device)
    work = operations((lambda: encoder(pixels)) if tokens else (lambda: encoder.embed_image(pixels)))
    store = bench.scratch / "store"

    def encode() -> None:
        shutil.rmtree(store, ignore_errors=True)
        given: Any = {"embeddings": not tokens, "tokens": tokens, "batch_size": size, "workers": workers, "progress": False}
        report = encode_images(list(map(str, taken)), {"encoder": encoder}, store, **given)
        if report.encoded != len(taken):
            raise ValueError(f"{report.encoded} of {len(taken)} images were encoded")

    rate = len(taken) / bench.seconds(encode, most=0)  # the shorter of two runs would say little more
    return Figure(rate, "images/s", rate * work, note=f"encode_images with {workers} threads, batches of {size}")
