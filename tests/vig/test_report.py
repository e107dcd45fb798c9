"""The page, read back with Python's own HTML parser."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import tiny

from encoders.images.reading import blur
from mof.data.digests import digest, record_id
from vig import random_selection, select
from vig.report import page, write_report
from vig.report.null_comparison import compare_nulls, rank_correlation
from vig.scoring.score_table import Score
from vig.scoring.scores import Scores
from vig.selection.selected import Selection

TOKENIZER = tiny.build_tokenizer()
END = TOKENIZER.eos_token_id
EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)>"


def identity(null: str = "blur", **changes: Any) -> dict[str, Any]:
    same = {key: key for key in ("model", "config", "weights", "processor", "tokenizer", "chat_template")}
    return {**same, "null": {"name": null}, "max_length": 99, "seed": 0, "versions": {"torch": "1"}, **changes}


def scores_of(items: list[Score], null: str = "blur", **outcome: Any) -> Scores:
    changes = outcome.pop("identity", {})
    return Scores(items, {"complete": True, "text_only": [], "failures": {}, **outcome, "identity": identity(null, **changes)})


def record_of(id: str, turns: list[tuple[str, str]], image: str | None = None) -> dict[str, Any]:
    said = [(who, text) for turn in turns for who, text in zip(("human", "gpt"), turn, strict=True)]
    said[0] = ("human", f"<image>\n{said[0][1]}")
    return {"id": id, "image": image or f"{id}.png", "conversations": [{"from": who, "value": text} for who, text in said]}


def score_of(record: dict[str, Any], vig: list[float] | None = None, seed: int = 0) -> Score:
    """One token per byte of an answer and one for its end."""
    answers = [turn["value"] for turn in record["conversations"] if turn["from"] == "gpt"]
    ids = [[*TOKENIZER(answer, add_special_tokens=False).input_ids, END] for answer in answers]
    flat = np.array([id for answer in ids for id in answer], np.int64)
    token_vig = np.array(vig if vig is not None else np.random.default_rng(seed).normal(size=len(flat)), np.float32)
    assert len(token_vig) == len(flat)
    ends = np.cumsum([len(answer) for answer in ids]) - 1
    text, spans = "", []
    for answer in answers:
        for character in answer:
            spans += [(len(text), len(text) + 1)] * len(character.encode())  # its bytes all have it
            text += character
        spans.append((len(text), len(text) + len("</s>")))
        text += "</s>"
    starts, stops = np.array(spans, np.int64).T
    vig_of_all = float(np.float32(token_vig.mean(dtype=np.float64)))
    return Score(record["id"], vig_of_all, 1.0, 2.0, token_vig, flat, ends, digest(record), text, starts, stops)


class Page(HTMLParser):
    """Tags, texts of tokens by record, image sources and everything that could load or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tokens: list[list[tuple[str, str]]] = []  # per card: (class, text)
        self.texts: list[str] = []
        self._open: list[str] = []
        self._token: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        named = dict(attributes)
        self.tags.append((tag, named))
        if tag == "article":
            self.tokens.append([])
        if tag == "span" and self.tokens and (named.get("class") or "").startswith("t "):
            self._token = named["class"]
            self.tokens[-1].append((self._token, ""))

    def handle_endtag(self, tag: str) -> None:
        if tag == "span":
            self._token = None

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self._token is not None:
            self.tokens[-1][-1] = (self._token, self.tokens[-1][-1][1] + data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))

    def values(self, tag: str, name: str) -> list[str]:
        return [named[name] or "" for own, named in self.tags if own == tag and name in named]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in "abcd":
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def records() -> list[dict[str, Any]]:
    return [
        record_of("a", [("What is it?", "A red dog.")]),
        record_of("b", [("Who?", "Two men"), ("And?", "\u00e9\U0001f600 no")]),
        record_of("c", [("Where?", "left  of\nit")]),
        record_of("d", [("How?", "so so")]),
    ]


def write(file: Path, selection: Selection, records: list[dict[str, Any]], **options: Any) -> Page:
    write_report(file, selection, records, **options)
    assert not list(file.parent.glob(".tmp-*"))
    return Page(file.read_text(encoding="utf-8"))


