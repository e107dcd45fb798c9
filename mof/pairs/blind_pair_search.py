"""CLIP-blind pairs: images that CLIP takes for the same and DINOv2 does not (arXiv 2401.06209, section 2).

All pairs are compared, exactly: a product of few small integers that can only overestimate CLIP's cosine throws nearly all of them
out (`mof.pairs.sieve`), and what is left is computed in full.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from encoders import FeatureStore
from mof.pairs.choice import Rules, choose
from mof.pairs.embedding_rows import EmbeddingRows
from mof.pairs.ledger import PairLedger
from mof.pairs.search import PairSearch

# Shapes: N images, D width of an embedding, M pairs.


@dataclass(frozen=True)
class BlindPairs:
    """M pairs of images, by gap (CLIP's cosine less DINOv2's), largest first; equal gaps by i, then j."""

    i: NDArray[np.int64]
    """[M], index of the one image"""
    j: NDArray[np.int64]
    """[M], index of the other; i < j"""
    clip_similarity: NDArray[np.float32]
    """[M], cosine; of several encoders the least"""
    dino_similarity: NDArray[np.float32]
    """[M], cosine; of several encoders the largest"""
    images: int
    """N, how many were compared"""
    total: int
    """How many pairs are blind, of which these were kept"""

    def __len__(self) -> int:
        return len(self.i)

    @property
    def gap(self) -> NDArray[np.float32]:
        """[M], what the pairs are sorted by"""
        return self.clip_similarity - self.dino_similarity

    def summary(self) -> str:
        """One line: how many pairs of how many, how many were kept, and how wide the gap is."""
        possible = self.images * (self.images - 1) // 2
        found = f"{self.total:,} blind pairs among {self.images:,} images ({possible:,} pairs)"
        kept = f"; {len(self):,} kept" if len(self) < self.total else ""
        return f"{found}{kept}" + (f"; gap {self.gap.min():.3f} to {self.gap.max():.3f}" if len(self) else "")

    def to_parquet(self, path: str | Path, names: Sequence[str] | None = None) -> None:
        """Columns i, j, clip_similarity, dino_similarity, gap; with the `names` [N] of the images also image_i, image_j."""
        pq.write_table(pa.table(self._columns(names)), path)

    def to_csv(self, path: str | Path, names: Sequence[str] | None = None) -> None:
        """The same columns, with a header."""
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            columns = self._columns(names)
            writer.writerow(columns)
            writer.writerows(zip(*(column if isinstance(column, list) else column.tolist() for column in columns.values()), strict=True))

    def _columns(self, names: Sequence[str] | None) -> dict[str, NDArray[Any] | list[str]]:
        images: dict[str, NDArray[Any] | list[str]] = {}
        if names is not None:
            if len(names) != self.images:
                raise ValueError(f"{len(names)} names for {self.images} images: expected one for each row of the embeddings")
            images = {"image_i": [names[i] for i in self.i], "image_j": [names[j] for j in self.j]}
        similarities = {"clip_similarity": self.clip_similarity, "dino_similarity": self.dino_similarity, "gap": self.gap}
        return {"i": self.i, "j": self.j, **images, **similarities}


def blind_pairs(
    clip: Any,
    dino: Any,
    clip_above: float = 0.95,
    dino_below: float = 0.6,
    *,
    max_pairs: int | None = None,
    one_per_image: bool = False,
    duplicates_above: float | None = None,
    duplicates_by: Any = None,
    per_cluster: int | None = None,
    ledger: str | Path | None = None,
    device: str | torch.device = "cpu",
    tile: int | None = None,
    progress: bool = False,
) -> BlindPairs:
    """All pairs of images with CLIP cosine > `clip_above` and DINOv2 cosine < `dino_below`.

    The same pairs as a brute-force search in float32; only those within 2e-6 of a threshold may fall on either side.

    Args:
        clip: embeddings [N, D] of one encoder: an array, a memory map or a tensor. Rows that are not of unit length are
            normalised, with a warning; a row of zeros has cosine 0 with everything. A list or tuple holds those of several
            encoders: a pair must be above with all of them. A `FeatureStore` stands for all encoders it was opened with.
        dino: embeddings [N, any width] of the other encoder, of the same images in the same order. With several encoders, a pair
            must be below with all.
        clip_above, dino_below: the defaults are the paper's.
        max_pairs: keep this many, those of the largest gap; 0 only counts. The number of all is in `.total`. None: all.
        one_per_image: an image may be in one pair only, its best.
        duplicates_above: images with cosine above this in every encoder count as one: the pair of two such groups with the
            largest gap stands for all, and pairs within a group are left out. Images are grouped round the one that comes first
            by gap.
        duplicates_by: embeddings to tell that by, in place of those of every encoder; `mof blind-pairs` takes thumbnails, so that
            only compressed and resized copies count (`mof.pairs.thumbnail_encoder`).
        per_cluster: keep at most so many pairs of a cluster. A pair is of the cluster of its image i: the first one, by gap, with
            CLIP cosine > `clip_above` to it.
        ledger: a folder through which any number of processes or machines share the work, each calling this function with the same
            arguments (see `mof.pairs.ledger`). All of them return the whole result. A stopped search goes on where it was.
        device: where the products are computed.
        tile: rows compared at a time; default 1,024, on a GPU 16,384. Besides the embeddings, which may be memory maps, memory is
            O(N K + tile^2) for the K of the sieve, mostly 28 to 124.
        progress: show a bar.

    Raises:
        ValueError: for arrays that are not two-dimensional, differ in length, or hold NaN or infinity; for thresholds that are NaN;
            for a ledger of another search; for stores of different images.
    """
    if np.isnan(clip_above) or np.isnan(dino_below):
        raise ValueError(f"thresholds must be numbers, got clip_above={clip_above}, dino_below={dino_below}")
    if duplicates_by is not None and duplicates_above is None:
        raise ValueError("duplicates_by says by what duplicates are told; give duplicates_above, too: the cosine from which on they are")
    rules = Rules(max_pairs, one_per_image, duplicates_above, per_cluster)
    _refuse_other_images(clip, dino)
    clips, dinos = _encoders(clip, "clip", device), _encoders(dino, "dino", device)
    alike = clips + dinos if duplicates_by is None else _encoders(duplicates_by, "duplicates_by", device)
    for one in (*clips, *dinos, *alike):
        if len(one) != len(clips[0]):
            raise ValueError(f"clip has {len(clips[0])} rows, {one.name} {len(one)}: all must be of the same images, in the same order")
    search = PairSearch(clips, dinos, clip_above, dino_below, tile)
    with _full_precision():
        found = search.found if ledger is None else PairLedger(ledger, search, rules.most_per_tile).found
        pairs, total = choose(lambda: found(progress), rules, clips, alike, clip_above)
    i, j, clip_similarity, dino_similarity = (np.ascontiguousarray(pairs[name]) for name in ("i", "j", "clip", "dino"))
    return BlindPairs(i, j, clip_similarity, dino_similarity, len(clips[0]), total)


def _encoders(given: Any, name: str, device: str | torch.device) -> list[EmbeddingRows]:
    """One encoder's embeddings, or those of a list of encoders or of a store."""
    if isinstance(given, FeatureStore):
        return [EmbeddingRows(given.embeddings(encoder), f"{name} ({encoder})", device) for encoder in given.encoders]
    if not isinstance(given, list | tuple):
        return [EmbeddingRows(given, name, device)]
    if not given:
        raise ValueError(f"{name} is an empty list: expected embeddings [N, D], or a list of them")
    return [EmbeddingRows(one, f"{name}[{n}]", device) for n, one in enumerate(given)]


def _refuse_other_images(clip: Any, dino: Any) -> None:
    """Rows of two stores go together only when they are of the same contents."""
    if isinstance(clip, FeatureStore) and isinstance(dino, FeatureStore) and clip.keys != dino.keys:
        raise ValueError(
            f"{clip.path} ({', '.join(clip.encoders)}) and {dino.path} ({', '.join(dino.encoders)}) hold different images, or in "
            "another order: encode the same images with both encoders into one store"
        )


@contextmanager
def _full_precision() -> Iterator[None]:
    """Matrix products in true float32, whatever the program around allows (TF32 errs by far more than the sieve makes room for)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


__all__ = ["BlindPairs", "blind_pairs"]
