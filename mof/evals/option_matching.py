"""The option that an answer chooses: options are read from `(a) Open (b) Closed`, answers are matched by letter and by text.

An answer that names no option, or several, chooses none. An option shortly after "not" or "never" is not named.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_OPTION = re.compile(r"\(([A-Za-z])\)")
_WORD = re.compile(r"\w+(?:'\w+)*|[^\w\s]")
_CURLY = "\u2019"  # the other apostrophe
_NEGATIONS = {"not", "never", "cannot", "neither", "nor"}
_BESIDE_LETTERS = {"and", "or", "both", "either", ".", ",", ";", ":", "!", "/"}
_NEGATION_REACH = 2  # words: "not open", "not the open"

# A letter counts in brackets; before one of ).:, at the beginning of a line; after a word such as "option"; and where the answer
# is nothing but letters.
_LETTER_FORMS = (
    re.compile(r"\(\s*([a-z])\s*\)", re.IGNORECASE),
    re.compile(r"^[^\w\n]*([a-z])[^\w\n]*?[).:,](?!\w)", re.IGNORECASE | re.MULTILINE),
    re.compile(r"\b(?:option|choice|letter)\s*(?:is\s*)?[:\"'*]*\s*([a-z])\b(?!')", re.IGNORECASE),
    re.compile(r"\b(?i:answer)\s*(?i:is\s*)?[:\"'*]*\s*(?:([A-Z])\b(?!')|([a-z])(?=\s*(?:[).:,;]|$)))"),
)


def parse_options(text: str) -> dict[str, str]:
    """ "(a) Open (b) Closed" -> {"a": "Open", "b": "Closed"}.

    Raises:
        ValueError: unless there are at least two options, lettered from (a) on, each with words of its own.
    """
    pieces = _OPTION.split(text)  # before, letter, words, letter, words, ...
    letters = [letter.lower() for letter in pieces[1::2]]
    words = [" ".join(piece.split()) for piece in pieces[2::2]]
    expected = [chr(ord("a") + i) for i in range(len(letters))]
    if pieces[0].strip() or len(letters) < 2 or letters != expected or not all(words):
        raise ValueError(f"expected options such as '(a) Open (b) Closed', got {text!r}")
    if len({" ".join(_words(option)) for option in words}) < len(words):
        raise ValueError(f"two of the options are the same: {text!r}")
    return dict(zip(letters, words, strict=True))


def match_letter(answer: str, options: Mapping[str, str]) -> str | None:
    """Return the only option whose letter the answer gives, or None."""
    return _only(_letters(answer, options))


def match_text(answer: str, options: Mapping[str, str]) -> str | None:
    """Return the only option whose words the answer holds, or None. "not visible" is not also "visible"."""
    return _only(_texts(answer, options))


def match_answer(answer: str, options: Mapping[str, str]) -> str | None:
    """Match by letter, or by text if there is no letter. Return None if letter and text name different options."""
    letters, texts = _letters(answer, options), _texts(answer, options)
    if not letters:
        return _only(texts)
    return None if len(texts) == 1 and texts != letters else _only(letters)


def _only(letters: set[str]) -> str | None:
    return next(iter(letters)) if len(letters) == 1 else None


def _letters(answer: str, options: Mapping[str, str]) -> set[str]:
    answer = answer.replace(_CURLY, "'")
    bare = set(_words(answer)) - _BESIDE_LETTERS
    if bare and bare <= options.keys():
        return bare
    named = set()
    for form in _LETTER_FORMS:
        for match in form.finditer(answer):
            letter = next(group for group in match.groups() if group).lower()
            if letter in options and not _negated(_words(answer[: match.start()])):
                named.add(letter)
    return named


def _texts(answer: str, options: Mapping[str, str]) -> set[str]:
    """Return the options whose words are in the answer. Longer options come first, and a shorter one may not use their words."""
    words = _words(answer)
    named = set()
    for letter, option in sorted(options.items(), key=lambda item: -len(_words(item[1]))):
        wanted = _words(option)
        position = 0
        while wanted and position + len(wanted) <= len(words):
            if words[position : position + len(wanted)] != wanted:
                position += 1
                continue
            if not _negated(words[:position]):
                named.add(letter)
            words[position : position + len(wanted)] = ["\0"] * len(wanted)  # taken; as a sign, it also ends a negation's reach
    return named


def _negated(before: list[str]) -> bool:
    """Return whether the last few words deny the next one; a sign in between ends the denial."""
    for word in reversed(before[-_NEGATION_REACH:]):
        if not word[0].isalnum():
            return False
        if word in _NEGATIONS or word.endswith("n't"):
            return True
    return False


def _words(text: str) -> list[str]:
    """Return words and signs in lower case; brackets and quotes are no signs."""
    tokens = _WORD.findall(text.casefold().replace(_CURLY, "'"))
    return [token for token in tokens if token[0].isalnum() or token in ".,;:!?/"]
