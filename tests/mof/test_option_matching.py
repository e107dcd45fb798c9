"""Which option an answer chooses, by cases written down and by properties."""

from __future__ import annotations

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mof.evals.option_matching import match_answer, match_letter, match_text, parse_options, yes_or_no
from mof.evals.second_thoughts import without_thoughts

OPEN = {"a": "Open", "b": "Closed"}
YES = {"a": "Yes", "b": "No"}
RIGHT = {"a": "Correct", "b": "Incorrect"}
VISIBLE = {"a": "Visible", "b": "Not visible"}
BUTTON = {"a": "OK/SELECT", "b": "OK"}
HOW_MANY = {"a": "One", "b": "More than one"}
CLOCK = {"a": "12", "b": "1"}


def test_options_as_the_files_spell_them() -> None:
    assert parse_options("(a) Open (b) Closed") == OPEN
    assert parse_options(" (A)Facing  the camera(B) 1 ") == {"a": "Facing the camera", "b": "1"}
    assert parse_options("(a) A cup (of tea) (b) None (c) I (we) do") == {"a": "A cup (of tea)", "b": "None", "c": "I (we) do"}


@pytest.mark.parametrize(
    "text", ["", "Open or closed", "(a) Open", "(b) Closed (a) Open", "(a) Open (c) Closed", "(a) (b) Closed", "x (a) Open (b) Closed",
             "(a) Open (b) open", "(a) Open (a) Closed", "a) Open b) Closed"],
)  # fmt: skip
def test_what_is_no_list_of_options_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        parse_options(text)


plain_words = st.lists(st.text("abcdefghijklmnopqrstuvwxyz0123456789", min_size=1, max_size=6), min_size=1, max_size=4).map(" ".join)


@given(st.lists(plain_words, min_size=2, max_size=5, unique=True))
def test_parsing_undoes_writing(options: list[str]) -> None:
    text = " ".join(f"({letter}) {option}" for letter, option in zip("abcde", options, strict=False))
    assert list(parse_options(text).values()) == options


@given(st.text(max_size=80))
def test_any_text_parses_or_is_refused(text: str) -> None:
    try:
        options = parse_options(text)
    except ValueError:
        return
    assert len(options) >= 2 and all(options.values())


