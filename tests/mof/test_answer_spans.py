"""Answers found in templates without marks, in the styles of released models; the same templates with marks are the reference."""

import re
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.tiny import build_tokenizer

from mof.data.answer_spans import render_answers
from mof.data.answer_tokens import encode_record
from mof.data.records import RecordError, to_record

PARTS = "{% for c in m.content %}{% if c.type == 'image' %}<image>{% else %}{{ c.text }}{% endif %}{% endfor %}"
FIRST = "{{ m.content[0].text }}"
TRIMMED = "{{ m.content[0].text | trim }}"


def turns(user, answer, end, system="{{ m.content[0].text }}", before="", after=""):
    """Return a template; `#(` and `#)` are where marks belong."""
    return (
        f"{before}{{% for m in messages %}}{{% if m.role == 'system' %}}{system}{{% elif m.role == 'user' %}}{user}{{% else %}}"
        f"{answer}{end}{{% endif %}}{{% endfor %}}{after}"
    )


def im(role, body):
    return f"<|im_start|>{role}\n{body}"


# Name -> (template, the special token that ends an answer, or None). Written from the rules of the released templates.
TEMPLATES = {
    "llava-1.5": (turns(f"USER: {PARTS} ", f"ASSISTANT: #({FIRST}#) ", "", system=FIRST + " "), None),
    "vicuna with </s>": (turns(f"USER: {PARTS} ", f"ASSISTANT: #({FIRST}</s>#)", ""), "</s>"),
    "llava-onevision": (turns(im("user", PARTS + "<|im_end|>\n"), im("assistant", f"#({TRIMMED}<|im_end|>#){{ '\n' }}"), "", system=im("system", FIRST + "<|im_end|>\n")), "<|im_end|>"),
    "qwen2-vl": (turns(im("user", PARTS + "<|im_end|>\n"), im("assistant", f"#({FIRST}<|im_end|>#){{ '\n' }}"), "", system=im("system", FIRST + "<|im_end|>\n"), before="{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"), "<|im_end|>"),
    "qwen3-vl, thoughts cut off": (turns(im("user", PARTS + "<|im_end|>\n"), "<|im_start|>assistant\n{% set said = m.content[0].text.split('</think>')[-1].lstrip('\n') %}" + ("{% if loop.last %}<think>\n\n</think>\n\n{% endif %}#({{ said }}<|im_end|>#){{ '\n' }}"), ""), "<|im_end|>"),
    "idefics3, smolvlm": (turns(f"User:{PARTS}<end_of_utterance>\n", f"Assistant: #({TRIMMED}<end_of_utterance>#){{ '\n' }}", "", before="<|im_start|>"), "<end_of_utterance>"),
    "gemma 3": (turns(f"<start_of_turn>user\n{PARTS}<end_of_turn>\n", f"<start_of_turn>model\n#({TRIMMED}<end_of_turn>#){{ '\n' }}", "", before="<s>"), "<end_of_turn>"),
    "pixtral": (turns(f"[INST]{PARTS}[/INST]", f"#({FIRST}</s>#)", "", before="<s>"), "</s>"),
    "llama 3.2 vision": (turns(f"<|start_header_id|>user<|end_header_id|>\n\n{PARTS}<|eot_id|>", f"<|start_header_id|>assistant<|end_header_id|>\n\n#({TRIMMED}<|eot_id|>#)", "", before="<s><|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ strftime_now('%d %b %Y') }}\n\n<|eot_id|>"), "<|eot_id|>"),
    "phi-4-multimodal": (turns(f"<|user|>{PARTS}<|end|>", f"<|assistant|>#({FIRST}<|end|>#)", "", after="<|endoftext|>"), "<|end|>"),
    "aya vision": (turns(f"<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{PARTS}<|END_OF_TURN_TOKEN|>", f"<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|><|START_RESPONSE|>#({FIRST}<|END_RESPONSE|><|END_OF_TURN_TOKEN|></s>#)", "", before="<s>"), "</s>"),
    "glm-4.1v, a turn ends where the next begins": (turns(f"<|user|>\n{PARTS}", f"<|assistant|>\n#({FIRST}{{% if not loop.last %}}<|user|>{{% endif %}}#)", "", before="[gMASK]<sop>").replace("<|user|>\n", "{% if loop.first or messages[loop.index0 - 1].role == 'system' %}<|user|>{% endif %}\n"), ("<|user|>", "Question 1?")),
    "the end of the conversation closes the last answer": (turns(f"Q: {PARTS} ", f"A: #({FIRST}{{% if loop.last %}}</s>{{% endif %}}#) ", ""), ("A cat.", "</s>")),
    "lfm2-vl": (turns(im("user", PARTS + "<|im_end|>\n"), im("assistant", f"#({FIRST}<|im_end|>#){{ '\n' }}"), "", before="<s>"), "<|im_end|>"),
    "a space before the end": (turns(f"USER: {PARTS} ", f"ASSISTANT: #({FIRST} </s>#)", ""), "</s>"),
    "llama 2, <s> for each turn": (turns(f"<s>[INST] {PARTS} [/INST] ", f"#({TRIMMED} </s>#)", ""), "</s>"),
}  # fmt: skip
SPECIALS = sorted({token for template, _ in TEMPLATES.values() for token in re.findall(r"<\|?\w+\|?>", template)} - {"<image>", "<think>"})


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIALS})
    return tokenizer


