"""Answers in the styles of released templates that think, number, date, join or drop texts. The marked texts are written by hand."""

from types import SimpleNamespace

import pytest
from PIL import Image
from support.tiny import build_tokenizer

from mof.data.answer_spans import render_answers
from mof.data.records import RecordError, to_record

ENDS = [
    "<|im_end|>",
    "<|endoftext|>",
    "<|user|>",
    "<|assistant|>",
    "<|eot|>",
    "<|end_of_sentence|>",
    "<|media_start|>",
    "<|END_RESPONSE|>",
    "<|END_OF_TURN|>",
    "<|open|>",
    "<|close|>",
    "<|sep|>",
]
EACH = "{%- for m in messages -%}"
PARTS = "{%- for c in m.content -%}{{ '<image>' if c.type == 'image' else c.text }}{%- endfor -%}"
THINKING = (
    "{%- set content = m.content if m.content is string else m.content[0].text -%}{%- set thought = '' -%}{%- if '</think>' in content -%}"
    "{%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') -%}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') -%}{%- endif -%}"
)
QWEN3 = (
    EACH + "{%- if m.role != 'assistant' -%}{{ '<|im_start|>' + m.role + '\n' }}" + PARTS + "{{ '<|im_end|>\n' }}{%- else -%}" + THINKING
    + "{{ '<|im_start|>assistant\n' }}{%- if loop.last -%}{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{%- endif -%}"
    "{{ content.lstrip('\n') + '<|im_end|>\n' }}{%- endif -%}{%- endfor -%}"
)  # fmt: skip
GLM45V = (
    EACH + "{%- if m.role == 'user' -%}{{ '<|user|>\n' }}" + PARTS + "{%- else -%}<|assistant|>" + THINKING
    + "{{ '\n<think>' + thought.strip() + '</think>' if loop.last and thought else '\n<think></think>' }}"
    "{%- if content.strip() -%}{{ '\n' + content.strip() }}{%- endif -%}{%- endif -%}{%- endfor -%}"
)  # fmt: skip
QWEN3_TEXT = QWEN3.replace(PARTS, "{{ m.content if m.content is string else '' }}").replace("else m.content[0].text", "else ''")
JANUS = (
    EACH + "{{ {'user': '<|User|>: ', 'assistant': '<|Assistant|>: '}[m.role] }}{%- for c in m.content -%}{%- if c.type == 'image' -%}"
    "{{ '' if loop.first else '\n' }}<image>{{ '' if loop.last else '\n' }}{%- else -%}{%- set text = c.text -%}"
    "{%- if loop.first -%}{%- set text = text.lstrip() -%}{%- endif -%}{%- if loop.last -%}{%- set text = text.rstrip() -%}{%- endif -%}"
    "{{ ' ' + text if not loop.first and m.content[loop.index0 - 1].type == 'text' else text }}{%- endif -%}{%- endfor -%}"
    "{%- if not loop.last -%}{{ '\n\n' if m.role == 'user' else '</s>' }}{%- endif -%}{%- endfor -%}"
)  # fmt: skip
NUMBERED = EACH + "{%- if m.role == 'user' -%}[Round {{ loop.index0 // 2 + 1 }}, {{ strftime_now('%H:%M:%S.%f') }}]\n" + PARTS
NUMBERED += "{%- else -%}{{ '\nA: ' }}" + PARTS + "{%- endif -%}{%- endfor -%}"
COMMAND_A = EACH + "{%- if m.role == 'user' -%}<|USER|>" + PARTS + "<|END_OF_TURN|>{%- else -%}<|CHATBOT|><|START_RESPONSE|>" + PARTS
COMMAND_A += "<|END_RESPONSE|><|END_OF_TURN|>{%- endif -%}{%- endfor -%}"
LLAMA4 = (
    EACH + "<|header_start|>{{ m.role }}<|header_end|>\n\n{%- for c in m.content -%}{{ '<image>' if c.type == 'image' else c.text | trim }}"
)
LLAMA4 = LLAMA4.replace("\n\n{%- for", "{{ '\n\n' }}{%- for") + "{%- endfor -%}<|eot|>{%- endfor -%}"
NEWLINES_CUT = (
    EACH
    + "{{ m.role }}:{%- for c in m.content -%}{{ '<image>' if c.type == 'image' else c.text.lstrip('\n') }}{%- endfor -%};{%- endfor -%}"
)
CONTENT = "{%- set said = m.content if m.content is string else m.content[0].text -%}"
KIMI = (
    EACH + "<|im_{{ m.role }}|>{%- if m.role == 'user' -%}" + PARTS + "{%- else -%}" + CONTENT
    + "{{ said if loop.last else said.split('◁/think▷')[-1] }}{%- endif -%}<|im_end|>{%- endfor -%}"
)  # fmt: skip
GEMMA4 = (
    EACH + "<|turn>{{ m.role + '\n' }}{%- if m.role == 'user' -%}" + PARTS + "{%- else -%}" + CONTENT
    + "{{ said.split('<channel|>')[-1] | trim }}{%- endif -%}{{ '<|im_end|>\n' }}{%- endfor -%}"
)  # fmt: skip
NEMOTRON = (  # the last answer is written behind the loop, with its thought; thoughts are cut from past answers
    "{%- for m in messages[:-1] -%}{%- if m.role == 'user' -%}{{ '<|user|>\n' }}" + PARTS + "{%- else -%}" + CONTENT
    + "{{ '<|assistant|>\n' + said.split('</think>')[-1].strip() + '\n<|eot|>\n\n' }}{%- endif -%}{%- endfor -%}"
    "{%- set m = messages[-1] -%}" + CONTENT + "{{ '<|assistant|>\n<think>\n\n' + said.strip() + '\n<|eot|>\n\n' }}"
)  # fmt: skip
SHOUTED = EACH + "{{ m.role | upper + ': ' }}{%- if m.role == 'user' -%}{%- for c in m.content -%}{{ c.text | upper + ' ' }}{%- endfor -%}"
SHOUTED += "{%- else -%}" + PARTS + "</s>{%- endif -%}{%- endfor -%}"
JSON = EACH + "<|im_start|>{{ m.content if m.content is string else m.content | tojson }}<|im_end|>{%- endfor -%}"
COMMENT = "{# put {% generation %} around the answers #}" + LLAMA4
MARKED_WITH_TOOLS = "{%- if tools -%}{%- generation -%}{%- endgeneration -%}{%- endif -%}" + LLAMA4
KIMI_K3 = EACH + "<|open|>{{ m.role }}<|sep|>" + PARTS + "<|close|>{{ m.role }}<|sep|></s>{%- endfor -%}"
AS_JSON = EACH + '{"role": "{{ m.role }}", "content": "' + PARTS + '"}</s>{%- endfor -%}'
STARS = EACH + "{{ m.role }}: **" + PARTS + "**{%- if m.role == 'assistant' -%}</s>{%- endif -%}{%- endfor -%}"
END_AFTER_QUESTIONS = EACH + "{{ m.role }}:" + PARTS + "{{ '\n' if m.role == 'assistant' else '</s>' }}{%- endfor -%}"
NOT_SPECIAL = EACH + "{{ m.role }}:" + PARTS + "<end>{%- endfor -%}"
RANDOM = "{{ range(1000) | random }}" + LLAMA4
NO_OPENING = EACH + "{%- if m.role == 'assistant' -%}<|assistant|>" + PARTS + "<|eot|>{%- else -%}" + PARTS + "{%- endif -%}{%- endfor -%}"

