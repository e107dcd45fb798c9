"""Measure how much longer `--ray` takes on a single machine than the same work without it.

    python benchmarks/cluster.py                       # `encode_images` of 500 and 2,000 images, in this process and by Ray's actor
    python benchmarks/cluster.py --counts 2000 8000

The images are photos of 640 x 480 as JPEG files in a tar, the encoders are the miniature's. So reading and decoding take most of the
time, and the share of Ray, which copies every file to its actor, is as large as it can be: real encoders compute a hundred times longer
per image. Each run is a separate process. "wall" includes the start of Ray and of its actor. "CPU" is the time of all processors in all
processes, which other work on the machine hardly disturbs. The last lines divide the difference into a start and a part that grows with
the work, and say what both are of an hour's work. The two stores are compared byte by byte.
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
import psutil
from PIL import Image

MODES = ("alone", "ray")
HOUR = 3600


def write_images(path: Path, count: int) -> None:
    """Write a tar of photo-like JPEG files: noise of many scales, about 60 kB each."""
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for number in range(count):
            layers = [Image.fromarray(rng.integers(0, 256, (3 * n, 4 * n, 3), dtype=np.uint8)).resize((640, 480)) for n in (2, 16, 100)]
            buffer = io.BytesIO()
            Image.fromarray(np.mean([np.asarray(layer) for layer in layers], 0).astype(np.uint8)).save(buffer, "JPEG", quality=90)
            member = tarfile.TarInfo(f"{number:06d}.jpg")
            member.size = buffer.tell()
            buffer.seek(0)
            tar.addfile(member, buffer)


def encode(mode: str, tar: Path, store: Path) -> dict[str, float]:
    """Encode the images in this process, or by Ray. Return the seconds of the wall clock and of all processors."""
    from encoders import build_encoder, encode_images
    from encoders.cluster import Cluster

    encoders = {name: build_encoder(name) for name in ("mini-clip", "mini-dino")}
    start, before = time.perf_counter(), processors()
    if mode == "ray":
        import ray

        ray.init("local", log_to_driver=False, logging_level="ERROR", include_dashboard=False)
    encode_images(tar, encoders, store, tokens="int8", progress=False, cluster=Cluster() if mode == "ray" else None)
    return {"wall": time.perf_counter() - start, "CPU": processors() - before}


def processors() -> float:
    """Return the processor seconds of this process and of all processes that it started, also of those that have ended."""
    every = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return sum(sum(process.cpu_times()[:4]) for process in every)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs=2, default=[500, 2000])
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        mode, tar, store = arguments.run
        print(json.dumps(encode(mode, Path(tar), Path(store))))
        return
    seconds: dict[tuple[str, int], dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        for count in arguments.counts:
            tar = Path(name, f"{count}.tar")
            write_images(tar, count)
            for mode in MODES:
                command = [sys.executable, __file__, "--run", mode, str(tar), f"{name}/{mode}-{count}"]
                environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
                out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
                seconds[mode, count] = json.loads(out.splitlines()[-1])
                print(f"{count:,} images, {mode:<5}", {key: f"{value:.1f} s" for key, value in seconds[mode, count].items()}, flush=True)
            same = subprocess.run(["diff", "-rq", "-x", "*lock*", f"{name}/alone-{count}", f"{name}/ray-{count}"]).returncode == 0
            print("the stores are", "the same" if same else "DIFFERENT", flush=True)
    few, many = arguments.counts
    for clock in ("wall", "CPU"):
        alone, ray = ([seconds[mode, count][clock] for count in (few, many)] for mode in MODES)
        grows = (ray[1] - ray[0]) / (alone[1] - alone[0]) - 1
        start = ray[0] - alone[0] - grows * alone[0]
        print(f"{clock}: start {start:.1f} s, then {grows:+.1%}; for an hour's work {(start + grows * HOUR) / HOUR:+.1%}")


if __name__ == "__main__":
    main()