def test_the_page_says_what_speaks_against_the_selection(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    scores = scores_of([score_of(records[0], [0.1] * 9 + [9.0, 0.0]), score_of(records[3], [-1.0] * 6)])
    page = write(tmp_path / "x.html", select(scores, keep=0.5), records)
    assert "90% of the kept samples' tokens that the image helped get no loss" in page.text and "--token-threshold none)." in page.text
    assert re.search(r" 1 records \(50\.0.?%\) have a VIG below 0\.", page.text)
    assert "helped get no loss" not in write(tmp_path / "y.html", select(scores, floor=True), records).text


def test_every_token_of_the_samples_is_there(tmp_path: Path, photos: Path, records: list[dict[str, Any]]) -> None:
    selection = select(scores_of([score_of(record, seed=i) for i, record in enumerate(records)]), keep=0.5)
    written = write(tmp_path / "x.html", selection, records, image_folder=photos)
    by_vig = sorted(selection.scores, key=lambda score: score.vig)
    shown = [*by_vig[2:][::-1], *by_vig[:2]]  # the highest from the top down, then the lowest from the bottom up
    assert len(written.tokens) == len(shown) == 4
    for score, tokens in zip(shown, written.tokens, strict=True):
        answers = [
            turn["value"] for record in records if record["id"] == score.id for turn in record["conversations"] if turn["from"] == "gpt"
        ]
        assert "".join(text for _, text in tokens) == "".join(answer + "</s>" for answer in answers)
        assert len(tokens) == len(score.token_ids)
        mask = selection.token_masks.get(score.id, np.zeros(len(tokens), bool))
        for i, (classes, _) in enumerate(tokens):
            assert ("help" if score.token_vig[i] >= 0 else "harm") in classes.split()
            assert ("on" in classes.split()) == mask[i]
            assert ("end" in classes.split()) == (i in score.turn_ends)
    titles = [named for tag, named in written.tags if tag == "span" and "title" in named]
    expected = [f"{vig:+.3f} nats".replace("-", "\u2212") for score in shown for vig in score.token_vig]
    assert [title["title"] for title in titles] == expected


def test_images_are_in_the_page(tmp_path: Path, photos: Path, records: list[dict[str, Any]]) -> None:
    selection = select(scores_of([score_of(record, seed=i) for i, record in enumerate(records)]), keep=0.5)
    written = write(tmp_path / "x.html", selection, records, image_folder=photos)
    sources = written.values("img", "src")
    pictures = [np.asarray(Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/png;base64,"))))) for source in sources]
    names = written.values("img", "alt")
    assert len(pictures) == 8
    for name, shown in zip(names, pictures, strict=True):
        file = photos / name.removesuffix(", null image")
        original = Image.open(file).convert("RGB")
        expected = blur(original) if name.endswith("null image") else original
        assert np.array_equal(shown, np.asarray(expected))


@pytest.mark.parametrize("form", ["table", "messages", "list"])
def test_records_of_every_form_are_shown(tmp_path: Path, photos: Path, form: str) -> None:
    asked = {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What is it?"}]}
    messages = [asked, {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]}]
    plain = record_of("a", [("What is it?", "A dog.")])
    record = {"table": plain | {"messages": None, "images": None}, "messages": {"id": "a", "messages": messages}, "list": messages}[form]
    score = dataclasses.replace(score_of(plain), id=record_id(record), digest=digest(record))
    written = write(tmp_path / "x.html", select(scores_of([score])), [record], image_folder=photos)
    assert "What is it?" in written.text and "<image>" not in written.text and len(written.tokens[0]) == len("A dog.") + 1
    assert written.values("img", "alt") == ["a.png", "a.png, null image"]


def test_nothing_is_loaded_and_nothing_runs(tmp_path: Path, photos: Path) -> None:
    Image.new("RGB", (90, 50)).save(photos / "p.png")
    records = [record_of(f"{EVIL}{i}", [(EVIL, f"{EVIL} {i}")], image="p.png") | {"source": EVIL + str(i % 2)} for i in range(4)]
    records.append(record_of("named", [("q", "a")], image='" onload="alert(1)<script>.png'))
    scores = scores_of([score_of(record, seed=i) for i, record in enumerate(records)], failures={EVIL: EVIL})
    selection = select(scores, keep=0.5, sources={record["id"]: record.get("source", EVIL) for record in records})
    written = write(tmp_path / "x.html", selection, records, image_folder=photos)
    tags = {tag for tag, _ in written.tags}
    assert not tags & {"link", "iframe", "object", "embed", "base", "form"}
    assert not [name for _, attributes in written.tags for name in attributes if name.startswith("on")]
    links = [value for _, named in written.tags for name, value in named.items() if name in ("src", "href", "srcset", "xlink:href", "data")]
    assert links and all(link is not None and link.startswith(("data:image/", "#")) for link in links)
    text = (tmp_path / "x.html").read_text()
    assert "url(" not in text and "@import" not in text
    (script,) = re.findall(r"<script.*?</script>", text, re.DOTALL)  # the search, which holds nothing of the records
    assert script in Path(page.__file__).with_name("page.html.jinja").read_text()
    assert sum(EVIL in "".join(part for _, part in tokens) for tokens in written.tokens) == 4
    assert "1 of the images shown here could not be read" in written.text


def test_the_same_bytes_every_time(tmp_path: Path, photos: Path, records: list[dict[str, Any]]) -> None:
    selection = select(scores_of([score_of(record, seed=i) for i, record in enumerate(records)]), keep=0.5)
    for name, order in (("one", records), ("two", records[::-1])):
        write(tmp_path / name, selection, order, image_folder=photos)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_without_images_the_page_says_so(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    selection = select(scores_of([score_of(record) for record in records]))
    written = write(tmp_path / "x.html", selection, records)
    assert "made without images" in written.text and not written.values("img", "src")
    written = write(tmp_path / "x.html", selection, records, image_folder=tmp_path / "nowhere")
    assert "4 of the images shown here could not be read" in written.text and "a.png: not found" in written.text


def test_sparsity_by_source(tmp_path: Path) -> None:
    records = [record_of(id, [("?", "xx")]) for id in "abcd"]
    values = {"a": [3, 3, 0], "b": [1, 1, 1], "c": [0, 0, 0], "d": [9, 0, 0]}  # means 2, 1, 0, 3
    scores = scores_of([score_of(record, values[record["id"]]) for record in records], text_only=["t"], failures={"f": "broken"})
    selection = select(scores, keep=0.5, keep_end_of_turn=False, sources=dict(zip("abcd", ("x", "x", "y", "y"), strict=True)))
    written = write(tmp_path / "x.html", selection, records)
    # the threshold is 2: a keeps two of its three tokens, d one
    for row in ("all +1.500 2 4 3 12 75.0%", "x +1.500 1 2 2 6 66.7%", "y +1.500 1 2 1 6 83.3%"):
        assert row in written.text
    assert "threshold +2.000: 50.0% reach it" in written.text
    assert "threshold +2.000: 25.0% reach it" in written.text  # of the tokens
    assert "3 of the 12 answer tokens (25.0%) reach the threshold. 0 of these get no loss" in written.text
    assert "0 tokens below the threshold get a loss" in written.text and "So 3 tokens (25.0%) get a loss" in written.text
    assert "1 text-only records are kept whole" in written.text and "f: broken" in written.text


@pytest.mark.parametrize(("values", "keep"), [([0.0], 0.0), ([0.25, 0.25, 0.25], 0.5), ([-3.0, 5.0], 1.0), ([-3.0, 5.0], None)])
def test_few_or_equal_scores(tmp_path: Path, values: list[float], keep: float | None) -> None:
    records = [record_of(str(i), [("?", "x")]) for i in range(len(values))]
    scores = scores_of([score_of(record, [value, value]) for record, value in zip(records, values, strict=True)])
    selection = select(scores, keep or 0)
    if keep is None:
        selection = random_selection(scores, select(scores, 1.0), 0)
    written = write(tmp_path / "x.html", selection, records)
    assert len(written.tokens) == len(values)
    assert ("threshold" in " ".join(written.texts).split("What the selection keeps")[0].split("reach it")[0]) == (keep not in (0.0, None))


def test_wrong_records_are_refused(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    selection = select(scores_of([score_of(record) for record in records]))
    with pytest.raises(ValueError, match="'[bcd]'"):
        write(tmp_path / "x.html", selection, records[:1])
    with pytest.raises(ValueError, match="'[abcd]'"):
        write(tmp_path / "x.html", selection, [record | {"image": "other.png"} for record in records])
    assert not (tmp_path / "x.html").exists()


def test_words_by_class_and_part_of_speech(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("textblob")
    record = record_of("a", [("?", "The red dog")])
    vig = [0.0, 0, 0, 0.5, 1, 1, 1, -0.25, -1, 0, 0.5, 7]  # The=0, " red"=3 (its space is none of it), dog=-0.5, the end
    selection = select(scores_of([score_of(record, vig)]))
    written = write(tmp_path / "x.html", selection, [record])
    for kind in ("colour", "adjective"):
        assert f"{kind}: +3.000, 1 words" in written.text
    for kind in ("object", "noun"):
        assert f"{kind}: \u22120.500, 1 words" in written.text
    assert (
        "function: +0.000, 1 words" in written.text
        and "determiner: +0.000, 1 words" in written.text
        and "3 words of 1 records" in written.text
    )
    monkeypatch.setattr(page, "can_tag", lambda: False)
    written = write(tmp_path / "x.html", selection, [record])
    assert 'pip install "mof-vig[report]"' in written.text and "determiner" not in written.text


# --- null images
def test_rank_correlation() -> None:
    x, y = np.array([1.0, 2, 3, 4]), np.array([1.0, 3, 2, 4])
    assert rank_correlation(x, y) == pytest.approx(1 - 6 * 2 / (4 * 15))  # 1 - 6 sum(d^2) / (n (n^2 - 1))
    assert rank_correlation(x, np.exp(x)) == pytest.approx(1) and rank_correlation(x, -x) == pytest.approx(-1)
    assert rank_correlation(x, np.zeros(4)) is None


def test_null_images_are_compared_by_record(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    items = [score_of(record, seed=i) for i, record in enumerate(records)]
    opposite = [dataclasses.replace(score, vig=-score.vig, token_vig=-score.token_vig) for score in items]
    runs = [scores_of(opposite[::-1], "zero"), scores_of(items), scores_of(items[:2], "drop")]
    zero, blurred, drop = compare_nulls(runs)
    assert (zero.name, blurred.name, drop.name) == ("zero", "blur", "drop")
    assert zero.sample_correlation == pytest.approx(-1) and zero.token_correlation == pytest.approx(-1)
    assert blurred.sample_correlation == pytest.approx(1) and drop.common == 2 and blurred.mean.mean == pytest.approx(-zero.mean.mean)
    assert blurred.positive == sum(score.vig > 0 for score in items) / 4
    written = write(tmp_path / "x.html", select(runs[1]), records, others=[runs[0], runs[2]])
    assert re.search(r"zero 4 \S+ \S+ \S+ 4 \u22121.000 \u22121.000", written.text)


def test_scores_of_another_model_are_refused(records: list[dict[str, Any]]) -> None:
    items = [score_of(record) for record in records]
    with pytest.raises(ValueError, match="'zero'.*weights"):
        compare_nulls([scores_of(items), scores_of(items, "zero", identity={"weights": "other"})])
    with pytest.raises(ValueError, match="'zero'"):
        compare_nulls([scores_of(items[:1]), scores_of(items[1:], "zero")])


def test_tokens_that_reach_the_threshold_and_tokens_with_a_loss_are_explained(tmp_path: Path) -> None:
    """a is kept with its last token by VIG, and its end by rule; b has a token above the threshold and is not kept."""
    records = [record_of("a", [("?", "xx")]), record_of("b", [("?", "xx")])]
    scores = scores_of([score_of(records[0], [0, 6, 0]), score_of(records[1], [4, 0, -4])])
    written = write(tmp_path / "x.html", select(scores, keep=0.5), records)
    assert "2 of the 6 answer tokens (33.3%) reach the threshold. 1 of these get no loss" in written.text
    assert "1 tokens below the threshold get a loss" in written.text and "So 2 tokens (33.3%) get a loss" in written.text


def test_model_and_records_are_named(tmp_path: Path, records: list[dict[str, Any]]) -> None:
    scores = scores_of([score_of(record) for record in records], about={"model": "runs/<mine>"})
    written = write(tmp_path / "x.html", select(scores), records, records_name="data/train.json")
    assert "Model model in runs/<mine> , records of data/train.json , null image blur" in written.text


def test_labels_of_the_axes_are_whole(tmp_path: Path) -> None:
    """No text of a chart begins left of it, also where counts are long."""
    drawn = page._histogram(np.repeat([0.0, 1.0, 1.1], (3_456_789, 2_345_678, 1)), np.array([0.0, 2.0]), 1.0, "record")
    anchored = re.findall(r'<text style="([^"]*)" (?:x="([-0-9.]+)"|transform="translate\(([-0-9.]+))[^>]*>([^<]*)<', drawn)
    assert any(text == "3,000,000" for *_, text in anchored)
    for style, x, moved, text in anchored:
        size = float(re.search(r"([0-9.]+)px", style)[1])
        if "text-anchor: end" in style:
            assert float(x or moved) > 0.5 * size * len(text)


@pytest.mark.slow
@pytest.mark.browser
def test_search_in_a_browser(browser: Any, tmp_path: Path, records: list[dict[str, Any]]) -> None:
    write(tmp_path / "x.html", select(scores_of([score_of(record) for record in records])), records)
    shown = browser.new_page()
    shown.goto((tmp_path / "x.html").as_uri())
    for words, names in (("TWO men", ["b"]), ("it", ["a", "c"]), ("nothing of the kind", [])):
        shown.fill("#search", words)
        assert sorted(shown.locator("article:visible header span:first-of-type").all_inner_texts()) == names
        assert shown.inner_text("#shown") == f"{len(names)} of 4 records"
    shown.close()
