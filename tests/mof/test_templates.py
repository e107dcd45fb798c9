"""Chat templates: rendered as transformers renders them, in any spelling, and within bounds."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from mof import MoFForConditionalGeneration, MoFProcessor
from mof.chat_templates import CHATML, VICUNA
from mof.data.answer_tokens import encode_record
from mof.data.collator import SupervisedCollator
from mof.data.prompts import prompt_inputs
from mof.data.records import RecordError, to_record
from mof.data.templates import TemplateBoundsError, marks_answers, render

TALK: list[dict[str, Any]] = [
    {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
]
NESTED = "{% for i in range(99999) %}" * 2 + "TEXT" + "{% endfor %}" * 2
TOWERS = "{% set ns = namespace(a=[1], b=[1]) %}{% for i in range(60) %}{% set ns.a, ns.b = [ns.a] * 2, [ns.b] * 2 %}{% endfor %}"
TRIMMED = "{%- for m in messages -%} {{ m.role }} : {% if m.role == 'assistant' %} {%- generation -%} x {%- endgeneration -%} {% endif %}{% endfor %}"


@pytest.mark.parametrize(
    "template",
    [
        VICUNA,
        CHATML,
        TRIMMED,
        "{{ 2**-3 }}{{ 'a' * -1 }}{{ '%s-%d' % ('a', 3) }}{{ '{:>4}'.format(1) }}{{ [1, 2] | join(',') }}{{ 'a-b' | replace('-', '+') }}"
        "{{ {'a': 1} | tojson(indent=2) }}{{ [{'a': 1}, {'a': 2}] | selectattr('a', 'equalto', 2) | list }}{{ ' a ' | trim ~ 1 ~ none }}"
        "{{ 'a,b'.split(',') | last }}{{ [1, 2] | join(',', attribute='real') }}{{ 1.5 * 2 }}{{ x | default('d') }}{{ 'x' | e }}",
        "{{ messages | tojson(indent=4) }}{% for role, turns in messages | groupby('role') %}{{ role }}{{ turns | length }}{% endfor %}"
        "{{ [1, 2, 3] | batch(2, '-') | list }}{{ [1, 2, 3] | slice(2) | list }}{{ [1, 2] | sum }}{{ '%s:%(a)s' | replace('%s:', '') | format(a=1) }}"
        "{{ 'a b' | wordcount }}{{ 'abcdef' | truncate(3, true, '.', 0) }}{{ 'a b' | urlencode }}{{ '<b>x</b>' | striptags }}{{ [1] | pprint }}"
        "{{ 'x' | center(9) }}{{ messages | join('|', attribute='role') }}{{ 12 | replace(1, 3) }}{{ messages[::-1] | map(attribute='role') | list }}",
        "{% for key, value in {'b': 1, 'a': [1]} | dictsort %}{{ key }}={{ value }}{{ loop.cycle('x', 'y') }}{{ loop.nextitem }}{% endfor %}"
        "{% macro tag(x, y=2) %}[{{ x }}{{ y }}{{ varargs }}{{ caller('u') if caller else '' }}]{% endmacro %}{{ tag(1) }}{{ tag(1, 3, 4) }}"
        "{% set text %}a{{ 1 }}{% endset %}{% filter upper %}{{ text }}{% endfilter %}{{ cycler('a', 'b').next() }}{{ 'a,b'.split(',', 1) }}"
        "{% for row in [1, [2, [3]]] recursive %}{{ '<' ~ loop(row) ~ '>' if row is iterable else row }}{% endfor %}{{ dict(a=1) | items | list }}",
        "{% if tools %}t{% endif %}{{ tools is none }}{{ documents }}{{ 3 * 4 }}{{ add_generation_prompt == false }}",
    ],
)
def test_text_and_answers_are_those_of_transformers(template: str) -> None:
    texts, spans = render_jinja_template(conversations=[TALK], chat_template=template, return_assistant_tokens_mask=True, eos_token="</s>")
    assert render(template, TALK, eos_token="</s>") == (texts[0], [tuple(span) for span in spans[0]])


@pytest.mark.parametrize("left", ["{%", "{%-", "{%+"])
@pytest.mark.parametrize("right", ["%}", "-%}"])
@pytest.mark.parametrize("space", ["", " ", "  "])
def test_every_spelling_of_the_mark(left: str, space: str, right: str) -> None:
    template = "a" + "b".join(f"{left}{space}{word}{space}{right}" for word in ("generation", "endgeneration")) + "c"
    assert marks_answers(template) and render(template, []) == ("abc", [(1, 2)])


@pytest.mark.parametrize("filter", ["upper", "trim"])
def test_marks_within_a_filter(filter: str) -> None:
    template = "{% filter FILTER %}A {% generation %}B{% endgeneration %} C{% endfilter %}".replace("FILTER", filter)
    assert render(template, []) == ("A B C", [(2, 3)])


@pytest.mark.parametrize(
    "template",
    [
        NESTED,
        NESTED.replace("TEXT", ""),
        "{{ 'x' * 10**10 }}",
        "{{ 10 ** (10 ** 9) }}",
        "{{ [0] * 10**12 }}",
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
        "{{ 'x' | center(10**8) }}",
        "{{ 'x'.ljust(10**8) }}{{ 'x'.zfill(10**8) }}",
        "{{ '%0100000000d' % 1 }}",
        "{{ '{:>{}}'.format(1, 10**8) }}",
        "{{ 'x' | indent(10**8, true) }}",
        "{{ [1] | tojson(indent=10**8) }}",
        "{{ ('x' * 9999).replace('x', 'y' * 9999) }}",
        "{{ ('x' * 9999) | replace('', 'y' * 9999) }}",
        "{{ range(999) | join('x' * 9999) }}",
        "{{ ('x' * 9999).join('y' * 999) }}",
        "{{ '\t'.expandtabs(10**8) }}",
        "{{ ('x' * 9999).translate({120: 'y' * 9999}) }}",
        "{% set x = 'x' * 90000 %}{{ (x ~ x) | length }}",
        "{% set x = 'x' * 90000 %}{{ (x + x) | length }}",
        "{{ ['x' * 9999] * 99 }}",
        "{{ '%s' % [['x' * 9999] * 99] }}",
        "{{ 10**999 * 10**9999 }}",
        "{{ [1] | batch(10**8, 0) | list }}",
        "{{ range(9999) | map('string') | list | length }}",
        "{% macro f() %}{% for i in range(999) %}{{ 'x' * 9999 }}{% endfor %}{% endmacro %}{{ f() | length }}",
        "{{ ('{0}' * 999).format('x' * 9999) }}",
        "{{ ('%(a)s' * 999) % {'a': 'x' * 9999} }}",
        "{{ '%09999999d' | format(1) }}",
        "{{ ('%s' * 9 ~ 'x' * 9999) | format(*['y' * 9999] * 9) }}",
        "{{ ([{'a': 'x' * 9999}] * 99) | join(attribute='a') }}",
        "{{ range(999) | join(d='x' * 9999) }}",
        "{{ lipsum(10**8) }}",
        "{{ [1, 2] | tojson(separators=('x' * 99999, 'x')) }}",
        "{{ [1] | slice(10**8) | list }}",
        "{{ 'x' | center(width=10**8) }}",
        "{{ ('<' * 99999) | striptags }}",
        "{% set x = [[0]] * 9999 %}{{ x | sum(start=[]) | length }}",
        "{% set ns = namespace(a=[1]) %}{% for i in range(60) %}{% set ns.a = [ns.a] %}{% endfor %}{{ ns.a | tojson(indent=4) }}",
        TOWERS + "{{ ns.a == ns.b }}",
        TOWERS + "{{ ns.a is eq(ns.b) }}",
        TOWERS + "{{ [ns.a, ns.b] | max }}",
        "{% set ns = namespace(a=(1,)) %}{% for i in range(60) %}{% set ns.a = (ns.a, ns.a) %}{% endfor %}{{ ns.a in {1: 2} }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(50) }}",
    ],
)
def test_a_template_without_end_is_refused(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mof.data.template_bounds.MOST_STEPS", 1000)
    monkeypatch.setattr("mof.data.template_bounds.MOST_CHARACTERS", 100_000)
    monkeypatch.setattr("mof.data.template_bounds.MOST_ITEMS", 10_000)
    with pytest.raises(TemplateBoundsError, match="chat template"):
        render(template, TALK)


def test_a_processor_with_a_template_without_end_is_refused(
    tiny_model: MoFForConditionalGeneration, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mof.data.template_bounds.MOST_STEPS", 1000)
    with pytest.raises(TemplateBoundsError, match="1000 steps"):
        MoFProcessor.from_parts(tiny_model, tiny_tokenizer, chat_template=NESTED)


def test_a_conversation_that_makes_a_template_endless_is_refused_at_generation(
    tiny_processor: MoFProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mof.data.template_bounds.MOST_STEPS", 1000)
    loops = "{% for i in range(100) %}{% for j in range(100) %}{% endfor %}{% endfor %}"
    tiny_processor.chat_template = (
        "{% if eos_token is defined and 'xyzzy' in messages[0].content[0].text %}" + loops + "{% endif %}" + VICUNA
    )
    chats = [[{"role": "user", "content": [{"type": "text", "text": text}]}] for text in ("Hello", "xyzzy")]
    assert prompt_inputs(tiny_processor, chats[:1], add_generation_prompt=True)["input_ids"].shape[0] == 1
    with pytest.raises(TemplateBoundsError, match="1000 steps"):
        prompt_inputs(tiny_processor, chats, add_generation_prompt=True, processor_kwargs={"padding": True})


@pytest.mark.parametrize("fault", ["{{ raise_exception('no system turn') }}", "{{ messages.a.b }}", "{{ 1 + 'a' }}", "{{ 1 / 0 }}"])
def test_what_a_template_raises_costs_the_record(fault: str, tiny_processor: MoFProcessor, caplog: pytest.LogCaptureFixture) -> None:
    tiny_processor.chat_template = "{% if messages[0].role == 'system' %}" + fault + "{% endif %}" + VICUNA
    image = Image.new("RGB", (4, 4))
    records = [{"id": f"r{start}", "images": [image], "messages": TALK[start:]} for start in (0, 1)]
    with pytest.raises(RecordError, match="'r0'"):
        encode_record(tiny_processor, to_record(records[0]))
    collator = SupervisedCollator(tiny_processor)
    assert len(collator(records)["labels"]) == 1 and collator.left_out == 1 and "'r0'" in caplog.text


def test_many_turns_take_time_in_proportion(tiny_processor: MoFProcessor) -> None:
    """The work is counted: looking at every token for every answer would take 10**9 steps here."""
    turns = TALK[3:] * 5_000
    example = encode_record(tiny_processor, to_record({"id": "long", "messages": turns}), max_length=10**9)
    assert int(example.answer_mask.sum()) == 5_000 * len(" Yes.") + 5_000
