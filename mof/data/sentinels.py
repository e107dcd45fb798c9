"""A conversation with sentinels in place of its texts shows which words of it the chat template writes.

A sentinel is a text that no record holds. `with_sentinels` puts sentinels in place of the answers, `with_hidden_questions` in place of the
other texts. Templates of models that think may leave out a thought ("<think> ... </think>"), so it has its own sentinel.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

from mof.data.records import Message, Part
from mof.data.templates import Span

KEY = f"{secrets.randbelow(10**20):020}"  # random, so that no text of a record holds a sentinel; digits have no upper case
SENTINEL = re.compile(f"\ue000{KEY}-([0-9]+)\ue001")
_SPACE = re.compile(r"\s*")
_THOUGHT_OPENS = re.compile(r"<think>\s*$")


@dataclass(frozen=True)
class Piece:
    """A Piece is a text of an answer that a template writes as it is, except for white space around it."""

    answer: int
    """The number of the answer."""
    text: str
    in_thought: bool = False
    """Whether it is a thought, which a template may leave out."""
    opens: bool = False
    """Whether "<think>" stands before it."""


def with_sentinels(messages: Sequence[Message]) -> tuple[list[Message], list[Piece]]:
    """Return the messages with a numbered sentinel in place of each piece of an answer, and the pieces."""
    replaced, pieces, answer = list[Message](), list[Piece](), 0
    for message in messages:
        if message["role"] == "assistant":
            parts = []
            for part in message["content"] or [{"type": "text", "text": ""}]:
                texts = ""
                for fixed, piece in _pieces(answer, part["text"]):
                    texts += fixed + _sentinel(len(pieces))
                    pieces.append(piece)
                parts.append({"type": "text", "text": texts})
            message, answer = {**message, "content": parts}, answer + 1
        replaced.append(message)
    return replaced, pieces


def with_hidden_questions(messages: Iterable[Message], first: int = 0) -> list[Message]:
    """Return the messages with a sentinel in place of each text of the user and the system, numbered from `first`.

    A message without a text gets an additional sentinel.
    """
    numbers = count(first)

    def hide(content: Sequence[Part]) -> list[Part]:
        with_text = content if any("text" in part for part in content) else [*content, {"type": "text", "text": ""}]
        return [{**part, "text": _sentinel(next(numbers))} if "text" in part else part for part in with_text]

    return [message if message["role"] == "assistant" else {**message, "content": hide(message["content"])} for message in messages]


def closings(hidden: str, pieces: Sequence[Piece], ending: re.Pattern[str]) -> dict[int, str]:
    """Return for each answer the words of the template that end its turn.

    Args:
        hidden: the conversation with sentinels in place of all texts, so that the words before the next sentinel are the template's.
        ending: a pattern for the end of a turn that matches the empty text too.
    """
    split = SENTINEL.split(hidden)  # words of the template, number of a piece, words, ...
    after = {int(number): words for number, words in zip(split[1::2], split[2::2], strict=True)}
    last = {piece.answer: number for number, piece in enumerate(pieces)}
    return {answer: ending.match(after[number])[0] for answer, number in last.items() if number in after}  # type: ignore[index]


def between_sentinels(text: str, with_sentinels: str, pieces: Sequence[Piece], closings: Mapping[int, str]) -> list[Span] | None:
    """Return the characters of each answer in `text`, or None if the template does not write each answer once and unchanged.

    The texts between the sentinels are words of the template, so the rest of `text` is the answers.

    Args:
        with_sentinels: the same conversation with sentinels in place of the pieces.
        closings: for each answer, the words that end its turn, which belong to it.
    """
    split = SENTINEL.split(with_sentinels)
    words, numbers = split[0::2], [int(number) for number in split[1::2]]
    if numbers != [number for number, piece in enumerate(pieces) if not piece.in_thought or number in numbers]:
        return None
    spans, start = dict[int, Span](), len(words[0])
    if not text.startswith(words[0]):
        return None
    for number, before, after in zip(numbers, words, words[1:], strict=False):
        piece = pieces[number]
        end = _end_of(piece.text, text, start, after)
        opening = _THOUGHT_OPENS.search(before) if piece.opens else None
        if end is None or (piece.opens and opening is None):
            return None
        start -= len(opening[0]) if opening else 0
        spans[piece.answer] = spans[piece.answer][0] if piece.answer in spans else start, end
        start = end + len(after)
    ended = all(answer in closings and text.startswith(closings[answer], end) for answer, (_, end) in spans.items())
    if start != len(text) or not ended:
        return None
    return [(start, end + len(closings[answer])) for answer, (start, end) in spans.items()]


def _end_of(piece: str, text: str, start: int, after: str) -> int | None:
    """Return where a piece ends that starts there, with `after` behind it, or None.

    White space around the piece may be cut off, and words at its start: a template may leave out a thought in its own marks.
    """
    core = piece.strip()
    leading, trailing = piece[: len(piece) - len(piece.lstrip())], piece[len(piece.rstrip()) :]
    begin = _SPACE.match(text, start).end() if core else start  # type: ignore[union-attr]  # it matches "" too
    if not (leading.endswith(text[start:begin]) and text.startswith(core, begin)):
        end = text.find(after, start) if after else len(text)
        kept = text[start : max(end, start)].strip()
        return end if kept and core.endswith(kept) else None
    middle = begin + len(core)
    spaces = _SPACE.match(text, middle).end() - _SPACE.match(after).end()  # type: ignore[union-attr]
    for end in (middle + len(trailing), spaces, middle):
        white = text[middle:end]
        if end >= middle and text.startswith(after, end) and (trailing.startswith(white) or (not core and trailing.endswith(white))):
            return end
    return None


def _sentinel(number: int) -> str:
    return f"\ue000{KEY}-{number}\ue001"


def _pieces(answer: int, text: str) -> list[tuple[str, Piece]]:
    """Return the pieces of a text, each with the marks of a thought that stand before it."""
    before, mark, after = text.partition("</think>")
    if not mark:
        return [("", Piece(answer, text))]
    thought, rest = before.lstrip().removeprefix("<think>").strip(), after.lstrip()
    opening = before[: before.index("<think>") + len("<think>")] if before.lstrip().startswith("<think>") else ""
    spaces = before[len(opening) :]
    leading = spaces[: len(spaces) - len(spaces.lstrip())]
    closing = spaces[len(leading) + len(thought) :] + mark + after[: len(after) - len(rest)]
    return [(opening + leading, Piece(answer, thought, True, bool(opening))), (closing, Piece(answer, rest))]