THOUGHT = "<think>\nIt has ears.\n</think>\n\nA cat."
CASES = {
    "a thought in the last answer": (QWEN3, [THOUGHT], "<|im_start|>user\nQ0<|im_end|>\n<|im_start|>assistant\n[<think>\nIt has ears.\n</think>\n\nA cat.<|im_end|>]\n"),
    "thoughts cut from past answers": (QWEN3, [THOUGHT, THOUGHT], "<|im_start|>user\nQ0<|im_end|>\n<|im_start|>assistant\n[A cat.<|im_end|>]\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n[<think>\nIt has ears.\n</think>\n\nA cat.<|im_end|>]\n"),
    "an empty thought": (QWEN3, ["<think>\n\n</think>\n\nA cat."], "<|im_start|>user\nQ0<|im_end|>\n<|im_start|>assistant\n[<think>\n\n</think>\n\nA cat.<|im_end|>]\n"),
    "a thought that the prompt opened": (QWEN3, ["It has ears.\n</think>\n\nA cat."], "<|im_start|>user\nQ0<|im_end|>\n<|im_start|>assistant\n<think>\n[It has ears.\n</think>\n\nA cat.<|im_end|>]\n"),
    "a thought that the template adds": (QWEN3, ["A cat."], "<|im_start|>user\nQ0<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n[A cat.<|im_end|>]\n"),
    "glm-4.5v": (GLM45V, [THOUGHT, THOUGHT], "<|user|>\nQ0<|assistant|>\n<think></think>\n[A cat.<|user|>]\nQ1<|assistant|>\n[<think>It has ears.</think>\nA cat.]"),
    "thoughts kept as they are": (LLAMA4, [THOUGHT], "<|header_start|>user<|header_end|>\n\nQ0<|eot|><|header_start|>assistant<|header_end|>\n\n[<think>\nIt has ears.\n</think>\n\nA cat.<|eot|>]"),
    "strings only, lists are dropped in silence": (QWEN3_TEXT, ["No.", "No."], "<|im_start|>user\nQ0<|im_end|>\n<|im_start|>assistant\n[No.<|im_end|>]\n<|im_start|>user\nQ1<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n[No.<|im_end|>]\n"),
    "janus joins parts by a space": (JANUS, [[" A", "cat. "], "No"], "<|User|>: Q0\n\n<|Assistant|>: [A cat.</s>]<|User|>: Q1\n\n<|Assistant|>: [No]"),
    "command a": (COMMAND_A, ["A cat."], "<|USER|>Q0<|END_OF_TURN|><|CHATBOT|><|START_RESPONSE|>[A cat.<|END_RESPONSE|>]<|END_OF_TURN|>"),
    "an empty answer": (COMMAND_A, [""], "<|USER|>Q0<|END_OF_TURN|><|CHATBOT|><|START_RESPONSE|>[<|END_RESPONSE|>]<|END_OF_TURN|>"),
    "llama 4": (LLAMA4, [" <|eot|> \ue0000\ue001", " 🐈\n"], "<|header_start|>user<|header_end|>\n\nQ0<|eot|><|header_start|>assistant<|header_end|>\n\n[<|eot|> \ue0000\ue001<|eot|>]<|header_start|>user<|header_end|>\n\nQ1<|eot|><|header_start|>assistant<|header_end|>\n\n[🐈<|eot|>]"),
    "kimi-vl, thoughts cut from past answers": (KIMI, ["◁think▷Ears.◁/think▷A cat."] * 2, "<|im_user|>Q0<|im_end|><|im_assistant|>[A cat.<|im_end|>]<|im_user|>Q1<|im_end|><|im_assistant|>[◁think▷Ears.◁/think▷A cat.<|im_end|>]"),
    "gemma 4, channels of thought cut": (GEMMA4, ["<|channel>thought\nEars.<channel|>\nA cat.", "No"], "<|turn>user\nQ0<|im_end|>\n<|turn>assistant\n[A cat.<|im_end|>]\n<|turn>user\nQ1<|im_end|>\n<|turn>assistant\n[No<|im_end|>]\n"),
    "nemotron nano vl": (NEMOTRON, [THOUGHT, "No"], "<|user|>\nQ0<|assistant|>\n[A cat.\n<|eot|>]\n\n<|user|>\nQ1<|assistant|>\n<think>\n\n[No\n<|eot|>]\n\n"),
    "lists are written as JSON": (JSON, ["A \"cat\"."], "<|im_start|>Q0<|im_end|><|im_start|>[A \"cat\".<|im_end|>]"),
    "only some white space is cut": (NEWLINES_CUT, ["\n a\n", "\n \n"], "user:Q0;assistant:[ a\n];user:Q1;assistant:[ \n];"),
    "marks in a comment": (COMMENT, ["No"], "<|header_start|>user<|header_end|>\n\nQ0<|eot|><|header_start|>assistant<|header_end|>\n\n[No<|eot|>]"),
    "marks that are not reached": (MARKED_WITH_TOOLS, ["No"], "<|header_start|>user<|header_end|>\n\nQ0<|eot|><|header_start|>assistant<|header_end|>\n\n[No<|eot|>]"),
    "kimi k3, words in the end of a turn": (KIMI_K3, ["A", "A"], "<|open|>user<|sep|>Q0<|close|>user<|sep|></s><|open|>assistant<|sep|>[A<|close|>assistant<|sep|></s>]<|open|>user<|sep|>Q1<|close|>user<|sep|></s><|open|>assistant<|sep|>[A<|close|>assistant<|sep|></s>]"),
    "answers as JSON": (AS_JSON, ["A</s>"], '{"role": "user", "content": "Q0"}</s>{"role": "assistant", "content": "[A</s>"}</s>]'),
    "answers between stars": (STARS, ["A", ""], "user: **Q0**assistant: **[A**</s>]user: **Q1**assistant: **[**</s>]"),
    "the end of a question is not the end of an answer": (END_AFTER_QUESTIONS, ["A", "A"], "user:Q0</s>assistant:[A]\nuser:Q1</s>assistant:[A]\n"),
    "a token that is not special ends a turn": (NOT_SPECIAL, ["A"], "user:Q0<end>assistant:[A<end>]"),
    "random words": (RANDOM, ["A"], "0<|header_start|>user<|header_end|>\n\nQ0<|eot|><|header_start|>assistant<|header_end|>\n\n[A<|eot|>]"),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ENDS})
    tokenizer.add_tokens(["<end>"])
    return tokenizer


