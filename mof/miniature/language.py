"""This module writes texts about scenes: web captions, descriptions, questions and answers, all made of the same few facts."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from mof.miniature.scenes import KINDS, PATTERNS, VALUES, Scene

_WEB = ("a photo of a {}", "a picture of a {}", "{}", "my new {}", "one {} on the ground", "look at this {}")
_QUESTIONS = {
    "Orientation": "Which way does the {kind} point, {a} or {b}?",
    "Presence": "Is the {kind} dotted or bare?",
    "State": "Is the {kind} whole or broken?",
    "Quantity": "How many balls are there, {a} or {b}?",
    "Spatial": "On which side of the {kind} are the balls, {a} or {b}?",
    "Color": "What colour is the {kind}, {a} or {b}?",
    "Structural Character": "Is the surface of the {kind} plain or striped?",
    "Text": "Which letter is on the sign, {a} or {b}?",
    "Camera Perspective": "Is the camera level or above?",
}
_ANSWERS = {
    "Orientation": "The {kind} points {value}.",
    "Presence": "The {kind} is {value}.",
    "State": "The {kind} is {value}.",
    "Quantity": "The number of balls is {value}.",
    "Spatial": "The balls are on the {value}.",
    "Color": "The colour of the {kind} is {value}.",
    "Structural Character": "Its surface is {value}.",
    "Text": "The letter on the sign is {value}.",
    "Camera Perspective": "The camera is {value}.",
}
_STATEMENTS = {
    "Orientation": "a {kind} pointing {value}",
    "Presence": "a {value} {kind}",
    "State": "a {value} {kind}",
    "Quantity": "a {kind} beside balls, {value} in number",
    "Spatial": "a {kind} with balls on the {value}",
    "Color": "a {value} {kind}",
    "Structural Character": "a {kind} with a {value} surface",
    "Text": "a {kind} and a sign with the letter {value}",
    "Camera Perspective": "a {kind}, the camera {value}",
}
_WORDS: dict[str, dict[Any, str]] = {
    "Orientation": {"left": "leftward", "right": "rightward", "up": "upward", "down": "downward"},
    "Presence": {True: "dotted", False: "bare"},
    "Quantity": {1: "one", 2: "two", 3: "three"},
}
DESCRIBE = "Describe the picture."
IS_THERE = "Is there a {} in the image?"


@dataclass(frozen=True)
class Turn:
    """A turn is a question about an image with its answer. It also says whether the image supports the answer."""

    question: str
    answer: str
    pattern: str
    """The pattern that the question is about; "Thing" for `yes_or_no`."""
    word: str
    """Word of the answer that decides whether it is right."""
    grounded: bool = True
    """True if the word is true of the image and cannot be told without the image (`mof.miniature.noise`)."""


def word(pattern: str, value: Any) -> str:
    """Return the word that answers a question of this pattern."""
    return _WORDS[pattern][value] if pattern in _WORDS else value


def options(pattern: str) -> list[str]:
    """Return all words that can answer a question of this pattern."""
    return [word(pattern, value) for value in VALUES[PATTERNS[pattern]] if value is not None]


def patterns_of(scene: Scene) -> list[str]:
    """Return the patterns about which a question can be asked: all nine, or eight for a scene without a sign."""
    return [pattern for pattern, field in PATTERNS.items() if getattr(scene, field) is not None]


def answer(scene: Scene, pattern: str) -> str:
    """Return the answer to the question of this pattern."""
    return _ANSWERS[pattern].format(kind=scene.kind, value=word(pattern, getattr(scene, PATTERNS[pattern])))


def statement(scene: Scene, pattern: str) -> str:
    """Return a statement about the scene in the form of MMVP-VLM, which follows the words "a photo of"."""
    return _STATEMENTS[pattern].format(kind=scene.kind, value=word(pattern, getattr(scene, PATTERNS[pattern])))


def question(scene: Scene, pattern: str, rng: np.random.Generator, other: str | None = None) -> str:
    """Return the question about this scene with its right option and a wrong option (`other`, or a random option) in random order."""
    right = word(pattern, getattr(scene, PATTERNS[pattern]))
    wrong = [option for option in options(pattern) if option != right]
    pair = [right, other or wrong[rng.integers(len(wrong))]]
    a, b = pair if rng.random() < 0.5 else pair[::-1]
    return _QUESTIONS[pattern].format(kind=scene.kind, a=a, b=b)


def facts(scene: Scene) -> list[str]:
    """Return the facts of the scene as words: the kind of object, and the answers to the questions."""
    return [scene.kind, *(word(pattern, getattr(scene, PATTERNS[pattern])) for pattern in patterns_of(scene))]


def description(scene: Scene, rng: np.random.Generator) -> str:
    """Return a complete description: the kind of the object, then all other facts in random order."""
    order = rng.permutation(patterns_of(scene))
    return " ".join([f"This is a {scene.kind}.", *(answer(scene, str(pattern)) for pattern in order)])


def web_caption(scene: Scene, rng: np.random.Generator) -> str:
    """Return a web caption, which names the object, half of the time also its colour, and nothing else."""
    name = f"{scene.colour} {scene.kind}" if rng.random() < 0.5 else scene.kind
    return _WEB[rng.integers(len(_WEB))].format(name)


def dialogue(scene: Scene, rng: np.random.Generator) -> list[Turn]:
    """Return five questions about different patterns with their answers."""
    return [
        Turn(question(scene, pattern, rng), answer(scene, pattern), pattern, word(pattern, getattr(scene, PATTERNS[pattern])))
        for pattern in map(str, rng.permutation(patterns_of(scene))[:5])
    ]


def things(scene: Scene) -> list[str]:
    """Return the kind of the object, and "sign" where the scene has a sign. Balls are in every scene."""
    return [scene.kind, *(["sign"] if scene.letter else [])]


def yes_or_no(scene: Scene, rng: np.random.Generator) -> list[Turn]:
    """Return two of POPE's questions, each about a thing that is in the scene or about a thing that is not, with the same probability."""
    there = things(scene)
    asked = {"Yes": there, "No": [thing for thing in (*KINDS, "sign") if thing not in there]}
    drawn = [str(said) for said in rng.choice(list(asked), 2)]
    return [Turn(IS_THERE.format(rng.choice(asked[said])), f"{said}.", "Thing", said) for said in drawn]


def talk(scene: Scene, rng: np.random.Generator, *, describe: bool) -> list[dict[str, str]]:
    """Return chat messages: a request for a description with the description, or questions and answers."""
    turns = [(DESCRIBE, description(scene, rng))] if describe else [(turn.question, turn.answer) for turn in dialogue(scene, rng)]
    return [{"role": role, "content": text} for turn in turns for role, text in zip(("user", "assistant"), turn, strict=True)]
