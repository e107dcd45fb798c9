"""`mof eval report` and `mof eval correlation`: what stands in the page is what the answers say."""

from __future__ import annotations

import csv
import json
import re
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.commands import mof
from support.stand_in import question_of, serve

from encoders.whole_files import read_sealed
from mof.evals.intervals import Difference
from mof.evals.mmvp_vlm import MMVPVLMResult, PairResult
from mof.evals.outcomes import MEASURES
from mof.evals.patterns import PATTERNS
from mof.evals.report import Cell, Report
from mof.evals.report_page import write_html

PAIRS = 27


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "300")


run = partial(mof, "eval")


def done(*arguments: str | Path) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


class Page(HTMLParser):
    """Tables as lists of rows of words, and what the page would load."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.loads: list[str] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [f"{name}={value}" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag != "meta":
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ("path", "use", "g")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += f" {data.strip()}" if data.strip() else ""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "MMVP"
    folder.mkdir()
    codes = [code for _, code in PATTERNS.values()]
    with (folder / "Questions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["lndex", "Question", "Options", "Correct Answer", "Category"])
        for i in range(1, 2 * PAIRS + 1):
            writer.writerow([i, f"Number {i}?", "(a) Open (b) Closed", "(a)" if i % 2 else "(b)", codes[(i - 1) // 6]])
    return folder


def mmvp(data: Path, out: Path, right: list[int], *options: str) -> Path:
    """A run whose pairs of these numbers (from 0) are right; of the others, the first question is."""
    answers = {str(i): "(a)" if i % 2 or (i - 1) // 2 not in right else "(b)" for i in range(1, 2 * PAIRS + 1)}
    out.mkdir(parents=True)
    (out / "answers.json").write_text(json.dumps(answers))
    done("mmvp", "--data", data, "--answers", out / "answers.json", "--output", out / "run", *options)
    return out / "run"


def probe(file: Path, rights: list[int]) -> Path:
    """Write the result of a CLIP that has `rights` of each pattern's 15 pairs right, and return its file."""
    pairs = []
    for pattern, right in zip(PATTERNS, rights, strict=True):
        for i in range(15):
            first = 2 * len(pairs) + 1
            similarities = ((0.3, 0.2), (0.2, 0.3)) if i < right else ((0.2, 0.3), (0.2, 0.3))
            pairs.append(PairResult(pattern, (first, first + 1), ("x", "y"), 0.96, similarities))
    MMVPVLMResult("my <clip>", pairs, "MMVP_VLM").to_json(file)
    return file


