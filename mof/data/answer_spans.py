"""render_answers finds the characters of the answers in a conversation that a chat template wrote.

Few templates mark the answers (`{% generation %}`). A template without marks writes the conversation twice, the second time with a
sentinel in place of each text of an answer. The texts between the sentinels are words of the template, so the rest of the first
conversation is the answers. Both texts must agree to the last character, or the record is refused. Templates of models that think may
leave out a thought ("<think> ... </think>"), so it has its own sentinel.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from mof.data.records import Message, Record, RecordError
from mof.data.template_bounds import TemplateBoundsError
from mof.data.templates import Span, render, template_of

_KEY = f"{secrets.randbelow(10**20):020}"  # random, so that no text of a record holds a sentinel; digits have no upper case
_SENTINEL = re.compile(f"\ue000{_KEY}-([0-9]+)\ue001")
_SPACE = re.compile(r"\s*")
_THOUGHT_OPENS = re.compile(r"<think>\s*$")
_FORMS: tuple[tuple[str, ...], ...] = ((), ("system", "assistant"), ("system", "assistant", "user"))
_NO_IMAGES = "it knows no images; set another processor.chat_template (mof.chat_templates has two)"

Writer = Callable[[Sequence[Message]], tuple[str, list[Span]]]


@dataclass(frozen=True)
class _Piece:
    """A piece is a text of an answer that a template writes as it is, except for white space around it."""

    answer: int
    """The number of the answer."""
    text: str
    in_thought: bool = False
    """Whether it is a thought, which a template may leave out."""
    opens: bool = False
    """Whether "<think>" stands before it."""


def render_answers(processor: ProcessorMixin, record: Record) -> tuple[str, list[Span]]:
    """Return the conversation as the processor's chat template writes it, and the characters of each answer.

    If a template without marks writes special tokens after an answer, the answer includes them up to the end-of-sequence token. If
    there is no end-of-sequence token, it includes the first special token, which ends the turn (and with GLM-4V also opens the next).

    Some templates want the texts as strings: for a text that is a list of parts, they raise an error, write the list as Python or JSON
    does, or write nothing. They get strings.

    Raises:
        RecordError: for a record without an answer, or in which the template does not write each answer once and unchanged, or leaves
            out a text of the user.
    """
    if not record.answers:
        raise RecordError(f"record {record.id!r} has no assistant message, so there is nothing to learn or score")
    template = template_of(processor)
    assert template is not None
    write: Writer = partial(render, template, **processor.tokenizer.special_tokens_map)
    errors: list[Exception] = []
    without_system = None  # a template may leave out the system text, but its strings are tried first
    for roles in _FORMS:
        try:
            text, spans = _located(processor.tokenizer, str(getattr(processor, "image_token", "")), record, write, roles)
            lacking = _left_out(record, _outside(text, spans), write, roles)
        except TemplateBoundsError:
            raise
        except Exception as error:  # templates raise errors of any kind
            errors.append(error)
            continue
        if not lacking:
            return text, spans
        if lacking == {"system"}:
            without_system = without_system or (text, spans)
        else:
            errors.append(RecordError(f"record {record.id!r}: the chat template leaves out a text of the user; {_NO_IMAGES}"))
    if without_system is not None:
        return without_system
    raise _most_helpful(record, errors)


def _most_helpful(record: Record, errors: Sequence[Exception]) -> Exception:
    """Return the most helpful error: the error of the template's author, about the record, or about lists in place of strings."""
    if not isinstance(errors[0], (TypeError, RecordError)) and "'list object'" not in str(errors[0]):
        return errors[0]
    refused = [error for error in errors if isinstance(error, RecordError)]
    joined = f"record {record.id!r}: the chat template cannot join the parts of a message ({errors[0]}): {_NO_IMAGES}"
    return refused[-1] if refused else RecordError(joined)


def _located(
    tokenizer: PreTrainedTokenizerBase, image_token: str, record: Record, write: Writer, roles: Sequence[str]
) -> tuple[str, list[Span]]:
    """Return the conversation of a record as text, and the characters of each answer.

    Args:
        roles: their texts are given as strings in place of parts.
    """
    text, spans = write(_as_strings(record.messages, roles))
    if _KEY in text:
        raise RecordError(f"record {record.id!r}: the chat template writes the parts of a message as a list: {_NO_IMAGES}")
    answers = len(record.answers)
    if not spans:  # no marks, or marks in a part that was not reached
        messages, pieces = _with_sentinels(record.messages)
        again, _ = write(_as_strings(messages, roles))
        ending = _end_of_turn(tokenizer, len(tokenizer), tokenizer.eos_token, image_token)
        return text, _between_sentinels(record, text, again, pieces, ending)
    if len(spans) > answers:  # the template marks each part of an answer
        spans = _joined(spans)
    if len(spans) != answers:
        raise RecordError(f"record {record.id!r}: {answers} assistant messages, but the chat template marks {len(spans)} answers")
    return text, spans


def _outside(text: str, spans: Sequence[Span]) -> str:
    """Return the text without the answers."""
    bounds = [0, *(place for span in spans for place in span), len(text)]
    return "\n".join(text[start:end] for start, end in zip(bounds[::2], bounds[1::2], strict=True))


