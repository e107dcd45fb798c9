"""render_answers finds the characters of the answers in a conversation that a chat template wrote.

Few templates mark the answers (`{% generation %}`). A template without marks writes the conversation again with sentinels in place of
the texts (`mof.data.sentinels`). Both texts must agree to the last character, or the record is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from mof.data.records import Message, Record, RecordError
from mof.data.sentinels import KEY, SENTINEL, between_sentinels, closings, with_hidden_questions, with_sentinels
from mof.data.template_bounds import TemplateBoundsError
from mof.data.templates import Span, render, template_of

_FORMS = ((), ("system", "assistant"), ("assistant",), ("assistant", "user"), ("system",), ("system", "assistant", "user"))
_NO_IMAGES = "it knows no images; set another processor.chat_template (mof.chat_templates has two)"

Writer = Callable[[Sequence[Message]], tuple[str, list[Span]]]


def render_answers(processor: ProcessorMixin, record: Record) -> tuple[str, list[Span]]:
    """Return the conversation as the processor's chat template writes it, and the characters of each answer.

    If a template without marks writes the end-of-sequence token after an answer and before the next question, the answer includes
    everything up to this token. If not, it includes the token of the tokenizer's added tokens that follows at once, which ends the turn
    (and with GLM-4V also opens the next).

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
    if KEY in text:
        raise RecordError(f"record {record.id!r}: the chat template writes the parts of a message as a list: {_NO_IMAGES}")
    answers = len(record.answers)
    if not spans:  # no marks, or marks in a part that was not reached
        messages, pieces = with_sentinels(record.messages)
        again, _ = write(_as_strings(messages, roles))
        hidden, _ = write(_as_strings(with_hidden_questions(messages, len(pieces)), roles))
        ending = _end_of_turn(tokenizer, len(tokenizer), tokenizer.eos_token, image_token)
        spans = between_sentinels(text, again, pieces, closings(hidden, pieces, ending)) or []
        if not spans:
            raise RecordError(
                f"record {record.id!r}: the chat template does not write each answer once and unchanged; put {{% generation %}} and "
                "{% endgeneration %} around the answers in it"
            )
        return text, spans
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
    questions = [
        (message["role"], text.strip())
        for message in record.messages
        if message["role"] != "assistant"
        for text in [part["text"] for part in message["content"] if "text" in part] or [""]
    ]
    if not roles and all(words in outside for _, words in questions):
        return set()
    again, _ = write(_as_strings(with_hidden_questions(record.messages), roles))
    shown = {int(number) for number in SENTINEL.findall(again)}
    return {role for number, (role, words) in enumerate(questions) if words and number not in shown}


def _as_strings(messages: Iterable[Message], roles: Sequence[str]) -> list[Message]:
    """Return the messages; those of these roles with a string in place of their parts, unless a part is an image.

    All other parts hold the key, which shows in the text of a template that writes a list instead of its texts.
    """
    return [
        {**message, "content": "\n".join(part["text"] for part in message["content"])}
        if message["role"] in roles and all(part["type"] == "text" for part in message["content"])
        else {**message, "content": [{**part, KEY: True} for part in message["content"]]}
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
    """Return a pattern for the end of a turn, which matches the empty text too.

    Args:
        size: the number of the tokenizer's tokens; with added tokens, the pattern is another.
    """
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    others = {*tokenizer.all_special_tokens, *added} - {tokenizer.bos_token, eos, image_token}
    longest_first = sorted((re.escape(token) for token in others if token and not token.isspace()), key=len, reverse=True)
    ends = [*([f".*?{re.escape(eos)}"] if eos else []), *([rf"\s*(?:{'|'.join(longest_first)})"] if longest_first else [])]
    return re.compile(f"(?s:{'|'.join(ends)})?")
