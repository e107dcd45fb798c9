"""Mean VIG by kind of word: what the image tells about colours, numbers and objects, and not about function words."""

from __future__ import annotations

from collections.abc import Iterable

from vig.answer_words import answer_words
from vig.means import Mean
from vig.scoring.scores import Score

# Singular; the plural counts too. Short lists are enough: a mean needs common words, not all words.
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


def word_classes() -> dict[str, str]:
    """Word -> "colour", "number", "attribute", "object", "spatial" or "function". Lower case; objects also in the plural."""
    classes = {word: kind for kind, words in _WORDS.items() for word in words.split()}
    plurals = {word + ("es" if word.endswith(("s", "sh", "ch", "x")) else "s") for word in _WORDS["object"].split()}
    return dict.fromkeys(plurals, "object") | classes


_CLASSES = word_classes()


def word_class(word: str) -> str | None:
    """The class of a word in any case; figures are numbers. None for a word that is in no list."""
    return "number" if word.isdecimal() else _CLASSES.get(word.lower())


def vig_by_word_class(scores: Iterable[Score]) -> dict[str, Mean]:
    """Class -> mean VIG of its words in nats, how many words, and the standard error, for the classes that occur.

    A word's VIG is the sum over its tokens, so that a tokenizer which cuts words into more pieces changes nothing.
    """
    found: dict[str | None, list[float]] = {}
    for score in scores:
        for turn in answer_words(score):
            for word in turn:
                found.setdefault(word_class(word.text), []).append(word.vig)
    return {kind: Mean.of(found[kind]) for kind in _WORDS if kind in found}
