"""These functions map the answer tokens of a score to pieces of text and to words, and give the mean VIG by class of word."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # scores show their words in notebooks
    from vig.scoring.score_table import Score

# Shapes: N = values, T = answer tokens of a record or of a turn, W = words of a turn.

WORD = re.compile(r"\w+")


# --- tokens and words of a score
class Word(NamedTuple):
    """Word is a word of an answer, as it was written."""

    text: str
    vig: float
    """Sum of the VIG of the tokens that hold a part of the word, in nats."""


def token_texts(score: Score) -> list[str]:
    """Return the piece of text that each token adds. Joined, the pieces are the answer.

    A space that belongs to no token goes with the next token. If several tokens make a character, the first token has the character
    and the pieces of the others are empty.
    """
    ends = np.maximum.accumulate(score.token_ends)  # [T]
    return [score.answer[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=False)]  # [] for an answer without tokens


def turns(score: Score) -> list[NDArray[np.int64]]:
    """Return indices into the answer tokens, turn by turn. The end-of-turn token of a turn, if it has one, is last."""
    parts = np.split(np.arange(len(score.token_ids)), score.turn_ends + 1)  # the last part is empty if the last turn has ended
    return [part for part in parts if len(part)]


def answer_words(score: Score) -> list[list[Word]]:
    """Return the words of each turn, in order. End-of-turn tokens belong to no word."""
    return [_words(score, turn) for turn in _without_ends(score)]


def word_places(score: Score) -> list[tuple[str, NDArray[np.int64]]]:
    """Return each word of the answers with the indices of the answer tokens that hold a part of it."""
    parts = ((part, *_held(score, part)) for part in _without_ends(score))
    return [(word, part[tokens]) for part, words, held in parts for word, tokens in zip(words, held, strict=True)]


def _without_ends(score: Score) -> Iterator[NDArray[np.int64]]:
    """Yield indices into the answer tokens, turn by turn, without end-of-turn tokens."""
    return (turn[~np.isin(turn, score.turn_ends)] for turn in turns(score))


def _words(score: Score, places: NDArray[np.int64]) -> list[Word]:
    words, held = _held(score, places)
    sums = np.where(held, score.token_vig[places].astype(np.float64), 0).sum(axis=1)  # [W]
    return [Word(word, total) for word, total in zip(words, sums.tolist(), strict=True)]


def _held(score: Score, places: NDArray[np.int64]) -> tuple[list[str], NDArray[np.bool_]]:
    """Return the words of a turn and [W, T], whether each word has a part in each of the turn's tokens."""
    starts, ends = score.token_starts[places], score.token_ends[places]  # [T] each
    matches = list(WORD.finditer(score.answer, int(starts.min()), int(ends.max()))) if len(places) else []
    spans = np.array([match.span() for match in matches], np.int64).reshape(-1, 2)  # [W, 2]
    return [match.group() for match in matches], (starts < spans[:, 1:]) & (ends > spans[:, :1])


# --- kinds of words
# Objects are in the singular; plurals are added below. Short lists are enough, because a mean needs common words, not all words.
_WORDS = {
    "colour": "black white red blue green yellow brown pink orange purple grey gray tan silver gold golden blond blonde beige",
    "number": "zero one two three four five six seven eight nine ten both several many",
    "attribute": "big small large little tiny huge tall short long thin thick wide narrow high low young old new wet dry dirty clean "
    "muddy snowy grassy sandy rocky wooden brick metal plastic glass leather bright dark colorful colourful plain striped dotted "
    "bare whole broken open closed empty full round square flat steep busy crowded smiling barefoot shirtless bald fluffy furry "
    "hairy shaggy spotted",
    "object": "dog cat horse bird cow sheep elephant bear zebra giraffe fish man woman boy girl child kid baby toddler person people "
    "men women children lady guy player skier climber biker surfer crowd car bus truck train boat bike bicycle motorcycle airplane "
    "rocket skateboard surfboard kayak sled ball frisbee toy stick rope guitar camera kite umbrella backpack bag bottle cup bowl "
    "plate pizza cake sandwich banana apple mushroom table chair couch bench bed toilet sink laptop phone keyboard tv clock book "
    "vase hammer key bell heart shirt jacket coat shorts pants jeans dress hat cap helmet vest suit bikini sunglasses glasses shoe "
    "hair face mouth head hand water pool beach ocean lake river sand snow grass field tree forest rock mountain hill cliff street "
    "road sidewalk building house wall fence window door bridge sign flower",
    "spatial": "left right above below under behind front top bottom middle between beside next near inside outside over through "
    "across along around up down leftward rightward upward downward",
    "function": "a an the is are was be being of and or to in on at with by for from as it its he she they his her their him "
    "them that this there who which while has have",
}  # fmt: skip


