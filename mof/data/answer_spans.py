"""The characters of the answers in a conversation that a chat template wrote, for templates with and without marks.

A template may mark where the assistant speaks (`{% generation %}`); few do. Without marks, the conversation is written twice, the
second time with a sentinel in place of each answer. The texts between the sentinels are the template's own words, so the rest of
the first conversation is the answers. Both texts must agree to the last character, or the record is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from mof.data.records import Message, Record, RecordError

Span = tuple[int, int]  # characters start..end-1
MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_SENTINEL = re.compile("\ue000([0-9]+)\ue001")  # characters that Unicode gives no meaning, so no text of a template holds them


def render_answers(processor: ProcessorMixin, record: Record) -> tuple[str, list[Span]]:
    """Return the conversation as the processor's chat template writes it, and the characters of each answer.

    An answer includes the special token that ends its turn, where the template writes such a token after it.

    Raises:
        ValueError: for a processor without a chat template.
        RecordError: for a record without an answer, or in which the template does not write each answer once and unchanged.
    """
    template = processor.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template is None:
        raise ValueError("the processor has no chat template: set processor.chat_template (mof.chat_templates has two)")
    if not record.answers:
        raise RecordError(f"record {record.id!r} has no assistant message, so there is nothing to learn or score")

    def render(messages: list[Message], **options: bool) -> tuple[list[str], Any]:
        specials = processor.tokenizer.special_tokens_map
        return render_jinja_template(conversations=[messages], chat_template=template, **options, **specials)

    if MARK.search(template):
        texts, marked = render(record.messages, return_assistant_tokens_mask=True)
        if len(marked[0]) != len(record.answers):
            raise RecordError(
                f"record {record.id!r}: {len(record.answers)} assistant messages, but the chat template marks {len(marked[0])} answers"
            )
        return texts[0], marked[0]
    text = render(record.messages)[0][0]
    return text, list(_between_sentinels(record, text, lambda messages: render(messages)[0][0], end_of_turn(processor.tokenizer)))


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Return a pattern for a special token that can end a turn, with white space before it; it matches the empty text too."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    specials = ({*tokenizer.all_special_tokens, *added} - {tokenizer.bos_token}) | {tokenizer.eos_token}
    longest_first = sorted((re.escape(token) for token in specials if token), key=len, reverse=True)
    return re.compile(rf"(?:\s*(?:{'|'.join(longest_first)}))?") if longest_first else re.compile("")


def _between_sentinels(record: Record, text: str, render: Callable[[list[Message]], str], ending: re.Pattern[str]) -> Iterator[Span]:
    """Yield the characters of each answer in `text`, which `render` made of the record's messages."""
    rendered = _SENTINEL.split(render(_with_sentinels(record.messages)))  # words of the template, number of a sentinel, words, ...
    words, numbers = rendered[0::2], rendered[1::2]
    start, answers = len(words[0]), [message for message in record.messages if message["role"] == "assistant"]
    whole = text.startswith(words[0]) and numbers == [str(number) for number in range(len(answers))]
    for message, after in zip(answers, words[1:], strict=False):
        written = next((said for said in _spellings(message) if text.startswith(said + after, start)), None)
        if written is None or not whole:
            break
        end = start + len(written)
        yield start, ending.match(text, end).end()  # type: ignore[union-attr]  # it matches the empty text
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
    """Yield the texts that templates make of an answer: its parts are joined, and white space around it may be cut off."""
    parts = [part["text"] for part in message["content"] if part["type"] == "text"]
    for separator in ("", "\n"):
        joined = separator.join(parts)
        yield from (joined, joined.strip(), joined.lstrip(), joined.rstrip(), separator.join(part.strip() for part in parts))
