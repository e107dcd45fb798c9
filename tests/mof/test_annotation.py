"""Annotations, the journal that keeps them, the table of pairs, and the export of annotations as benchmarks."""

from __future__ import annotations

import csv
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from support.annotation_folder import COMPLETE, EMPTY, write_folder
from support.commands import mof

from encoders import build_encoder
from encoders.csv_cells import csv_cell, plain_cell
from mof import probe_mmvp_vlm
from mof.evals.mmvp import read_mmvp
from mof.evals.mmvp_vlm import read_mmvp_vlm
from mof.evals.patterns import PATTERNS
from mof.pairs.annotation.annotation import Annotation
from mof.pairs.annotation.export import export_annotations
from mof.pairs.annotation.journal import JOURNAL, ConflictError, Images, Journal, Saved
from mof.pairs.annotation.server import Session
from mof.pairs.pair_table import BlindPairs, PairTable

NAMES = Images(("a.jpg", "b.jpg"), None)  # of files that cannot be read


def annotation(**changes):
    return Annotation.from_json(COMPLETE | changes)


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({}, []),
        ({"pattern": None}, ["pattern"]),
        ({"statements": ["x", " \n"]}, ["right statement"]),
        ({"statements": ["Open  wings", "open wings"]}, ["statements that differ"]),
        ({"question": ""}, ["question"]),
        ({"options": ["", "Closed"]}, ["option (a)"]),
        ({"options": ["open", "Open"]}, ["options that can be told apart"]),
        ({"options": ["Open (b) half", "Closed"]}, ["options that can be told apart"]),
        ({"right": ["a", None]}, ["right option of each image"]),
        ({"right": ["a", "a"]}, ["right options that differ"]),
    ],
)
def test_what_is_missing(changes, missing):
    assert annotation(**changes).missing() == missing
    assert annotation(**changes).state == ("todo" if missing else "done")


def test_a_mark_goes_before_everything():
    assert annotation(mark="skipped").state == "skipped"
    assert annotation(mark="flagged", question="").state == "flagged"


@pytest.mark.parametrize(
    "wrong",
    [
        None, [], {}, "x", COMPLETE | {"more": 1}, COMPLETE | {"pattern": "Colour"}, COMPLETE | {"mark": "done"}, COMPLETE | {"pattern": []},
        COMPLETE | {"statements": "ab"}, COMPLETE | {"statements": ["a"]}, COMPLETE | {"statements": ["a", 1]},
        COMPLETE | {"question": None}, COMPLETE | {"question": "x" * 2001}, COMPLETE | {"right": ["a", "c"]}, COMPLETE | {"right": ["a"]},
    ],
)  # fmt: skip
def test_what_is_no_annotation_is_refused(wrong):
    with pytest.raises(ValueError):
        Annotation.from_json(wrong)


