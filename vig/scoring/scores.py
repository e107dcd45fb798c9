"""VIG scores: a `Score` for each record in memory, a row for each record in Arrow and on disk."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vig.processes import Processes
from vig.scoring.folder import ScoreFolder, manifest_file, read_lists, read_shards

# Shapes: N = records, T = answer tokens of one record, over all its turns; E = end-of-turn tokens among them.

logger = logging.getLogger(__name__)

SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "digest": pa.string(),
        "vig": pa.float32(),
        "loss": pa.float32(),
        "null_loss": pa.float32(),
        "token_vig": pa.list_(pa.float32()),
        "token_ids": pa.list_(pa.int64()),
        "turn_ends": pa.list_(pa.int64()),
        "answer": pa.string(),
        "token_starts": pa.list_(pa.int64()),
        "token_ends": pa.list_(pa.int64()),
    }
)


def _no_tokens() -> NDArray[np.int64]:
    return np.empty(0, np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Score:
    """How much the image helped the answer of a record, in nats; below 0 for a misleading image."""

    id: str
    vig: float
    """Mean of `token_vig`, which is log(PPL(answer | null image) / PPL(answer | image)); a float32 value."""
    loss: float
    """Mean negative log-likelihood of the answer tokens with the image."""
    null_loss: float
    """Mean negative log-likelihood of the answer tokens with the null image."""
    token_vig: NDArray[np.float32]
    """[T] loss with the null image minus loss with the image, per answer token."""
    token_ids: NDArray[np.int64]
    """[T] the answer tokens."""
    turn_ends: NDArray[np.int64]
    """[E] indices into the answer tokens: the end-of-turn token of each turn, if it has one."""
    digest: str
    """Digest of the record when it was scored: a run is not resumed with a record that has changed since."""
    answer: str = ""
    """The answers of all turns in order, as the chat template writes them, end-of-turn marks included, up to the
    last token."""
    token_starts: NDArray[np.int64] = field(default_factory=_no_tokens)
    """[T] where each token starts in `answer`, in characters."""
    token_ends: NDArray[np.int64] = field(default_factory=_no_tokens)
    """[T] where each token ends: token t is answer[token_starts[t]:token_ends[t]]. If the bytes of a character are several tokens,
    all of them have this character. Some tokenizers count the space before a word to the word, others to no token."""

    def __repr__(self) -> str:
        losses = f"loss {self.loss:.3f} with the image, {self.null_loss:.3f} with the null image"
        return f"Score of record {self.id!r}: VIG {self.vig:.3f} nats; {losses}; {len(self.token_vig)} answer tokens"


class Scores(Sequence[Score]):
    """Scores in the order of the records.

    Attributes:
        manifest: the identity of the run, whether it is complete, and the ids of the records without a score.
        failures: id -> reason, of every record that could not be scored.
    """

    def __init__(self, items: Iterable[Score], manifest: Mapping[str, Any]) -> None:
        self._items = list(items)
        self.manifest = dict(manifest)
        self._numbers: dict[str, int] | None = None  # by id; made on first use

    def __getitem__(self, index: Any) -> Any:  # a Score by its number or its id, or a list of them for a slice
        if not isinstance(index, str):
            return self._items[index]
        if self._numbers is None:
            self._numbers = {score.id: number for number, score in enumerate(self._items)}
        if index not in self._numbers:
            raise KeyError(f"no score of record {index!r}: {self.failures.get(index, 'it was not scored')}")
        return self._items[self._numbers[index]]

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        tokens = sum(len(score.token_vig) for score in self._items)
        state = "" if self.manifest["complete"] else "; the run did not finish"
        lines = [
            f"Scores of {len(self):,} records with {tokens:,} answer tokens{state}",
            f"  {len(self.manifest['text_only']):,} records without an image, {len(self.failures):,} that could not be scored",
        ]
        if len(self):
            low, middle, high = np.quantile(self.vig, [0, 0.5, 1])
            lines.append(f"  VIG in nats: mean {self.vig.mean():.3f}, median {middle:.3f}, from {low:.3f} to {high:.3f}")
        return "\n".join(lines)

    @property
    def ids(self) -> list[str]:
        return [score.id for score in self._items]

    @property
    def vig(self) -> NDArray[np.float32]:
        """[N] sample VIG of the N records."""
        return np.array([score.vig for score in self._items], dtype=np.float32)

    @property
    def failures(self) -> dict[str, str]:
        return self.manifest["failures"]

    def table(self) -> pa.Table:
        """N rows with the columns of `SCHEMA`, the fields of `Score`."""
        return to_table(self._items)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the scores to a new or empty folder, which `load_scores` reads. ValueError if the folder holds anything."""
        with ScoreFolder(folder, self.manifest["identity"], SCHEMA, Processes()) as target:
            if held := len(target.read(["id"])):
                raise ValueError(f"{folder} already holds {held} scores; give an empty folder")
            target.append(self.table())
            target.finish(self.manifest["text_only"], self.failures)


def to_table(scores: Sequence[Score]) -> pa.Table:
    return pa.table({name: [getattr(score, name) for score in scores] for name in SCHEMA.names}, schema=SCHEMA)


def from_table(table: pa.Table) -> list[Score]:
    columns = [_rows(table[name]) for name in SCHEMA.names]
    return [Score(**dict(zip(SCHEMA.names, row, strict=True))) for row in zip(*columns, strict=True)]


def _rows(column: pa.ChunkedArray) -> list[Any]:
    """A list with a Python value or a numpy array for each row."""
    if not pa.types.is_list(column.type):
        return column.to_pylist()
    rows: list[Any] = []
    for chunk in column.chunks:
        values, ends = chunk.flatten().to_numpy(), [0, *chunk.value_lengths().to_numpy().cumsum().tolist()]
        rows += [values[start:end] for start, end in itertools.pairwise(ends)]  # np.split takes its time
    return rows


def load_scores(folder: str | os.PathLike[str]) -> Scores:
    """Load the scores in a folder that `score` wrote. For an interrupted run these are the saved scores, and a warning is logged.

    Raises:
        ValueError: for a folder without a manifest, a shard that cannot be read, or shards that together hold fewer scores than
            the run had saved, or hold a record twice.
    """
    path = Path(folder)
    manifest = {"complete": False, **manifest_file(path).read()}
    scores = from_table(read_shards(path, SCHEMA))
    text_only, failures = read_lists(path) if manifest["complete"] else ([], {})
    if not manifest["complete"]:
        logger.warning("%s: the scoring run did not finish; run it again with this folder to resume it", folder)
    elif manifest["scores"] != len(scores):
        raise ValueError(
            f"{folder}: the run saved {manifest['scores']} scores, but the shards hold {len(scores)}; put back the missing shards, "
            "remove copies, or score again with this folder to fill the gap"
        )
    if twice := len(scores) - len({score.id for score in scores}):
        raise ValueError(f"{folder}: {twice} records are in the shards more than once; remove copies of shards")
    outcome = {"complete": manifest["complete"], "text_only": text_only, "failures": failures}
    return Scores(scores, {**outcome, "identity": manifest["identity"]})
