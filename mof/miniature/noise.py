"""Each function makes a kind of noise that real instruction data has: answers that the image does not support, or that need no image.

In real data, writers give the usual answer without looking, images are mixed up, questions give their answer away, and answers are
wrapped in fixed words. Each function gets the scene of an image and a random generator, and returns the turns of a record about this
image.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from mof.miniature.language import DESCRIBE, Turn, answer, dialogue, question, word
from mof.miniature.scenes import PATTERNS, VALUES, Scene, habit, sample_scene

HABIT = 0.9
"""Probability with which a writer who did not look states the usual value of a field."""
_OPENINGS = ("As the picture shows:", "Here is what I can see.", "Let me look at the picture.")
_CLOSINGS = ("I hope that this helps.", "Is there more to tell?", "This is all that I can say.")


def ungrounded(scene: Scene, rng: np.random.Generator) -> list[Turn]:
    """Return the turns of a writer who knows the kind of object but did not look, so most values are the usual values of this kind."""
    return _untrue(dialogue(_imagined(scene, rng), rng))


def swapped(scene: Scene, rng: np.random.Generator) -> list[Turn]:
    """Return the turns of another image, which may show another kind of object."""
    return _untrue(dialogue(sample_scene(rng), rng))


def span(scene: Scene, rng: np.random.Generator) -> list[Turn]:
    """Return turns in which a single answer has a wrong value and all others are true."""
    turns = dialogue(scene, rng)
    place = int(rng.integers(len(turns)))
    pattern = turns[place].pattern
    field = PATTERNS[pattern]
    wrong = [value for value in VALUES[field] if value not in (None, getattr(scene, field))]
    false = replace(scene, **{field: wrong[rng.integers(len(wrong))]})
    wrong_word = word(pattern, getattr(false, field))
    turns[place] = Turn(question(scene, pattern, rng, other=wrong_word), answer(false, pattern), pattern, wrong_word, grounded=False)
    return turns


def guessable(scene: Scene, rng: np.random.Generator) -> list[Turn]:
    """Return true turns with questions that state their answer first."""
    return _untrue([replace(turn, question=f"{turn.answer} {turn.question}") for turn in dialogue(scene, rng)])


def boilerplate(scene: Scene, rng: np.random.Generator) -> list[Turn]:
    """Return true turns with fixed words before and after each answer."""

    def wrapped(text: str) -> str:
        return f"{_OPENINGS[rng.integers(len(_OPENINGS))]} {text} {_CLOSINGS[rng.integers(len(_CLOSINGS))]}"

    return [replace(turn, answer=wrapped(turn.answer)) for turn in dialogue(scene, rng)]


def plausible(scene: Scene, rng: np.random.Generator) -> list[Turn]:
    """Return requests to describe the image. Each answer names the true kind of object, then claims a value that nobody looked up.

    The image helps to tell the kind, and the kind helps to guess its usual values. So the VIG of these answers may be positive.
    """
    claims = dialogue(_imagined(scene, rng), rng)
    return _untrue([replace(turn, question=DESCRIBE, answer=f"This is a {scene.kind}. {turn.answer}") for turn in claims])


KINDS: dict[str, Callable[[Scene, np.random.Generator], list[Turn]]] = {
    "ungrounded": ungrounded, "swapped": swapped, "span": span, "guessable": guessable, "boilerplate": boilerplate, "plausible": plausible,
}  # fmt: skip


def draw_kind(shares: Mapping[str, float], rng: np.random.Generator) -> str | None:
    """Return a random kind of noise, or None. The probability of each kind is its share.

    Raises:
        ValueError: for an unknown kind, or shares that are negative or whose sum is above 1.
    """
    if unknown := shares.keys() - KINDS.keys():
        raise ValueError(f"no kind of noise is called {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    if min(shares.values(), default=0) < 0 or sum(shares.values()) > 1 + 1e-9:
        raise ValueError(f"expected shares of noise that are at least 0 and together at most 1, got {dict(shares)}")
    place = rng.random()
    for kind, share in shares.items():
        if place < share:
            return kind
        place -= share
    return None


def _imagined(scene: Scene, rng: np.random.Generator) -> Scene:
    """Return another scene with the same kind of object, in which nine fields of ten have the kind's usual value."""
    fields = {
        field: habit(scene.kind, field) if rng.random() < HABIT else values[rng.integers(len(values))]
        for field, values in VALUES.items()
        if field != "kind"
    }
    return replace(scene, **fields)


def _untrue(turns: list[Turn]) -> list[Turn]:
    return [replace(turn, grounded=False) for turn in turns]