# --- the journal
def test_what_was_saved_is_there_again_and_nothing_is_written_over(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    assert journal.get(NAMES) == Saved(0, Annotation())
    first = journal.save(NAMES, 0, annotation(question="One?"))
    second = journal.save(NAMES, first.revision, annotation(question="Zwei für ü \u2028?"))
    assert second.revision == 2
    again = Journal(tmp_path / "j.jsonl")
    assert again.get(NAMES) == second and again.get(Images(("a.jpg", "c.jpg"), None)) == Saved()
    assert again.get(Images(("b.jpg", "a.jpg"), None)) == Saved(2, second.annotation.swapped())
    assert json.loads((tmp_path / "j.jsonl").read_text().split("\n")[0])["question"] == "One?"


def test_two_writers_see_each_other_and_neither_is_overwritten(tmp_path):
    mine, theirs = Journal(tmp_path / "j.jsonl"), Journal(tmp_path / "j.jsonl")
    theirs.save(NAMES, 0, annotation(question="Theirs?"))
    with pytest.raises(ConflictError) as refused:
        mine.save(NAMES, 0, annotation(question="Mine?"))
    assert refused.value.current == Saved(1, annotation(question="Theirs?"))
    assert mine.save(NAMES, 0, annotation(question="Theirs?")).revision == 1  # the same again is no conflict, and no line
    assert mine.save(NAMES, 1, annotation(question="Mine?")).revision == 2
    assert theirs.get(NAMES).annotation.question == "Mine?"
    mine.save(Images(("c.jpg", "d.jpg"), None), 0, annotation())  # another pair
    assert [images.names[0] for images, _ in theirs.news()] == ["a.jpg", "a.jpg", "c.jpg"] and theirs.news() == []


@settings(max_examples=30, deadline=None)
@given(cut=st.integers(1, 400))
def test_a_torn_last_line_is_dropped_and_written_over(tmp_path_factory, cut):
    file = tmp_path_factory.mktemp("torn") / "j.jsonl"
    Journal(file).save(NAMES, 0, annotation())
    whole = file.read_bytes()
    file.write_bytes(whole + whole[: min(cut, len(whole) - 1)])
    journal = Journal(file)
    assert journal.get(NAMES).revision == 1
    journal.save(NAMES, 1, annotation(question="After?"))
    assert Journal(file).get(NAMES) == Saved(2, annotation(question="After?"))
    assert len(file.read_bytes().splitlines()) == 2


@pytest.mark.parametrize("line", ["nonsense", "{}", "[]", json.dumps(COMPLETE), '{"image_i": 1}'])
def test_a_damaged_line_is_named_not_dropped(tmp_path, line):
    file = tmp_path / "j.jsonl"
    Journal(file).save(NAMES, 0, annotation())
    file.write_text(file.read_text() + line + "\n")
    before = file.read_bytes()
    with pytest.raises(ValueError, match="line 2"):
        Journal(file).news()
    with pytest.raises(ValueError, match="line 2"):
        Journal(file).save(NAMES, 1, annotation(question="x"))
    assert file.read_bytes() == before


def test_lines_of_earlier_releases_are_read_and_other_formats_refused(tmp_path):
    file = tmp_path / "j.jsonl"
    Journal(file).save(NAMES, 0, annotation())
    entry = json.loads(file.read_text())
    assert entry.pop("format") == 2 and entry.pop("digests") is None and entry.pop("digest")
    for older in (entry, entry | {"format": 1}):  # before lines had a format, and digests
        file.write_text(json.dumps(older) + "\n")
        assert Journal(file).get(NAMES) == Saved(1, annotation())
        assert Journal(file).get(Images(NAMES.names, ("1", "2"))) == Saved(1, annotation())
    file.write_text(json.dumps(entry | {"format": 3}) + "\n")
    with pytest.raises(ValueError, match="line 1: .* 3"):
        Journal(file).news()


def test_a_file_that_was_shortened_in_use_is_noticed(tmp_path):
    journal = Journal(tmp_path / "j.jsonl")
    journal.save(NAMES, 0, annotation())
    (tmp_path / "j.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"j\.jsonl"):
        journal.get(NAMES)


def test_many_who_write_at_once_lose_nothing(tmp_path):
    """Each writer has a journal of its own, as servers have."""

    def write(name):
        journal = Journal(tmp_path / "j.jsonl")
        for k in range(30):
            while True:
                seen = journal.get(NAMES)
                try:
                    journal.save(NAMES, seen.revision, annotation(question=f"{name} {k}"))
                    break
                except ConflictError:
                    continue

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, "xyz"))
    questions = [json.loads(line)["question"] for line in (tmp_path / "j.jsonl").read_text().splitlines()]
    assert sorted(questions) == sorted(f"{name} {k}" for name in "xyz" for k in range(30))


def test_a_changed_byte_of_a_line_is_noticed(tmp_path):
    file = tmp_path / "j.jsonl"
    Journal(file).save(NAMES, 0, annotation())
    file.write_bytes(file.read_bytes().replace(b"open wings", b"opem wings"))
    with pytest.raises(ValueError, match="line 1: .*damaged"):
        Journal(file).get(NAMES)


@pytest.mark.parametrize("text", ["half \ud83e", "\udd8b half", "a\x00b", "\x1b[31mred", "whole \ud83e\udd8b"])
def test_half_a_surrogate_blocks_no_export(tmp_path, text):
    """Browsers send half a surrogate when an emoji is cut, and older releases kept it."""
    folder = write_folder(tmp_path / "pairs", 1)
    session = Session(folder)
    session.save(0, {"revision": 0, "annotation": COMPLETE | {"question": text}})
    export_annotations(folder, tmp_path / "out")
    question = read_mmvp(tmp_path / "out/MMVP")[0].question
    assert question.isprintable() and ("half" not in text or "\ufffd" in question) and ("whole" not in text or "\U0001f98b" in question)
    old = {
        "image_i": session.pairs.table.pairs[0].names[0],
        "image_j": session.pairs.table.pairs[0].names[1],
        "saved": "",
        **COMPLETE,
        "question": text,
    }
    (folder / JOURNAL).write_text(json.dumps(old) + "\n")
    assert export_annotations(folder, tmp_path / "old").by_pattern == {"State": 1}


