"""Records are clustered by their first instruction, so that a selection keeps a share of each (as VisNec does, arXiv 2603.01195)."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, ProcessorMixin

from mof.data.records import RecordError, texts_of
from mof.data.rows import RawRecord, id_of, rows

# Shapes: R = instructions, D = width of the model.

FITTED = 20_000  # records that the centres are fitted to, drawn at random
BLOCK = 4096  # records that are assigned at a time


def instruction_clusters(
    model: PreTrainedModel, processor: ProcessorMixin, records: Callable[[], Iterable[RawRecord]], count: int, seed: int = 0
) -> dict[str, str]:
    """Return id -> name of its cluster, "cluster 0" and so on, for use as the `sources` of `vig.select`.

    An instruction is the mean of the model's input embeddings over the tokens of a record's first question. K-means (scipy)
    makes the clusters. Records without a question are in no cluster.

    Args:
        records: gives all records anew each time it is called; they are never all in memory.

    Raises:
        ValueError: for fewer different instructions than clusters.
    """
    from scipy.cluster.vq import kmeans2, vq  # slow to import

    rng = random.Random(seed)
    drawn: list[str] = []
    for place, (_, text) in enumerate(_instructions(records())):  # a reservoir: each record is as likely to stay
        if place < FITTED:
            drawn.append(text)
        elif (slot := rng.randrange(place + 1)) < FITTED:
            drawn[slot] = text
    if not 1 <= count <= len(set(drawn)):
        raise ValueError(f"{count} clusters need as many different instructions, of which the records have {len(set(drawn))}")
    centres, _ = kmeans2(_embedded(model, processor, drawn), count, minit="++", seed=seed)  # [count, D]
    clusters: dict[str, str] = {}
    pairs = _instructions(records())
    while block := list(islice(pairs, BLOCK)):
        codes, _ = vq(_embedded(model, processor, [text for _, text in block]), centres)  # [R]
        clusters |= {id: f"cluster {code}" for (id, _), code in zip(block, codes.tolist(), strict=True)}
    return clusters


def _instructions(records: Iterable[RawRecord]) -> Iterator[tuple[str, str]]:
    """Yield the id and the first question of each record that can be read and has a question."""
    for raw in rows(records):
        try:
            questions = texts_of(raw, "user")
        except RecordError:
            continue
        if questions:
            yield id_of(raw), questions[0]


@torch.inference_mode()
def _embedded(model: PreTrainedModel, processor: ProcessorMixin, texts: Sequence[str]) -> NDArray[np.float64]:
    """Return [R, D], the mean input embedding of each text; 0 for a text without a token."""
    table = model.get_input_embeddings().weight  # [V, D]
    ids = processor.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    means = [table[torch.tensor(tokens, dtype=torch.long, device=table.device)].float().sum(0) / max(len(tokens), 1) for tokens in ids]
    return torch.stack(means).double().cpu().numpy()