@pytest.mark.parametrize(
    ("answer", "options", "letter", "text", "either"),
    [
        ("(a)", OPEN, "a", None, "a"),
        ("(B)", OPEN, "b", None, "b"),
        ("A", OPEN, "a", None, "a"),
        (" b.\n", OPEN, "b", None, "b"),
        ("**(b)**", OPEN, "b", None, "b"),
        ("a) Open", OPEN, "a", "a", "a"),
        ("A: Open", OPEN, "a", "a", "a"),
        ("A. The wings are open.", OPEN, "a", "a", "a"),
        ("The correct answer is (b) Closed.", OPEN, "b", "b", "b"),
        ("Answer: B", OPEN, "b", None, "b"),
        ("the answer is b.", OPEN, "b", None, "b"),
        ("The answer is A because it looks so", OPEN, "a", None, "a"),
        ("Option b is right", OPEN, "b", None, "b"),
        ("Open", OPEN, None, "a", "a"),
        ("The wings are CLOSED!", OPEN, None, "b", "b"),
        ("(b) Closed, not (a) open", OPEN, "b", "b", "b"),
        ("not open but closed", OPEN, None, "b", "b"),
        ("(a), because they are open rather than closed", OPEN, "a", None, "a"),
        ("The number of balls is one.", {"a": "one", "b": "two"}, None, "a", "a"),  # as the miniature's models answer
        ("The letter on the sign is T.", {"a": "T", "b": "X"}, None, "a", "a"),
        ("The letter on the sign is O.", {"a": "L", "b": "O"}, None, "b", "b"),
        ("LEFT", {"a": "left", "b": "right"}, None, "a", "a"),
        ("left or right", {"a": "left", "b": "right"}, None, None, None),
        ("leftover", {"a": "left", "b": "right"}, None, None, None),
        ("It is upright", {"a": "left", "b": "right"}, None, None, None),
        # neither
        ("", OPEN, None, None, None),
        ("I cannot tell", OPEN, None, None, None),
        ("(c)", OPEN, None, None, None),
        ("A butterfly with wings", OPEN, None, None, None),
        ("The answer is a riddle", OPEN, None, None, None),
        ("An opening enclosed", OPEN, None, None, None),
        ("They aren't open", OPEN, None, None, None),
        ("They aren\u2019t open", OPEN, None, None, None),
        ("It is not really closed", OPEN, None, None, None),
        ("I don't think it's open", OPEN, None, None, None),
        ("I do not believe that the wings of the butterfly are open", OPEN, None, None, None),
        ("They don't appear to be open", OPEN, None, None, None),
        ("I doubt that it is open.", OPEN, None, None, None),
        ("No doubt it is open.", OPEN, None, "a", "a"),
        ("Without a doubt, open", OPEN, None, "a", "a"),
        ("It is no longer open", OPEN, None, None, None),
        ("I don't think that the answer is B", OPEN, None, None, None),
        ("I don't think it's open, it is closed", OPEN, None, "b", "b"),
        ("I'm not sure, but I think it's closed", OPEN, None, "b", "b"),
        # both, or at odds
        ("(a) or (b)", OPEN, None, None, None),
        ("A or B", OPEN, None, None, None),
        ("A, B", OPEN, None, None, None),
        ("a and b", OPEN, None, None, None),
        ("(a) Open (b) Closed", OPEN, None, None, None),
        ("a) Open\nb) Closed", OPEN, None, None, None),
        ("half open, half closed", OPEN, None, None, None),
        ("(a) Closed", OPEN, "a", "b", None),
        # options that hold one another
        ("Yes, it is.", YES, None, "a", "a"),
        ("There is no hat.", YES, None, "b", "b"),
        ("Yes and no", YES, None, None, None),
        ("Nothing noteworthy, yesterday", YES, None, None, None),
        ("It is visible", VISIBLE, None, "a", "a"),
        ("It is not visible", VISIBLE, None, "b", "b"),
        ("It says OK/SELECT", BUTTON, None, "a", "a"),
        ("It says OK", BUTTON, None, "b", "b"),
        ("More than one apple", HOW_MANY, None, "b", "b"),
        ("One apple", HOW_MANY, None, "a", "a"),
        ("12", CLOCK, None, "a", "a"),
        ("closer to 1.", CLOCK, None, "b", "b"),
        ("Closed is wrong", OPEN, None, None, None),
        ("Closed? No.", OPEN, None, None, None),
        ("Closed? No, open.", OPEN, None, "a", "a"),
        ("Open - wrong. Closed - right", OPEN, None, "b", "b"),
        ("B: No", YES, "b", "b", "b"),
        ("B: Incorrect", RIGHT, "b", "b", "b"),
        ("Incorrect: B", RIGHT, "b", "b", "b"),
        ("(a) No (b) Yes", {"a": "No", "b": "Yes"}, None, None, None),
        ("a) No\nb) Yes", {"a": "No", "b": "Yes"}, None, None, None),
        ("(a) Wait here (b) Go", {"a": "Wait here", "b": "Go"}, None, None, None),
        ("(a) Not visible (b) Visible", {"a": "Not visible", "b": "Visible"}, None, None, None),
        ("A. No, B.", YES, "b", "b", "b"),
        ("A die.", {"a": "Coin", "b": "Die"}, None, "b", "b"),
        ("[ ] Open [x] Closed", OPEN, None, "b", "b"),
        ("~~Open~~ Closed", OPEN, None, "b", "b"),
        ("Upside-down", {"a": "Upright", "b": "Upside down"}, None, "b", "b"),
    ],
)  # fmt: skip
def test_answers(answer: str, options: dict[str, str], letter: str | None, text: str | None, either: str | None) -> None:
    assert match_letter(answer, options) == letter
    assert match_text(answer, options) == text
    assert match_answer(answer, options) == either


