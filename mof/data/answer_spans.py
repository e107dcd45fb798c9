"""render_answers finds the characters of the answers in a conversation that a chat template wrote.

Few templates mark the answers (`{% generation %}`). A template without marks writes the conversation twice, the second time with a
sentinel in place of each answer. The texts between the sentinels are words of the template, so the rest of the first conversation is
the answers. Both texts must agree to the last character, or the record is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers import ProcessorMixin

from mof.data.records import Message, Record, RecordError
from mof.data.templates import Span, TemplateBoundsError, marks_answers, render, template_of

_SENTINEL = re.compile("\ue000([0-9]+)\ue001")  # Unicode gives these characters no meaning, so no text of a template holds them


def render_answers(processor: ProcessorMixin, record: Record) -> tuple[str, list[Span]]:
    """Return the conversation as the processor's chat template writes it, and the characters of each answer.

    If a template without marks writes special tokens after an answer, the answer includes them up to the end-of-sequence token. If
    there is no end-of-sequence token, it includes the first special token, which ends the turn (and with GLM-4V also opens the next).

    Raises:
        RecordError: for a record without an answer, or in which the template does not write each answer once and unchanged.
    """
    answers = len(record.answers)
    if not answers:
        raise RecordError(f"record {record.id!r} has no assistant message, so there is nothing to learn or score")
    template, specials = template_of(processor), processor.tokenizer.special_tokens_map
    assert template is not None
    text, spans = _render(record, template, record.messages, specials)
    if not marks_answers(template):
        again, _ = _render(record, template, _with_sentinels(record.messages), specials)
        spans = list(_between_sentinels(record, text, again, _end_of_turn(processor)))
    if len(spans) > answers:  # the template marks each part of an answer
        spans = _joined(spans)
    if len(spans) != answers:
        raise RecordError(f"record {record.id!r}: {answers} assistant messages, but the chat template marks {len(spans)} answers")
    return text, spans


def _render(record: Record, template: str, messages: Sequence[Message], specials: Mapping[str, Any]) -> tuple[str, list[Span]]:
    """Return the conversation of a record as text, with the marked answers.

    Some templates raise an error for a text that is a list of parts, or write the list as Python does. They get the texts as strings.
    """
    errors: list[Exception] = []
    for roles in ((), ("system", "assistant"), ("system", "assistant", "user")):
        given = [_as_string(message) if message["role"] in roles else message for message in messages]
        try:
            text, spans = render(template, given, **specials)
        except TemplateBoundsError:
            raise
        except Exception as error:  # templates raise errors of any kind
            errors.append(error)
            continue
        if not _writes_lists(text, given) and all(message["content"].strip() in text for message in given if _is_string(message)):
            return text, spans
    if errors:
        raise errors[0]
    raise RecordError(
        f"record {record.id!r}: the chat template writes the parts of a message as a Python list: it knows no images; set another "
        "processor.chat_template (mof.chat_templates has two)"
    )


def _as_string(message: Message) -> Message:
    """Return a message of text with a string in place of its parts; another message is returned as it is."""
    if any(part["type"] != "text" for part in message["content"]):
        return message
    return {**message, "content": "\n".join(part["text"] for part in message["content"])}


def _is_string(message: Message) -> bool:
    return isinstance(message["content"], str)


def _writes_lists(text: str, messages: Sequence[Message]) -> bool:
    """Return whether the text holds the parts of a message as Python writes a list."""
    return "[{'type': '" in text and any(str(message["content"]) in text for message in messages if not _is_string(message))


def _joined(spans: Sequence[Span]) -> list[Span]:
    """Return the spans, with spans that touch joined to a single span."""
    joined = list(spans[:1])
    for start, end in spans[1:]:
        if start == joined[-1][1]:
            joined[-1] = joined[-1][0], end
        else:
            joined.append((start, end))
    return joined


def _end_of_turn(processor: ProcessorMixin) -> re.Pattern[str]:
    """Return a pattern for the special tokens that end a turn, with white space before them; it matches the empty text too."""
    tokenizer, eos = processor.tokenizer, processor.tokenizer.eos_token
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    others = {*tokenizer.all_special_tokens, *added} - {tokenizer.bos_token, eos, str(getattr(processor, "image_token", ""))}
    longest_first = sorted((re.escape(token) for token in others if token), key=len, reverse=True)
    special = rf"\s*(?:{'|'.join(longest_first)})" if longest_first else "(?!)"
    return re.compile(rf"(?:(?:{special})*?\s*{re.escape(eos)}|{special})?" if eos else f"(?:{special})?")


def _between_sentinels(record: Record, text: str, with_sentinels: str, ending: re.Pattern[str]) -> Iterator[Span]:
    """Yield the characters of each answer in `text`. `with_sentinels` is the text of the same record with sentinels."""
    pieces = _SENTINEL.split(with_sentinels)  # words of the template, number of a sentinel, words, ...
    words, numbers = pieces[0::2], pieces[1::2]
    start, answers = len(words[0]), [message for message in record.messages if message["role"] == "assistant"]
    whole = text.startswith(words[0]) and numbers == [str(number) for number in range(len(answers))]
    for message, after in zip(answers, words[1:], strict=False):
        written = next((spelling for spelling in _spellings(message) if text.startswith(spelling + after, start)), None)
        if written is None or not whole:
            break
        end = start + len(written)
        yield start, ending.match(text, end).end()  # type: ignore[union-attr]  # the pattern matches the empty text too
        start = end + len(after)
    if not whole or start != len(text):
        raise RecordError(
            f"record {record.id!r}: the chat template does not write each answer once and unchanged; put {{% generation %}} and "
            "{% endgeneration %} around the answers in it"
        )


def _with_sentinels(messages: Sequence[Message]) -> list[Message]:
    """Return the messages with a numbered sentinel in place of each answer."""
    number, replaced = 0, []
    for message in messages:
        if message["role"] == "assistant":
            message = {**message, "content": [{"type": "text", "text": f"\ue000{number}\ue001"}]}
            number += 1
        replaced.append(message)
    return replaced


def _spellings(message: Message) -> Iterator[str]:
    """Yield the texts that templates may write for an answer: its parts are joined, and white space around it may be cut off."""
    parts = [part["text"] for part in message["content"] if part["type"] == "text"]
    for separator in ("", "\n"):
        joined = separator.join(parts)
        yield from (joined, joined.strip(), joined.lstrip(), joined.rstrip(), separator.join(part.strip() for part in parts))
