"""TwoPasses turns records into scores: it cuts the records into windows, makes batches of each window, and runs two passes per batch.

With `EncoderBranches`, there is a further pass for each encoder.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mof.data.digests import digest
from mof.data.rows import Row
from vig.output_head import evaluating
from vig.scoring.answer_losses import AnswerLosses
from vig.scoring.batches import Batch, make_batches, windows
from vig.scoring.encoder_branches import EncoderBranches
from vig.scoring.hidden_images import CannotHideError, refuse_seeing
from vig.scoring.pairs import Pair, PairReader
from vig.scoring.score_table import MEASURES, Score, columns_of

# Shapes: N = answer tokens in a batch, T = answer tokens of one record, M = measures of a token, the loss first, E = encoders.

logger = logging.getLogger(__name__)

WINDOW_BATCHES = 8  # the records of this number of batches are read, then sorted by length and by image
MOST_FAILURES = 50  # if the model refuses this number of records in a row, the fault is not in the records


class TwoPasses:
    """TwoPasses scores records.

    Several threads may call `scores`, each with its own reader: one of them reads and decodes while another uses the model.

    Args:
        batch_tokens, batch_size, measures: see `vig.score`. With measures, `losses` returns the values of all `MEASURES`.
    """

    def __init__(self, losses: AnswerLosses, batch_tokens: int, batch_size: int, measures: Sequence[str] = ()) -> None:
        self._measures = measures
        self._losses = losses
        self._batch_tokens, self._batch_size = batch_tokens, batch_size
        self._refused_in_a_row = 0
        self._obeys_masks = False  # known after the first batch
        self._reading, self._computing = threading.Lock(), threading.Lock()  # neither tokenizers nor models may be used by two threads
        kind = losses.model.device.type  # "meta" for a model that is offloaded
        under = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        self._autocast = torch.get_autocast_dtype(kind) if under else None  # of the thread that asked for scores

    def scores(self, records: Iterable[Row], reader: PairReader, branches: EncoderBranches | None = None) -> list[Score]:
        """Return the scores of all records that have one; the reader keeps account of the others.

        Args:
            branches: adds the VIG of each encoder to the scores.
        """
        tokens, size = WINDOW_BATCHES * self._batch_tokens, WINDOW_BATCHES * self._batch_size
        read, scores = windows(map(reader.read, records), tokens, size), list[Score]()
        while True:
            with self._reading:
                window = next(read, None)
            if window is None:
                return scores
            with self._computing, self._conditions():
                self._reader, self._branches = reader, branches
                scores += [score for scores in self._window([pair for pair in window if pair is not None]) for score in scores]

    def _conditions(self) -> ExitStack:
        """Return the context in which this thread uses the model: in eval mode, on the model's GPU, and under the caller's autocast."""
        model, stack = self._losses.model, ExitStack()
        stack.enter_context(evaluating(model))
        if self._autocast is not None:
            stack.enter_context(torch.autocast(model.device.type, self._autocast))
        if model.device.type == "cuda":
            stack.enter_context(torch.cuda.device(model.device))
        return stack

    def _window(self, pairs: Sequence[Pair]) -> Iterator[list[Score]]:
        batches = make_batches(pairs, self._batch_tokens, self._batch_size)
        while batches:
            batch = batches.pop(0)
            scores = self._batch(batch)
            if scores is None:  # out of memory
                self._batch_tokens = max(batch.tokens // 2, 1)
                rest = [pair for waiting in [batch, *batches] for pair in waiting.pairs]
                batches = make_batches(rest, self._batch_tokens, self._batch_size)
            else:
                yield scores

    def _batch(self, batch: Batch) -> list[Score] | None:
        """Return the scores of a batch without the records that the model refuses, or None if memory ran out."""
        pairs = batch.pairs
        self._check_hiding(pairs[0])
        try:
            values = self._values(batch)  # [2 + E, N, M]
        except torch.OutOfMemoryError:
            if len(pairs) > 1:
                logger.warning("out of memory with %d records of %d tokens in all; going on with half as many", len(pairs), batch.tokens)
                return None
            self._reader.fail(pairs[0].id, f"out of memory with this record alone, {batch.tokens} tokens")
            return []
        except Exception as error:  # for example, a record has more image tokens than its image gives; models raise errors of any kind
            if len(pairs) > 1:  # each record is tried alone, to find the record at fault
                return [score for pair in pairs for score in self._batch(Batch([[pair]], 0)) or []]
            self._refused_in_a_row += 1
            if self._refused_in_a_row >= MOST_FAILURES:
                raise
            self._reader.fail(pairs[0].id, f"the model does not take it ({type(error).__name__}: {error})")
            return []
        self._refused_in_a_row = 0
        ends = np.cumsum([int(pair.clean.answer_mask.sum()) for pair in pairs])
        scores = []
        for pair, own in zip(pairs, np.split(values, ends[:-1], axis=1), strict=True):  # [2 + E, T, M]
            if np.isfinite(own[1:, :, 0] - own[0, :, 0]).all():
                scores.append(_to_score(pair, own, self._measures, self._branches.names if self._branches else []))
            else:  # for example, after an overflow in half precision
                self._reader.fail(pair.id, "the model's loss on it is not finite")
        return scores

    def _check_hiding(self, pair: Pair) -> None:
        if self._obeys_masks or not self._reader.nulls.hides:
            return
        try:
            refuse_seeing(self._losses, pair.null)
            self._obeys_masks = True
        except CannotHideError:
            raise
        except Exception:  # the fault of this record, which its own pass will name; the next batch is checked
            return

    def _values(self, batch: Batch) -> NDArray[np.float32]:
        """Return the losses (and other measures) of all answer tokens in all passes, [2 + E, N, M].

        The first pass has the images, the second the null images, and the others the null images for each encoder.
        """
        if self._branches is None:
            passes = [[[getattr(pair, side) for pair in group] for group in batch.groups] for side in ("clean", "null")]
        else:
            passes = self._branches.passes(batch)
        # with "drop" there is no image before the question, so sharing would save little
        prefixes = [batch.prefix, *[0 if self._reader.nulls.drops else batch.prefix] * (len(passes) - 1)]
        values = torch.stack([self._losses(groups, prefix) for groups, prefix in zip(passes, prefixes, strict=True)])  # [2 + E, N(, M)]
        return values.view(*values.shape[:2], -1).cpu().numpy()  # the only wait for the device in a batch


def _to_score(pair: Pair, values: NDArray[np.float32], measures: Sequence[str], encoders: Sequence[str]) -> Score:
    """Return the score of a record from the values [2 + E, T, M] of its answer tokens."""
    clean, null, *others = values  # [T, M] each
    loss, null_loss = clean[:, 0], null[:, 0]  # [T], [T]
    kept = [values[:, MEASURES.index(name)] for name in measures for values in (clean, null)]  # arrays [T]
    extra: dict[str, Any] = dict(zip(columns_of(measures), kept, strict=True))
    extra |= {"image_digest": digest(pair.images), "image_files": pair.image_files}
    extra["encoder_vig"] = {name: other[:, 0] - loss for name, other in zip(encoders, others, strict=True)}
    token_vig = null_loss - loss  # [T]
    # a mean that is rounded to float32 never exceeds the largest of its values, so a selected record has a token to select
    vig, mean_loss, mean_null = (float(np.float32(x.mean(dtype=np.float64))) for x in (token_vig, loss, null_loss))
    token_ids = pair.clean.input_ids[pair.clean.answer_mask].numpy()  # [T]
    starts, ends = pair.clean.characters.numpy().T  # [T], [T]
    rest = (pair.clean.answer, starts, ends)
    return Score(pair.id, vig, mean_loss, mean_null, token_vig, token_ids, pair.turn_ends, pair.digest, *rest, **extra)
