"""This module has two chat templates that mark the assistant's words, for tokenizers whose own template does not mark them.

The templates of published language models expect plain strings and know no images. Both templates here write images in place and
put the end-of-turn token into the answer.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from mof.data.records import IMAGE_PLACEHOLDER
from mof.data.templates import marks_answers

# An image is followed by a line break, as in LLaVA. Content may be a plain string or a list of parts.
_CONTENT = (
    "{%- macro text(content) -%}{%- if content is string -%}{{ content }}{%- else -%}{%- for part in content -%}"
    "{{ '" + IMAGE_PLACEHOLDER + "\\n' if part['type'] == 'image' else part['text'] }}"
    "{%- endfor -%}{%- endif -%}{%- endmacro -%}"
)

VICUNA = _CONTENT + (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{ 'ASSISTANT:' }}{% generation %}{{ ' ' + text(message['content']) + eos_token }}{% endgeneration %}"
    "{%- elif message['role'] == 'user' -%}{{ 'USER: ' + text(message['content']) + ' ' }}"
    "{%- else -%}{{ text(message['content']) + ' ' }}{%- endif -%}"
    "{%- endfor -%}"
    "{{ 'ASSISTANT:' if add_generation_prompt else '' }}"
)
"""This template writes LLaVA-1.5's turns: "USER: <image>\\nWhat is it? ASSISTANT: A cat.</s>USER: ...".

LLaVA-1.5 opens every conversation with a system prompt, "A chat between a curious user and an artificial intelligence
assistant. The assistant gives helpful, detailed, and polite answers to the user's questions.", and a space. This template
adds no system prompt. A conversation with these words as system message gives the same text as LLaVA-1.5.
"""

CHATML = _CONTENT + (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'assistant' -%}"
    "{% generation %}{{ text(message['content']) + '<|im_end|>' }}{% endgeneration %}"
    "{%- else -%}{{ text(message['content']) + '<|im_end|>' }}{%- endif -%}{{ '\\n' }}"
    "{%- endfor -%}"
    "{{ '<|im_start|>assistant\\n' if add_generation_prompt else '' }}"
)
"""This template writes the turns of Qwen, SmolLM and others, whose end-of-sequence token also ends a turn."""


def choose_chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the tokenizer's own template if it marks answers and knows images. If not, return CHATML or VICUNA.

    CHATML is returned for a tokenizer whose end-of-sequence token is `<|im_end|>`, VICUNA for all others.

    Raises:
        ValueError: for a tokenizer without an end-of-sequence token, because no answer would end.
    """
    template = tokenizer.chat_template
    if isinstance(template, str) and marks_answers(template) and IMAGE_PLACEHOLDER in template:
        return template
    if tokenizer.eos_token is None:
        raise ValueError("the tokenizer has no eos_token, so answers could not end: set one, or give a chat_template")
    return CHATML if tokenizer.eos_token == "<|im_end|>" else VICUNA
