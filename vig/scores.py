"""VIG scores in memory and on disk: a folder of parquet shards with a manifest, safe to kill and resume."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vig.manifest import differences

# Shapes: T = answer tokens of one record, over all its turns; E = end-of-turn tokens among them.

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "digest": pa.string(),
        "vig": pa.float32(),
        "loss": pa.float32(),
        "null_loss": pa.float32(),
        "token_vig": pa.list_(pa.float32()),
        "token_ids": pa.list_(pa.int64()),
        "turn_ends": pa.list_(pa.int64()),
    }
)


@dataclass(frozen=True, slots=True, eq=False)
class Score:
    """How much the image helped one record's answer, in nats; signed: a misleading image scores below 0."""

    id: str
    vig: float
    """Mean of `token_vig`, which is log(PPL(answer | null image) / PPL(answer | image)); a float32 value."""
    loss: float
    """Mean negative log-likelihood of the answer tokens given the image."""
    null_loss: float
    """The same given the null image."""
    token_vig: NDArray[np.float32]
    """[T] loss with the null image minus loss with the image, per answer token."""
    token_ids: NDArray[np.int64]
    """[T] the answer tokens."""
    turn_ends: NDArray[np.int64]
    """[E] indices into the answer tokens: the end-of-turn token of each turn that has one."""
    digest: str
    """Of the record as it was scored: a record that has changed since is not resumed silently."""


class Scores(Sequence[Score]):
    """Scores in the order of the records.

    Attributes:
        manifest: the identity of the run, and what became of its records.
        failures: id -> reason, of every record that could not be scored.
    """

    def __init__(self, items: Iterable[Score], manifest: Mapping[str, Any]) -> None:
        self._items = list(items)
        self.manifest = dict(manifest)

    def __getitem__(self, index: Any) -> Any:  # a Score, or a list of them for a slice
        return self._items[index]

    def __len__(self) -> int:
        return len(self._items)

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

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write to a new or empty folder, which `load_scores` reads. ValueError when it holds anything."""
        target = ScoreFolder(folder, self.manifest["identity"])
        if target.scores:
            raise ValueError(f"{folder} already holds {len(target.scores)} scores; give an empty folder")
        target.append(self._items)
        target.finish(self.manifest["text_only"], self.failures)


def load_scores(folder: str | os.PathLike[str]) -> Scores:
    """The scores in a folder that `score` wrote; of an interrupted run those it had saved, with a warning.

    Raises:
        ValueError: for a folder without a manifest, a shard that cannot be read, naming it, or shards that together do not
            hold as many scores as the run had saved.
    """
    manifest = _read_manifest(Path(folder))
    scores = _read_shards(Path(folder))
    saved = manifest.pop("scores", None)
    if not manifest["complete"]:
        logger.warning("%s: the scoring run did not finish; run it again with this folder to resume it", folder)
    elif saved is not None and saved != len(scores):  # None: a folder from before the number was written down
        raise ValueError(
            f"{folder}: the run saved {saved} scores, but the shards hold {len(scores)}; put back the missing shards, remove "
            "copies, or score again with this folder to fill the gap"
        )
    return Scores(scores, manifest)


class ScoreFolder:
    """The output folder of one run. Every file is written under a temporary name and renamed, so none is ever partial.

    Args:
        folder: new, empty, or of an earlier run with the same identity, whose scores are then in `.scores`.
        identity: see `vig.manifest.scoring_identity`.

    Raises:
        ValueError: for a folder that holds another run, saying what differs, or other files.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: Mapping[str, Any]) -> None:
        self.path = Path(folder)
        self.path.mkdir(parents=True, exist_ok=True)
        for leftover in (*self.path.glob("shard-*.parquet.tmp"), *self.path.glob(f"{MANIFEST}.tmp")):  # of a killed run
            leftover.unlink()
        self._manifest: dict[str, Any] = {"complete": False, "text_only": [], "failures": {}}
        self._manifest["identity"] = dict(identity)
        self.scores: list[Score] = []
        if (self.path / MANIFEST).exists():
            self._manifest = _read_manifest(self.path)
            different = list(differences(self._manifest["identity"], identity))
            if different:
                raise ValueError(f"{self.path} holds the scores of another run; give a new folder. Different:\n  " + "\n  ".join(different))
            self.scores = _read_shards(self.path)
        elif any(self.path.iterdir()):
            raise ValueError(f"{self.path} is not empty and holds no {MANIFEST} of a scoring run; give a new folder")
        else:
            self._update_manifest()
        self._saved = len(self.scores)
        self._next_shard = 1 + max((int(p.stem.removeprefix("shard-")) for p in _shards(self.path)), default=-1)

    def append(self, scores: Sequence[Score]) -> None:
        """Save one more shard; nothing for no scores."""
        if not scores:
            return
        if self._manifest["complete"]:  # more records than last time
            self._update_manifest(complete=False)
        columns = {name: [getattr(score, name) for score in scores] for name in _SCHEMA.names}
        table = pa.table(columns, schema=_SCHEMA)
        _write_atomically(self.path / f"shard-{self._next_shard:05d}.parquet", lambda p: pq.write_table(table, p))
        self._next_shard += 1
        self._saved += len(scores)

    def finish(self, text_only: Sequence[str], failures: Mapping[str, str]) -> None:
        """Mark the run as complete, with its text-only records, its failures and the number of scores in the shards."""
        self._update_manifest(complete=True, scores=self._saved, text_only=list(text_only), failures=dict(failures))

    def _update_manifest(self, **entries: Any) -> None:
        self._manifest.update(entries)
        text = json.dumps(self._manifest, indent=1)
        _write_atomically(self.path / MANIFEST, lambda p: p.write_text(text))


def _write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())  # otherwise a power cut could leave the name without the bytes
    os.replace(temporary, path)


def _read_manifest(folder: Path) -> dict[str, Any]:
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder} holds no {MANIFEST}: expected a folder that vig.score wrote")
    return json.loads((folder / MANIFEST).read_text())


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*.parquet"))


def _read_shards(folder: Path) -> list[Score]:
    scores: list[Score] = []
    for path in _shards(folder):
        try:
            table = pq.read_table(path)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} cannot be read ({error}); delete it and score again to fill the gap") from error
        columns = {name: _rows(table[name]) for name in _SCHEMA.names}
        scores.extend(Score(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True))
    return scores


def _rows(column: pa.ChunkedArray) -> list[Any]:
    """One Python value or one numpy array per row."""
    if not pa.types.is_list(column.type):
        return column.to_pylist()
    rows = column.combine_chunks()
    return np.split(rows.flatten().to_numpy(), rows.value_lengths().to_numpy().cumsum()[:-1])