def processor(tokenizer, template):
    return SimpleNamespace(tokenizer=tokenizer, chat_template=template.replace("#(", "").replace("#)", ""))


def marked(tokenizer, template, style="{% generation %}"):
    closing = style.replace("generation", "endgeneration")
    return SimpleNamespace(tokenizer=tokenizer, chat_template=template.replace("#(", style).replace("#)", closing))


def talk(answers, system=None, image=True):
    messages = [] if system is None else [{"role": "system", "content": system}]
    for number, answer in enumerate(answers):
        asked = [{"type": "text", "text": f"Question {number}?"}]
        messages += [{"role": "user", "content": [{"type": "image"}, *asked] if image and not number else asked}]
        messages += [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    return to_record({"id": "x", "messages": messages, "images": [Image.new("RGB", (2, 2))] if image else []})


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_are_those_of_the_template_with_marks(tokenizer, name, system):
    template, end = TEMPLATES[name]
    record = talk(["A cat.", "A cat.", "Question 1?"], system)  # equal answers, and an answer that repeats a question
    text, spans = render_answers(processor(tokenizer, template), record)
    expected_text, expected = render_answers(marked(tokenizer, template), record)
    assert text == expected_text
    assert [text[start:stop] for start, stop in spans] == [text[start:stop] for start, stop in expected]
    assert [*spans] == [*map(tuple, expected)]
    assert all(text[start:stop].endswith(end or ("A cat.", "Question 1?")) for start, stop in spans)


@pytest.mark.parametrize("style", ["{% generation %}", "{%- generation -%}", "{%-generation%}", "{% generation -%}"])
def test_marks_are_used_in_any_spelling(tokenizer, style):
    template = TEMPLATES["qwen2-vl"][0].replace("<|im_end|>#)", "#)<|im_end|>")  # a mark that leaves the end of the turn out
    text, spans = render_answers(marked(tokenizer, template, style), talk(["A cat."]))
    assert [text[start:stop] for start, stop in spans] == ["A cat."]


plain = st.text(st.characters(codec="utf-8", exclude_characters="\ue000\ue001"), min_size=1, max_size=12)


@settings(deadline=None)
@given(st.lists(plain, min_size=1, max_size=4), st.sampled_from([name for name in TEMPLATES if "thoughts" not in name]))
def test_any_texts_are_found_or_refused(tokenizer, answers, name):
    """White space at the ends is the template's matter; everything between it is the answer, to the last character."""
    template, _ = TEMPLATES[name]
    text, spans = render_answers(processor(tokenizer, template), talk(answers))
    found = [text[start:stop] for start, stop in spans]
    assert len(found) == len(answers)
    for answer, piece in zip(answers, found, strict=True):
        assert answer.strip() in piece
    reference_text, reference = render_answers(marked(tokenizer, template), talk(answers))
    assert text == reference_text
    for (start, stop), (left, right) in zip(spans, reference, strict=True):
        assert text[min(start, left) : max(start, left)].isspace() or start == left
        assert text[min(stop, right) : max(stop, right)].isspace() or stop == right


@pytest.mark.parametrize(
    "template",
    [
        turns(PARTS, "{{ m.content[0].text | upper }}", ""),
        turns(PARTS, "{{ m.content[0].text }}{{ m.content[0].text }}", ""),
        turns(PARTS, "{% if loop.last %}{{ m.content[0].text }}{% endif %}", ""),
        turns(PARTS, "{{ m.content[0].text | length }}{{ m.content[0].text }}", ""),
    ],
    ids=["changed", "twice", "left out", "counted"],
)
def test_a_template_that_rewrites_answers_costs_the_record(tokenizer, template):
    with pytest.raises(RecordError, match="'x'"):
        render_answers(SimpleNamespace(tokenizer=tokenizer, chat_template=template), talk(["a cat", "b"]))


LAST = "{% if loop.last or loop.index0 == messages | length - 2 %}"
STRINGS = {
    "pixtral: system text and answers are added to strings": turns(LAST + "{{ messages[0].content + '|' }}{% endif %}" + f"[INST]{PARTS}[/INST]", "#({{ m.content + '</s>' }}#)", "", system=""),
    "llama 3.2: the system text is trimmed": turns(f"USER: {PARTS} ", f"ASSISTANT: #({FIRST}</s>#)", "", system="").replace("{% for m", "{{ messages[0].content | trim }}{% for m", 1).replace(FIRST, "{{ m.content if m.content is string else m.content[0].text }}"),
    "text only": turns("USER: {{ m.content }} ", "ASSISTANT: #({{ m.content }}</s>#)", "", system="{{ m.content }} "),
    "text only, trimmed": turns("USER: {{ m.content | trim }} ", "ASSISTANT: #({{ m.content | trim }}</s>#)", "", system="{{ m.content | trim }} "),
}  # fmt: skip


@pytest.mark.parametrize("name", STRINGS)
def test_a_template_that_wants_strings_gets_strings(tokenizer, name):
    record = talk(["A cat.", "No."], "Be brief.", image="text only" not in name)
    for make in (processor, marked):
        text, spans = render_answers(make(tokenizer, STRINGS[name]), record)
        assert [text[start:stop] for start, stop in spans] == ["A cat.</s>", "No.</s>"]
        assert all(words in text for words in ("Be brief.", "Question 0?", "Question 1?")) and "type" not in text


def test_a_template_that_knows_no_images_is_refused(tokenizer):
    """Its prompts would hold "[{'type': 'image'}, ...]", with or without marks around the answers."""
    for make in (processor, marked):
        with pytest.raises(RecordError, match=r"'x'.*knows no images"):
            render_answers(make(tokenizer, STRINGS["text only"]), talk(["A cat."]))


def test_the_token_of_an_image_is_no_end_of_a_turn(tokenizer):
    own = processor(tokenizer, "{% for m in messages %}" + PARTS + "{% endfor %}")
    own.image_token = "<image>"
    images = [Image.new("RGB", (2, 2))] * 2
    turns = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A cat."}] * 2
    text, spans = render_answers(own, to_record({"id": "x", "messages": turns, "images": images}))
    assert [text[start:stop] for start, stop in spans] == ["A cat.", "A cat."]


def test_marks_around_each_part_of_an_answer_are_one_answer(tokenizer):
    template = turns(PARTS + "|", "{% for c in m.content %}#({{ c.text }} #){% endfor %}", "|")
    parts = [{"type": "text", "text": text} for text in ("A", "cat.")]
    messages = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": parts}] * 2
    text, spans = render_answers(marked(tokenizer, template), to_record({"id": "x", "messages": messages}))
    assert [text[start:stop] for start, stop in spans] == ["A cat. ", "A cat. "]


def test_a_record_without_an_answer_is_refused(tokenizer):
    with pytest.raises(RecordError, match="'q'"):
        record = to_record({"id": "q", "messages": [{"role": "user", "content": "What?"}]})
        render_answers(processor(tokenizer, TEMPLATES["pixtral"][0]), record)


def test_empty_answers_are_not_told_as_too_long(tiny_processor):
    tiny_processor.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content[0].text }}; {% endfor %}"  # with no end of a turn
    turns = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": ""}]
    with pytest.raises(RecordError, match="^record 'q' has only empty answers; take the record out$"):
        encode_record(tiny_processor, to_record({"id": "q", "messages": turns}))
