"""`blind_pairs` finds pairs of images that CLIP takes for the same and DINOv2 does not (arXiv 2401.06209, section 2).

All pairs are compared, exactly. A product of a few small integers, which can only overestimate CLIP's cosine, throws out nearly all pairs
(`mof.pairs.sieve`). The cosines of the others are computed in full (`mof.pairs.comparison`), and rules choose among the pairs that
are found (`mof.pairs.choice`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from encoders import FeatureStore
from encoders.cluster import Cluster
from mof.pairs.choice import Rules, choose
from mof.pairs.comparison import PairComparison
from mof.pairs.embedding_rows import EmbeddingRows
from mof.pairs.ledger import PairLedger
from mof.pairs.pair_table import BlindPairs

# Shapes: N images, D width of an embedding.


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
    cluster: Cluster | None = None,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> BlindPairs:
    """Find all pairs of images with CLIP cosine > `clip_above` and DINOv2 cosine < `dino_below`.

    The pairs are those of a brute-force search in float32; only pairs within 2e-6 of a threshold may fall on either side. Besides the
    embeddings, which may be memory maps, the search needs O(N K) memory for the K of the sieve, mostly 28 to 124, and one tile.

    Args:
        clip: embeddings [N, D] of one encoder: an array, a memory map or a tensor. Rows that are not of unit length are
            normalised, with a warning; a row of zeros has cosine 0 with everything. A list or tuple holds the embeddings of several
            encoders: a pair must be above the threshold with all of them. A `FeatureStore` stands for all encoders it was opened with.
        dino: embeddings [N, any width] of the other encoder, of the same images in the same order. With several encoders, a pair
            must be below the threshold with all.
        clip_above, dino_below: thresholds; the defaults are the paper's.
        max_pairs: number of pairs to keep, those with the largest gap; 0 only counts. `.total` is the number of all. None: all.
        one_per_image: whether an image may be in one pair only, its best.
        duplicates_above: images with cosine above this in every encoder count as one: the pair of two such groups with the
            largest gap stands for all, and pairs within a group are left out. Images are grouped round the image that comes first
            by gap.
        duplicates_by: embeddings that tell duplicates, in place of the encoders' embeddings; `mof blind-pairs` takes thumbnails, so that
            only compressed and resized copies count (`mof.pairs.image_collection.ThumbnailEncoder`).
        per_cluster: largest number of pairs of a cluster to keep. A pair belongs to the cluster of its image i: the first image, by gap,
            with CLIP cosine > `clip_above` to it.
        ledger: a folder for the finished parts of the search, with which a stopped search goes on (`mof.pairs.ledger`).
        cluster: Ray's actors that compare the images (`encoders.cluster`), in place of this process. They need the folder `ledger`,
            which all of them see, and use a GPU if they have a GPU.
        device: where the products are computed.
        progress: whether a bar is shown.

    Raises:
        ValueError: for arrays that are not two-dimensional, differ in length, or hold NaN or infinity; for thresholds that are NaN;
            for a ledger of another search; for stores of different images.
    """
    if np.isnan(clip_above) or np.isnan(dino_below):
        raise ValueError(f"thresholds must be numbers, got clip_above={clip_above}, dino_below={dino_below}")
    if duplicates_by is not None and duplicates_above is None:
        raise ValueError("duplicates_by needs the cosine above which two images are duplicates: give duplicates_above, too")
    if cluster is not None and ledger is None:
        raise ValueError("cluster needs the folder in which its machines put the pairs that they find: give ledger, too")
    rules = Rules(max_pairs, one_per_image, duplicates_above, per_cluster)
    _refuse_different_images(clip, dino)
    clips, dinos = _encoders(clip, "clip", device), _encoders(dino, "dino", device)
    alike = clips + dinos if duplicates_by is None else _encoders(duplicates_by, "duplicates_by", device)
    for rows in (*clips, *dinos, *alike):
        if len(rows) != len(clips[0]):
            raise ValueError(f"clip has {len(clips[0])} rows, {rows.name} {len(rows)}: all must be of the same images, in the same order")
    comparison = PairComparison(clips, dinos, clip_above, dino_below)
    with torch.autocast(comparison.device.type, enabled=False):
        found = comparison.found if ledger is None else PairLedger(ledger, comparison, rules.most_per_tile, cluster).found
        pairs, total = choose(lambda: found(progress), rules, clips, alike, clip_above)
    i, j, clip_similarity, dino_similarity = (np.ascontiguousarray(pairs[name]) for name in ("i", "j", "clip", "dino"))
    return BlindPairs(i, j, clip_similarity, dino_similarity, len(clips[0]), total)


def _encoders(given: Any, name: str, device: str | torch.device) -> list[EmbeddingRows]:
    """Return the embeddings of one encoder, of a list of encoders, or of all encoders of a store."""
    if isinstance(given, FeatureStore):
        return [EmbeddingRows(given.embeddings(encoder), f"{name} ({encoder})", device) for encoder in given.encoders]
    if not isinstance(given, list | tuple):
        return [EmbeddingRows(given, name, device)]
    if not given:
        raise ValueError(f"{name} is an empty list: expected embeddings [N, D], or a list of them")
    return [EmbeddingRows(embeddings, f"{name}[{n}]", device) for n, embeddings in enumerate(given)]


def _refuse_different_images(clip: Any, dino: Any) -> None:
    """Raise ValueError for two stores whose rows are not of the same contents."""
    if isinstance(clip, FeatureStore) and isinstance(dino, FeatureStore) and clip.keys != dino.keys:
        raise ValueError(
            f"{clip.path} ({', '.join(clip.encoders)}) and {dino.path} ({', '.join(dino.encoders)}) hold different images, or in "
            "another order: encode the same images with both encoders into one store"
        )