def test_the_page(tmp_path: Path, data: Path) -> None:
    weak = mmvp(data, tmp_path / "weak", list(range(9)), "--name", "weak & <old>")
    seeds = [mmvp(data, tmp_path / f"s{seed}", list(range(15 + 3 * seed)), "--name", "strong", "--seed", str(seed)) for seed in (0, 1, 2)]
    rights = [14, 12, 10, 8, 6, 4, 3, 2, 0]
    page_file = tmp_path / "out" / "all.html"
    shown = done("report", weak, *seeds, probe(tmp_path / "clip.json", rights), "-o", page_file)
    page = Page(page_file)
    assert all(link.startswith("xlink:href=#") for link in page.loads) and "http" not in page_file.read_text()  # self-contained
    assert f"<title>strong, Color: {100 * 2 / 3:.1f} %</title>" in page_file.read_text() and "chance 25" in " ".join(page.words)
    main, differences, correlations, notes = page.tables[:4]
    columns = main[1]
    cells = {row[0].strip(): dict(zip(columns, row, strict=True)) for row in main[2:]}
    assert list(cells) == ["weak & <old>", "strong", "my <clip>"]
    pairs, questions = " right pairs, % higher is better", " right questions, % higher is better"
    assert columns.count(pairs) == 2  # of MMVP-VLM and of MMVP
    weak_cells, strong, clip = main[2:]
    assert clip[1].split()[0] == f"{100 * sum(rights) / 135:.1f}" and clip[2].split()[0] == "96.0" and set(clip[3:]) == {" \u2013"}
    assert re.fullmatch(r" 33\.3 \[1[4-9]\.\d, 5[0-2]\.\d\]", weak_cells[3]) and columns[3] == pairs
    assert weak_cells[4].split()[0] == f"{100 * (27 + 9) / 54:.1f}" and columns[4] == questions
    assert strong[3].split()[0] == f"{100 * 18 / 27:.1f}" and f"±{100 * 3 / 27:.1f}, 3 seeds" in strong[3]
    assert weak_cells[5].split()[0] == "33.3"  # no known wrong label among these

    (row,) = [row for row in differences[1:] if row[0] == " MMVP, right pairs, %"]
    assert row[1:4] == [" weak & <old>", " strong", f" {100 * (9 - 18) / 27:.1f}"] and row[5] == " strong is better"

    first = next(row for row in correlations[1:] if "weak" in row[1])
    by_pattern = [1, 1, 1, 0, 0, 0, 0, 0, 0]
    mean, spread = sum(rights) / 9, (sum((r - sum(rights) / 9) ** 2 for r in rights)) ** 0.5
    r = sum((x - mean) * (y - 1 / 3) for x, y in zip(rights, by_pattern, strict=True)) / spread / 2**0.5
    assert first[0] == " my <clip> (encoder)" and first[2] == f" {r:.2f}"
    assert [row[2] for row in correlations if "(published)" in row[1]] == [" 0.87", " 0.71", " 0.79", " 0.72", " 0.31"]

    by_run = {(row[0].strip(), row[1].strip()): row[2:] for row in notes[1:]}
    assert by_run["strong", "mmvp"][0] == " 27 pairs, seeds 0, 1, 2"
    assert (
        "how they were made is not known" in by_run["strong", "mmvp"][1]
        and "54 questions of another file than MMVP's" in by_run["strong", "mmvp"][1]
    )
    assert by_run["my <clip>", "mmvp-vlm"] == [" 135 pairs of MMVP_VLM", " none known"]
    published = {row[0].strip(): row[1:] for row in page.tables[4]}
    assert published["SigLIP SO400M 224"] == [" 37.8", " \u2013"] and published["LLaVA-1.5 + I-MoF, 336 px"] == [" \u2013", " 31.3"]
    assert "LLaVA-1.5-7B + VIG" not in published  # neither POPE nor CHAIR was measured
    words = " ".join(page.words)
    assert "27 pairs make ±16 points at 25 % and ±19 at 50 %" in words and "GPT-4V" in words

    assert "27 pairs make ±16 points" in shown and "strong" in shown
    text = (tmp_path / "out" / "all.txt").read_text()
    assert all(figure in text for figure in ("33.3", "66.7 ±11.1", "my <clip>"))
    with (tmp_path / "out" / "all.csv").open() as file:
        table = {row["model"]: row for row in csv.DictReader(file)}
    assert float(table["strong"]["MMVP right pairs, %"]) == pytest.approx(200 / 3, abs=1e-4)
    assert float(table["strong"]["MMVP right pairs, % spread"]) == pytest.approx(100 / 9, abs=1e-4)
    assert table["strong"]["MMVP right pairs, % runs"] == "3" and table["my <clip>"]["MMVP right pairs, %"] == ""
    low, high = (float(table["weak & <old>"][f"MMVP right pairs, % {end}"]) for end in ("low", "high"))
    assert f"[{low:.1f}, {high:.1f}]" in weak_cells[3]


def test_differences_stand_in_the_unit_of_their_measure(tmp_path: Path) -> None:
    between = Difference(0.4, (-0.1, 0.9))
    columns = {key: MEASURES[key] for key in ("caption vig", "mmvp pairs")}
    differences = [(key, "a", "b", between) for key in columns]
    write_html(Report([], columns, {}, differences, [], {}, {}, []), tmp_path / "r.html")
    shown = [row[3:5] for row in Page(tmp_path / "r.html").tables[1][1:]]
    assert shown == [[" +0.4", " [-0.1, +0.9]"], [" +40.0", " [-10.0, +90.0]"]]  # nats; points