# --- pairs that change
def remine(folder, rows):
    """Write pairs.csv anew from pairs of files."""
    with (folder / "pairs.csv").open("w", newline="") as file:
        table = [(0, 1, first, second, 0.9, 0.1, 0.8) for first, second in rows]
        csv.writer(file).writerows([("i", "j", "image_i", "image_j", "clip_similarity", "dino_similarity", "gap"), *table])


def test_annotations_follow_the_content_of_a_pair(tmp_path):
    folder = write_folder(tmp_path / "pairs", 3)
    session = Session(folder)
    session.save(1, {"revision": 0, "annotation": COMPLETE})
    session.save(2, {"revision": 0, "annotation": COMPLETE | {"question": "Third?"}})
    (tmp_path / "moved").mkdir()
    moved = {name: (folder / name).rename(tmp_path / "moved" / f"new-{name}") for name in ("1-left.jpg", "1-right.png")}
    remine(folder, [(moved["1-right.png"], moved["1-left.jpg"]), (folder / "0-left.jpg", folder / "0-right.png")])
    again = Session(folder)  # moved, renamed, sides swapped, in another order, the third pair gone
    assert again.progress() == {"pairs": 2, "done": 1, "skipped": 0, "flagged": 0, "first": 1}
    shown = again.show(0)
    assert (shown["revision"], shown["state"]) == (1, "done")
    assert shown["annotation"]["statements"] == ("closed wings", "open wings") and shown["annotation"]["right"] == ("b", "a")
    assert [Path(names[0]).name for names in again.pairs.elsewhere()] == ["2-left.jpg"]
    result = export(folder, tmp_path / "out")
    assert result.exit_code == 0 and "1 complete annotations are of pairs that the table does not hold" in result.output
    assert "2-left.jpg" in result.output and [item.statement for item in read_mmvp_vlm(tmp_path / "out/MMVP_VLM")] == [
        "closed wings",
        "open wings",
    ]
    assert again.save(0, {"revision": 1, "annotation": EMPTY})["revision"] == 2


def test_another_photo_under_the_same_name_is_another_pair(tmp_path):
    folder = write_folder(tmp_path / "pairs", 1)
    Session(folder).save(0, {"revision": 0, "annotation": COMPLETE})
    Image.new("RGB", (16, 16)).save(folder / "0-right.png")
    again = Session(folder)
    assert again.progress()["done"] == 0 and again.show(0)["revision"] == 0 and len(again.pairs.elsewhere()) == 1


def test_annotations_of_earlier_releases_are_found_by_name_and_go_on(tmp_path):
    folder = write_folder(tmp_path / "pairs", 1)
    first, second = PairTable(folder).pairs[0].names
    (folder / JOURNAL).write_text(json.dumps({"image_i": first, "image_j": second, "saved": "", **COMPLETE}) + "\n")
    remine(folder, [(second, first)])
    session = Session(folder)
    assert session.progress()["done"] == 1 and session.show(0)["annotation"]["right"] == ("b", "a")
    assert session.save(0, {"revision": 1, "annotation": COMPLETE | {"question": "New?"}})["revision"] == 2
    remine(folder, [(first, second)])
    assert Session(folder).show(0)["annotation"]["question"] == "New?"


def test_a_server_sees_what_another_saves_without_reading_all_again(tmp_path):
    folder = write_folder(tmp_path / "pairs", 3)
    mine, theirs = Session(folder), Session(folder)
    theirs.save(0, {"revision": 0, "annotation": COMPLETE})
    theirs.save(1, {"revision": 0, "annotation": COMPLETE | {"mark": "flagged"}})
    assert mine.progress() == {"pairs": 3, "done": 1, "skipped": 0, "flagged": 1, "first": 2}
    theirs.save(0, {"revision": 1, "annotation": EMPTY})
    assert mine.progress() == {"pairs": 3, "done": 0, "skipped": 0, "flagged": 1, "first": 0} and mine.show(0)["next_todo"] == 2