def rendered(tokenizer, template, answers, questions=("Q0", "Q1", "Q2")):
    messages = []
    for question, answer in zip(questions, answers, strict=False):
        parts = [{"type": "text", "text": text} for text in ([answer] if isinstance(answer, str) else answer)]
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": parts}]
    record = to_record({"id": "x", "messages": messages})
    return render_answers(SimpleNamespace(tokenizer=tokenizer, chat_template=template), record)


def marked(text, spans):
    for start, end in reversed(spans):
        text = f"{text[:start]}[{text[start:end]}]{text[end:]}"
    return text


@pytest.mark.parametrize("name", CASES)
def test_answers_of_released_styles(tokenizer, name):
    template, answers, expected = CASES[name]
    assert marked(*rendered(tokenizer, template, answers)) == expected


def test_both_renderings_show_the_same_time(tokenizer):
    text, spans = rendered(tokenizer, NUMBERED, ["a", "b"])
    assert [text[start:end] for start, end in spans] == ["a", "b"] and "[Round 2, " in text


def test_questions_in_upper_case(tokenizer):
    assert marked(*rendered(tokenizer, SHOUTED, ["No"], ["what?"])) == "USER: WHAT? ASSISTANT: [No</s>]"


def test_a_question_that_the_answer_repeats_is_not_left_out(tokenizer):
    template = (
        EACH + "|{%- if m.role == 'assistant' or m.content is string -%}{{ m.content if m.content is string else m.content[0].text }}"
    )
    text, _ = rendered(tokenizer, template + "{%- endif -%}{%- endfor -%}", ["What?"], ["What?"])
    assert text == "|What?|What?"