def test_150_pairs_make_7_points(tmp_path: Path) -> None:
    folder = tmp_path / "whole"
    folder.mkdir()
    rows = [f"{i},Q{i}?,(a) x (b) y,{'(a)' if i % 2 else '(b)'}" for i in range(1, 301)]
    (folder / "Questions.csv").write_text("\n".join(["lndex,Question,Options,Correct Answer", *rows]))
    (tmp_path / "a.json").write_text(json.dumps({str(i): "(a)" for i in range(1, 301)}))
    done("mmvp", "--data", folder, "--answers", tmp_path / "a.json", "--output", tmp_path / "run")
    shown = done("report", tmp_path / "run", "-o", tmp_path / "r.html")
    assert "150 pairs make ±7 points at 25 % and ±8 at 50 %" in shown
    page = Page(tmp_path / "r.html")
    assert page.tables[0][2][1] == " 0.0 [0.0, 2.5]"  # Wilson's; the pairs' patterns are unknown, so there is no correlation
    assert not any("Pearson" in words for words in page.words)
    refused = run("correlation", tmp_path / "run")
    assert refused.exit_code == 2 and "--patterns" in refused.stderr


def test_pope_and_chair(tmp_path: Path) -> None:
    """Photos are the units of POPE; strategies count equally."""
    (tmp_path / "pope").mkdir()
    (tmp_path / "answers").mkdir()
    said = {"random": [True, True, False, False, True, False], "popular": [True, True, True, True, False, False]}
    for strategy, answers in said.items():
        lines = [
            {"question_id": i, "image": f"{i // 2}.jpg", "text": f"Is there a {strategy} {i}?", "label": "no" if i % 2 else "yes"} for i in range(6)
        ]  # fmt: skip
        (tmp_path / "pope" / f"coco_pope_{strategy}.json").write_text("\n".join(map(json.dumps, lines)))
        replies = [{"question_id": i, "text": "yes" if yes else "no"} for i, yes in enumerate(answers)]
        (tmp_path / "answers" / f"{strategy}.jsonl").write_text("\n".join(map(json.dumps, replies)))
    out = tmp_path / "run"
    done("pope", "--data", tmp_path / "pope", "--answers", tmp_path / "answers", "--output", out, "--name", "m")
    result = json.loads((out / "result.json").read_text())

    (tmp_path / "synonyms.txt").write_text("cat, kitten\ndog\nbus\n")
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(4)]
    boxes = [{"image_id": i, "category_id": 1} for i in range(4)]
    (tmp_path / "instances.json").write_text(json.dumps({"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cat"}]}))
    (tmp_path / "captions.json").write_text(json.dumps({"annotations": [{"image_id": 0, "caption": "a dog"}]}))
    captions = ["A cat and a dog.", "A cat, a dog.", "A kitten.", "A bus."]
    (tmp_path / "made.json").write_text(json.dumps([{"image_id": i, "caption": text} for i, text in enumerate(captions)]))
    files = ("--instances", tmp_path / "instances.json", "--captions", tmp_path / "captions.json", "--synonyms", tmp_path / "synonyms.txt")
    done("chair", *files, "--answers", tmp_path / "made.json", "--output", tmp_path / "chair", "--name", "m")

    done("report", out, tmp_path / "chair", "-o", tmp_path / "r.html")
    with (tmp_path / "r.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["POPE accuracy, %"]) == pytest.approx(100 * result["accuracy"], abs=1e-4) == pytest.approx(100 * 7 / 12)
    # random: 2 hits, 1 false, 1 missed; popular: 2 hits, 2 false, 1 missed
    assert float(row["POPE F1, %"]) == pytest.approx(100 * (4 / 6 + 4 / 7) / 2, abs=1e-4) == pytest.approx(100 * result["f1"], abs=1e-4)
    assert float(row["POPE said yes, %"]) == pytest.approx(100 * 7 / 12, abs=1e-4)
    assert float(row["POPE F1, % low"]) < 60 < float(row["POPE F1, % high"])
    assert float(row["CHAIR CHAIR i, %"]) == pytest.approx(100 * 2 / 6, abs=1e-4) and float(row["CHAIR CHAIR s, %"]) == 50
    assert float(row["CHAIR words"]) == 13 / 4


def test_the_table_for_markdown_and_latex(tmp_path: Path, data: Path) -> None:
    runs = [mmvp(data, tmp_path / "a", list(range(9)), "--name", "a_b & 100 % |x|"), mmvp(data, tmp_path / "c", [1], "--name", "=cmd()")]
    shown = done("report", *runs, "-o", tmp_path / "r.html")
    assert "r.csv, r.md, r.tex and r.txt" in shown
    markdown = (tmp_path / "r.md").read_text().splitlines()
    assert [len(re.findall(r"(?<!\\)\|", line)) for line in markdown] == [len(re.findall(r"(?<!\\)\|", markdown[0]))] * 4
    assert re.match(r"\| a\\_b & 100 % \\\|x\\\| \| 33\.3 \[1\d\.\d, 5\d\.\d\] \|", markdown[2])
    latex = (tmp_path / "r.tex").read_text()
    assert r"a\_b \& 100 \% |x| & 33.3 {\scriptsize [1" in latex and latex.count(r"\\") == 3 and r"right pairs, \%" in latex
    with (tmp_path / "r.csv").open() as file:
        assert [row["model"] for row in csv.DictReader(file)] == ["a_b & 100 % |x|", "'=cmd()"]  # no formula
    assert max(map(len, (tmp_path / "r.txt").read_text().splitlines())) <= 120


def test_results_stand_in_the_card_of_the_model(tmp_path: Path, data: Path) -> None:
    one, other = (mmvp(data, tmp_path / name, list(range(9)), "--name", name) for name in ("one", "other"))
    model = tmp_path / "model"
    options = ("-o", tmp_path / "r.html", "--card", model)
    assert "no config.json" in str(run("report", one, *options).output)
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "llava"}')
    (model / "README.md").write_text("mine\n")
    assert "one, other" in str(run("report", one, other, *options).output)
    for _ in range(2):  # the second report replaces the first
        done("report", one, *options)
    card = (model / "README.md").read_text()
    assert (
        card.startswith("mine\n")
        and card.count("## Results") == 1
        and "| MMVP, right pairs, % | 33.3 " in card
        and "| data of mmvp | 27 pairs |" in card
    )


