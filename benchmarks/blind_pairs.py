"""Compare time and memory of `blind_pairs` with faiss' range search and a filter, and with numpy's full matrices, for the same pairs.

    python benchmarks/blind_pairs.py                       # N = 20,000 and 60,000
    python benchmarks/blind_pairs.py --counts 20000

faiss needs `pip install faiss-cpu`; without it, this comparison is left out. Every method runs in a separate process with the same
embeddings, so that its peak memory can be read. The methods take turns, and the shortest time of --repeats counts. Compare the ratios,
because absolute times mean little on shared cores.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
import warnings
from importlib.util import find_spec

import numpy as np

ABOVE, BELOW = 0.95, 0.6


def embeddings(count: int, spectrum: str) -> tuple[np.ndarray, np.ndarray]:
    """Return unit rows of width 768 and 1024 with thousands of blind pairs.

    With the spectrum "flat", all channels have the same variance. With another spectrum, the variance falls from channel to channel.
    """
    rng = np.random.default_rng(0)
    centres = rng.integers(count // 4, size=count)  # about four images of a thing
    pair = []
    for width, spread, offset in ((768, 0.18, 0.9), (1024, 1.2, 0.0)):
        scale = np.ones(width) if spectrum == "flat" else (1 + np.arange(width)) ** -0.5
        scale = (scale / np.linalg.norm(scale)).astype(np.float32)
        things = rng.standard_normal((count // 4, width), dtype=np.float32)
        x = (things[centres] + spread * rng.standard_normal((count, width), dtype=np.float32)) * scale
        x[:, 0] += offset
        pair.append(x / np.linalg.norm(x, axis=1, keepdims=True))
    return pair[0], pair[1]


def ours(clip: np.ndarray, dino: np.ndarray) -> int:
    from mof import blind_pairs

    return len(blind_pairs(clip, dino, ABOVE, BELOW))


def faiss_range_search(clip: np.ndarray, dino: np.ndarray) -> int:
    import faiss

    index = faiss.IndexFlatIP(clip.shape[1])
    index.add(clip)
    limits, _, j = index.range_search(clip, ABOVE)
    i = np.repeat(np.arange(len(clip)), np.diff(limits).astype(np.int64))
    i, j = i[i < j], j[i < j]
    return int((np.einsum("nd,nd->n", dino[i], dino[j]) < BELOW).sum())


def numpy_full(clip: np.ndarray, dino: np.ndarray) -> int:
    return int(np.triu((clip @ clip.T > ABOVE) & (dino @ dino.T < BELOW), 1).sum())


METHODS = {"blind_pairs": ours, "faiss range_search": faiss_range_search, "numpy full matrices": numpy_full}


def measure(method: str, count: int, spectrum: str) -> dict[str, float]:
    """Run a method in this process. Return seconds, the number of pairs, and the peak memory beyond the embeddings in GB."""
    warnings.simplefilter("ignore")
    clip, dino = embeddings(count, spectrum)
    METHODS[method](clip[:5000], dino[:5000])  # a first run for imports and thread pools
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    pairs = METHODS[method](clip, dino)
    return {
        "seconds": time.perf_counter() - start,
        "pairs": pairs,
        "gigabytes": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[20_000, 60_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)  # a measurement in a separate process
    arguments = parser.parse_args()
    if arguments.one:
        method, count, spectrum = arguments.one
        print(json.dumps(measure(method, int(count), spectrum)))
        return
    for count in arguments.counts:
        left_out = ({"faiss range_search"} if find_spec("faiss") is None else set()) | (
            {"numpy full matrices"} if count > 20_000 else set()
        )
        methods = [name for name in METHODS if name not in left_out]
        for spectrum in ("realistic", "flat"):
            runs: dict[str, list[dict[str, float]]] = {name: [] for name in methods}
            for _ in range(arguments.repeats):
                for name in methods:
                    command = [sys.executable, __file__, "--one", name, str(count), spectrum]
                    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                    runs[name].append(json.loads(out.splitlines()[-1]))
            least = {name: min(run["seconds"] for run in repeats) for name, repeats in runs.items()}
            for name, repeats in runs.items():
                print(
                    f"N = {count:,} {spectrum:<9}  {name:<20} {least[name]:7.2f} s  {least[name] / least['blind_pairs']:6.1f} x  "
                    f"{repeats[0]['gigabytes']:5.2f} GB  {repeats[0]['pairs']:,} pairs",
                    flush=True,
                )


if __name__ == "__main__":
    main()
