"""`render` writes a conversation with a chat template, as transformers does, and marks the answers. Its time and memory are bounded.

A template comes with a checkpoint, so it is code from strangers. Jinja's sandbox keeps it away from files and programs, but does not
stop endless loops and endless texts.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from transformers import ProcessorMixin
from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

Span = tuple[int, int]  # characters start..end-1

MOST_STEPS = 300_000  # rounds of loops and calls of macros
MOST_CHARACTERS = 50_000_000

SHORT_CHAT = ({"role": "user", "content": [{"type": "text", "text": "-"}]},)

MARKED = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
START, END = (f"\ufdd0{secrets.token_hex(8)}\ufdd1" for _ in range(2))  # random, so that no text holds them
_steps: ContextVar[int] = ContextVar("steps")


class TemplateBoundsError(ValueError):
    """TemplateBoundsError says that a chat template needs too many steps or characters."""


def marks_answers(template: object) -> bool:
    """Return whether a chat template puts {% generation %}, in any of Jinja's spellings, around the assistant's words."""
    return isinstance(template, str) and MARKED.search(template) is not None


def template_of(processor: ProcessorMixin) -> str | None:
    """Return the chat template of a processor. If it has several, return its default template."""
    template = processor.chat_template
    return template.get("default") if isinstance(template, dict) else template


def render(template: str, messages: Sequence[Mapping[str, Any]], **context: Any) -> tuple[str, list[Span]]:
    """Return a conversation as text, and the characters of each answer in it.

    Raises:
        TemplateBoundsError: for a template that takes too many steps or characters.
        Exception: any error that the template raises.
    """
    context = {"tools": _no_tools(), "documents": None, "add_generation_prompt": False, **context}  # as in transformers
    token = _steps.set(0)
    try:
        pieces, length = [], 0
        for piece in _compiled(template).generate(messages=messages, **context):
            pieces.append(piece)
            length += len(piece)
            if length > MOST_CHARACTERS:
                raise TemplateBoundsError(f"the chat template writes more than {MOST_CHARACTERS} characters")
    finally:
        _steps.reset(token)
    return _without_marks("".join(pieces))


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
    """Return the compiled template. Each round of a loop and each call of a macro is counted, and the size of each value is checked."""
    environment = _compile_jinja_template("").environment.overlay(extensions=[_Generation])
    environment.intercepted_binops = frozenset(("*", "**"))
    environment.call_binop = lambda _, operator, left, right: _multiplied(environment, operator, left, right)
    environment.count_step = _count_step
    environment.filters = {**environment.filters, "bounded": _bounded}
    environment.globals = {key: value for key, value in environment.globals.items() if key != "lipsum"}
    tree = environment.parse(template)
    for node in list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))):
        step = nodes.Call(nodes.EnvironmentAttribute("count_step"), [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(step).set_lineno(node.lineno))
    for node in list(tree.find_all(nodes.Assign)):
        node.node = nodes.Filter(node.node, "bounded", [], [], None, None).set_lineno(node.lineno)
    for node in list(tree.find_all(nodes.AssignBlock)):
        node.filter = nodes.Filter(node.filter, "bounded", [], [], None, None).set_lineno(node.lineno)
    tree.set_environment(environment)
    code = environment.compile(tree, filename="<chat template>")
    return environment.template_class.from_code(environment, code, environment.make_globals(None))


def _count_step() -> None:
    _steps.set(_steps.get() + 1)
    if _steps.get() > MOST_STEPS:
        raise TemplateBoundsError(f"the chat template takes more than {MOST_STEPS} steps")


def _bounded(value: Any) -> Any:
    if isinstance(value, (str, list, tuple, dict)) and len(value) > MOST_CHARACTERS:
        raise TemplateBoundsError(f"the chat template makes a value of more than {MOST_CHARACTERS} characters")
    return value


def _multiplied(environment: Any, operator: str, left: Any, right: Any) -> Any:
    """Return left * right or left ** right, unless the result would be huge."""
    sizes = [len(value) if isinstance(value, (str, list, tuple)) else abs(value) for value in (left, right)]
    if operator == "*" and not all(isinstance(value, (int, float)) for value in (left, right)):
        size = sizes[0] * sizes[1]
    else:
        size = 64 * max(sizes) if operator == "**" else 0
    if size > MOST_CHARACTERS:
        raise TemplateBoundsError(f"the chat template makes a value of more than {MOST_CHARACTERS} characters")
    return environment.binop_table[operator](left, right)


@lru_cache(maxsize=1)
def _no_tools() -> Any:
    """Return the value of `tools` that transformers passes to a template without tools. It depends on transformers' version."""
    (text,), _ = render_jinja_template(conversations=[[]], chat_template="{{ tools is none }}")
    return None if text == "True" else []


def refuse_endless(template: str | None, messages: Sequence[Mapping[str, Any]] = SHORT_CHAT) -> None:
    """Render a conversation. A TemplateBoundsError refuses a template without end; other faults show where the text is used."""
    try:
        if template is not None:
            render(template, messages, add_generation_prompt=True)
    except TemplateBoundsError:
        raise
    except Exception:  # for example, the template needs a system message, or a variable that the tokenizer would give
        return
