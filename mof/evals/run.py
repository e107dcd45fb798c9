"""One evaluation from its questions to its folder: `settings.json`, `cache.jsonl`, `answers.jsonl` and `result.json`.

A run that was cut off goes on where it stopped, and a second one asks nothing: answers are kept in the cache.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mof.evals.answerers import AnswersFile
from mof.evals.answering import Answer, AnswerCache, Answerer, Prompt, Usage, answer_all
from mof.evals.chair import CocoWords, score_chair
from mof.evals.judge import agreement, judge_prompt, verdict
from mof.evals.mmvp import FIRST_QUESTION, LABELS, MATCHES, Question, score
from mof.evals.pope import STRATEGIES, PopeQuestion, says_yes, score_pope

Result = dict[str, Any]
MMVP_QUESTIONS, POPE_QUESTIONS = 300, 3000  # of the whole benchmarks; POPE's per strategy


@dataclass(frozen=True)
class Run:
    """Where a run is written and how its questions are asked."""

    folder: Path
    answerer: Answerer
    cache: Path | None = None
    """Another place for the cache, so that several runs share one."""
    prices: tuple[float, float] = (0.0, 0.0)
    """Per million tokens, read and written; of the judge, too."""
    progress: bool = False
    name: str | None = None
    """What tables call the model; by default the answerer's name."""
    seed: int | None = None
    """With which the model was trained: runs of one name and several seeds are joined in a report."""

    @property
    def model(self) -> Result:
        """Whose result it is."""
        return {"model": self.name or self.answerer.name, "seed": self.seed}

    def ask(self, prompts: Sequence[Prompt], answerer: Answerer | None = None) -> tuple[list[Answer], Usage]:
        asked = answerer or self.answerer
        cache = None if isinstance(asked, AnswersFile) else AnswerCache(self.cache or self.folder / "cache.jsonl")
        return answer_all(asked, prompts, cache, progress=self.progress)

    def begin(self, benchmark: str, **settings: Any) -> None:
        """Write settings.json."""
        versions = {package: _version(package) for package in ("mof-vig", "torch", "transformers")}
        document = {"benchmark": benchmark, "answerer": self.answerer.settings, **settings, "versions": versions}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / "settings.json", json.dumps(document, indent=1))

    def costs(self, usage: Usage) -> Result:
        return dataclasses.asdict(usage) | (usage.costs(*self.prices) if any(self.prices) else {})

    def end(self, rows: Sequence[Mapping[str, Any]], result: Result, usage: Usage) -> Result:
        """Write answers.jsonl and result.json; the result with what it cost."""
        result["usage"] = self.costs(usage)
        write_whole(self.folder / "answers.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        write_whole(self.folder / "result.json", json.dumps(result, indent=1))
        return result


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a source tree
        return None


def write_whole(file: Path, text: str) -> None:
    """The whole file or none of it."""
    draft = file.with_name(file.name + ".part")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, file)


def eval_mmvp(run: Run, questions: Sequence[Question], prompt: str = "official", judge: Answerer | None = None) -> Result:
    """MMVP: pair and question accuracy, by each way of matching and by released and corrected labels."""
    run.begin("mmvp", prompt=prompt, questions=len(questions), judge=None if judge is None else judge.settings)
    answers, usage = run.ask([question.prompt(prompt) for question in questions])
    matchers = {name: match for name, match in MATCHES.items() if name != "likelihood" or all(one.log_likelihoods for one in answers)}
    chosen = {name: [match(q, a) for q, a in zip(questions, answers, strict=True)] for name, match in matchers.items()}
    right = {
        name: {labels: [letter == q.labels[labels] for letter, q in zip(letters, questions, strict=True)] for labels in LABELS}
        for name, letters in chosen.items()
    }
    headline = next(iter(MATCHES))
    judged = {} if judge is None else _judge(run, judge, questions, answers, right[headline])
    if judged:
        right["judge"] = judged.pop("right")
    scores = {name: {labels: dataclasses.asdict(score(questions, by[labels])) for labels in LABELS} for name, by in right.items()}
    rows: list[Result] = [
        {
            "id": q.id, "pattern": q.pattern, "prompt": q.text, "labels": q.labels, "answer": a.text, "error": a.error,
            "log_likelihoods": a.log_likelihoods, "chosen": {name: letters[i] for name, letters in chosen.items()},
            "right": {name: {labels: by[labels][i] for labels in LABELS} for name, by in right.items()},
        }
        for i, (q, a) in enumerate(zip(questions, answers, strict=True))
    ]  # fmt: skip
    best = scores[headline]["released"]
    result = {
        "benchmark": "mmvp", **run.model, "prompt": prompt, "questions": len(questions), "pairs": len(questions) // 2,
        "matched_by": headline, "labels": "released",
        "pair_accuracy": best["pair_accuracy"], "question_accuracy": best["question_accuracy"], "scores": scores,
        "corrected_rows": [q.id for q in questions if q.labels["released"] != q.labels["corrected"]],
        "unmatched": [row["id"] for row in rows if row["chosen"][headline] is None],
        **({"judge": judged} if judged else {}),
        "deviations": _mmvp_deviations(run, questions, prompt, judge) + _refusals(answers, "they count as wrong"),
    }  # fmt: skip
    return run.end(rows, result, usage)