def test_only_ticked_pairs_are_shown_with_their_tags(tmp_path):
    folder = write_folder(tmp_path / "pairs", 3)
    names = [pair.names for pair in PairTable(folder).pairs]
    rows = [{"image_i": names[n][0], "image_j": names[n][1], "pattern": pattern} for n, pattern in ((2, "Text"), (0, None))]
    (tmp_path / "ticked.json").write_text(json.dumps(rows))
    session = Session(folder, tmp_path / "ticked.json")
    assert len(session.pairs) == 2 and [session.show(n)["annotation"]["pattern"] for n in (0, 1)] == [None, "Text"]
    session.save(1, {"revision": 0, "annotation": COMPLETE})
    assert session.show(1)["annotation"]["pattern"] == "State" and Session(folder).progress()["done"] == 1
    for wrong in ("[]", "{", '[{"image_i": "a"}]', '[{"image_i": "a", "image_j": "b", "pattern": null}]'):
        (tmp_path / "ticked.json").write_text(wrong)
        with pytest.raises(ValueError, match=r"ticked\.json"):
            Session(folder, tmp_path / "ticked.json")


# --- the table
def test_parquet_is_read_before_csv_and_relative_names_are_found(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "pairs", 2)
    assert [pair.clip_similarity for pair in PairTable(folder).pairs] == [0.99, 0.98]
    columns = {"image_i": ["0-left.jpg"], "image_j": ["0-right.png"], "clip_similarity": pa.array([0.5], pa.float32()),
               "dino_similarity": [0.1], "gap": [0.4]}  # fmt: skip
    pq.write_table(pa.table(columns), folder / "pairs.parquet")
    table = PairTable(folder)
    assert len(table) == 1 and table.image(0, 1) == folder / "0-right.png"  # of the folder
    monkeypatch.chdir(tmp_path)
    columns["image_i"] = ["pairs/0-left.jpg"]
    pq.write_table(pa.table(columns), folder / "pairs.parquet")
    assert PairTable(folder).image(0, 0) == Path("pairs/0-left.jpg")  # of the working directory


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"pairs\.csv"),
        ("i,j\n1,2\n", "image_i, image_j.* i, j"),
        ("image_i,image_j,clip_similarity,dino_similarity,gap\n", r"pairs\.csv"),
        ("image_i,image_j,clip_similarity,dino_similarity,gap\na.jpg,b.jpg,0.9,0.1,0.8\n", r"a\.jpg"),
        ("image_i,image_j,clip_similarity,dino_similarity,gap\n0-left.jpg,,0.9,0.1,0.8\n", "row 1"),
        ("image_i,image_j,clip_similarity,dino_similarity,gap\n0-left.jpg,b,0.9,nan,0.8\n", "row 1"),
        ("image_i,image_j,clip_similarity,dino_similarity,gap\n0-left.jpg,b,x,0.1,0.8\n", "row 1"),
        ("image_i,image_j,clip_similarity,dino_similarity,gap\n0-left.jpg,b,1,0,1\n0-left.jpg,b,1,0,1\n", r"pairs\.csv"),
    ],
)
def test_a_table_that_is_none_is_refused(tmp_path, content, message):
    (write_folder(tmp_path, 1) / "pairs.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        PairTable(tmp_path)


def test_a_table_of_another_format_is_refused(tmp_path):
    folder = write_folder(tmp_path, 1)
    pairs = BlindPairs(np.array([0]), np.array([1]), np.array([0.99]), np.array([0.25]), 2, 1)
    pairs.to_parquet(folder / "pairs.parquet", [str(folder / name) for name in ("0-left.jpg", "0-right.png")])
    assert PairTable(folder).pairs[0].dino_similarity == 0.25
    table = pq.read_table(folder / "pairs.parquet")
    assert table.schema.metadata[b"blind_pairs_format"] == b"1"
    pq.write_table(table.replace_schema_metadata(dict.fromkeys(table.schema.metadata, b"2")), folder / "pairs.parquet")
    with pytest.raises(ValueError, match="format 2"):
        PairTable(folder)


def test_a_folder_without_a_table_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        PairTable(tmp_path / "nowhere")


def test_names_that_look_like_numbers_stay_names(tmp_path):
    folder = write_folder(tmp_path, 1)
    (folder / "0-left.jpg").rename(folder / "007")
    (folder / "pairs.csv").write_text("image_i,image_j,clip_similarity,dino_similarity,gap\n007,1e3,1,0,1\n")
    assert PairTable(folder).pairs[0].names == ("007", "1e3")


# --- the session
def test_where_a_session_goes_on(tmp_path):
    folder = write_folder(tmp_path, 4)
    session = Session(folder)
    assert session.progress() == {"pairs": 4, "done": 0, "skipped": 0, "flagged": 0, "first": 0}
    for number, said in (
        (0, COMPLETE),
        (1, EMPTY | {"mark": "skipped"}),
        (2, COMPLETE | {"question": ""}),
        (3, COMPLETE | {"mark": "flagged"}),
    ):
        session.save(number, {"revision": 0, "annotation": said})
    assert (folder / JOURNAL).is_file()
    again = Session(folder)
    assert again.progress() == {"pairs": 4, "done": 1, "skipped": 1, "flagged": 1, "first": 2}
    assert again.show(3)["next_todo"] == 2 and again.show(2)["next_todo"] is None
    assert again.show(2)["missing"] == ["question"]


# --- export
def export(folder, out):
    return mof("blind-pairs", "export", folder, "-o", out)


def test_what_was_annotated_is_what_the_probes_read(tmp_path):
    folder = write_folder(tmp_path / "pairs", 5)
    session = Session(folder)
    texts = {"statements": ['a "sign", open', "ein geöffnetes Schild"], "question": "Open,\nor closed?", "options": ["Yes, very", "No"]}
    saved = {
        0: COMPLETE | {"pattern": "Text"} | texts,
        1: COMPLETE | {"pattern": "Orientation", "right": ["b", "a"]},
        2: COMPLETE | {"question": ""},
        3: COMPLETE | {"mark": "flagged"},
    }
    for number, annotation in saved.items():
        session.save(number, {"revision": 0, "annotation": annotation})
    result = export(folder, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert (
        "pair 3: lacks question" in result.output and "pair 4: flagged" in result.output and "1 pairs were not annotated" in result.output
    )

    questions = read_mmvp(tmp_path / "out/MMVP")
    assert [question.id for question in questions] == [1, 2, 3, 4] and [question.pattern for question in questions] == ["Text"] * 2 + [
        "Orientation"
    ] * 2
    assert {(question.question, question.options_text) for question in questions[:2]} == {("Open, or closed?", "(a) Yes, very (b) No")}
    assert [question.labels for question in questions] == [{"released": right, "corrected": right} for right in "abba"]
    items = read_mmvp_vlm(tmp_path / "out/MMVP_VLM")
    assert [(item.id, item.type) for item in items] == [
        (1, "Orientation"),
        (2, "Orientation"),
        (3, "Text"),
        (4, "Text"),
    ]  # the official order
    assert [item.statement for item in items[2:]] == texts["statements"]
    assert items[0].image == tmp_path / "out/MMVP_VLM/MLLM_VLM Images/Orientation/1.jpg"

    for ours, pair in ((questions[:2], 0), (questions[2:], 1), (items[:2], 1), (items[2:], 0)):
        assert ours[0].image.read_bytes() == (folder / f"{pair}-left.jpg").read_bytes()  # a JPEG is not encoded again
        png, jpeg = (np.asarray(Image.open(file), dtype=int) for file in (folder / f"{pair}-right.png", ours[1].image))
        assert Image.open(ours[1].image).format == "JPEG" and np.abs(png - jpeg).max() <= 4
    with (tmp_path / "out/MMVP/Questions.csv").open() as file:
        assert next(csv.reader(file))[:4] == ["lndex", "Question", "Options", "Correct Answer"]
    with (tmp_path / "out/MMVP_VLM/Questions.csv").open() as file:
        assert next(csv.reader(file)) == ["Question ID", "Type", "Statement"]


def test_texts_that_spreadsheets_take_for_formulas_are_quoted_in_files_and_read_back(tmp_path):
    folder = write_folder(tmp_path / "pairs", 1)
    texts = {"statements": ['=HYPERLINK("http://x")', "+1 apple"], "question": "@SUM or not?", "options": ["'-1", "2"]}
    Session(folder).save(0, {"revision": 0, "annotation": COMPLETE | texts})
    export_annotations(folder, tmp_path / "out")
    for file in (tmp_path / "out").rglob("Questions.csv"):
        with file.open() as stream:
            assert not [cell for row in csv.reader(stream) for cell in row if cell.startswith(("=", "+", "-", "@"))]
    assert read_mmvp(tmp_path / "out/MMVP")[0].question == "@SUM or not?"
    assert [item.statement for item in read_mmvp_vlm(tmp_path / "out/MMVP_VLM")] == texts["statements"]


@given(st.text(alphabet="'=+-@\t\ra1", max_size=6))
def test_cells_are_read_back(text):
    cell = csv_cell(text)
    assert plain_cell(cell) == text and not cell.startswith(("=", "+", "-", "@", "\t", "\r"))


def test_names_of_images_are_no_formulas_in_the_table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["=cmd.png", "-b.png"]
    for name in names:
        Image.new("RGB", (8, 8)).save(name)
    pair = BlindPairs(np.array([0]), np.array([1]), np.array([0.9], np.float32), np.array([0.1], np.float32), 2, 1)
    pair.to_csv("pairs.csv", names)
    assert Path("pairs.csv").read_text().splitlines()[1].startswith("0,1,'=cmd.png,'-b.png,")
    assert PairTable(tmp_path).pairs[0].names == ("=cmd.png", "-b.png")


def test_an_export_is_refused_where_there_is_nothing_or_something(tmp_path):
    folder = write_folder(tmp_path / "pairs", 1)
    with pytest.raises(ValueError, match="pairs: .*0"):
        export_annotations(folder, tmp_path / "out")
    Session(folder).save(0, {"revision": 0, "annotation": COMPLETE})
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("x")
    refused = export(folder, tmp_path / "out")
    assert refused.exit_code == 2 and "not empty" in refused.output and (tmp_path / "out/mine.txt").exists()


def test_a_pair_whose_image_is_gone_is_left_out_and_named(tmp_path):
    folder = write_folder(tmp_path / "pairs", 2)
    for number in (0, 1):
        Session(folder).save(number, {"revision": 0, "annotation": COMPLETE})
    (folder / "1-right.png").write_bytes(b"no image")
    done = export_annotations(folder, tmp_path / "out")
    assert done.by_pattern == {"State": 1} and done.untouched == 0
    assert [(number, "1-right.png" in reason) for number, reason in done.left_out] == [(2, True)]


@settings(max_examples=10, deadline=None)
@given(st.lists(st.sampled_from(list(PATTERNS)), min_size=1, max_size=12), st.randoms())
def test_any_mix_of_patterns_is_read_back(tmp_path_factory, patterns, random):
    folder = write_folder(tmp_path_factory.mktemp("mix") / "pairs", len(patterns))
    session = Session(folder)
    rights = [random.choice((["a", "b"], ["b", "a"])) for _ in patterns]
    for number, (pattern, right) in enumerate(zip(patterns, rights, strict=True)):
        statements = [f"left of {number}", f"right of {number}"]
        session.save(number, {"revision": 0, "annotation": COMPLETE | {"pattern": pattern, "right": right, "statements": statements}})
    out = folder.parent / "out"
    export_annotations(folder, out)
    assert [question.labels["corrected"] for question in read_mmvp(out / "MMVP")] == [letter for right in rights for letter in right]
    expected = [
        (pattern, f"{side} of {n}") for t in PATTERNS for n, pattern in enumerate(patterns) if pattern == t for side in ("left", "right")
    ]
    assert [(item.type, item.statement) for item in read_mmvp_vlm(out / "MMVP_VLM")] == expected


def test_the_probe_runs_on_an_export(tmp_path):
    folder = write_folder(tmp_path / "pairs", 2)
    for number in (0, 1):
        Session(folder).save(number, {"revision": 0, "annotation": COMPLETE})
    export_annotations(folder, tmp_path / "out")
    assert list(probe_mmvp_vlm(build_encoder("mini-clip"), tmp_path / "out/MMVP_VLM").by_pattern) == ["State"]
