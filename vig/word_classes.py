"""Mean VIG by kind of word: what the image tells about colours, numbers and objects, and not about function words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from vig.scores import Score

# Singular; the plural counts too. Short lists are enough: a mean needs common words, not all words.
_WORDS = {
    "colour": "black white red blue green yellow brown pink orange purple grey gray tan silver gold blond blonde dark bright "
    "colorful striped",
    "number": "one two three four five six seven eight nine ten both several many",
    "object": "dog cat horse bird cow sheep elephant bear zebra giraffe man woman boy girl child kid baby toddler person people "
    "men women children lady guy player skier climber crowd car bus truck train boat bike bicycle motorcycle airplane skateboard "
    "surfboard kayak sled ball frisbee toy stick rope guitar camera kite umbrella backpack bag bottle cup bowl plate pizza cake "
    "sandwich banana apple table chair couch bench bed toilet sink laptop phone keyboard tv clock book vase shirt jacket coat "
    "shorts pants jeans dress hat cap helmet vest suit bikini sunglasses glasses shoe hair face mouth head hand water pool "
    "beach ocean lake river sand snow grass field tree forest rock mountain hill cliff street road sidewalk building house wall "
    "fence window door bridge sign flower",
    "spatial": "left right above below under behind front top bottom between beside next near inside outside over through across "
    "along around up down",
    "function": "a an the is are was be being of and or to in on at with by for from as it its he she they his her their him "
    "them that this there who which while has have",
}  # fmt: skip


def word_classes() -> dict[str, str]:
    """Word -> "colour", "number", "object", "spatial" or "function". Lower case; objects also in the plural."""
    classes = {word: kind for kind, words in _WORDS.items() for word in words.split()}
    plurals = {word + ("es" if word.endswith(("s", "sh", "ch", "x")) else "s") for word in _WORDS["object"].split()}
    return dict.fromkeys(plurals, "object") | classes


def vig_by_word_class(scores: Iterable[Score], tokenizer: Any) -> dict[str, tuple[float, int]]:
    """Class -> (mean VIG of its words in nats, how many words), for the classes that occur.

    A word's VIG is the sum over its tokens, so that a tokenizer which cuts words into more pieces changes nothing.

    Args:
        tokenizer: the one that the scores were made with.
    """
    classes = word_classes()
    found: dict[str, list[float]] = {kind: [] for kind in _WORDS}
    for score in scores:
        for word, vig in _words(score, tokenizer):
            if word in classes:
                found[classes[word]].append(vig)
    return {kind: (float(np.mean(values)), len(values)) for kind, values in found.items() if values}


def _words(score: Score, tokenizer: Any) -> Iterator[tuple[str, float]]:
    """The words of the answers, in lower case, and their VIG. End-of-turn tokens belong to none and part the turns."""
    for turn in np.split(np.arange(len(score.token_ids)), score.turn_ends + 1):  # the last is empty after an ended turn
        places = [int(place) for place in turn if place not in score.turn_ends]
        ids = [int(score.token_ids[place]) for place in places]
        # How far the text reaches after each token: no tokenizer gives offsets for ids.
        texts = [tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False) for end in range(len(ids) + 1)]
        for match in re.finditer(r"[a-z]+", texts[-1].lower()):
            inside = [i for i in range(len(ids)) if len(texts[i]) < match.end() and len(texts[i + 1]) > match.start()]
            yield match.group(), float(sum(score.token_vig[places[i]] for i in inside))
