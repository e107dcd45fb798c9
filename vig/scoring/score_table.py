"""A score is a `Score` in memory, and a row of a table in Arrow and on disk; each record has one score."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

# Shapes: N = records, T = answer tokens of one record, over all its turns; E = end-of-turn tokens among them.

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

MEASURES = ("loss", "logit", "entropy")
"""The further values of each answer token that a run can save, each with the image and with the null image."""

ENCODER = "token_vig_of_"
"""A column with this prefix and the name of an encoder holds the encoder's VIG. A score has these columns in `Score.encoder_vig`."""


def columns_of(measures: Sequence[str]) -> list[str]:
    """Return the names of the columns of these measures. They are fields of `Score`."""
    return [f"{start}token_{measure}" for measure in measures for start in ("", "null_")]


def schema_of(identity: Mapping[str, Any]) -> pa.Schema:
    """Return the columns that a run of this identity writes: `SCHEMA`, and the columns of its measures, encoders and image files."""
    per_token = [*columns_of(identity.get("measures", ())), *(ENCODER + name for name in identity.get("encoders", ()))]
    extra = [pa.field(name, pa.list_(pa.float32())) for name in per_token]
    extra += [pa.field(name, pa.string()) for name in identity.get("image_columns", ())]  # earlier releases had none
    return pa.schema([*SCHEMA, *extra])


IMAGE_COLUMNS = ("image_digest", "image_files")
"""The columns that tell whether an image was replaced."""

LIGHT = ["id", "digest", "vig", "loss", "token_vig", "turn_ends"]
"""The columns that selections and distributions need."""


def _no_tokens() -> NDArray[np.int64]:
    return np.empty(0, np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Score:
    """A score says how much the image helped the answer of a record, in nats. It is below 0 for a misleading image."""

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
    """[E] indices into the answer tokens: the end-of-turn token of each turn that has an end-of-turn token."""
    digest: str
    """Digest of the record when it was scored: a run is not resumed with a record that has changed since."""
    answer: str = ""
    """The answers of all turns in order, as the chat template writes them, end-of-turn marks included, up to the
    last token."""
    token_starts: NDArray[np.int64] = field(default_factory=_no_tokens)
    """[T] the index in `answer`, in characters, at which each token starts."""
    token_ends: NDArray[np.int64] = field(default_factory=_no_tokens)
    """[T] the index at which each token ends: token t is answer[token_starts[t]:token_ends[t]]. If the bytes of a character are several
    tokens, all of them have this character. With some tokenizers the space before a word belongs to the word, with others to no token."""
    token_loss: NDArray[np.float32] | None = None
    """[T] negative log-likelihood with the image. This and the fields below are None unless the run had the measure."""
    null_token_loss: NDArray[np.float32] | None = None
    """[T] negative log-likelihood with the null image."""
    token_logit: NDArray[np.float32] | None = None
    """[T] the logit of the answer token with the image, as the model gives it."""
    null_token_logit: NDArray[np.float32] | None = None
    """[T] the logit of the answer token with the null image."""
    token_entropy: NDArray[np.float32] | None = None
    """[T] entropy over the vocabulary with the image, in nats."""
    null_token_entropy: NDArray[np.float32] | None = None
    """[T] entropy over the vocabulary with the null image."""
    encoder_vig: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    """Encoder -> [T] loss when only this encoder sees the null image, minus loss with the image; empty unless the run had `per_encoder`.
    The encoders' values need not add up to `token_vig`: the rest is told only by all encoders together, or by several of them alike."""
    image_digest: str = ""
    """Digest of the images' pixels when they were scored: a run is not resumed with other images under the same paths."""
    image_files: str = ""
    """Size and time of the images' files then; as long as these are the same, the pixels are not looked at."""

    def __repr__(self) -> str:
        losses = f"loss {self.loss:.3f} with the image, {self.null_loss:.3f} with the null image"
        return f"Score of record {self.id!r}: VIG {self.vig:.3f} nats; {losses}; {len(self.token_vig)} answer tokens"

    def _repr_html_(self) -> str:
        from vig.notebook import scores_html  # only notebooks need it

        return scores_html("", [self], self.token_vig)


def to_table(scores: Sequence[Score], schema: pa.Schema = SCHEMA) -> pa.Table:
    return pa.table({name: [_cell(score, name) for score in scores] for name in schema.names}, schema=schema)


def _cell(score: Score, column: str) -> Any:
    return score.encoder_vig[column.removeprefix(ENCODER)] if column.startswith(ENCODER) else getattr(score, column)


def from_table(table: pa.Table) -> list[Score]:
    columns = [_rows(column) for column in table.columns]
    return [_score(dict(zip(table.column_names, row, strict=True))) for row in zip(*columns, strict=True)]


def _score(cells: dict[str, Any]) -> Score:
    encoders = [name for name in cells if name.startswith(ENCODER)]
    encoder_vig = {name.removeprefix(ENCODER): cells.pop(name) for name in encoders}
    return Score(**cells, encoder_vig=encoder_vig)


def _rows(column: pa.ChunkedArray) -> list[Any]:
    """Return a list with a Python value or a numpy array for each row."""
    if not pa.types.is_list(column.type):
        return column.to_pylist()
    rows: list[Any] = []
    for chunk in column.chunks:
        values, ends = chunk.flatten().to_numpy(), [0, *chunk.value_lengths().to_numpy().cumsum().tolist()]
        rows += [values[start:end] for start, end in itertools.pairwise(ends)]  # np.split is slower
    return rows


def flat(column: pa.ChunkedArray) -> NDArray[Any]:
    """Return the values of all rows of a list column, row after row."""
    chunks = [chunk.flatten().to_numpy() for chunk in column.chunks]  # a single chunk is not copied
    return chunks[0] if len(chunks) == 1 else np.concatenate([np.empty(0, column.type.value_type.to_pandas_dtype()), *chunks])


def row_bounds(column: pa.ChunkedArray) -> NDArray[np.int64]:
    """Return [N + 1], the index at which each row of a list column starts among its values, and the end of the last row."""
    return np.concatenate([[0], pc.list_value_length(column).to_numpy().cumsum(dtype=np.int64)])