_PLURALS = [word + ("es" if word.endswith(("s", "sh", "ch", "x")) else "s") for word in _WORDS["object"].split()]
_CLASSES = dict.fromkeys(_PLURALS, "object") | {word: kind for kind, words in _WORDS.items() for word in words.split()}


def word_class(word: str) -> str | None:
    """Return the class of a word: "colour", "number", "attribute", "object", "spatial" or "function", or None if no list has the word.

    Capital letters make no difference, digits are numbers, and objects may be in the plural.
    """
    return "number" if word.isdecimal() else _CLASSES.get(word.lower())


# First letters of a Penn Treebank tag -> name of the part of speech. The first entry that fits a tag is taken.
_PARTS_OF_SPEECH = {
    "NN": "noun", "VB": "verb", "MD": "verb", "JJ": "adjective", "RB": "adverb", "WRB": "adverb", "IN": "preposition",
    "TO": "preposition", "RP": "preposition", "DT": "determiner", "PDT": "determiner", "WDT": "determiner", "PRP": "pronoun",
    "WP": "pronoun", "EX": "pronoun", "CD": "number", "CC": "conjunction",
}  # fmt: skip


def can_tag() -> bool:
    """Return whether textblob is installed. Its tagger finds the parts of speech."""
    return find_spec("textblob") is not None


def parts_of_speech(words: Sequence[str]) -> list[str | None]:
    """Return the part of speech of each word of a short English text, or None for a word without a part of speech.

    The tagger uses a list of words and a few rules, and is wrong for a few words.
    """
    if not words:
        return []
    from textblob.en import tag  # an optional extra, and slow to import

    tags = [name for _, name in tag(" ".join(words), tokenize=False)]
    assert len(tags) == len(words), f"{len(words)} words, but {len(tags)} tags: {words}"
    return [_part_of_speech(tag) for tag in tags]


@cache
def _part_of_speech(tag: str) -> str | None:
    return next((name for prefix, name in _PARTS_OF_SPEECH.items() if tag.startswith(prefix)), None)


# --- means
class Mean(NamedTuple):
    """Mean holds a mean of VIG, in nats."""

    mean: float
    n: int
    """Number of values."""
    error: float | None
    """Standard error of the mean; None for fewer than two values."""

    @classmethod
    def of(cls, values: Sequence[float] | NDArray[np.floating]) -> Mean:
        """Return the mean of at least one value."""
        array = np.asarray(values)  # [N]
        error = float(array.std(ddof=1, dtype=np.float64)) / math.sqrt(len(array)) if len(array) > 1 else None
        return cls(float(array.mean(dtype=np.float64)), len(array), error)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Return the lower and the upper end of the 95 % confidence interval of the mean, or None without an error."""
        return None if self.error is None else (self.mean - 1.96 * self.error, self.mean + 1.96 * self.error)


def vig_by_word_class(scores: Iterable[Score]) -> dict[str, Mean]:
    """Return class -> mean VIG of its words, for the classes that occur.

    The VIG of a word is the sum over its tokens, so a tokenizer that cuts words into more pieces does not change it.
    """
    vig: dict[str | None, list[float]] = {}
    for score in scores:
        for word in (word for turn in answer_words(score) for word in turn):
            vig.setdefault(word_class(word.text), []).append(word.vig)
    return {kind: Mean.of(vig[kind]) for kind in _WORDS if kind in vig}