def test_a_question_that_begins_like_the_end_of_a_turn(tokenizer):
    text = marked(*rendered(tokenizer, NO_OPENING, ["a", "b"], ["What?", "</s><|eot|>?"]))
    assert text == "What?<|assistant|>[a<|eot|>]</s><|eot|>?<|assistant|>[b<|eot|>]"


@pytest.mark.parametrize("question", ["", "</s>", "<image>"])
def test_the_end_of_a_question_without_words_is_not_the_end_of_an_answer(tokenizer, question):
    image = [Image.new("RGB", (2, 2))] * (question == "<image>")
    turns = [("human", "What?"), ("gpt", "A"), ("human", question), ("gpt", "B")]
    record = to_record({"id": "x", "images": image, "conversations": [{"from": role, "value": text} for role, text in turns]})
    text = marked(*render_answers(SimpleNamespace(tokenizer=tokenizer, chat_template=END_AFTER_QUESTIONS), record))
    assert text == f"user:What?</s>assistant:[A]\nuser:{question}</s>assistant:[B]\n"


@pytest.mark.parametrize("change", ["escape", "replace('\n', ' / ')", "replace('<think>', '<reasoning>')", "upper"])
def test_a_thought_whose_marks_are_rewritten_is_refused(tokenizer, change):
    with pytest.raises(RecordError, match="'x'.*once and unchanged"):
        rendered(tokenizer, EACH + "{{ m.content[0].text | " + change + " }}</s>{%- endfor -%}", [THOUGHT])


