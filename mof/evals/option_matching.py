"""match_answer finds the option that an answer chooses. Options are read from `(a) Open (b) Closed`; answers match by letter or by text.

An answer that names no option, or several, chooses none. An option shortly after "not" or "never" is not named, nor is an option in
a clause that begins with a denied belief: "I do not think the door is open". The time is proportional to the answer's length.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Container, Iterator, Mapping, Sequence
from itertools import dropwhile

from mof.evals.denials import DENIAL_REACH, FILLERS, TURNS, WRONG, is_denied, is_negated, is_refused, words_of
from mof.evals.second_thoughts import corrections, without_thoughts

_OPTION = re.compile(r"\(([A-Za-z])\)")

# Letters are looked for in tokens: abbreviations, words with their hyphens, and signs.
_TOKEN = re.compile(r"(?:\w\.){2,}\w?|\w+(?:['-]\w+)*|[^\w\s]")
_ANSWER_MARK = re.compile(r"\\boxed|</?answer>|\b(?:antwort|respuesta|réponse|risposta|resposta|ответ)\b", re.IGNORECASE)
_NOT_CHOSEN = re.compile(r"~~[^~\n]*~~|\[ \][^\[\n]*")
"""Words that are struck out, and options without a tick."""
_DECORATION = re.compile(
    r"\\[a-z]+|<(?P<tag>[a-z])>(?=[^<]{0,99}</(?P=tag)>)|</\w{1,20}>|<\w{2,20}>|[*_`$#\"\u2018\u201c\u201d]|(?<!\w)'|'(?!\w)|[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]"
)
"""LaTeX, tags, Markdown, quotes, and scripts that put no spaces around a letter."""
_BRACKETS = str.maketrans("[]{}\u3010\u3011", "()()()")
_TOGETHER = {"and", "or", "both", "either", "vs", "versus", "/", "&"}
_BEFORE_YES = set(
    re.findall(
        r"\S+",
        """the final correct my answer is so would must be it i think believe i'd say definitely certainly clearly surely
        sure of course it's a""",
    )
)
_YES_AND_NO = {"yes": True, "no": False}
_NO_DENIAL = {"doubt", "problem", "idea", "clue", "way", "question", "other", "further", "need"}
"""Words behind "no" that make it no answer: "No idea", "No problem! Yes, there is a dog", "Yes. Actually, no other animal is there"."""
_LEADS = {"option", "choice", "answer", "choose", "pick", "select", "with"}
_FOLLOWERS = {"is", "isn't", "was", "would", "seems", "looks", "appears", "because", "since", "as", "matches", "fits", "describes", "best"}
"""Words that follow a letter and never the article "a"."""
_TAKES_BACK = {"no", "nope", "wait", "oops", "scratch", "strike"}
"""Words of a correction that take back a letter even if no other letter follows."""


def parse_options(text: str) -> dict[str, str]:
    """Return the options of a text: {"a": "Open", "b": "Closed"} for "(a) Open (b) Closed".

    Raises:
        ValueError: unless there are at least two options, lettered from (a) on, each with words of its own.
    """
    pieces = _OPTION.split(text)  # before, letter, words, letter, words, ...
    letters = [letter.lower() for letter in pieces[1::2]]
    words = [" ".join(piece.split()) for piece in pieces[2::2]]
    expected = [chr(ord("a") + i) for i in range(len(letters))]
    if pieces[0].strip() or len(letters) < 2 or letters != expected or not all(words):
        raise ValueError(f"expected options such as '(a) Open (b) Closed', got {text!r}")
    if len({" ".join(words_of(option)) for option in words}) < len(words):
        raise ValueError(f"two of the options are the same: {text!r}")
    return dict(zip(letters, words, strict=True))


def match_letter(answer: str, options: Mapping[str, str]) -> str | None:
    """Return the only option whose letter the answer gives, or None."""
    return _only(_letters(answer, options)[0])


def match_text(answer: str, options: Mapping[str, str]) -> str | None:
    """Return the only option whose words the answer holds, or None. "not visible" is not also "visible"."""
    return _only(_texts(_final(answer), options))


