"""Models think before they answer and change their minds while they answer. These functions return the part that counts."""

from __future__ import annotations

import re
from collections.abc import Iterator

_CLOSED = re.compile(
    r"</(?:think|thinking|thoughts?|reasoning|analysis|scratchpad)>|<\|end_of_thought\|>|\[/THINK\]|\u25c1/think\u25b7", re.IGNORECASE
)
_OPENED = re.compile(
    r"<(?:think|thinking|thoughts?|reasoning|analysis|scratchpad)>|<\|begin_of_thought\|>|\[THINK\]|\u25c1think\u25b7", re.IGNORECASE
)
"""Tags around the thoughts of models, such as Qwen's, Magistral's and Kimi's."""
_CORRECTION = re.compile(
    r"(?:^|(?<=[^\w\s/&] )|(?<=\n))(?:(?:no(?= [^\w\s]| ?$| ?\n| (?:actually|wait|sorry|it|i|the answer)\b)|nope|wait|oh|hmm|hold on"
    r"|actually|sorry|oops|scratch that|strike that|correction|(?:or )?rather|i mean|i meant|on second thoughts?"
    r"|let me (?:check|correct|count|double|fix|look|see|start|think|try|verify|re\w*)\b[a-z ]{0,40})\b[^\w\n]*)+",
    re.IGNORECASE,
)
"""Words at the beginning of a clause that take back the words before, in tokens with spaces between.

"Let me explain" and "Let me know if" take nothing back.
"""
MOST_CORRECTIONS = 5
"""The number of corrections that are looked at, from the last on."""


def without_thoughts(answer: str) -> str:
    """Return the answer behind the model's thoughts, or before them if nothing is behind.

    It is empty if the thoughts begin the answer and do not end, because they were cut off.
    """
    *_, end = (0, *(match.end() for match in _CLOSED.finditer(answer)))
    if end and not answer[end:].strip():
        opened = _OPENED.search(answer)
        return answer[: opened.start()].strip() if opened else ""
    return answer[end:] if end or not _OPENED.match(answer.lstrip()) else ""


def corrections(text: str) -> Iterator[tuple[str, str, str]]:
    """Yield (words before, words of the correction, words behind) for each correction, the last first.

    Args:
        text: tokens with spaces between, in lines.
    """
    for match in [*_CORRECTION.finditer(text)][: -MOST_CORRECTIONS - 1 : -1]:
        yield text[: match.start()], match[0], text[match.end() :]