GIVES_B = r"""(b)|b|B.|b)|**(b)**|Answer: **B**|\boxed{B}|$\boxed{\text{B}}$|<answer>B</answer>|<answer> (B) </answer>|B~~The butterfly rests.|B~~Unlike open
wings, these touch.|B is the correct answer.|B is correct|The correct option is (b)|I choose b|I think it's B.|**Final Answer:** B|选B|答案：B|Ⓑ|（b）|Ｂ|[b]
|{b}|<B>|"B"|‘B’|`B`|__B__|### B|- B|1. B|b - closed|Closed - B|closed (b)|The wings touch, so B.|I would go with B.|My answer would be B.
|The letter is B|Answer → B|Answer = B|The best answer is B because they touch.|B because they touch|B</s>|ASSISTANT: B|The answer is "B".|It is not A, it is B
|Not A but B|It can't be A, so B.|I don't think it's A. It's B.|A is not correct; B is|A is incorrect. The answer is B.|<think>A or B? maybe A</think>B
|(a) Open~(b) Closed~~B|Between A and B, the answer is B.|Option A says open. Option B says closed. Therefore, the answer is B.|\(B\)|\textbf{B}|[[B]]
|A: no wait, B|A, no, wait, B.|A. No, B.|A - no, B|A. Actually, B.|It's A. Sorry, I mean B.|A, or rather B|A; no, B|Answer: A? No, B.
|The answer is A.~~Wait, let me look again. The answer is B.|A. Closed? Hmm, A shows open wings. No, (b).|B. Sorry, I cannot see A.|[x] B [ ] A|- [ ] A~- [x] B
|<thinking>A</thinking>B|[THINK]A[/THINK](b)|Die Antwort ist B.|La respuesta es B.|La réponse est B|Ответ: B|Maybe B|Perhaps (b)|La respuesta correcta es la B|A resposta é B
|The answer is B. Let me know if you need more about option A.|(b)~~Let me explain. Option A says that the wings are up.|[ ] A [x] B|B <analysis>not A</analysis>
|Answer: B. Open wings look different.|(b) Closed~~Option (a) does not fit the photo.|B) Closed|It's (b) Closed|Based on it, I would choose option (b).|must be B
|It is B that fits|Option b shows the wings|B is my answer|Answer:~~**B**|The final answer is $\boxed{B}$.|The answer is B, not A.|{"answer": "B"}|B — they touch
|<b>B</b>|<p>B</p>|<u>(b)</u>|Surely B|It has to be B.|The answer seems to be B|It looks like B|It appears to be (b).|I vote for B|The answer's B|ans: b
|B best describes the wings|A? No, B.|Is it A? No. It is B.|B is not wrong|Not incorrect: B|A: wrong. B: right.|(A) incorrect (B) correct|B! Not A.|B, no doubt
|The incorrect answer is A. The correct answer is B.|Incorrect: A. Correct: B|Correct answer: B; incorrect: A|B - no, they are not open|The statement is false: B"""  # noqa: RUF001
GIVES_NONE = r"""A door|A man is standing|C|(c)|Option C|A or B|(a) or (b)|both|Neither A nor B|not B|It is not (b)|I don't think it is B|The answer is not B
|B is wrong|B isn't right|B is not correct|Plan B|Vitamin B|Exhibit A|Type A blood|A-frame house|U.S.A.|at 5 a.m.|B.B. King|B movies are fun|I see a B-52|The
answer is a door|choose a door|It's a bird|with a hat|The answer is A or B|The answer is A, B|A/B|A & B|A~B|B, no.|(b) - no|B. Wait, that is wrong.|A? No. B? No.|A, maybe B|<think>The answer is B|[ ] A [ ] B|a (red) door|A (red) door|an a la carte|I cannot
answer. A door is there.|Both A and B|A bird, a tree and a house|such a view|the letter A is on the sign|A man's hat|Is it A or B?
|A vs. B|B is unlikely|Anything but B|all but (b)|any letter except B|It looks like a door|<b>A</b> or <b>B</b>|B? No.|B? Not really.|B (no)|B, incorrect|B - wrong|B (incorrect)
|(b) (wrong)|Incorrect: B|Wrong answer: B|Incorrect options: (b)|Not correct: B|The wrong option is B|The incorrect answer is B.|Incorrect: B (Closed)|(b) Closed is wrong|The wrong option is (b) Closed"""


def spellings(text: str) -> list[str]:
    """The answers between bars; ~ stands for a line's end."""
    return [answer.replace("~", "\n") for answer in text.replace("\n|", "|").replace("\n", " ").split("|")]


