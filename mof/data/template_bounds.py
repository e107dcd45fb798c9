"""A chat template comes with a checkpoint, so it is code from strangers. This module bounds its steps, time and memory.

Jinja's sandbox keeps a template away from files and programs, but does not stop endless loops and huge texts. Here each round of a loop
is counted, and each text is measured before it is made.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache, wraps
from typing import Any

from jinja2 import nodes, pass_environment
from jinja2.filters import make_attrgetter

MOST_STEPS = 300_000  # rounds of loops, calls of macros, and items that filters take
MOST_CHARACTERS = 50_000_000  # in a value, and in everything that a template writes
MOST_ITEMS = 1_000_000  # in a list
MOST_LEVELS = 50  # of lists in lists; JSON is indented at each
MOST_DIGITS = 10_000  # in an integer, in base 2
MOST_SECONDS = 20  # the computing time of this thread
ITEMS_A_STEP = 100  # a filter that makes a list takes a step for each 100 items

LISTS = (list, tuple, dict)
OF_LISTS = frozenset((
    "batch", "count", "dictsort", "first", "groupby", "items", "last", "length", "list", "map", "max", "min", "random", "reject",
    "rejectattr", "select", "selectattr", "slice", "sort", "sum", "unique",
))  # fmt: skip
OF_COMPARED = ("dictsort", "groupby", "max", "min", "sort", "unique")
COMPARISONS = frozenset(("==", "!=", "<", "<=", ">", ">=", "eq", "equalto", "ge", "gt", "greaterthan", "in", "le", "lessthan", "lt", "ne"))
SLOW = ("pprint", "striptags", "urlize", "wordwrap")  # their time grows with the square of the text or so
MOST_FOR_SLOW = 10_000  # characters
GROWING = frozenset(("batch", "center", "expandtabs", "indent", "ljust", "rjust", "slice", "tojson", "translate", "zfill"))
WIDE = re.compile(r"%[^%a-zA-Z]*(\*|\d{5})|\{[^{}]*(\{|\d{5})")  # formats that pad a value to any width


class TemplateBoundsError(ValueError):
    """TemplateBoundsError says that a chat template needs too many steps, too much time or too many characters."""


@dataclass
class _Spent:
    """_Spent holds the costs of a conversation so far."""

    steps: int = 0
    characters: int = 0
    until: float = field(default_factory=lambda: time.thread_time() + MOST_SECONDS)


_spent: ContextVar[_Spent] = ContextVar("spent")


@contextmanager
def counted() -> Iterator[None]:
    """Count what a template does in this context, from 0."""
    token = _spent.set(_Spent())
    try:
        yield
    finally:
        _spent.reset(token)


def bounded(environment: Any) -> Any:
    """Change an `ImmutableSandboxedEnvironment` of Jinja so that everything its templates do within `counted` is bounded; return it."""
    call, operators = environment.call, environment.binop_table

    def called(context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        text = getattr(getattr(function, "__wrapped__", function), "__self__", None)  # of a method; "format" is wrapped by Jinja
        if isinstance(text, str):
            if function.__name__ == "join":
                return _joined(args[0], text)
            _measure(function.__name__, text, *args, **kwargs)
        return _bounded(call(context, function, *args, **kwargs))

    environment.intercepted_binops = frozenset(("*", "**", "+", "%"))
    environment.call_binop = lambda _, name, left, right: operators[name](*_operands(name, left, right))
    environment.call, environment.finalize, environment.concat = called, _written, _joined
    environment.count_step, environment.small, environment.tilde = _count, _small, lambda *values: _joined(map(_text, values))
    environment.filters = {name: _limited(name, filter) for name, filter in environment.filters.items()}
    environment.filters["join"] = _join
    environment.filters["random"] = environment.filters["first"]  # each rendering of a conversation is the same text
    environment.tests = {name: _compared(test) if name in COMPARISONS else test for name, test in environment.tests.items()}
    # both renderings of a conversation show the same time
    own = {"lipsum": _no_lipsum, "strftime_now": lru_cache(maxsize=64)(environment.globals["strftime_now"])}
    environment.globals = {**environment.globals, **own}
    return environment


def with_checks(tree: Any) -> Any:
    """Put the checks into a parsed template (`jinja2.nodes.Template`), and return it."""
    for node in list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))):
        node.body.insert(0, nodes.ExprStmt(_call("count_step")).set_lineno(node.lineno))
    for node in list(tree.find_all(nodes.Concat)):
        node.nodes = [_call("tilde", *node.nodes)]
    for node in list(tree.find_all(nodes.Compare)):
        if not any(isinstance(side, nodes.Const) for side in (node.expr, *(operand.expr for operand in node.ops))):
            for part in (node, *node.ops):
                part.expr = _call("small", part.expr)
    for node in list(tree.find_all(nodes.Tuple)):  # its hash takes time
        if node.ctx == "load":
            node.items = [_call("small", item) for item in node.items]
    return tree


def _call(name: str, *args: nodes.Expr) -> nodes.Expr:
    return nodes.Call(nodes.EnvironmentAttribute(name), list(args), [], None, None)


def _count(steps: int = 1) -> None:
    spent = _spent.get()
    spent.steps += steps
    if spent.steps > MOST_STEPS:
        raise TemplateBoundsError(f"the chat template takes more than {MOST_STEPS} steps")
    if (steps > 1 or spent.steps % 64 == 0) and time.thread_time() > spent.until:  # not each time, since the clock is slow
        raise TemplateBoundsError(f"the chat template takes more than {MOST_SECONDS} seconds")


def _stepping(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _count()
        yield value


def _require(size: int, most: int | None = None, unit: str = "characters") -> None:
    most = MOST_CHARACTERS if most is None else most
    if size > most:
        raise TemplateBoundsError(f"the chat template makes a value of more than {most} {unit}")


def _bounded(value: Any) -> Any:
    if isinstance(value, (str, *LISTS)):
        _fits(value, len(value))
    return value


def _fits(value: Any, size: int) -> None:
    """Refuse the size of a text or a list that is like this value."""
    _require(size, *(() if isinstance(value, str) else (MOST_ITEMS, "items")))


def _written(value: Any) -> str:
    """Return a value as the text that a template writes, and count its characters."""
    text, spent = _text(value), _spent.get()
    spent.characters += len(text)
    if spent.characters > MOST_CHARACTERS:
        raise TemplateBoundsError(f"the chat template writes more than {MOST_CHARACTERS} characters")
    return text


def _joined(texts: Iterable[str], separator: str = "") -> str:
    texts = list(texts)
    _require(sum(map(len, texts)) + len(separator) * len(texts))
    return separator.join(texts)


@pass_environment
def _join(environment: Any, value: Iterable[Any], d: Any = "", attribute: str | int | None = None) -> str:
    """Do what Jinja's filter of this name does, within bounds."""
    items = value if attribute is None else map(make_attrgetter(environment, attribute), value)
    return _joined(map(_text, _stepping(items)), _text(d))


