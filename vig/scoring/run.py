"""`score` measures VIG by two teacher-forced passes per record, the first with its image and the second with a null image."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from itertools import islice
from typing import Any

import pyarrow as pa
from PIL import Image
from transformers import PreTrainedModel, ProcessorMixin

from encoders import StoredImages
from encoders.cluster import Cluster, grown, worked
from encoders.progress import progress_bar
from mof.data.digests import digest
from mof.data.record_files import UnreadableRow
from mof.data.records import ImageSource, RecordError, images_of, refuse_missing_images, to_record
from mof.data.rows import RawRecord, Row, id_of, opened, rows, rows_by_id
from vig.nulls import NullImages
from vig.positions import most_tokens
from vig.processes import Processes
from vig.scoring.batches import by_image
from vig.scoring.calibration import Sample, calibration, with_swapped_images
from vig.scoring.encoder_branches import mixture_of
from vig.scoring.folder import ScoreFolder
from vig.scoring.hidden_images import image_token_of
from vig.scoring.identity import scoring_identity
from vig.scoring.items import LANES, ItemScorer, ScoreItem, Total
from vig.scoring.pairs import PairReader
from vig.scoring.passes import WINDOW_BATCHES
from vig.scoring.score_table import MEASURES, Score, schema_of, to_table
from vig.scoring.scores import Part, Scores

logger = logging.getLogger(__name__)


def score(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    records: Iterable[RawRecord],
    output_dir: str | os.PathLike[str] | None = None,
    null: str | Callable[[Image.Image], Image.Image] = "blur",
    *,
    image_folder: str | os.PathLike[str] | None = None,
    batch_tokens: int = 16384,
    batch_size: int = 64,
    max_length: int = 2048,
    only_image: int | None = None,
    stored_images: tuple[StoredImages, StoredImages] | None = None,
    seed: int = 0,
    measures: Sequence[str] = (),
    per_encoder: bool = False,
    calibrate: bool = False,
    cluster: Cluster | None = None,
    about: Mapping[str, str] | None = None,
) -> Scores:
    """Measure the visual information gain (VIG) of every answer token of every record that has an image (arXiv 2602.17186).

    The VIG of a token is its negative log-likelihood (natural logarithm) with the null image minus its negative log-likelihood
    with the image. The VIG of a record is the mean over the answer tokens of all its turns. Records without an image are not
    scored. Records that cannot be read or have no answer are logged, skipped and listed in `scores.failures`.

    On several processes (torchrun, accelerate), each process calls this with the same arguments and scores its share. Records with
    the same images are in the same share. All processes return all scores. Another number of processes may resume the run.

    In bfloat16 the VIG of a token changes by 0.002 nats on average, 0.04 at the 99th percentile and 0.12 at most. The VIG of a record
    changes by 0.005 at most, and 99.6 % of the best 70 % of the records stay the same (12,722 answer tokens of 360 records, miniature
    model).

    Args:
        model: any image-text-to-text model of transformers. It stays on its device and is used in eval mode.
        processor: its processor, with a chat template.
        records: LLaVA records {"id", "image", "conversations"}, chat messages {"messages", "images"} or lists of messages, as
            `mof.data.records.to_record` reads them; or a file, a data set or a DataFrame of them (`mof.data.rows.opened`). Records
            with equal ids are numbered. In a list, records with the same images are scored together. A generator or a
            Hugging Face data set is read once and never held in memory.
        output_dir: the folder of the scores (`vig.scoring.folder`), which all processes see. An interrupted run with the same
            settings is resumed there.
        null: a name in `vig.nulls.NULL_NAMES`, or a function from an RGB image to an RGB image of the same size.
        image_folder: the folder in which relative image paths start.
        batch_tokens: tokens per forward pass; halved for the rest of the run when memory runs out.
        batch_size: records per forward pass, at most. Scores do not depend on `batch_size` and `batch_tokens`.
        max_length: tokens; longer records are cut as in training (`vig.positions` may cut earlier).
        only_image: index of the single image in each record that the null image replaces; by default all images are replaced.
            Each index needs a separate run and folder.
        stored_images: two feature stores that replace the runs of the encoders: the features of the images, and of the blurred
            images (`mof encode --model`, without and with `--blurred`). With null="blur" only.
        seed: seed of the random null images.
        measures: "loss", "logit" and "entropy" save this value of every answer token too, with the image and with the null image
            (`vig.selection.measures` needs them).
        per_encoder: measure the VIG of each encoder of a mixture too: the loss when this encoder alone sees the null image, minus the
            loss with the image (`Score.encoder_vig`). Each encoder costs a further pass of the language model, and no encoder runs
            more often.
        calibrate: score 1 % of the records (100 to 1,000) with swapped images too, and keep in the manifest how well VIG tells right
            from swapped images (`vig.scoring.calibration`).
        cluster: Ray's actors that score (`encoders.cluster`), in place of this process. They see the images and the folder of the
            scores; the model, which may lie in the memory of the CPU here, is sent to them.
        about: texts for readers of the scores, beside the name of the model (`ScoreFolder.finish`).

    Raises:
        ValueError: for a list whose first records all lack their images, an unknown null image, `per_encoder` with a model that is no
            mixture or a null image that no encoder sees, a processor without a chat template, an output folder that holds another run or
            to which another run is writing, or a record that has changed since it was scored.
    """
    if min(batch_size, batch_tokens) < 1:
        raise ValueError(f"batch_size and batch_tokens must be at least 1, got {batch_size} and {batch_tokens}")
    if unknown := sorted(set(measures) - set(MEASURES)):
        raise ValueError(f"unknown measures {', '.join(unknown)}; expected some of {', '.join(MEASURES)}")
    measures = [name for name in MEASURES if name in measures]
    records = opened(records)
    nulls = _null_images(records, null, seed, only_image, image_folder, stored_images)
    encoders = list(mixture_of(model).encoders) if per_encoder else []
    if per_encoder and (nulls.drops or nulls.hides):
        raise ValueError(f"per_encoder shows a null image to an encoder, and null={null!r} has none; take 'blur' or another null image")
    identity = scoring_identity(model, processor, nulls.description, max_length, seed, measures, encoders)
    schema = schema_of(identity)
    hidden_token = image_token_of(model) if nulls.hides else None
    new_reader = partial(PairReader, processor, image_folder, nulls, most_tokens(model.config, max_length), stored_images, hidden_token)
    if isinstance(records, Sequence):  # a list can show a wrong folder before anything is scored
        refuse_missing_images(records, image_folder)
    processes = Processes.all()
    if cluster is not None and processes.count > 1:
        raise ValueError("a cluster scores in place of processes that torchrun or accelerate starts: use either")
    with ExitStack() as stack:
        stack.callback(processes.close)
        processes.require_equal(identity, "model, processor and settings")
        folder = None if output_dir is None else stack.enter_context(ScoreFolder(output_dir, identity, schema, processes))
        shard = None if folder is None else folder.shard
        options: dict[str, Any] = {"batch_tokens": batch_tokens, "batch_size": batch_size, "measures": measures, "per_encoder": per_encoder}
        make = partial(ItemScorer, model, new_reader, shard, schema, moves=cluster is not None, **options)
        done = {} if folder is None else folder.known()
        ids: dict[str, None] = {}  # all ids, in the order of the records; complete when all records are read
        sample = Sample()
        own: Iterable[Row] = _own_share(records, done, ids, processes, sample, new_reader())
        total = None
        if isinstance(records, Sequence):
            own = by_image(list(own))
            total = sum(id_of(raw) not in done for raw in own)
            logger.info("%d of %d records are to be scored", total, len(records))

        def items() -> Iterator[ScoreItem]:
            yield from _items(own, done, folder, batch_size)
            if _known_calibration(sample, folder, calibrate).keys() == {"digest"}:
                mine = with_swapped_images(sample.records, image_folder)[processes.rank :: processes.count]
                yield from (ScoreItem(share, None, swapped=True) for share in _cut(mine, batch_size))

        result, swapped, seen = Total(), Total(), 0
        with (
            progress_bar("records", total, processes.rank == 0) as advance,
            closing(worked(make, items(), cluster, LANES)) as work,
        ):
            for item, parts in work:
                (swapped if item.swapped else result).add(parts)
                seen += 0 if item.swapped else len(item.records)
                advance(seen, f"mean VIG {result.sum_of_vig / result.number:.3f}" if result.number else "")
        known = _known_calibration(sample, folder, calibrate)
        manifest = {"identity": dict(identity), "about": {"model": model.name_or_path, **(about or {})}, "calibration": known}
        return _together(processes, folder, result, swapped.scores, ids, manifest)


def _null_images(
    records: Iterable[RawRecord],
    null: str | Callable[[Image.Image], Image.Image],
    seed: int,
    only_image: int | None,
    image_folder: str | os.PathLike[str] | None,
    stored_images: tuple[StoredImages, StoredImages] | None,
) -> NullImages:
    """Return the object that makes the null images of a run. The arguments are as in `score`, which raises the same errors."""
    if null == "shuffle" and isinstance(records, Iterator):
        raise ValueError("null='shuffle' draws from the images of all records, which an iterator gives only once: give a list")
    nulls = NullImages(null, seed, _donors(records, image_folder) if null == "shuffle" else (), only_image)
    if stored_images is not None:
        if null != "blur" or only_image is not None or [store.view.blurred for store in stored_images] != [False, True]:
            raise ValueError("stored_images are those of the images and of all of them blurred, in this order, for null='blur'")
        nulls.description["stored"] = [store.description for store in stored_images]
    return nulls


def _together(
    processes: Processes,
    folder: ScoreFolder | None,
    result: Total,
    swapped: list[Score],
    ids: Mapping[str, None],
    manifest: dict[str, Any],
) -> Scores:
    """Return the scores of all processes, in the order of the records."""
    if processes.count > 1:
        processes.require_equal(digest(sorted(ids)), "the records")
    parts = processes.gather((result.scores, swapped, result.text_only, result.failures))
    text_only = {id for _, _, ids_without, _ in parts for id in ids_without}
    reasons = {id: reason for _, _, _, failures in parts for id, reason in failures.items()}
    lists = [id for id in ids if id in text_only], {id: reasons[id] for id in ids if id in reasons}
    schema = schema_of(manifest["identity"])
    table = folder.read() if folder is not None else to_table([score for scored, *_ in parts for score in scored], schema)
    places = {id: place for place, id in enumerate(table["id"].to_pylist())}
    in_order = table.take(pa.array([places[id] for id in ids if id in places], pa.int64()))
    outcome = {"complete": True, "text_only": lists[0], "failures": lists[1]}
    scores = Scores([], {**outcome, **manifest}, parts=[Part(in_order, in_order.slice)])
    if scores.manifest["calibration"].keys() == {"digest"}:  # a new calibration: all records of its sample have their scores now
        others = [score for _, mine, *_ in parts for score in mine if score.id in scores.places]
        scores.manifest["calibration"] |= calibration([scores[score.id] for score in others], others, scores.vig)
    if folder is not None:
        processes.on_first(lambda: folder.finish(*lists, manifest["about"], scores.manifest["calibration"]))
    return scores


def _own_share(
    records: Iterable[RawRecord],
    done: Mapping[str, tuple[str, str, str]],
    ids: dict[str, None],
    processes: Processes,
    sample: Sample,
    reader: PairReader,
) -> Iterator[Row]:
    """Yield the records of this process. The ids of all records are put into `ids`, and all records are offered to `sample`.

    Args:
        done: id -> digests of the records that have a score (`ScoreFolder.known`).

    Raises:
        ValueError: for a record that has changed since it was scored, or whose image was replaced.
    """
    for id, raw in rows_by_id(records):
        ids[id] = None
        sample.add(id, raw)
        if id in done:
            scored, *images = done[id]
            if scored != digest(raw):
                raise ValueError(f"the folder holds scores of other records under the same ids; give a new folder. Changed: {id}")
            if not isinstance(raw, UnreadableRow) and reader.shows_others(raw, *images):
                raise ValueError(f"an image of record {id!r} was replaced by another since it was scored; give a new folder")
        if processes.count == 1 or int(digest(images_of(raw) or raw), 16) % processes.count == processes.rank:
            yield raw


def _items(own: Iterable[Row], done: Collection[str], folder: ScoreFolder | None, batch_size: int) -> Iterator[ScoreItem]:
    """Yield the items of the records that have no score yet."""
    for number, share in enumerate(_cut(own, batch_size)):
        if todo := [raw for raw in share if id_of(raw) not in done]:
            if folder is not None:
                folder.begin()
            yield ScoreItem(todo, None if folder is None else folder.number(number))


def _known_calibration(sample: Sample, folder: ScoreFolder | None, calibrate: bool) -> dict[str, Any]:
    """Return the calibration that an earlier run made with this sample, only its "digest" if it is to be made now, or {}.

    All records must have been read before.
    """
    known = {} if folder is None else folder.calibration
    if known.get("digest") == sample.digest:
        return known
    return {"digest": sample.digest} if calibrate else {}


def _cut(records: Iterable[Row], batch_size: int) -> Iterator[list[Row]]:
    """Cut records into items. An item depends on all records, done or not: a run that goes on after a kill makes the same batches."""
    position, rest = 0, iter(records)
    while share := list(islice(rest, grown(position, batch_size, WINDOW_BATCHES * batch_size))):
        yield share
        position += len(share)


def _donors(records: Iterable[RawRecord], image_folder: str | os.PathLike[str] | None) -> list[ImageSource]:
    """Return the first image of every record that has images and can be read."""
    donors: list[ImageSource] = []
    for raw in rows(records):
        try:
            donors += to_record(raw, image_folder).images[:1]
        except RecordError:  # `PairReader` reports the record later
            continue
    return donors