def match_answer(answer: str, options: Mapping[str, str]) -> str | None:
    """Match by letter, or by text if there is no letter. Return None if letter and text beside it name different options."""
    letters, beside = _letters(answer, options)
    texts = _texts(beside, options)
    if not letters:
        return _only(texts)
    return None if len(texts) == 1 and texts != letters else _only(letters)


def yes_or_no(answer: str) -> bool | None:
    """Return True for an answer that begins with yes, ends with a line that does, or says that the answer is yes; False for no.

    The word behind a correction counts: "Yes. Wait, no."
    """
    lines = _lines(answer)
    corrected = corrections("\n".join(map(" ".join, lines)))
    last_words = [behind.partition("\n")[0].split() or _TOKEN.findall(said)[-2:] for _, said, behind in corrected]
    for part in [*last_words, *lines[:1], *_answer_parts(lines), *lines[-1:]]:
        said = list(dropwhile(lambda word: word in _BEFORE_YES or not word[0].isalnum(), map(str.casefold, part)))
        if said[:1] == ["no"] and said[1:2] and said[1] in _NO_DENIAL:
            said = list(dropwhile(lambda word: not word[0].isalnum(), said[2:]))
        if said and said[0] in _YES_AND_NO:
            hedged = said[1:2] in (["and"], ["or"], ["/"]) and said[2:3] in (["yes"], ["no"])
            return None if hedged else _YES_AND_NO[said[0]]
    return None


def _only(letters: set[str]) -> str | None:
    return next(iter(letters)) if len(letters) == 1 else None


def _final(answer: str) -> str:
    """Return the answer without thoughts, and without words and options that are not chosen."""
    return _NOT_CHOSEN.sub(" ", without_thoughts(answer)).replace("[x]", " ").replace("\u2019", "'")


# --- letters
def _letters(answer: str, options: Mapping[str, str]) -> tuple[set[str], str]:
    """Return the options whose letters are given, and the part of the answer that decides about them.

    Sentences from the word "answer" on decide first; then lines that hold only a letter, or a letter and its option; then the
    whole answer.
    """
    lines, corrected = _last_said(_lines(answer), options)
    parts = [] if any("answer" in words_of(option) for option in options.values()) else _answer_parts(lines)
    chosen = [part for part in parts if _named(part, options)]
    if not chosen:
        single = [(line, letters) for line in lines if len(letters := _named(line, options)) == 1]
        chosen = [line for line, letters in single if _holds_only(line, letters)]
        chosen = chosen or [line for line, (letter,) in single if _holds_only(line, {letter, *words_of(options[letter])})]
    letters = set[str]().union(*(_named(part, options) for part in chosen or lines))
    return letters, "\n".join(" ".join(part) for part in chosen or (lines if corrected else ())) or _final(answer)


def _last_said(lines: list[list[str]], options: Mapping[str, str]) -> tuple[list[list[str]], bool]:
    """Return the lines behind the last correction of a letter, "B. Wait, A.", and True; or all lines and False.

    A letter that is taken back without another letter, "B. Wait, that is wrong.", leaves no lines.
    """

    def names(said: Sequence[list[str]]) -> bool:
        return any(_named(line, options) for line in said)

    for before, said, behind in corrections("\n".join(map(" ".join, lines))):
        last = next((word for word in reversed(before.casefold().split()) if word[0].isalnum()), "")
        if words_of(said)[:1] == words_of(options.get(last, ""))[:1]:  # the option behind its letter: "(a) No (b) Yes"
            continue
        earlier, later = ([line.split() for line in text.split("\n")] for text in (before, behind))
        if names(earlier) and names(later):
            return later, True
        rest = [word for line in later for word in map(str.casefold, line) if word[0].isalnum() and word not in FILLERS]
        taken_back = not _TAKES_BACK.isdisjoint(said.casefold().split())
        if taken_back and WRONG.issuperset(rest) and names(earlier) and {"no"}.isdisjoint(map(str.casefold, options.values())):
            return [], True
    return lines, False


