"""The four jobs of a cluster on small data, each into a folder of its own. As a program, this file is a driver that can be killed:

python -m support.cluster_jobs JOB DATA OUTPUT [ADDRESS]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from PIL import Image

from encoders import encode_images
from encoders.cluster import Cluster
from encoders.storage import fetched, located
from mof import blind_pairs
from mof.evals import answering
from mof.evals.answerers import LocalModel
from mof.evals.answerers.cluster_model import ClusterModel
from mof.evals.answering import AnswerCache, Prompt, answer_all
from mof.pairs import ledger as pair_ledger
from support.pictures import encoded, tar_of
from support.spectra import embeddings
from support.tiny import TinyEncoder
from support.tiny_llava import build_llava, many_records
from vig import score

SIDE, IMAGES = 64, 1200
"""Rows of a square of the search, and its images."""


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels).resize((40, 40)))


def numbered_tar(path: Path, contents: list[bytes]) -> Path:
    return tar_of(path, [(f"{number:04d}.png", content) for number, content in enumerate(contents)])


def write_data(folder: Path) -> Path:
    """Write a tar with doubles and damaged images, records and prompts."""
    contents = [picture(number % 140) for number in range(150)]  # the last ten are doubles
    for number in (3, 64, 65, 120):
        contents[number] = contents[number][:120] if number % 2 else b"no image"
    numbered_tar(folder / "photos.tar", contents)
    (folder / "bad.png").write_bytes(b"no image")
    (folder / "records.json").write_text(json.dumps(many_records(folder / "images")))
    return folder


def encode(data: Path, out: Path, cluster: Cluster | None) -> Any:
    encoders = {"a": TinyEncoder(16, 8, 32, 0.5, 1), "b": TinyEncoder(24, 4, 24, 0.4, 3)}
    return encode_images(data / "photos.tar", encoders, out, tokens="int8", batch_size=4, progress=False, cluster=cluster)


def both_embeddings() -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    return embeddings(rng, IMAGES, 24, "usual"), embeddings(rng, IMAGES, 24, "flat")


def search(data: Path, out: Path, cluster: Cluster | None) -> Any:
    with patch.object(pair_ledger, "square_size", lambda images: SIDE):
        pairs = blind_pairs(*both_embeddings(), 0.6, 0.2, ledger=out, max_pairs=500, one_per_image=True, cluster=cluster)
    return pairs.total, pairs.table()


def score_records(data: Path, out: Path, cluster: Cluster | None) -> Any:
    options = {"image_folder": data / "images", "batch_size": 1, "calibrate": True, "cluster": cluster}
    scores = score(*build_llava(), json.loads((data / "records.json").read_text()), out, **options)
    return scores.ids, scores.failures, scores.manifest


def answer(data: Path, out: Path, cluster: Cluster | None) -> Any:
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (30, 30, 3), dtype=np.uint8)) for _ in range(24)]
    prompts = [Prompt.about(str(n), image, "Which?", ("left", "right")) for n, image in enumerate(images)]
    prompts.insert(5, Prompt.about("bad", str(data / "bad.png"), "Which?"))
    model = LocalModel(*build_llava(), "tiny", batch_size=2, max_new_tokens=4)
    out = fetched(out)
    out.mkdir(exist_ok=True, parents=True)
    with patch.object(answering, "BETWEEN", 0.0):
        return answer_all(model if cluster is None else ClusterModel(model, cluster), prompts, AnswerCache(out / "cache.jsonl"))


Job = Callable[[Path, Path, Cluster | None], Any]
JOBS: dict[str, tuple[Job, str, int]] = {
    "encode": (encode, "a-*/features-*", 5),
    "search": (search, "*.npz", 10),
    "score": (score_records, "shard-*", 4),
    "answer": (answer, "cache.jsonl", 5),
}
"""Name -> the job, the pattern of its results, and how many of them there are in the middle of the job."""


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the content of every file by its path, without locks."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file() and "lock" not in path.name}


def results(name: str, out: Path) -> int:
    """Return how many results of the job there are."""
    files = list(out.glob(JOBS[name][1]))
    return sum(len(file.read_bytes().splitlines()) for file in files) if name == "answer" else len(files)


if __name__ == "__main__":
    JOBS[sys.argv[1]][0](Path(sys.argv[2]), located(sys.argv[3]), Cluster(sys.argv[4]) if sys.argv[4:] else None)
