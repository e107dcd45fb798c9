"""A VIG score is a `Score` in memory, and a row of a table in Arrow and on disk; each record has one score."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from encoders.runs import run_digest
from encoders.storage import fetched
from encoders.tables import write_table
from vig.processes import Processes
from vig.scoring.folder import SHARDS, ScoreFolder, manifest_file, read_lists, read_shard

# Shapes: N = records, T = answer tokens of one record, over all its turns; E = end-of-turn tokens among them;
# A = answer tokens of all records.

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


MEASURES = ("loss", "logit", "entropy")
"""The further values of each answer token that a run can save, each with the image and with the null image."""


ENCODER = "token_vig_of_"
"""With the name of an encoder behind it, a column of the VIG of this encoder. A score has these columns in `Score.encoder_vig`."""


def columns_of(measures: Sequence[str]) -> list[str]:
    """Return the names of the columns of these measures. They are fields of `Score`."""
    return [f"{start}token_{measure}" for measure in measures for start in ("", "null_")]


def schema_of(identity: Mapping[str, Any]) -> pa.Schema:
    """Return the columns that a run of this identity writes: `SCHEMA`, those of its measures, encoders and image files."""
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
    The encoders' values need not add up to `token_vig`: the rest is what they tell only together, or what both tell."""
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


@dataclass(frozen=True)
class Part:
    """A part holds consecutive scores: in memory the columns that every selection needs, and all columns on demand."""

    light: pa.Table
    read: Callable[[], pa.Table]
    """It returns the same rows with all columns."""


