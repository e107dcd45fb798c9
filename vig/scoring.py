"""VIG scoring: two teacher-forced passes per record, one with its image and one with a null image."""

from __future__ import annotations

import inspect
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, ProcessorMixin

from mof.records import RecordError, digest, to_record
from mof.supervision import collate
from vig.manifest import scoring_identity
from vig.nulls import ImageSource, NullImages
from vig.pairs import Pair, PairReader, RawRecord, unique_ids
from vig.scores import Score, ScoreFolder, Scores

# Shapes: B = records in a batch, S = padded length, K = positions whose logits are asked for, V = vocabulary,
# N = answer tokens in a batch, T = answer tokens of one record.

logger = logging.getLogger(__name__)

IGNORED = -100  # label of every token outside the answers
SHARD_RECORDS = 256  # at most so many scores are lost when a run is killed


def score(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    records: Sequence[RawRecord],
    output_dir: str | os.PathLike[str] | None = None,
    null: str | Callable[[Image.Image], Image.Image] = "blur",
    *,
    image_folder: str | os.PathLike[str] | None = None,
    batch_size: int = 8,
    max_length: int = 2048,
    seed: int = 0,
) -> Scores:
    """Visual information gain of every answer token of every record that has an image (arXiv 2602.17186).

    Token VIG is the token's negative log-likelihood (natural logarithm) with the null image minus that with the image;
    a record's VIG is the mean over all its answer tokens, those of all its turns together. Records without an image are
    not scored; records that cannot be read or have no answer are logged, skipped and listed in `scores.failures`.

    Args:
        model: any image-text-to-text model of transformers, used where it is and as it is, in eval mode.
        processor: its processor, with a chat template that marks the answers by {% generation %}.
        records: LLaVA records {"id", "image", "conversations"} or chat messages.
        output_dir: where the scores are saved; a folder of an interrupted run with the same settings is resumed.
        null: a name in `vig.nulls.NULLS`, or a function from an RGB image to an RGB image of the same size.
        image_folder: what relative image paths are relative to.
        batch_size: records per forward pass. It does not change the scores.
        max_length: tokens; longer records are cut as in training.
        seed: of the null images that are random.

    Raises:
        ValueError: for duplicated ids, an unknown null image, a chat template without generation spans, an output
            folder that holds another run, or a record that has changed since it was scored.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    by_id = dict(zip(unique_ids(records), records, strict=True))
    nulls = NullImages(null, seed, _donors(records, image_folder) if null == "shuffle" else ())
    identity = scoring_identity(model, processor, nulls.description, max_length, seed)
    folder = None if output_dir is None else ScoreFolder(output_dir, identity)
    scores = {} if folder is None else _resumed(folder, by_id)
    reader = PairReader(processor, image_folder, nulls, max_length)
    todo = [record for id, record in by_id.items() if id not in scores]
    scores.update((fresh.id, fresh) for fresh in _score_all(model, reader, todo, batch_size, folder))
    outcome = {"complete": True, "text_only": reader.text_only, "failures": reader.failures}
    if folder is not None:
        folder.finish(reader.text_only, reader.failures)
    return Scores((scores[id] for id in by_id if id in scores), {**outcome, "identity": identity})


def _score_all(
    model: PreTrainedModel,
    reader: PairReader,
    records: Sequence[RawRecord],
    batch_size: int,
    folder: ScoreFolder | None,
) -> list[Score]:
    """Score the records in batches, saving shards on the way when there is a folder."""
    scores: list[Score] = []
    saved = 0
    try:
        with _evaluating(model), _progress(len(records)) as advance:
            for start in range(0, len(records), batch_size):
                batch = records[start : start + batch_size]
                pairs = [pair for pair in map(reader.read, batch) if pair is not None]
                fresh = _score_batch(model, reader, pairs) if pairs else []
                scores += fresh
                if folder is not None and len(scores) - saved >= SHARD_RECORDS:
                    folder.append(scores[saved:])
                    saved = len(scores)
                advance(len(batch), fresh)
    finally:  # an interrupted run loses nothing, a killed one at most SHARD_RECORDS scores
        if folder is not None:
            folder.append(scores[saved:])
    return scores


def _score_batch(model: PreTrainedModel, reader: PairReader, pairs: Sequence[Pair]) -> list[Score]:
    """One score per pair; one that is not finite (say, an overflow in half precision) is a failure."""
    tokenizer = reader.processor.tokenizer
    pad_id = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id  # masked out, so any id serves
    # padding goes right whatever the tokenizer prefers: then no position moves and a causal model never sees it
    clean = _answer_losses(model, collate([pair.clean for pair in pairs], pad_id, "right"))  # [N]
    null = _answer_losses(model, collate([pair.null for pair in pairs], pad_id, "right"))  # [N]
    losses = torch.stack([clean, null]).cpu().numpy()  # [2, N]; the only wait for the device in a batch
    ends = np.cumsum([int(pair.clean.answer_mask.sum()) for pair in pairs])
    scores = []
    for pair, (loss, null_loss) in zip(pairs, np.split(losses, ends[:-1], axis=1), strict=True):  # [T], [T]
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


@torch.inference_mode()
def _answer_losses(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """-log q(answer token | what comes before it), one record after the other: [N], float32."""
    labels = batch["labels"]  # [B, S]
    rows, columns = torch.nonzero(labels[:, 1:] != IGNORED, as_tuple=True)  # [N], [N]: position t predicts token t + 1
    targets = labels[rows, columns + 1]  # [N]
    inputs = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
    kept = torch.arange(labels.shape[1])  # [K] = [S]
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        # the vocabulary projection, most of the memory, is then done only where some record has an answer
        kept, columns = columns.unique(return_inverse=True)  # [K], [N]
        inputs["logits_to_keep"] = kept.to(model.device)
    logits = model(**inputs, use_cache=False).logits  # [B, K, V]
    if logits.shape[:2] != (len(labels), len(kept)):
        raise ValueError(
            f"{type(model).__name__} gave logits of shape {tuple(logits.shape)}, expected {len(labels)} records with "
            f"{len(kept)} positions: processor and model must agree on the number of tokens per image"
        )
    answers = logits[rows.to(logits.device), columns.to(logits.device)].float()  # [N, V]
    return F.cross_entropy(answers, targets.to(logits.device), reduction="none")  # [N]


def _donors(records: Iterable[RawRecord], image_folder: str | os.PathLike[str] | None) -> list[ImageSource]:
    """The first image of every record that has one and can be read."""
    donors: list[ImageSource] = []
    for raw in records:
        try:
            donors += to_record(raw, image_folder).images[:1]
        except RecordError:  # reported when its turn to be scored comes
            continue
    return donors


def _resumed(folder: ScoreFolder, records: Mapping[str, RawRecord]) -> dict[str, Score]:
    """The scores already in the folder, of the records that are asked for."""
    scores = {score.id: score for score in folder.scores if score.id in records}
    changed = [id for id, score in scores.items() if score.digest != digest(records[id])]
    if changed:
        raise ValueError(
            f"{folder.path} holds scores of other records under the same ids; give a new folder. "
            f"{len(changed)} changed: {', '.join(changed[:10])}"
        )
    if scores:
        logger.info("%d of %d records are already scored in %s", len(scores), len(records), folder.path)
    return scores


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
def _progress(total: int) -> Iterator[Callable[[int, Sequence[Score]], None]]:
    """A bar with records per second, time left and the running mean VIG; silent when the output is not a terminal."""
    console = Console(stderr=True)
    facts = TextColumn("{task.fields[rate]:.1f} records/s, mean VIG {task.fields[vig]:.3f}")
    columns = (TextColumn("VIG"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), facts)
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total, rate=0.0, vig=float("nan"))
        start = time.perf_counter()
        values: list[float] = []

        def advance(records: int, scores: Sequence[Score]) -> None:
            values.extend(score.vig for score in scores)
            progress.advance(task, records)
            rate = progress.tasks[task].completed / (time.perf_counter() - start)
            progress.update(task, rate=rate, vig=sum(values) / max(len(values), 1))

        yield advance
