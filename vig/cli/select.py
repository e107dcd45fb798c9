"""`mof vig select` chooses the records and answer tokens to train on."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import typer
from pydantic_core import to_json

from encoders.command_groups import starts_over
from encoders.command_options import Records, output_option, seed_option
from encoders.digests import file_digest
from encoders.saved_folders import card_path
from encoders.terminal import say
from encoders.whole_files import write_whole
from mof.data.digests import record_id, unselected
from mof.data.rows import stream_rows
from vig.scoring.calibration import verdict
from vig.scoring.folder import RECORDS_DIGEST
from vig.scoring.scores import Scores, load_scores
from vig.selection import thresholds
from vig.selection.card import Index, index_path, write_card, write_index
from vig.selection.measures import MEASURES
from vig.selection.random_control import Level, random_selection
from vig.selection.sources import record_sources


@starts_over
def select(
    scores: Annotated[Path, typer.Option(help="Folder that `mof vig score` wrote.")],
    records: Records,
    output: Annotated[Path, output_option("JSON file (or .jsonl, a record a line) for the selected records, each with its token_mask.")],
    keep: Annotated[float, typer.Option(help="Share of the samples to keep, in [0, 1].")] = 0.7,
    threshold: Annotated[float | None, typer.Option(help="Keep samples from this VIG on, in place of --keep.")] = None,
    floor: Annotated[
        bool, typer.Option("--floor", help="Drop only the samples and tokens with a negative VIG, in place of --keep and --threshold.")
    ] = False,
    by: Annotated[str, typer.Option(help=f"Measure to choose by: {', '.join(MEASURES)}.")] = "vig",
    reference: Annotated[
        Path | None, typer.Option(help="Scores of the same records by another model: choose by the loss minus the loss there (RHO-1).")
    ] = None,
    token_threshold: Annotated[
        str,
        typer.Option(help="Supervise tokens from this VIG on: a number, 'shared' (the threshold of the samples) or 'none' (all tokens)."),
    ] = "shared",
    token_keep: Annotated[
        float | None, typer.Option(help="Share of the kept samples' answer tokens to supervise, in place of --token-threshold.")
    ] = None,
    end_of_turn: Annotated[bool, typer.Option(help="Supervise the ends of turns, whatever their VIG is.")] = True,
    source_key: Annotated[
        str | None, typer.Option(help="Key of a record that names its source; 'image' takes the top folder of its image.")
    ] = None,
    quota: Annotated[
        list[str] | None,
        typer.Option(help="Smallest share to keep of every source (0.3) or of a single source (ocr_vqa=0.5). Can be given several times."),
    ] = None,
    clusters: Annotated[
        int | None,
        typer.Option(min=1, help="Number of clusters of the first questions (k-means): keep the share --keep of each. Not with --quota."),
    ] = None,
    random: Annotated[
        Level | None, typer.Option(help="Draw as many tokens at random instead: whole samples, tokens of all samples, or both.")
    ] = None,
    seed: Annotated[int, seed_option("Seed of --random and --clusters.")] = 0,
    weights: Annotated[
        tuple[float, float] | None, typer.Option(help="Weigh tokens by their VIG between these two, in place of a hard mask.")
    ] = None,
) -> None:
    """Keep the records, and in them the answer tokens, that the image helped most.

    \b
    Example:
      mof vig select --scores runs/scores --records data/train.json --keep 0.7 --output data/selected.json
    \b
    At least 30 % of each source, told apart by image folder:
      mof vig select --scores runs/scores --records data/train.json --keep 0.7 --source-key image --quota 0.3 --output data/selected.json
    """
    if output.resolve() == records.resolve():
        raise ValueError(f"--output {output} would overwrite the --records; give another file")
    loaded, quotas = load_scores(scores), _quota(quota or [], source_key)
    if clusters is not None:
        if source_key is not None or quota or threshold is not None or floor:
            raise ValueError("--clusters has a quota of its own; leave out --source-key, --quota, --threshold and --floor")
        sources = _clusters(loaded, records, clusters, seed)
    else:
        sources = {} if source_key is None else record_sources(stream_rows(records), source_key)
    selection = thresholds.select(
        loaded,
        keep,
        threshold=threshold,
        token_keep=token_keep,
        token_threshold=_token_threshold(token_threshold),
        keep_end_of_turn=end_of_turn,
        sources=sources,
        quota=quotas if clusters is None else keep,
        by=by,
        reference=None if reference is None else load_scores(reference),
        floor=floor,
    )
    if random is not None:
        selection = random_selection(selection.scores, selection, seed, random)
    if weights is not None:
        selection = selection.weighted(*weights)
    given = Counter[None]()
    as_scored = records.is_file() and loaded.manifest["about"].get(RECORDS_DIGEST) == file_digest(records)
    chosen, index = selection.applied(_counted(stream_rows(records), given), as_scored=as_scored), Index(array("q"), [])
    index_path(output).unlink(missing_ok=True)  # after a crash, no old index lies beside new records
    kept = write_records(output, _noted(chosen, given, index))
    settings = {
        "keep": None if floor or threshold is not None else keep, "threshold": threshold, "floor": floor,
        "token_threshold": token_threshold, "token_keep": token_keep,
        "end_of_turn": end_of_turn, "source_key": source_key, "quota": quota or [], "clusters": clusters, "random": random,
        "seed": seed, "weights": weights,
        "reference": None if reference is None else str(reference),
    }  # fmt: skip
    write_index(output, index)
    write_card(output, selection, settings, kept)
    if random is None and by == "vig" and reference is None and (said := verdict(loaded.manifest["calibration"])):
        say(said)
    say(
        f"{selection.summary()}\n{kept} of {given[None]} records written to {output}, their rows to {index_path(output)}, "
        f"their card to {card_path(output)}"
    )


def _clusters(scores: Scores, records: Path, count: int, seed: int) -> dict[str, str]:
    """Return id -> cluster, by the embeddings of the model that made the scores."""
    from encoders.saved_models import load_network, load_processor  # slow to import
    from vig.selection.clusters import instruction_clusters

    folder = Path(scores.manifest["about"].get("model", ""))
    if not folder.is_dir() or not folder.name:
        raise ValueError(f"--clusters needs the model of the scores, which was in {str(folder)!r}; put it back there")
    processor = load_processor(folder)
    return instruction_clusters(load_network(folder), processor, lambda: stream_rows(records), count, seed)


def _counted(records: Iterable[Any], counter: Counter[None]) -> Iterator[Any]:
    for record in records:
        counter[None] += 1
        yield record


def _noted(chosen: Iterable[dict[str, Any]], given: Counter[None], index: Index) -> Iterator[dict[str, Any]]:
    """Yield the chosen records, and note the row and the id of each. The last row that was given is that of the record."""
    for record in chosen:
        index.rows.append(given[None] - 1)
        index.ids.append(record_id(record))
        yield record


def write_records(path: Path, records: Iterable[Mapping[str, Any]]) -> int:
    """Write the records as they come: as a list, a record in each line of a .jsonl file, or rows of a .parquet file. Return their number.

    Raises:
        ValueError: for records that hold images and are not written as .parquet, or that a table cannot hold as they are.
    """
    if path.suffix == ".parquet":
        return _write_table(path, list(records))
    start, between, end = (b"", b"\n", b"\n") if path.suffix == ".jsonl" else (b"[", b",\n", b"]\n")
    count = 0

    def write(temporary: Path) -> None:
        nonlocal count
        with temporary.open("wb") as file:
            file.write(start)
            for count, record in enumerate(records, start=1):
                file.write((between if count > 1 else b"") + as_json(record, path))
            file.write(end)

    write_whole(path, write)
    return count


def as_json(record: Mapping[str, Any], path: Path) -> bytes:
    """Return a record as a line of JSON. pydantic writes it in a third of the time, but no half of a surrogate pair."""
    try:
        return to_json(record, inf_nan_mode="constants", fallback=partial(_refuse, path))
    except ValueError:
        return json.dumps(record, default=partial(_refuse, path)).encode()


def _write_table(path: Path, records: list[Mapping[str, Any]]) -> int:
    names = dict.fromkeys(name for record in records for name in record)
    table = pa.table({name: [record.get(name) for record in records] for name in names})
    if [unselected(row) for row in table.to_pylist()] != [unselected(record) for record in records]:  # their digests would not fit
        raise ValueError(f"{path}: a table has the same entries in all rows, but these records differ; write a .jsonl file")
    write_whole(path, lambda temporary: pq.write_table(table, temporary))
    return len(records)


def _refuse(path: Path, value: Any) -> None:
    raise ValueError(f"{path} cannot hold {type(value).__name__}, such as images in records; give an --output that ends in .parquet")


def _token_threshold(text: str) -> float | Literal["shared"] | None:
    if text == "shared":
        return "shared"
    return None if text == "none" else _number("--token-threshold", text)


def _quota(texts: list[str], source_key: str | None) -> float | dict[str, float]:
    """Return 0.3 for ["0.3"], and {"a": 0.3, "b": 0.5} for ["a=0.3", "b=0.5"]."""
    if texts and source_key is None:
        raise ValueError("--quota needs --source-key, which names the sources")
    if len(texts) == 1 and "=" not in texts[0]:
        return _number("--quota", texts[0])
    pairs = [text.rpartition("=") for text in texts]
    if not all(name for name, _, _ in pairs):
        raise ValueError(f"--quota takes one share for all sources, or NAME=SHARE for each source; got {' '.join(texts)}")
    return {name: _number("--quota", share) for name, _, share in pairs} if pairs else 0.0


def _number(option: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{option}: {text!r} is no number") from None