@pytest.mark.slow
def test_wrong_pairs_are_shown_with_both_answers(tmp_path: Path, data: Path) -> None:
    (data / "MMVP Images").mkdir()
    for i in range(1, 2 * PAIRS + 1):
        Image.new("RGB", (300, 200), (4 * i, 0, 0)).save(data / "MMVP Images" / f"{i}.jpg")
    half = "\ud83d"  # of a character that a server cut
    with serve(lambda body: f"(a) <for number {re.search(r'Number ([0-9]+)', question_of(body))[1]}> {half}") as server:
        done("mmvp", "--data", data, "--endpoint", server.url, "--model-name", "m", "--output", tmp_path / "run")
    done("report", tmp_path / "run", "-o", tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert text.count("&gt; \ufffd") == 24 and text.count('src="data:image/jpeg;base64,') == 2 * 12 and "27 wrong of 27 pairs" in text
    shown = [int(number) for number in re.findall(r"Answer: \(a\) &lt;for number (\d+)&gt;", text)]
    assert shown[:4] == [1, 2, 7, 8] and len(shown) == 24  # a pair of each pattern first
    (data / "MMVP Images" / "1.jpg").unlink()
    done("report", tmp_path / "run", "-o", tmp_path / "r.html")
    assert (tmp_path / "r.html").read_text().count("no photo") == 1


@pytest.mark.slow
@pytest.mark.browser
def test_no_table_is_cut_at_1280_pixels(browser: Any, tmp_path: Path) -> None:
    cells = {key: Cell(100.0, (91.1, 100.0), 3, 11.1) for key in MEASURES}
    rows = dict.fromkeys(["llava-1.5-13b-interleaved-vig-selected-70", "runs/a/folder/with/a/long/name/checkpoint-1200"], cells)
    write_html(Report([], dict(MEASURES), rows, [], [], {}, {}, []), tmp_path / "r.html")
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.goto((tmp_path / "r.html").as_uri())
    cut = page.evaluate(
        "[...document.querySelectorAll('table.main')].map((table) => table.parentNode.scrollWidth - table.parentNode.clientWidth)"
    )
    page.close()
    assert len(cut) > 1 and max(cut) <= 0


def test_other_questions_are_told_and_not_compared(tmp_path: Path, data: Path) -> None:
    first = mmvp(data, tmp_path / "a", [1, 2], "--name", "a")
    questions = data / "Questions.csv"
    questions.write_text(questions.read_text().replace("Number 7?", "Number seven?"))
    second = mmvp(data, tmp_path / "b", [1, 2], "--name", "b")
    done("report", first, second, "-o", tmp_path / "r.html")
    page = Page(tmp_path / "r.html")
    assert not any("Differences" in words for words in page.words)
    assert "other questions, photos or labels than those of a: no difference is computed" in page.tables[2][2][3]


def test_correlation_command(tmp_path: Path, data: Path) -> None:
    runs = [mmvp(data, tmp_path / "a", [1, 2, 6], "--name", "a"), mmvp(data, tmp_path / "none", [], "--name", "none")]
    shown = done("correlation", *runs, "--plot", tmp_path / "plots" / "lines.svg")
    assert "OpenAI ViT-L/14 336 (published)" in shown and "GPT-4V (published)" in shown
    assert "none: undefined, since the model scored the same on every pattern" in shown and "nan" not in shown.lower()
    drawn = (tmp_path / "plots" / "lines.svg").read_text()
    assert drawn.lstrip().startswith("<?xml") and "Camera" not in shown
    done("report", *runs, "-o", tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert "undefined: the model scored the same on every pattern" in text and "nan" not in re.sub(r"<[^>]*>", "", text).lower().split()


def test_what_is_no_run_is_refused(tmp_path: Path, data: Path) -> None:
    good = mmvp(data, tmp_path / "good", [1])
    twin = mmvp(data, tmp_path / "twin", [2], "--name", "answers")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.json").write_text('{"accuracy": 1}')
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "torn.json").write_text('{"benchmark": "mm')
    cases = [
        ((tmp_path / "empty",), "expected a folder that `mof eval` wrote to its end"),
        ((tmp_path / "nothing",), "nothing: cannot be read"),
        ((tmp_path / "other.json",), "other.json is no result of"),
        ((tmp_path / "list.json",), "list.json is no result of"),
        ((tmp_path / "torn.json",), "torn.json is no result of"),
        ((good, twin), "are both of answers on mmvp with seed None: tell them apart with --name or --seed"),
        ((good, "-o", tmp_path / "r.pdf"), "expected a name that ends in .html"),
    ]  # fmt: skip
    for arguments, words in cases:
        refused = run("report", *arguments)
        assert refused.exit_code == 2 and words in refused.stderr, refused.output
    assert not (tmp_path / "r.html").exists()
    result = read_sealed(good / "result.json")
    del result["files"]  # as earlier releases wrote it, without digests
    assert result["format"] == 1
    (good / "result.json").write_text(json.dumps(result | {"format": 2}))
    assert "format 2" in run("report", good).stderr
    (good / "result.json").write_text(json.dumps({key: value for key, value in result.items() if key != "format"}))  # of an old release
    done("report", good, "-o", tmp_path / "old.html")
    answers = good / "answers.jsonl"
    rows = answers.read_text().splitlines()
    answers.write_text("\n".join(rows[:-1]))
    assert "is no result of" in run("report", good).stderr  # an odd number of questions
    answers.write_text("\n".join(rows[:-2]))
    assert "the files are of different runs" in run("report", good).stderr
    answers.write_text("")
    assert "no answers" in run("report", good).stderr
