"""Without training, AUROC (the area under the ROC curve) measures how well scores tell records and words with noise from others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.table import Table
from scipy.stats import mannwhitneyu

from mof.miniature.noise import KINDS
from vig import Score, Scores
from vig.selection.measures import MEASURES

Words = Mapping[str, list[tuple[str, str, bool]]]  # id -> (answer, its deciding word, whether it is grounded) for each turn


def auroc(higher: Sequence[float], lower: Sequence[float]) -> float:
    """Return the probability that a value of `higher` is above a value of `lower`, where ties count half. NaN without values."""
    if not len(higher) or not len(lower):
        return float("nan")
    return float(mannwhitneyu(higher, lower).statistic / (len(higher) * len(lower)))


def separation(
    scores: Scores, records: Sequence[Mapping[str, Any]], truth: Mapping[str, Mapping[str, Any]], measures: Sequence[str] = ("vig",)
) -> dict[str, dict[str, float]]:
    """Return the AUROC of each measure for each kind of noise that the records have.

    The measures of records compare records without noise with records of the kind: each of `measures` (names in
    `vig.selection.measures.MEASURES`), VIG that is shuffled among the records, the lowest loss and the highest null loss. The measures
    of tokens ("token vig") compare the tokens that the picture decides with the tokens that it does not, where the truth names the
    deciding words: grounded words with the false word in the same records (`span`), or with all other words of the answers
    (`boilerplate`), and otherwise deciding words of records without noise with deciding words of records of the kind.
    """
    table: dict[str, dict[str, float]] = {}
    if not truth:
        return table  # nobody knows the truth about real records
    values = {name: MEASURES[name].of(scores) for name in measures}  # [A] or None, and [N] each
    of_records = {name: of for name, (_, of) in values.items()}
    if len(measures) > 1:
        of_records["shuffled vig"] = np.random.default_rng(0).permutation(scores.vig)
    of_records |= {"lowest loss": -scores.loss, "highest null loss": np.array([score.null_loss for score in scores])}
    noise = np.array([truth[id]["noise"] or "" for id in scores.ids])  # [N]
    words = {record["id"]: _words(record, truth[record["id"]]) for record in records if "words" in truth[record["id"]]}
    if words and len(scores):  # the truth about real records names no words
        deciding, grounded = map(np.concatenate, zip(*(_deciding(score, words) for score in scores), strict=True))  # [A], [A]
        token_noise = np.repeat(noise, np.diff(scores.bounds))  # [A]
    for kind in KINDS:
        if not (noise == kind).any():
            continue
        table[kind] = {name: auroc(of[noise == ""], of[noise == kind]) for name, of in of_records.items()}
        if not words:
            continue
        noisy = token_noise == kind
        compared = noisy if kind in ("span", "boilerplate") else noisy | (token_noise == "")
        true, other = deciding & grounded & compared, noisy & ~deciding if kind == "boilerplate" else deciding & ~grounded & compared
        table[kind] |= {f"token {name}": auroc(of[true], of[other]) for name, (of, _) in values.items() if of is not None}
    return table


def separation_tables(rows: Sequence[dict[str, Any]]) -> Iterator[Table]:
    """Yield a table of records and a table of tokens for each null image, from entries {"model", "null", "table"}: mean AUROC in %."""
    for null in dict.fromkeys(row["null"] for row in rows):
        measured = [row["table"] for row in rows if row["null"] == null and row["table"]]
        if not measured:
            continue  # no record has noise
        names = list(next(iter(measured[0].values())))
        for unit in ("records", "tokens"):
            columns = [name for name in names if name.startswith("token ") == (unit == "tokens")]
            title = f"AUROC of {unit}, null image {null}, mean of {len(measured)} models, %: 50 is chance"
            table = Table("noise", *(column.removeprefix("token ") for column in columns), title=title, box=SIMPLE)
            for kind in measured[0]:
                table.add_row(kind, *(f"{100 * np.mean([entry[kind][name] for entry in measured]):.1f}" for name in columns))
            yield table


def _words(record: Mapping[str, Any], truth: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
    """Return (answer, its deciding word, whether it is grounded) for each turn."""
    answers = [turn["value"] for turn in record["conversations"] if turn["from"] == "gpt"]
    return list(zip(answers, truth["words"], truth["grounded"], strict=True))


def _deciding(score: Score, words: Words) -> tuple[np.ndarray, np.ndarray]:
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