@pytest.mark.parametrize("user", ["{{ m.content + '|' }}", PARTS], ids=["questions as strings", "questions in parts"])
def test_answers_as_strings_and_a_system_text_in_parts(tokenizer, user):
    template = EACH + "{%- if m.role == 'user' -%}" + user + "{%- else -%}"
    template += "{{ m.content + '</s>' if m.role == 'assistant' else m.content[0].text }}{%- endif -%}{%- endfor -%}"
    messages = [("system", "Be brief."), ("user", "Q"), ("assistant", "A")]
    record = to_record({"id": "x", "messages": [{"role": role, "content": text} for role, text in messages]})
    text = marked(*render_answers(SimpleNamespace(tokenizer=tokenizer, chat_template=template), record))
    assert text.replace("|", "") == "Be brief.Q[A</s>]"


def test_the_template_of_the_tokenizer_counts_if_the_processor_has_none(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", LLAMA4)
    assert rendered(tokenizer, None, ["a"]) == rendered(tokenizer, LLAMA4, ["a"])


def test_sentinels_in_questions_are_text(tokenizer):
    text, spans = rendered(tokenizer, LLAMA4, ["a"], ["\ue0000\ue001 and <|eot|>?"])
    assert [text[start:end] for start, end in spans] == ["a<|eot|>"]


WANTS_STRINGS = {
    "dropped": QWEN3_TEXT,
    "joined": EACH + "{{ m.role + ': ' + m.content }}{%- endfor -%}",
    "JSON": JSON,
    "indented JSON": JSON.replace("tojson", "tojson(indent=2)"),
    "cut": EACH + "{{ m.content.strip() }}{%- endfor -%}",
}


@pytest.mark.parametrize("template", WANTS_STRINGS.values(), ids=WANTS_STRINGS)
def test_templates_of_language_models_are_refused_with_images(tokenizer, template):
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "No"}]
    record = {"id": "x", "image": Image.new("RGB", (2, 2)), "conversations": talk}
    processor = SimpleNamespace(tokenizer=tokenizer, chat_template=template)
    with pytest.raises(RecordError, match=r"'x'.*knows no images; set another processor.chat_template"):
        render_answers(processor, to_record(record))


def test_a_template_that_drops_the_system_text_is_used(tokenizer):
    messages = [("system", "Be brief."), ("user", "Q"), ("assistant", "A")]
    record = to_record({"id": "x", "messages": [{"role": role, "content": text} for role, text in messages]})
    template = EACH + "{%- if m.role != 'system' -%}|" + PARTS + "{%- endif -%}{%- endfor -%}"
    assert marked(*render_answers(SimpleNamespace(tokenizer=tokenizer, chat_template=template), record)) == "|Q|[A]"


def test_the_end_of_a_turn_is_looked_up_once(tokenizer, monkeypatch):
    """Gemma 3 has 6,414 special tokens, whose pattern takes 0.2 s."""
    rendered(tokenizer, LLAMA4, ["a"])
    monkeypatch.setattr(type(tokenizer), "added_tokens_decoder", property(lambda self: pytest.fail("looked up again")))
    rendered(tokenizer, LLAMA4, ["b"])