@pytest.mark.parametrize(("text", "letter"), [(GIVES_B, "b"), (GIVES_NONE, None)], ids=["a letter", "no letter"])
def test_plain_ways_to_give_a_letter_and_words_that_only_look_like_it(text: str, letter: str | None) -> None:
    assert len(spellings(text)) > 40
    assert {answer: match_answer(answer, OPEN) for answer in spellings(text)} == dict.fromkeys(spellings(text), letter)
    assert {answer: match_letter(answer, OPEN) for answer in spellings(text)} == dict.fromkeys(spellings(text), letter)


def test_what_a_model_thinks_or_strikes_out_is_no_answer() -> None:
    thought = "<|begin_of_thought|>It looks like A<|end_of_thought|>(b)"
    assert {match_answer(answer, OPEN) for answer in (thought, "~~A~~ B", "<think>A</think>Closed")} == {"b"}
    assert without_thoughts(thought) == "(b)" and without_thoughts("<think>cut in the") == ""
    assert without_thoughts("A <think> is a tag.") == "A <think> is a tag."
    assert without_thoughts("<answer>A</answer>\n<reasoning>It <think>is</think></reasoning>\n") == "<answer>A</answer>"
    assert {without_thoughts(answer) for answer in ("it is A </think>\n", " <think>A</think>", "\n<think>A")} == {""}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("yes|Yes.|**Yes**|Yes, it does.|Yes~~It fits.|Answer: yes|The answer is yes.|'Yes'|Yes - it does|<answer>Yes</answer>|\\boxed{yes}|It fits.~Yes|"
         "I think yes|The answer would be yes|Definitely yes|<b>Yes</b>|Yes, there is no doubt|<think>no</think>Yes|It's a yes|No doubt, yes.|No problem! Yes, there is.|No. Wait, yes, it does.|Yes, the answer is correct.|Yes. Actually, no other animal is there.|Yes. Let me explain: no word of it is wrong.", True),
        ("no|No.|NO|nO!|**No**|No, it does not.|No~~It differs|The answer is no.|Final answer: No|(no)|It differs.~~Answer: no|Yes... no, wait: no.|Yes. Sorry, no.", False),
        ("|maybe|Yes and no|yes or no|Yes/No|Nothing|another|yesterday|There is no error in it|The answer is correct|not sure|No idea|No way to tell", None),
    ],
)  # fmt: skip
def test_yes_and_no(text: str, said: bool | None) -> None:
    assert {answer: yes_or_no(answer) for answer in spellings(text)} == dict.fromkeys(spellings(text), said)


@pytest.mark.parametrize("piece", [" ", "(a) ", "open ", "not ", "B.\n"])
def test_long_answers_take_time_in_proportion(piece: str) -> None:
    """In quadratic time, this test would take minutes."""
    match_answer("answer is" + piece * (2**16 // len(piece)) + "B", OPEN)


DENIALS = {"not", "never", "cannot", "neither", "nor", "nowhere", "hardly", "without", "no", "doubt", "deny", "unlikely", "impossible"}
unnegated = plain_words.filter(lambda words: not DENIALS & set(words.split()))
two_options = st.lists(unnegated, min_size=2, max_size=4, unique=True).map(lambda words: dict(zip("abcd", words, strict=False)))


@given(two_options, st.data())
def test_a_letter_in_brackets_and_the_option_itself_are_found(options: dict[str, str], data: st.DataObject) -> None:
    letter = data.draw(st.sampled_from(sorted(options)))
    assert match_letter(f"({letter})", options) == letter
    assert match_text(options[letter].upper(), options) in (letter, None)
    if not any(word in options.values() for word in options[letter].split()):
        assert match_text(options[letter], options) == letter


@given(two_options, st.text(max_size=60))
def test_any_answer_is_matched_or_not_and_case_of_words_does_not_matter(options: dict[str, str], answer: str) -> None:
    for match in (match_letter, match_text, match_answer):
        assert match(answer, options) in {None, *options}
    assert match_text(answer.lower(), options) == match_text(answer.lower().upper().lower(), options)


@given(two_options, st.permutations("ab"))
@example({"a": "0", "b": "answer"}, ["b", "a"])
def test_two_letters_or_two_options_choose_none(options: dict[str, str], order: list[str]) -> None:
    first, second = order
    assert match_answer(f"({first}) or ({second})", options) is None
    assert match_answer(f"({first}) {options[first]} ({second}) {options[second]}", options) is None
