"""Without training, AUROC (the area under the ROC curve) measures how well scores tell records and words with noise from others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.table import Table
from scipy.stats import mannwhitneyu

from mof.miniature.noise import KINDS
from vig import Score, Scores

RECORD_MEASURES: dict[str, Callable[[Score], float]] = {
    "vig": lambda score: score.vig,
    "lowest loss": lambda score: -score.loss,
    "highest null loss": lambda score: score.null_loss,
}


def auroc(higher: Sequence[float], lower: Sequence[float]) -> float:
    """Return the probability that a value of `higher` is above a value of `lower`, where ties count half. NaN without values."""
    if not len(higher) or not len(lower):
        return float("nan")
    return float(mannwhitneyu(higher, lower).statistic / (len(higher) * len(lower)))


def separation(scores: Scores, records: Sequence[Mapping[str, Any]], truth: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the AUROC of each measure for each kind of noise that the records have.

    The measures of records compare records without noise with records of the kind. The measure "token vig" compares the tokens that
    the picture decides with the tokens that it does not, where the truth names the deciding words: grounded words with the false word in
    the same records (`span`), or with all other words of the answers (`boilerplate`), and otherwise deciding words of records without
    noise with deciding words of records of the kind.
    """
    table: dict[str, dict[str, float]] = {}
    if not truth:
        return table  # nobody knows the truth about real records
    clean = [score for score in scores if truth[score.id]["noise"] is None]
    words = {record["id"]: _words(record, truth[record["id"]]) for record in records if "words" in truth[record["id"]]}
    for kind in KINDS:
        noisy = [score for score in scores if truth[score.id]["noise"] == kind]
        if not noisy:
            continue
        row = {name: auroc([*map(measure, clean)], [*map(measure, noisy)]) for name, measure in RECORD_MEASURES.items()}
        table[kind] = row
        if not words:
            continue  # the truth about real records names no words
        grounded, other = _token_vig(noisy if kind in ("span", "boilerplate") else [*clean, *noisy], words)
        if kind == "boilerplate":
            other = np.concatenate([score.token_vig[~_deciding(score, words)[0]] for score in noisy])
        row["token vig"] = auroc(grounded, other)
    return table


def separation_tables(rows: Sequence[dict[str, Any]]) -> list[Table]:
    """Return a table for each null image from the entries `{"model", "null", "table"}`: mean AUROC over models, in %."""
    tables = []
    for null in dict.fromkeys(row["null"] for row in rows):
        measured = [row["table"] for row in rows if row["null"] == null]
        title = f"AUROC with the null image {null}, mean of {len(measured)} models, %: 50 is chance"
        table = Table("noise", *next(iter(measured[0].values())), title=title, box=SIMPLE)
        for kind in measured[0]:
            table.add_row(kind, *(f"{100 * np.mean([entry[kind][name] for entry in measured]):.1f}" for name in measured[0][kind]))
        tables.append(table)
    return tables


def _words(record: Mapping[str, Any], truth: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    """Return (answer, its deciding word, whether it is grounded) for each turn."""
    answers = [turn["value"] for turn in record["conversations"] if turn["from"] == "gpt"]
    return list(zip(answers, truth["words"], truth["grounded"], strict=True))


def _deciding(score: Score, words: Mapping[str, list[tuple[str, str, bool]]]) -> tuple[np.ndarray, np.ndarray]:
    """Return two masks [T] of a record's answer tokens: the tokens of deciding words, and the tokens of grounded deciding words."""
    deciding, grounded = (np.zeros(len(score.token_vig), bool) for _ in range(2))
    place = 0
    for answer, word, true in words[score.id]:
        place = score.answer.find(answer, place)
        if place < 0:
            break  # the record was cut at max_length
        start = place + answer.rindex(f"{word}.")  # every sentence of an answer ends with its deciding word
        inside = (score.token_starts < start + len(word)) & (score.token_ends > start)
        deciding |= inside
        grounded |= inside & true
        place += len(answer)
    return deciding, grounded


def _token_vig(scores: Sequence[Score], words: Mapping[str, list[tuple[str, str, bool]]]) -> tuple[np.ndarray, np.ndarray]:
    """Return two arrays: the VIG of all tokens of grounded deciding words, and of all tokens of other deciding words."""
    pairs = [(score, *_deciding(score, words)) for score in scores]
    return (
        np.concatenate([score.token_vig[deciding & grounded] for score, deciding, grounded in pairs]),
        np.concatenate([score.token_vig[deciding & ~grounded] for score, deciding, grounded in pairs]),
    )
