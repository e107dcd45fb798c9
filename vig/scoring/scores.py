"""Scores is the sequence of all scores of a run, in memory or in the folder that `score` wrote."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from encoders.runs import run_digest
from encoders.storage import fetched
from encoders.tables import write_table
from vig.processes import Processes
from vig.scoring.calibration import diagnosis
from vig.scoring.folder import SHARDS, ScoreFolder, manifest_file, read_lists, read_shard
from vig.scoring.score_table import ENCODER, LIGHT, SCHEMA, Score, flat, from_table, row_bounds, schema_of, to_table

# Shapes: N = records, A = answer tokens of all records.

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """A part holds consecutive scores: in memory the columns that every selection needs, and all columns on demand."""

    light: pa.Table
    read: Callable[[], pa.Table]
    """This function returns the same rows with all columns."""


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
        lines += [f"  {line}" for line in diagnosis(self.manifest.get("calibration", {})).splitlines()]
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
        return flat(self._light["token_vig"])

    @cached_property
    def bounds(self) -> NDArray[np.int64]:
        """Return [N + 1], the index at which the tokens of each record start in `token_vig`, and the end of the last record."""
        return row_bounds(self._light["token_vig"])

    @cached_property
    def turn_ends(self) -> NDArray[np.int64]:
        """Return the end-of-turn tokens of all records, as indices into `token_vig`."""
        ends = self._light["turn_ends"]
        return flat(ends) + np.repeat(self.bounds[:-1], np.diff(row_bounds(ends)))

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
        return np.concatenate([np.empty(0, np.float32), *(flat(read()[name]) for read in self._readers)])

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