def _judge(run: Run, judge: Answerer, questions: Sequence[Question], answers: Sequence[Answer], by_rule: Mapping[str, Any]) -> Result:
    """What the judge says by either kind of label, and its agreement with the rule by the released ones."""
    asked = [(labels, judge_prompt(q, a.text, q.labels[labels])) for labels in LABELS for q, a in zip(questions, answers, strict=True)]
    replies, usage = run.ask([prompt for _, prompt in asked], judge)
    verdicts = {labels: [verdict(reply) for (of, _), reply in zip(asked, replies, strict=True) if of == labels] for labels in LABELS}
    undecided = [q.id for q, said in zip(questions, verdicts["released"], strict=True) if said is None]
    return {
        "right": {labels: [said is True for said in verdicts[labels]] for labels in LABELS},
        "model": judge.name,
        "wording": "released grader",
        "agreement": dataclasses.asdict(agreement(verdicts["released"], by_rule["released"])),
        "undecided": undecided,
        "usage": run.costs(usage),
    }


def _mmvp_deviations(run: Run, questions: Sequence[Question], prompt: str, judge: Answerer | None) -> list[str]:
    notes = [_decoding(run.answerer, "the official run samples at temperature 0.2")]
    if prompt != "official":
        notes.append(f"asked with the {prompt} prompt")
    if judge is None:
        notes.append("answers matched to options by rule; the official run asks gpt-4-0314")
    elif judge.name != "gpt-4-0314":
        notes.append(f"judged by {judge.name} at temperature 0; the official run asks gpt-4-0314 at 0.2")
    if questions[0].id == 1 and questions[0].question != FIRST_QUESTION:
        notes.append(f"{len(questions)} questions of another file than MMVP's")
    elif len(questions) != MMVP_QUESTIONS:
        notes.append(f"{len(questions)} of {MMVP_QUESTIONS} questions")
    return notes


def _refusals(answers: Sequence[Answer], consequence: str) -> list[str]:
    refused = sum(answer.error is not None for answer in answers)
    return [f"{refused} prompts were refused: {consequence}"] if refused else []


def _decoding(answerer: Answerer, official: str) -> str:
    if isinstance(answerer, AnswersFile):
        return "finished answers: how they were made is not known"
    return f"greedy decoding; {official}"


def eval_pope(run: Run, questions: Sequence[PopeQuestion], images: Path | None) -> Result:
    """POPE by strategy and their mean. Images: the folder of the photos; None for finished answers."""
    run.begin("pope", questions=len(questions))
    prompts = [
        Prompt(q.id, [{"role": "user", "content": [{"type": "text", "text": q.text}]}], [])
        if images is None
        else Prompt.about(q.id, str(images / q.image), q.text)
        for q in questions
    ]
    _refuse_missing(prompts)
    answers, usage = run.ask(prompts)
    scores = score_pope(questions, [answer.text for answer in answers])
    rows = [
        {"id": q.id, "image": q.image, "text": q.text, "present": q.present, "answer": a.text, "error": a.error, "yes": says_yes(a.text)}
        for q, a in zip(questions, answers, strict=True)
    ]
    missing = [strategy for strategy in STRATEGIES if strategy not in scores]
    partial = {name: one.questions for name, one in scores.items() if name != "mean" and one.questions != POPE_QUESTIONS}
    deviations = [_decoding(run.answerer, "POPE prescribes no decoding")]
    deviations += _refusals(answers, "they count as yes, as empty answers do by the released rule")
    deviations += [f"the mean leaves out {', '.join(missing)}: no questions"] if missing else []
    deviations += [f"{count} of {POPE_QUESTIONS} {name} questions" for name, count in partial.items()]
    result = {
        "benchmark": "pope", **run.model, **dataclasses.asdict(scores["mean"]),
        "scores": {name: dataclasses.asdict(one) for name, one in scores.items()}, "deviations": deviations,
    }  # fmt: skip
    return run.end(rows, result, usage)


def eval_chair(run: Run, words: CocoWords, objects: Mapping[str, set[str]], images: Mapping[str, Path] | None, prompt: str) -> Result:
    """CHAIR of captions. Images: file by image id, to be described; None takes all captions of a file of finished answers."""
    run.begin("chair", prompt=prompt, images=None if images is None else len(images))
    if images is None:
        assert isinstance(run.answerer, AnswersFile)
        prompts = [Prompt(id, [], []) for id in run.answerer.answers]
    else:
        prompts = [Prompt.about(id, str(file), prompt) for id, file in images.items()]
    answers, usage = run.ask(prompts)
    score = score_chair(words, objects, {one.id: answer.text for one, answer in zip(prompts, answers, strict=True)})
    rows = [
        dataclasses.asdict(one) | {"in_image": sorted(objects[one.image_id]), "caption": answer.text, "error": answer.error}
        for one, answer in zip(score.captions, answers, strict=True)
    ]
    shares = {field.name: getattr(score, field.name) for field in dataclasses.fields(score) if field.name != "captions"}
    result = {
        "benchmark": "chair", **run.model, **shares, "captions": len(rows),
        "deviations": [
            _decoding(run.answerer, "CHAIR prescribes none"),
            *([] if images is None else [f"asked with {prompt!r}; CHAIR prescribes no words"]),
            *_refusals(answers, "they count as captions without objects"),
            "plurals, spaces and double words of the synonyms file as in mof.evals.chair; the released script does not count \"a bus\"",
        ],
    }  # fmt: skip
    return run.end(rows, result, usage)


def _refuse_missing(prompts: Sequence[Prompt]) -> None:
    missing = [str(image) for prompt in prompts for image in prompt.images if not Path(str(image)).is_file()]
    if missing:
        raise ValueError(f"{len(missing)} images are missing, such as {missing[0]}")
