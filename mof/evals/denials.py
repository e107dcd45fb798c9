"""The words around an option may deny it: "not open", "I do not think the door is open", "B is wrong", "B? No."

The time is proportional to the number of words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import takewhile

_WORD = re.compile(r"\w+(?:'\w+)*|[^\w\s]")
_NEGATIONS = {"not", "never", "cannot", "neither", "nor", "nowhere", "hardly", "without"}
_NEGATION_REACH = 2  # words: "not open", "not the open"
_BELIEFS = set(
    re.findall(
        r"\S+",
        "think believe say see look looks looking appear appears seem seems sure certain convinced guess expect agree",
    )
)
"""Words that take a denial along to the end of their clause: "don't think it's open", "doesn't appear to be open"."""
_DOUBTS = {"doubt", "deny", "unlikely", "impossible"}
"""Words that deny the rest of their clause by themselves, unless they are denied: "I doubt that it is open", but "no doubt it is open"."""
_BELIEF_REACH = 12  # words
FILLERS = set(
    re.findall(
        r"\S+",
        """the final correct best right most likely my answer option choice letter response is be would it it's that that's this
        i i'd i'll i'm we think believe say guess choose chosen pick select selected go going with so therefore thus hence then ok okay
        clearly definitely probably surely certainly obviously maybe perhaps possibly
        to must should will has seems appears looks like matches vote for ans
        answer's la le el o é è ist es est lautet correcta correcte corretta correta""",
    )
)
"""Words that say nothing beside a letter: a clause of these and a letter gives the letter."""
_REASONS = {"because", "since", "as"}
WRONG = {"wrong", "incorrect", "false"}
_DENIALS = {*_NEGATIONS, *WRONG, "unlikely"}
_ALL_BUT = {("anything", "but"), ("everything", "but"), ("all", "but")}
"""Words directly before a letter that leave this letter out."""
_REFUSAL_REACH = 8  # words and signs on either side
DENIAL_REACH = 4  # words before a letter: "I do not think it is B"
TURNS = {"but", "rather", "instead"}  # end a clause, and the reach of a denial


def is_denied(words: Sequence[str], place: int, options: Mapping[str, str]) -> bool:
    """Return whether the words around a letter deny it: "I do not think it is B", "B is wrong", but not "B is not wrong"."""
    following = _clause(words[place + 1 : place + 4])
    denials = [place for place, word in enumerate(following) if word in _DENIALS or _denies(word)]
    twice = len(denials) > 1 and denials[0] + 1 == denials[1] and following[denials[1]] in WRONG
    if denials and not twice and following[0] not in _REASONS:
        return True
    end = place + 2 if words[place + 1 : place + 2] == [")"] else place + 1
    option = words_of(options[words[place]])
    end += len(option) if list(words[end : end + len(option)]) == option else 0
    if not twice and is_refused(words, place, end, options):
        return True
    before = [word for word in words[max(0, place - 2 * DENIAL_REACH) : place] if word not in "()"]
    for letter, own in options.items():  # "(a) Not visible (b) Visible" denies neither
        if before[-len(option := words_of(own)) - 1 :] == [letter, *option]:
            before = before[: len(before) - len(option)]
    if before[-1:] == ["except"] or tuple(before[-2:]) in _ALL_BUT:
        return True
    return is_negated(before, len(before), DENIAL_REACH)


def is_refused(words: Sequence[str], start: int, end: int, options: Mapping[str, str]) -> bool:
    """Return whether the words beside words[start:end] refuse it: "incorrect: B", "the wrong answer is B", "B? No.", "B (wrong)".

    Words of an option refuse nothing: "B: No" gives the option "No".
    """
    own = {word for option in options.values() for word in words_of(option)}
    signs, said, next_sign = _beside(words[end : end + _REFUSAL_REACH])
    behind = words[end + len(signs) + 1 : end + _REFUSAL_REACH]
    last = {*signs} and not any(word[0].isalnum() for word in behind)  # "B, no." But "B - no, they are closed" gives a reason
    no = {"no", "nope"} if {"?", "("} & {*signs} or last else set()
    refusals = WRONG | no | {word for word in said if _denies(word) and next_sign != "("}  # "closed, not (a) open"
    if refusals.issuperset(said[:1]) and said[1:] in ([], ["really"]) and said and next_sign != ":" and own.isdisjoint(said):
        return True
    front = words[max(0, start - _REFUSAL_REACH) : start][::-1]
    signs, said, next_sign = _beside(front)
    if not said and next_sign == ":":  # fillers, as in "incorrect: it is B"
        signs, said, next_sign = _beside(front[front.index(":") :])
    if not {*signs} <= {"(", ":"} or next_sign == ")" or not own.isdisjoint(said):
        return False
    denials = {word for word in said if _denies(word)} if ":" in signs else set()
    wrong = WRONG & {*said}
    return bool(wrong) != bool(denials) and {*said} <= {*wrong, *denials, "options", "answers", "choices"}


def is_negated(words: Sequence[str], position: int, reach: int = _NEGATION_REACH) -> bool:
    """Return whether the words before `position` in its clause deny it: one of the last few, or a denied belief further in front."""
    before = reversed(words[max(0, position - _BELIEF_REACH) : position])
    clause = _clause(list(before))
    if any(_denies(word) for word in clause[:reach]) or clause[:1] == ["no"] or clause[:2] == ["longer", "no"]:
        return True
    for place, word in enumerate(clause):
        denied = any(_denies(other) or other == "no" for other in clause[place + 1 : place + 3])
        if (word in _BELIEFS and denied) or (word in _DOUBTS and not denied):
            return True
    return False


def _beside(words: Sequence[str]) -> tuple[list[str], list[str], str]:
    """Return the signs with which the words begin, the clause behind them without fillers, and the sign behind the clause."""
    signs = list(takewhile(lambda word: not word[0].isalnum(), words))
    clause = _clause(words[len(signs) :])
    return signs, [word for word in clause if word not in FILLERS], next(iter(words[len(signs) + len(clause) :]), "")


def _clause(words: Sequence[str]) -> list[str]:
    """Return the words before the first sign or turn."""
    return list(takewhile(lambda word: word[0].isalnum() and word not in TURNS, words))


def _denies(word: str) -> bool:
    return word in _NEGATIONS or word.endswith("n't")


def words_of(text: str) -> list[str]:
    """Return words and signs in lower case; brackets and quotes are no signs."""
    tokens = _WORD.findall(text.casefold().replace("\u2019", "'"))
    return [token for token in tokens if token[0].isalnum() or token in ".,;:!?/"]
