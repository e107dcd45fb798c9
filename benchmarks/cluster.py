"""Measure how much longer `--ray` takes on a single machine than the same work without it.

    python benchmarks/cluster.py                  # `encode_images` of 4,000 images, in this process and by Ray's actor
    python benchmarks/cluster.py --images 8000

The images are photos of 640 x 480 as JPEG files in a tar, the encoders are the miniature's, which cost next to nothing. So reading and
decoding take the time, and the share of Ray, which copies every file to its actor, is as large as it can be. Each run is a separate
process on an idle machine, with a thread of torch per core, or as many as OMP_NUM_THREADS says. The time of an image is that of the second
half of the work, by the times at which its shards were written; the rest is the start, of Ray and its actor too. The last line is the share
of Ray in an hour's work. The two stores are compared byte by byte.
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
from pathlib import Path

import numpy as np
from PIL import Image

from encoders import FeatureStore
from encoders.store.manifest import shards_of
from encoders.store.shards import Shard

MODES = ("alone", "ray")
HOUR = 3600
KINDS = 100
"""Different photos. Each image is a photo with its number behind the end of the JPEG file, which makes it another content."""


def write_images(path: Path, count: int) -> None:
    """Write a tar of photo-like JPEG files: noise of many scales, about 150 kB each."""
    rng, photos = np.random.default_rng(0), list[bytes]()
    for _ in range(KINDS):
        layers = [Image.fromarray(rng.integers(0, 256, (3 * n, 4 * n, 3), dtype=np.uint8)).resize((640, 480)) for n in (2, 16, 100)]
        buffer = io.BytesIO()
        Image.fromarray(np.mean([np.asarray(layer) for layer in layers], 0).astype(np.uint8)).save(buffer, "JPEG", quality=90)
        photos.append(buffer.getvalue())
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            content = photos[number % KINDS] + str(number).encode()
            member = tarfile.TarInfo(f"{number:06d}.jpg")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def encode(mode: str, tar: Path, store: Path) -> tuple[float, float]:
    """Encode the images in this process, or by Ray. Return the seconds of the clock, and those of an image when all has started."""
    from encoders import build_encoder, encode_images
    from encoders.cluster import Cluster

    encoders = {name: build_encoder(name) for name in ("mini-clip", "mini-dino")}
    start = time.perf_counter()
    if mode == "ray":
        import ray

        ray.init("local", log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    encode_images(tar, encoders, store, tokens="int8", progress=False, cluster=Cluster() if mode == "ray" else None)
    return time.perf_counter() - start, of_an_image(store)


def of_an_image(store: Path) -> float:
    """Return the seconds of an image, from the shards that were written in the second half of the work."""
    paths = shards_of(store, FeatureStore(store).manifest["mini-dino"])
    shards = sorted((path.stat().st_mtime, len(Shard(path).keys)) for path in paths)
    second_half = shards[len(shards) // 2 :]
    return (second_half[-1][0] - second_half[0][0]) / sum(images for _, images in second_half[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        mode, tar, store = arguments.run
        print(json.dumps(encode(mode, Path(tar), Path(store))))
        return
    starts, each = dict[str, float](), dict[str, float]()
    with tempfile.TemporaryDirectory() as name:
        write_images(tar := Path(name, "photos.tar"), arguments.images)
        for mode in MODES:
            command = [sys.executable, __file__, "--run", mode, str(tar), f"{name}/{mode}"]
            environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
            seconds, each[mode] = json.loads(out.splitlines()[-1])
            starts[mode] = seconds - arguments.images * each[mode]
            print(f"{mode:<5} {seconds:5.1f} s: {1e3 * each[mode]:.2f} ms an image, and {starts[mode]:.1f} s", flush=True)
        same = subprocess.run(["diff", "-rq", "-x", "*lock*", f"{name}/alone", f"{name}/ray"]).returncode == 0
        print("the stores are", "the same" if same else "DIFFERENT", flush=True)
    share = each["ray"] / each["alone"] - 1 + (starts["ray"] - starts["alone"]) / HOUR
    print(f"Ray makes an hour's work {share:.1%} longer")


if __name__ == "__main__":
    main()
