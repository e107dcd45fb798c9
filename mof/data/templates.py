"""`render` writes a conversation with a chat template, as transformers does, and marks the answers, within bounds."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from transformers import ProcessorMixin
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

from mof.data.template_bounds import TemplateBoundsError, bounded, counted, with_checks

Span = tuple[int, int]  # characters start..end-1

SHORT_CHAT = ({"role": "user", "content": [{"type": "text", "text": "-"}]},)

MARKED = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
START, END = (f"\ufdd0{secrets.randbelow(10**20):020}\ufdd1" for _ in range(2))  # random, so that no text holds them; digits have no case


def marks_answers(template: object) -> bool:
    """Return whether a chat template puts {% generation %}, in any of Jinja's spellings, around the assistant's words."""
    return isinstance(template, str) and MARKED.search(template) is not None


def template_of(processor: ProcessorMixin) -> str | None:
    """Return the chat template of a processor, or else of its tokenizer. If there are several, return the default template."""
    template = processor.chat_template or processor.tokenizer.chat_template
    return template.get("default") if isinstance(template, dict) else template


def render(template: str, messages: Sequence[Mapping[str, Any]], **context: Any) -> tuple[str, list[Span]]:
    """Return a conversation as text, and the characters of each answer in it.

    Raises:
        TemplateBoundsError: for a template that takes too many steps or characters.
        Exception: any error that the template raises.
    """
    context = {"tools": _no_tools(), "documents": None, "add_generation_prompt": False, **context}  # as in transformers
    with counted():
        return _without_marks(_compiled(template).render(messages=messages, **context))


def _without_marks(marked: str) -> tuple[str, list[Span]]:
    """Return the text without its marks, and the characters between each START and END."""
    texts, spans, place, start = [], [], 0, 0
    for piece in re.split(f"({START}|{END})", marked):
        if piece == START:
            start = place
        elif piece == END:
            spans.append((start, place))
        else:
            texts.append(piece)
            place += len(piece)
    return "".join(texts), spans


class _Generation(Extension):
    """This extension implements {% generation %}.

    The time of transformers' own extension grows with the square of the number of answers.
    """

    tags = {"generation"}  # noqa: RUF012  as in Jinja
    priority = 200  # after the extension of transformers, whose priority is 100

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        marks = [nodes.Output([nodes.TemplateData(mark)]).set_lineno(line) for mark in (START, END)]
        return [marks[0], *body, marks[1]]


@lru_cache(maxsize=16)
def _compiled(template: str) -> Any:
    """Return the compiled template, whose marks and bounds are ours."""
    environment = bounded(_compile_jinja_template("").environment.overlay(extensions=[_Generation]))
    tree = with_checks(environment.parse(template))
    tree.set_environment(environment)
    code = environment.compile(tree, filename="<chat template>")
    return environment.template_class.from_code(environment, code, environment.make_globals(None))


@lru_cache(maxsize=1)
def _no_tools() -> Any:
    """Return the value of `tools` that transformers passes to a template without tools. It depends on transformers' version."""
    (text,), _ = render_jinja_template(conversations=[[]], chat_template="{{ tools is none }}")
    return None if text == "True" else []


def refuse_endless(processor: ProcessorMixin, messages: Sequence[Mapping[str, Any]] = SHORT_CHAT) -> None:
    """Render a conversation. A TemplateBoundsError refuses a template without end; other faults show where the text is used."""
    template = template_of(processor)
    try:
        if template is not None:
            render(template, messages, add_generation_prompt=True, **processor.tokenizer.special_tokens_map)
    except TemplateBoundsError:
        raise
    except Exception:  # for example, the template needs a system message
        return