def _text(value: Any) -> str:
    return str(_small(value))


def _small(value: Any) -> Any:
    """Return a value, unless the lists and texts in it are deep, or huge together: a list may hold a list or a text many times."""
    level, levels, items, size = [value] if isinstance(value, LISTS) else [], 0, 0, 0
    while level:
        below = []
        for each in level:
            for item in [*each, *each.values()] if isinstance(each, dict) else each:
                items, size = items + 1, size + (len(item) if isinstance(item, str) else 0)
                below += [item] if isinstance(item, LISTS) else []
                _require(items, MOST_ITEMS, "items")
                _require(size)
        level, levels = below, levels + 1
        _require(levels, MOST_LEVELS, "levels")
    return value


def _operands(name: str, left: Any, right: Any) -> tuple[Any, Any]:
    """Return the operands of left + right, left * right, left ** right or left % right, unless the result would be huge."""
    sized = [value for value in (left, right) if isinstance(value, (str, *LISTS))]
    whole = [value for value in (left, right) if isinstance(value, int)]
    if name == "+" and len(sized) == 2:
        _fits(left, len(left) + len(right))
    elif name == "*" and sized and whole:
        _fits(sized[0], len(sized[0]) * whole[0])
    elif name in ("*", "**") and len(whole) == 2:
        bits = left.bit_length() + right.bit_length() if name == "*" else left.bit_length() * right
        _require(bits, MOST_DIGITS, "binary digits")
    elif name == "%" and isinstance(left, str):
        _measure("format", left, right)
    return left, right


def _measure(name: str, text: str, *args: Any, **named: Any) -> None:
    """Refuse a method of text, or a filter, whose result would be huge."""
    given = [*args, *named.values()]
    if name == "format" or name == "format_map":
        if WIDE.search(text):
            raise TemplateBoundsError(f"the chat template pads values to a width without bounds, by the format {text[:80]!r}")
        _require(len(text) + max(text.count("%"), text.count("{")) * len(_text(given)))
    elif name == "replace" and len(given) > 1:
        old, new = (str(value) for value in given[:2])
        _require(text.count(old) * len(new))
    elif name in SLOW:
        _require(len(text), MOST_FOR_SLOW)
    elif name in GROWING:
        _require((len(text) + 1) * max((value if isinstance(value, int) else len(_text(value)) for value in given), default=1))


def _compared(test: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    return lambda left, right: test(_small(left), _small(right))


def _no_lipsum(*args: Any, **kwargs: Any) -> None:
    raise TemplateBoundsError("the chat template uses lipsum, whose result has no bounds; no conversation needs it")


def _limited(name: str, filter: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter that refuses to make a huge result, and counts the items that it takes."""
    own = int(hasattr(filter, "jinja_pass_arg"))  # Jinja passes its context or environment first

    @wraps(filter)
    def limited(*args: Any, **kwargs: Any) -> Any:
        value, *rest = args[own:]
        _measure(name, "" if name in OF_LISTS else _text(value), *rest, **kwargs)
        if name in OF_COMPARED:
            _small(value)
        result = filter(*args[:own], _stepping(value) if name == "sum" else value, *rest, **kwargs)
        if isinstance(result, Iterator):
            return _stepping(result)
        if isinstance(result, LISTS):
            _count(len(result) // ITEMS_A_STEP)
        return _bounded(result)

    return limited
