"""VIG scoring: two teacher-forced passes per record, one with its image and one with a null image."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin

from encoders import StoredImages
from mof.records import ImageSource, RecordError, digest, record_id, to_record
from vig.answer_losses import AnswerLosses
from vig.batches import Batch, by_image, make_batches, windows
from vig.manifest import scoring_identity
from vig.nulls import NullImages
from vig.pairs import Pair, PairReader, RawRecord, unique_ids
from vig.scores import Score, ScoreFolder, Scores

# Shapes: N = answer tokens in a batch, T = answer tokens of one record.

logger = logging.getLogger(__name__)

SHARD_RECORDS = 256  # at most so many scores are lost when a run is killed
WINDOW_BATCHES = 8  # so many batches of records are read before they are sorted by length and by image


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
) -> Scores:
    """Visual information gain of every answer token of every record that has an image (arXiv 2602.17186).

    Token VIG is the token's negative log-likelihood (natural logarithm) with the null image minus that with the image;
    a record's VIG is the mean over all its answer tokens, those of all its turns together. Records without an image are
    not scored; records that cannot be read or have no answer are logged, skipped and listed in `scores.failures`.

    Args:
        model: any image-text-to-text model of transformers, used where it is and as it is, in eval mode.
        processor: its processor, with a chat template that marks the answers by {% generation %}.
        records: LLaVA records {"id", "image", "conversations"} or chat messages {"messages", "images"}. Of a list, those on
            the same images are scored together; anything else, a generator say, is read once and never held in memory.
        output_dir: where the scores are saved; a folder of an interrupted run with the same settings is resumed.
        null: a name in `vig.nulls.NULL_NAMES`, or a function from an RGB image to an RGB image of the same size.
        image_folder: what relative image paths are relative to.
        batch_tokens: tokens per forward pass; halved for the rest of the run when memory runs out.
        batch_size: records per forward pass, at most. Neither changes the scores.
        max_length: tokens; longer records are cut as in training.
        only_image: index of the one image of each record that the null image replaces; by default all are replaced.
        stored_images: features out of stores instead of running the encoders: of the images, and of the blurred images
            (`mof encode --model`, without and with `--blurred`). With null="blur" only.
        seed: of the null images that are random.

    Raises:
        ValueError: for duplicated ids, an unknown null image, a chat template without generation spans, an output
            folder that holds another run, or a record that has changed since it was scored.
    """
    if min(batch_size, batch_tokens) < 1:
        raise ValueError(f"batch_size and batch_tokens must be at least 1, got {batch_size} and {batch_tokens}")
    if null == "shuffle" and isinstance(records, Iterator):
        raise ValueError("null='shuffle' draws from the images of all records, which an iterator gives only once: give a list")
    nulls = NullImages(null, seed, _donors(records, image_folder) if null == "shuffle" else (), only_image)
    if stored_images is not None:
        if null != "blur" or only_image is not None or [one.view.blurred for one in stored_images] != [False, True]:
            raise ValueError("stored_images are those of the images and of all of them blurred, in this order, for null='blur'")
        nulls.description["stored"] = [one.description for one in stored_images]
    identity = scoring_identity(model, processor, nulls.description, max_length, seed)
    folder = None if output_dir is None else ScoreFolder(output_dir, identity)
    reader = PairReader(processor, image_folder, nulls, max_length, stored_images)
    scores = {} if folder is None else {score.id: score for score in folder.scores}
    ids: dict[str, None] = {}  # of all records that are asked for, in order; complete when all are read
    todo: Iterable[RawRecord] = _unscored(records, dict(scores), ids, reader)
    if isinstance(records, Sequence):  # then what is wrong shows before anything is scored
        unique_ids(records)
        todo = by_image(list(todo))
        logger.info("%d of %d records are to be scored", len(todo), len(records))
    tokenizer = processor.tokenizer
    losses = AnswerLosses(model, 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id)  # masked out: any id serves
    with _evaluating(model):
        scores.update((fresh.id, fresh) for fresh in _score_all(losses, reader, todo, batch_tokens, batch_size, folder))
    outcome = {"complete": True, "text_only": reader.text_only, "failures": reader.failures}
    if folder is not None:
        folder.finish(reader.text_only, reader.failures)
    return Scores((scores[id] for id in ids if id in scores), {**outcome, "identity": identity})


def _unscored(records: Iterable[RawRecord], scores: Mapping[str, Score], ids: dict[str, None], reader: PairReader) -> Iterator[RawRecord]:
    """The records without a score, while `ids` takes note of all. ValueError for one that is not what was scored."""
    for raw in records:
        id = record_id(raw)
        if id in ids:
            reader.fail(id, "another record before it has the same id")
            continue
        ids[id] = None
        if id not in scores:
            yield raw
        elif scores[id].digest != digest(raw):
            raise ValueError(f"the folder holds scores of other records under the same ids; give a new folder. Changed: {id}")


def _score_all(
    losses: AnswerLosses,
    reader: PairReader,
    records: Iterable[RawRecord],
    batch_tokens: int,
    batch_size: int,
    folder: ScoreFolder | None,
) -> list[Score]:
    """Score the records window by window, saving shards on the way when there is a folder."""
    scores: list[Score] = []
    saved = 0
    total = len(records) if isinstance(records, Sized) else None
    try:
        with _progress(total) as advance:
            for window in windows(map(reader.read, records), WINDOW_BATCHES * batch_tokens, WINDOW_BATCHES * batch_size):
                batches = make_batches((pair for pair in window if pair is not None), batch_tokens, batch_size)
                advance(window.count(None), [])
                while batches:
                    batch = batches.pop(0)
                    fresh = _score_batch(losses, reader, batch)
                    if fresh is None:  # out of memory
                        batch_tokens = max(batch.tokens // 2, 1)
                        batches = make_batches((pair for one in [batch, *batches] for pair in one.pairs), batch_tokens, batch_size)
                        continue
                    scores += fresh
                    if folder is not None and len(scores) - saved >= SHARD_RECORDS:
                        folder.append(scores[saved:])
                        saved = len(scores)
                    advance(len(batch.pairs), fresh)
    finally:  # an interrupted run loses nothing, a killed one at most SHARD_RECORDS scores
        if folder is not None:
            folder.append(scores[saved:])
    return scores


def _score_batch(losses: AnswerLosses, reader: PairReader, batch: Batch) -> list[Score] | None:
    """One score per pair; one that is not finite (say, an overflow in half precision) is a failure. None: out of memory."""
    pairs = batch.pairs
    try:
        clean = losses([[pair.clean for pair in group] for group in batch.groups], batch.prefix)  # [N]
        # without an image there is nothing before the question that would be worth sharing
        null = losses([[pair.null for pair in group] for group in batch.groups], 0 if reader.nulls.drops else batch.prefix)  # [N]
    except torch.OutOfMemoryError:
        if len(pairs) > 1:
            logger.warning("out of memory with %d records of %d tokens in all; going on with half as many", len(pairs), batch.tokens)
            return None
        reader.fail(pairs[0].id, f"out of memory with this record alone, {batch.tokens} tokens")
        return []
    both = torch.stack([clean, null]).cpu().numpy()  # [2, N]; the only wait for the device in a batch
    ends = np.cumsum([int(pair.clean.answer_mask.sum()) for pair in pairs])
    scores = []
    for pair, (loss, null_loss) in zip(pairs, np.split(both, ends[:-1], axis=1), strict=True):  # [T], [T]
        if not np.isfinite(null_loss - loss).all():
            reader.fail(pair.id, "the model's loss on it is not finite")
            continue
        scores.append(_to_score(pair, loss, null_loss))
    return scores


def _to_score(pair: Pair, loss: NDArray[np.float32], null_loss: NDArray[np.float32]) -> Score:
    token_vig = null_loss - loss  # [T]
    # rounded to float32, a mean never exceeds the largest of its values, so a selected sample has a token to select
    vig, mean_loss, mean_null = (float(np.float32(x.mean(dtype=np.float64))) for x in (token_vig, loss, null_loss))
    token_ids = pair.clean.input_ids[pair.clean.answer_mask].numpy()  # [T]
    return Score(pair.id, vig, mean_loss, mean_null, token_vig, token_ids, pair.turn_ends, pair.digest)


def _donors(records: Iterable[RawRecord], image_folder: str | os.PathLike[str] | None) -> list[ImageSource]:
    """The first image of every record that has one and can be read."""
    donors: list[ImageSource] = []
    for raw in records:
        try:
            donors += to_record(raw, image_folder).images[:1]
        except RecordError:  # reported when its turn to be scored comes
            continue
    return donors


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; every module's own mode back afterwards, since parts may have been frozen in eval mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _progress(total: int | None) -> Iterator[Callable[[int, Sequence[Score]], None]]:
    """A bar with records per second, time left and the running mean VIG; silent when the output is not a terminal."""
    console = Console(stderr=True)
    facts = TextColumn("{task.fields[rate]:.1f} records/s, mean VIG {task.fields[vig]:.3f}")
    columns = (TextColumn("VIG"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), facts)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total, rate=0.0, vig=float("nan"))
        start = time.perf_counter()
        count, sum_of_vig = 0, 0.0

        def advance(records: int, scores: Sequence[Score]) -> None:
            nonlocal count, sum_of_vig
            count, sum_of_vig = count + len(scores), sum_of_vig + sum(score.vig for score in scores)
            progress.advance(task, records)
            rate = progress.tasks[task].completed / (time.perf_counter() - start)
            progress.update(task, rate=rate, vig=sum_of_vig / max(count, 1))

        yield advance
