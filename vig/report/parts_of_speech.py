"""The part of speech of each word, by the tagger that the package textblob brings with its word lists."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

# The first letters of a Penn Treebank tag and what it is called here; the first that fits counts.
_NAMES = {
    "NN": "noun", "VB": "verb", "MD": "verb", "JJ": "adjective", "RB": "adverb", "WRB": "adverb", "IN": "preposition",
    "TO": "preposition", "RP": "preposition", "DT": "determiner", "PDT": "determiner", "WDT": "determiner", "PRP": "pronoun",
    "WP": "pronoun", "EX": "pronoun", "CD": "number", "CC": "conjunction",
}  # fmt: skip


def can_tag() -> bool:
    """Whether the tagger is installed."""
    return find_spec("textblob") is not None


def parts_of_speech(words: Sequence[str]) -> list[str | None]:
    """For each word of a sentence or two; None for what has no part of speech. English only.

    The tagger knows words and a few rules, and is wrong for some.
    """
    if not words:
        return []
    from textblob.en import tag  # an optional extra, and slow to import

    tags = [name for _, name in tag(" ".join(words), tokenize=False)]
    assert len(tags) == len(words), f"{len(words)} words, but {len(tags)} tags: {words}"
    return [next((name for prefix, name in _NAMES.items() if tag.startswith(prefix)), None) for tag in tags]
