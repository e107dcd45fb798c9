"""The time of reading patch tokens from a feature store with its checks, as a ratio to the time without them (MOF_CHECK=off).

    python benchmarks/store_checks.py
    python benchmarks/store_checks.py --images 512 --batch 1

Both ways read the same rows from the same pages of memory, in turn in one process; the shortest of --repeats counts. The tokens have
the size of those of CLIP ViT-L/14 at 224 pixels in float16: 256 x 1024, 0.5 MB an image.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from encoders import Encoder, FeatureStore, encode_images


class Repeated(Encoder):
    """Makes 16 x 16 tokens of 1024 channels out of the pixels, in no time."""

    def __init__(self) -> None:
        sizes = {"width": 1024, "depth": 1, "patch_size": 2, "image_size": 32, "embed_dim": 1024}
        super().__init__(nn.Conv2d(3, 1, 1), **sizes, mean=(0.5,) * 3, std=(0.5,) * 3, trainable=False)

    def patch_tokens(self, x: Tensor) -> Tensor:
        return x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).reshape(len(x), 256, 12).repeat(1, 1, 86)[..., :1024]

    def image_embedding(self, x: Tensor) -> Tensor:
        return self.patch_tokens(x).mean(dim=1)  # [B, 1024]


def seconds(store: FeatureStore, orders: list[np.ndarray]) -> float:
    start = time.process_time()
    for rows in orders:
        store.tokens("repeated", rows)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32, help="rows that are read at a time")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        images = Path(temporary) / "images"
        images.mkdir()
        for index in range(arguments.images):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(images / f"{index}.png")
        encode_images(images, {"repeated": Repeated()}, Path(temporary) / "store", tokens="float16", progress=False)
        orders = np.array_split(rng.permutation(arguments.images), -(-arguments.images // arguments.batch))
        least = {"off": float("inf"), "on": float("inf")}
        for _ in range(arguments.repeats + 1):  # the first fills the cache of the disk
            for way in least:
                os.environ["MOF_CHECK"] = way
                least[way] = min(least[way], seconds(FeatureStore(Path(temporary) / "store"), orders))
        size = arguments.images * 256 * 1024 * 2 / 1e9
        print(f"{size / least['off']:.2f} GB/s without checks, {size / least['on']:.2f} GB/s with them, {least['on'] / least['off']:.2f} x")


if __name__ == "__main__":
    main()