class Scores(Sequence[Score]):
    """Scores is a sequence in the order of the records. Arrow holds the scores as columns, and a `Score` is made on demand.

    Scores of a folder (`load_scores`) keep the columns `LIGHT` in memory and read the others from the folder, shard by shard.

    Attributes:
        manifest: the "identity" of the run, whether it is "complete", the ids of the records without a score ("text_only", "failures"),
            the name of its model ("about"), and its "calibration" (`vig.scoring.calibration`), which may be empty.
        schema: the columns of all scores.
        failures: id -> reason of every record that could not be scored.
    """

    def __init__(self, items: Iterable[Score], manifest: Mapping[str, Any], *, parts: Sequence[Part] = ()) -> None:
        self.schema = schema_of(manifest["identity"])
        table = to_table(list(items), self.schema)
        parts = [*parts, Part(table, table.slice)] if len(table) else list(parts)
        tables = [SCHEMA.empty_table().select(LIGHT), *(part.light.select(LIGHT) for part in parts)]
        self._light = pa.concat_tables(tables).combine_chunks()
        self._starts = np.cumsum([0, *(len(part.light) for part in parts)])  # [P + 1] for P parts
        self._readers = [part.read for part in parts]
        self._last: tuple[int, pa.Table] | None = None  # number and rows of the part that was read last
        self.manifest = dict(manifest)

    def __getitem__(self, index: Any) -> Any:  # a Score by its number or its id, or a list of them for a slice
        if isinstance(index, str):
            if index not in self.places:
                raise KeyError(f"no score of record {index!r}: {self.failures.get(index, 'it was not scored')}")
            index = self.places[index]
        places = range(len(self))[index]
        return self.at(places) if isinstance(places, range) else self.at([places])[0]

    def __len__(self) -> int:
        return len(self._light)

    def __iter__(self) -> Iterator[Score]:
        for number in range(len(self._readers)):
            yield from from_table(self._read(number))

    def at(self, places: Sequence[int]) -> list[Score]:
        """Return the scores at these indices, in their order. Each shard that holds any of them is read once."""
        wanted = np.array(places, np.int64)
        scores: dict[int, Score] = {}
        part_of = np.searchsorted(self._starts, wanted, side="right") - 1
        for number in np.unique(part_of).tolist():
            mine = wanted[part_of == number]
            scores |= zip(mine.tolist(), from_table(self._read(number).take(pa.array(mine - self._starts[number]))), strict=True)
        return [scores[place] for place in places]

    def _read(self, number: int) -> pa.Table:
        if self._last is None or self._last[0] != number:
            self._last = number, self._readers[number]()
        return self._last[1]

    def __repr__(self) -> str:
        state = "" if self.manifest["complete"] else "; the run did not finish"
        lines = [
            f"Scores of {len(self):,} records with {len(self.token_vig):,} answer tokens{state}",
            f"  {len(self.manifest['text_only']):,} records without an image, {len(self.failures):,} that could not be scored",
        ]
        if len(self):
            low, middle, high = np.quantile(self.vig, [0, 0.5, 1])
            lines.append(f"  VIG in nats: mean {self.vig.mean():.3f}, median {middle:.3f}, from {low:.3f} to {high:.3f}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from vig.notebook import SHOWN, scores_html  # only notebooks need it

        order = np.argsort(-self.vig, kind="stable").tolist()
        places = order if len(order) <= 2 * SHOWN else order[:SHOWN] + order[-SHOWN:]
        return scores_html(repr(self), self.at(places), self.token_vig)

    @property
    def ids(self) -> list[str]:
        return self._light["id"].to_pylist()

    @cached_property
    def places(self) -> dict[str, int]:
        """Return id -> index of the score."""
        return {id: place for place, id in enumerate(self.ids)}

    @cached_property
    def vig(self) -> NDArray[np.float32]:
        """Return [N], the VIG of the N records."""
        return self._light["vig"].to_numpy()

    @cached_property
    def loss(self) -> NDArray[np.float32]:
        """Return [N], the mean loss of the N records' answer tokens with the image, in nats."""
        return self._light["loss"].to_numpy()

    @cached_property
    def token_vig(self) -> NDArray[np.float32]:
        """Return [A], the VIG of all answer tokens, record by record. Record i has token_vig[bounds[i]:bounds[i + 1]]."""
        return _flat(self._light["token_vig"])

    @cached_property
    def bounds(self) -> NDArray[np.int64]:
        """Return [N + 1], the index at which the tokens of each record start in `token_vig`, and the end of the last record."""
        return _bounds(self._light["token_vig"])

    @cached_property
    def turn_ends(self) -> NDArray[np.int64]:
        """Return the end-of-turn tokens of all records, as indices into `token_vig`."""
        ends = self._light["turn_ends"]
        return _flat(ends) + np.repeat(self.bounds[:-1], np.diff(_bounds(ends)))

    @property
    def encoders(self) -> list[str]:
        """Return the encoders whose own VIG these scores hold."""
        return list(self.manifest["identity"].get("encoders", ()))

    def column(self, name: str) -> NDArray[np.float32]:
        """Return [A], a column of values of all answer tokens, for example "null_token_logit", in the order of `token_vig`.

        Raises:
            ValueError: for scores without this column; the message names the command that makes it.
        """
        if name.startswith(ENCODER) and name not in self.schema.names:
            has = ", ".join(self.encoders) or "none; score again into a new folder with per_encoder=True (mof vig score --per-encoder)"
            raise ValueError(f"these scores have no column {name!r}; encoders with a VIG of their own: {has}")
        if name not in self.schema.names:
            measure = name.rpartition("_")[2]
            raise ValueError(
                f"these scores have no column {name!r}; score again into a new folder with measures=({measure!r},) "
                f"(mof vig score --measures {measure})"
            )
        return np.concatenate([np.empty(0, np.float32), *(_flat(read()[name]) for read in self._readers)])

    def tokens_of(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the indices into `token_vig` of all answer tokens of the scores with these indices, score by score."""
        lengths = np.diff(self.bounds)[places]
        return np.arange(lengths.sum()) + np.repeat(self.bounds[places] - (lengths.cumsum() - lengths), lengths)

    @cached_property
    def digests(self) -> list[str]:
        """Return the digest that each record had when it was scored."""
        return self._light["digest"].to_pylist()

    @property
    def failures(self) -> dict[str, str]:
        return self.manifest["failures"]

    def table(self) -> pa.Table:
        """Return N rows with the columns of `schema`, which are fields of `Score`."""
        return pa.concat_tables([self.schema.empty_table(), *(read() for read in self._readers)])

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the scores to a new or empty folder, which `load_scores` reads.

        Raises:
            ValueError: for a folder that holds anything.
        """
        with ScoreFolder(folder, self.manifest["identity"], self.schema, Processes()) as target:
            if held := len(target.read(["id"])):
                raise ValueError(f"{folder} already holds {held} scores; give an empty folder")
            path, run = target.shard
            if len(self):
                write_table(Path(path.format(0)), self.table(), run)
            target.finish(self.manifest["text_only"], self.failures, self.manifest.get("about", {}), self.manifest.get("calibration"))


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


def _flat(column: pa.ChunkedArray) -> NDArray[Any]:
    """Return the values of all rows of a list column, row after row."""
    chunks = [chunk.flatten().to_numpy() for chunk in column.chunks]  # a single chunk is not copied
    return chunks[0] if len(chunks) == 1 else np.concatenate([np.empty(0, column.type.value_type.to_pandas_dtype()), *chunks])


def _bounds(column: pa.ChunkedArray) -> NDArray[np.int64]:
    """Return [N + 1], the index at which each row of a list column starts among its values, and the end of the last row."""
    return np.concatenate([[0], pc.list_value_length(column).to_numpy().cumsum(dtype=np.int64)])


def load_scores(folder: str | os.PathLike[str]) -> Scores:
    """Load the scores in a folder that `score` wrote. If the run was interrupted, the saved scores are loaded and a warning is logged.

    Raises:
        ValueError: for a folder without a manifest, a shard that cannot be read, shards that hold fewer scores than the run had saved,
            or shards that hold a record twice.
    """
    path = fetched(folder)
    manifest = {"complete": False, **manifest_file(path).read()}
    run = run_digest(manifest["identity"])
    schema = schema_of(manifest["identity"])
    parts = [Part(read_shard(shard, schema, run, LIGHT), partial(read_shard, shard, schema, run)) for shard in sorted(path.glob(SHARDS))]
    text_only, failures = read_lists(path, manifest.get("files", {})) if manifest["complete"] else ([], {})
    outcome = {"complete": manifest["complete"], "text_only": text_only, "failures": failures, "about": manifest.get("about", {})}
    outcome["calibration"] = manifest.get("calibration", {})
    scores = Scores([], {**outcome, "identity": manifest["identity"]}, parts=parts)
    if not manifest["complete"]:
        logger.warning("%s: the scoring run did not finish; run it again with this folder to resume it", folder)
    elif manifest["scores"] != len(scores):
        raise ValueError(
            f"{folder}: the run saved {manifest['scores']} scores, but the shards hold {len(scores)}; put back the missing shards, "
            "remove copies, or score again with this folder to fill the gap"
        )
    if twice := len(scores) - len(scores.places):
        raise ValueError(f"{folder}: {twice} records are in the shards more than once; remove copies of shards")
    return scores