def _left_out(record: Record, outside: str, write: Writer, roles: Sequence[str]) -> set[str]:
    """Return the roles "user" and "system" if the template leaves out a text of theirs.

    Args:
        outside: the conversation as the template writes it, without the answers, which may repeat a question.
    """
    given = [(message["role"], part["text"].strip()) for message in record.messages for part in message["content"] if "text" in part]
    questions = [(role, words) for role, words in given if role != "assistant" and words]
    if not roles and all(words in outside for _, words in questions):
        return set()
    sentinels = iter(range(len(questions)))

    def hide(message: Message) -> Message:
        parts = [
            {**part, "text": f"\ue000{_KEY}-{next(sentinels)}\ue001"} if part.get("text", "").strip() else part
            for part in message["content"]
        ]
        return message if message["role"] == "assistant" else {**message, "content": parts}

    again, _ = write(_as_strings([hide(message) if message["role"] != "assistant" else message for message in record.messages], roles))
    shown = {int(number) for number in _SENTINEL.findall(again)}
    return {role for number, (role, _) in enumerate(questions) if number not in shown}


def _as_strings(messages: Iterable[Message], roles: Sequence[str]) -> list[Message]:
    """Return the messages; those of these roles with a string in place of their parts, unless a part is an image.

    All other parts hold the key, which shows in the text of a template that writes a list instead of its texts.
    """
    return [
        {**message, "content": "\n".join(part["text"] for part in message["content"])}
        if message["role"] in roles and all(part["type"] == "text" for part in message["content"])
        else {**message, "content": [{**part, _KEY: True} for part in message["content"]]}
        for message in messages
    ]


def _joined(spans: Sequence[Span]) -> list[Span]:
    """Return the spans, with spans that touch joined to a single span."""
    joined = list(spans[:1])
    for start, end in spans[1:]:
        if start == joined[-1][1]:
            joined[-1] = joined[-1][0], end
        else:
            joined.append((start, end))
    return joined


@lru_cache(maxsize=16)
def _end_of_turn(tokenizer: PreTrainedTokenizerBase, size: int, eos: str | None, image_token: str) -> re.Pattern[str]:
    """Return a pattern for the special tokens that end a turn, with white space before them; it matches the empty text too.

    Args:
        size: the number of the tokenizer's tokens; with added tokens, the pattern is another.
    """
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    others = {*tokenizer.all_special_tokens, *added} - {tokenizer.bos_token, eos, image_token}
    longest_first = sorted((re.escape(token) for token in others if token), key=len, reverse=True)
    special = rf"\s*(?:{'|'.join(longest_first)})" if longest_first else "(?!)"
    return re.compile(rf"(?:(?:{special})*?\s*{re.escape(eos)}|{special})?" if eos else f"(?:{special})?")


def _between_sentinels(record: Record, text: str, with_sentinels: str, pieces: Sequence[_Piece], ending: re.Pattern[str]) -> list[Span]:
    """Return the characters of each answer in `text`. `with_sentinels` is the text of the same record with sentinels."""
    split = _SENTINEL.split(with_sentinels)  # words of the template, number of a piece, words, ...
    words, numbers = split[0::2], [int(number) for number in split[1::2]]
    wanted = [number for number, piece in enumerate(pieces) if not piece.in_thought or number in numbers]
    start, spans = len(words[0]), dict[int, Span]()
    whole = text.startswith(words[0]) and numbers == wanted
    for number, before, after in zip(numbers, words, words[1:], strict=False):
        piece = pieces[number]
        end = _end_of(piece.text, text, start, after) if whole else None
        if end is None:
            break
        if piece.opens and (opening := _THOUGHT_OPENS.search(before)):
            start -= len(opening[0])
        spans[piece.answer] = spans[piece.answer][0] if piece.answer in spans else start, end
        start = end + len(after)
    if start != len(text) or len(spans) != len(record.answers):
        raise RecordError(
            f"record {record.id!r}: the chat template does not write each answer once and unchanged; put {{% generation %}} and "
            "{% endgeneration %} around the answers in it"
        )
    return [(start, ending.match(text, end).end()) for start, end in spans.values()]  # type: ignore[union-attr]  # it matches "" too


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


def _with_sentinels(messages: Sequence[Message]) -> tuple[list[Message], list[_Piece]]:
    """Return the messages with a numbered sentinel in place of each piece of an answer, and the pieces."""
    replaced, pieces, answer = list[Message](), list[_Piece](), 0
    for message in messages:
        if message["role"] == "assistant":
            parts = []
            for part in message["content"] or [{"type": "text", "text": ""}]:
                texts = ""
                for fixed, piece in _pieces(answer, part["text"]):
                    texts += f"{fixed}\ue000{_KEY}-{len(pieces)}\ue001"
                    pieces.append(piece)
                parts.append({"type": "text", "text": texts})
            message, answer = {**message, "content": parts}, answer + 1
        replaced.append(message)
    return replaced, pieces


def _pieces(answer: int, text: str) -> list[tuple[str, _Piece]]:
    """Return the pieces of a text, each with the marks of a thought that stand before it."""
    before, mark, after = text.partition("</think>")
    if not mark:
        return [("", _Piece(answer, text))]
    thought, rest = before.lstrip().removeprefix("<think>").strip(), after.lstrip()
    opening = before[: before.index("<think>") + len("<think>")] if before.lstrip().startswith("<think>") else ""
    spaces = before[len(opening) :]
    leading = spaces[: len(spaces) - len(spaces.lstrip())]
    closing = spaces[len(leading) + len(thought) :] + mark + after[: len(after) - len(rest)]
    return [(opening + leading, _Piece(answer, thought, True, bool(opening))), (closing, _Piece(answer, rest))]