def _lines(answer: str) -> list[list[str]]:
    """Return the tokens of each line that has any."""
    text = unicodedata.normalize("NFKC", _final(answer)).translate(_BRACKETS)
    text = _DECORATION.sub(" ", _ANSWER_MARK.sub(" answer ", text))
    return [tokens for line in text.splitlines() if (tokens := _TOKEN.findall(line))]


def _answer_parts(lines: Sequence[list[str]]) -> Iterator[list[str]]:
    """Yield the rest of each sentence from the word "answer" on; the whole sentence where words before "answer" deny the rest."""
    for line in lines:
        ends = [place + 1 for place, token in enumerate(line) if token in ".!?"]
        for start, end in zip([0, *ends], [*ends, len(line)], strict=True):
            sentence = line[start:end]
            place = next((place for place, token in enumerate(sentence) if token.casefold() == "answer"), None)
            if place is not None:
                before = [token.casefold() for token in sentence[:place]]
                denied = before[-1:] in ([word] for word in WRONG) or is_negated(before, place, DENIAL_REACH)
                yield sentence if denied else sentence[place:]


def _holds_only(line: Sequence[str], words: Container[str]) -> bool:
    """Return whether all words of the line are fillers or among `words`."""
    return all(word in FILLERS or word in words or not word[0].isalnum() for word in map(str.casefold, line))


def _named(line: Sequence[str], options: Mapping[str, str]) -> set[str]:
    """Return the options whose letters stand where the article "a" and other words do not."""
    words = [token.casefold() for token in line]
    ends = [place for place in range(len(words)) if _ends_clause(words, place)]
    named = set[str]()
    for start, end in zip([0, *(place + 1 for place in ends)], [*ends, len(words)], strict=True):
        clause = words[start:end]
        places = [] if options.keys().isdisjoint(clause) else _given(line[start:end], clause, options)
        named |= {words[start + place] for place in places if not is_denied(words, start + place, options)}
    return named


def _ends_clause(words: Sequence[str], place: int) -> bool:
    """Return whether the token ends a clause, as signs do. A bracket after "a" may not: "a (closed) door"."""
    if words[place] == "(" and place and words[place - 1] == "a":
        return words[place + 2 : place + 3] == [")"] and len(words[place + 1]) == 1
    return words[place] in TURNS or (not words[place][0].isalnum() and words[place] not in _TOGETHER)


def _given(clause: Sequence[str], words: Sequence[str], options: Mapping[str, str]) -> list[int]:
    """Return the places of the letters that the clause gives. `words` are the clause in lower case."""
    rest = [word for word in words if word not in FILLERS] or words
    if all(word in options or word in _TOGETHER for word in rest):
        return [place for place, word in enumerate(words) if word in options and word in rest]
    fillers = next((place for place, word in enumerate(words) if word not in FILLERS or word == "letter"), 0)
    given = []
    for place, word in enumerate(words):
        if word not in options:
            continue
        following = words[place + 1] if place + 1 < len(words) else ""
        before = words[place - 2 : place] if place > 1 else ["", *words[:place]]
        led = 0 < place <= fillers or before[-1] in _LEADS or (before[-1] == "is" and before[0] in _LEADS)
        certain = not following or following in _FOLLOWERS or clause[place].isupper() or word not in ("a", "i")  # no other words
        if (led and certain) or before[-1] in ("option", "choice") or (place == fillers and following in _FOLLOWERS):
            given.append(place)
    return given


# --- words
def _texts(answer: str, options: Mapping[str, str]) -> set[str]:
    """Return the options whose words are in the answer. Longer options come first, and a shorter one may not use their words."""
    words = words_of(answer)
    whole = list(words)
    named = set()
    for letter, option in sorted(options.items(), key=lambda item: -len(words_of(item[1]))):
        wanted = words_of(option)
        position = 0
        while wanted and position + len(wanted) <= len(words):
            if words[position : position + len(wanted)] != wanted:
                position += 1
                continue
            start = position - next((back for back in (1, 2) if whole[max(0, position - back)] == letter), 0)  # "(a) open", "a. open"
            if not is_negated(words, position) and not is_refused(whole, start, position + len(wanted), options):
                named.add(letter)
            words[position : position + len(wanted)] = ["\0"] * len(wanted)  # taken; as a sign, it also ends a negation's reach
    return named
