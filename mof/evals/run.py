"""One evaluation from its questions to its folder: `settings.json`, `cache.jsonl`, `answers.jsonl` and `result.json`.

A run that was cut off goes on where it stopped, and a second one asks nothing: answers are kept in the cache. A folder that
holds the answers of another evaluation is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from encoders.digests import file_digest
from encoders.images.opening import ImageError, inside
from encoders.runs import LOCKS, RunFile, RunLock, remove_unfinished, versions, write_sealed, write_sealed_lines
from mof.evals.answerers import AnswersFile
from mof.evals.answering import Answer, AnswerCache, Answerer, Prompt, Usage, answer_all, image_hash
from mof.evals.chair import CocoWords, score_chair
from mof.evals.judge import agreement, judge_prompt, verdict
from mof.evals.mmvp import FIRST_QUESTION, LABELS, MATCHES, Question, score
from mof.evals.pope import STRATEGIES, PopeQuestion, says_neither, says_no_unread, says_yes, score_pope

Result = dict[str, Any]
MMVP_QUESTIONS, POPE_QUESTIONS = 300, 3000  # in the whole benchmarks; for POPE per strategy
FORMAT = 1  # version of everything in the folder of an evaluation


@contextmanager
def claimed_folder(folder: Path, **identity: Any) -> Iterator[None]:
    """Give the folder to a single evaluation in a single process: its identity and the versions of packages are in settings.json.

    Versions are no part of the identity: an evaluation that takes days may go on after an update.

    Raises:
        ValueError: if another process fills the folder, or if it holds answers or results of another evaluation (saying what differs).
    """
    remedy = "give a new --output (a copy of cache.jsonl in it keeps answers from being asked again)"
    settings = RunFile(folder / "settings.json", "run of mof eval", FORMAT, remedy)
    if _is_older(settings.path):
        raise ValueError(
            f"{folder} was filled by an older release, which did not note the data of an evaluation; give a new --output (a copy of "
            "cache.jsonl in it keeps answers of endpoints from being asked again). `mof eval report` reads the finished results as before"
        )
    own = ("cache.jsonl*", LOCKS)
    settings.refuse_foreign(own)
    folder.mkdir(parents=True, exist_ok=True)
    with RunLock(folder):
        begun = any((folder / name).exists() for name in ("cache.jsonl", "answers.jsonl", "result.json"))
        content = settings.claim(identity, begun=begun, own=own)
        settings.write(content["identity"], versions=versions("mof-vig", "torch", "transformers"))
        remove_unfinished(folder)
        yield


def _is_older(settings: Path) -> bool:
    """Return whether a release wrote the file that did not write an identity."""
    try:
        content = json.loads(settings.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and "benchmark" in content


def row_name(model: str, decoding: str | None) -> str:
    """Return the name of a run's row in tables: the model, with its decoding unless that is plain."""
    return model if decoding in (None, "greedy") else f"{model} ({decoding})"


@dataclass(frozen=True)
class Run:
    """Where a run is written and how its questions are asked."""

    folder: Path
    answerer: Answerer
    cache: Path | None = None
    """Another place for the cache, so that several runs share one."""
    progress: bool = False
    name: str | None = None
    """The model's name in tables; by default the answerer's name."""
    seed: int | None = None
    """The seed with which the model was trained: a report joins runs of one name and several seeds."""

    def ask(self, prompts: Sequence[Prompt], answerer: Answerer | None = None) -> tuple[list[Answer], Usage]:
        asked = answerer or self.answerer
        cache = None if isinstance(asked, AnswersFile) else AnswerCache(self.cache or self.folder / "cache.jsonl")
        return answer_all(asked, prompts, cache, progress=self.progress)

    @contextmanager
    def claimed(self, benchmark: str, data: Any, images: Iterable[Path], **settings: Any) -> Iterator[None]:
        """Own the folder. The identity holds a digest of `data` (JSON-able) and of the images' content.

        Raises:
            ValueError: for missing images, for the folder of another evaluation, or while another process fills it.
        """
        files = sorted({str(file) for file in images})
        if missing := [file for file in files if not Path(file).is_file()]:
            raise ValueError(f"{len(missing)} images are missing, such as {missing[0]}")
        content = json.dumps([data, *map(_content, files)], sort_keys=True)
        digest = hashlib.sha256(content.encode()).hexdigest()[:32]
        with claimed_folder(self.folder, benchmark=benchmark, answerer=self.answerer.settings, data=digest, **settings):
            yield

    def end(self, benchmark: str, rows: Sequence[Result], figures: Result, deviations: Sequence[str], usage: Usage) -> Result:
        """Write answers.jsonl and result.json; return the result."""
        decoding = self.answerer.settings.get("decoding")  # None for answerers that do not tell
        result = {
            "format": FORMAT, "benchmark": benchmark, "model": row_name(self.name or self.answerer.name, decoding), "seed": self.seed,
            "decoding": decoding,
            **figures, "deviations": deviations, "usage": dataclasses.asdict(usage),
        }  # fmt: skip
        write_sealed_lines(self.folder / "answers.jsonl", rows)
        write_result(self.folder, result)
        return result


def write_result(folder: Path, result: Result) -> None:
    """Write result.json, with the digests of the files of answers, which are written before."""
    files = [*folder.glob("answers.jsonl"), *folder.glob("answers/*.jsonl")]
    write_sealed(folder / "result.json", result | {"files": {str(file.relative_to(folder)): file_digest(file) for file in files}})


def _content(file: str) -> str:
    """Return the digest of an image file, or the reason why it is not read, which costs its own prompts only."""
    try:
        return image_hash(file)
    except ImageError as error:
        return str(error)


def eval_mmvp(run: Run, questions: Sequence[Question], prompt: str = "official", judge: Answerer | None = None) -> Result:
    """Measure MMVP: pair and question accuracy, by each way of matching and by released and corrected labels."""
    data = [(q.id, q.text, q.labels, q.pattern) for q in questions]
    images = [q.image for q in questions if q.image is not None]
    with run.claimed("mmvp", data, images, prompt=prompt, judge=None if judge is None else judge.settings):
        answers, usage = run.ask([question.prompt(prompt) for question in questions])
        likelihoods = any(answer.log_likelihoods for answer in answers) and all(
            answer.log_likelihoods or answer.error for answer in answers
        )
        matchers = {name: match for name, match in MATCHES.items() if name != "likelihood" or likelihoods}
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
                "image": None if q.image is None else str(q.image.resolve()), "log_likelihoods": a.log_likelihoods,
                "chosen": {name: letters[i] for name, letters in chosen.items()},
                "right": {name: {labels: by[labels][i] for labels in LABELS} for name, by in right.items()},
            }
            for i, (q, a) in enumerate(zip(questions, answers, strict=True))
        ]  # fmt: skip
        best = scores[headline]["released"]
        figures = {
            "prompt": prompt, "questions": len(questions), "pairs": len(questions) // 2, "matched_by": headline, "labels": "released",
            "pair_accuracy": best["pair_accuracy"], "question_accuracy": best["question_accuracy"], "scores": scores,
            "corrected_rows": [q.id for q in questions if q.labels["released"] != q.labels["corrected"]],
            "unmatched": [row["id"] for row in rows if row["chosen"][headline] is None],
            **({"judge": judged} if judged else {}),
        }  # fmt: skip
        deviations = _mmvp_deviations(run, questions, prompt, judge) + _refusals(rows, "they count as wrong")
        return run.end("mmvp", rows, figures, deviations, usage)


def _judge(run: Run, judge: Answerer, questions: Sequence[Question], answers: Sequence[Answer], by_rule: Mapping[str, Any]) -> Result:
    """Ask the judge by both kinds of labels; return its verdicts, and its agreement with the rule by the released labels."""
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
        "usage": dataclasses.asdict(usage),
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


def _refusals(rows: Sequence[Result], consequence: str) -> list[str]:
    refused = [f"{row.get('id', row.get('image_id'))} ({str(row['error'])[:200]})" for row in rows if row["error"] is not None]
    return [f"{len(refused)} prompts were refused, such as {refused[0]}: {consequence}"] if refused else []


def _decoding(answerer: Answerer, official: str) -> str:
    if isinstance(answerer, AnswersFile):
        return "finished answers: how they were made is not known"
    decoding = answerer.settings.get("decoding", "greedy")
    return f"{'greedy decoding' if decoding == 'greedy' else f'decoding {decoding}, greedily'}; {official}"


def eval_pope(run: Run, questions: Sequence[PopeQuestion], images: Path | None) -> Result:
    """Measure POPE by strategy, and the mean over strategies. `images` is the folder of the photos, None for finished answers."""
    photos = {} if images is None else {q.id: Path(inside(images, q.image)) for q in questions}
    with run.claimed("pope", [(q.id, q.image, q.text, q.present) for q in questions], photos.values()):
        answers, usage = run.ask([Prompt.about(q.id, str(photos[q.id]) if photos else None, q.text) for q in questions])
        scores = score_pope(questions, [answer.text for answer in answers])
        rows = [
            {
                "id": q.id, "image": q.image, "text": q.text, "present": q.present,
                "answer": a.text, "error": a.error, "yes": says_yes(a.text),
            }
            for q, a in zip(questions, answers, strict=True)
        ]  # fmt: skip
        missing = [strategy for strategy in STRATEGIES if strategy not in scores]
        partial = {name: by["questions"] for name, by in scores.items() if name != "mean" and by["questions"] != POPE_QUESTIONS}
        deviations = [_decoding(run.answerer, "POPE prescribes no decoding")]
        deviations += _refusals(rows, "they count as yes, as empty answers do by the released rule")
        neither, unread = (sum(map(says, (answer.text for answer in answers))) for says in (says_neither, says_no_unread))
        deviations += (
            [f"{neither} of {len(answers)} answers say neither yes nor no: they count as yes by the released rule"] if neither else []
        )
        deviations += [f"{unread} answers say no in a spelling that the released rule counts as yes"] if unread else []
        deviations += [f"the mean leaves out {', '.join(missing)}: no questions"] if missing else []
        deviations += [f"{count} of {POPE_QUESTIONS} {name} questions" for name, count in partial.items()]
        return run.end("pope", rows, {**scores["mean"], "scores": scores, "neither": neither}, deviations, usage)


def eval_chair(run: Run, words: CocoWords, objects: Mapping[str, set[str]], images: Mapping[str, Path] | None, prompt: str) -> Result:
    """Measure CHAIR. `images` are the files to describe, by image id; None takes all captions of a file of finished answers."""
    seen = {id: sorted(names) for id, names in objects.items() if images is None or id in images}
    words_of_prompt = {} if images is None else {"prompt": prompt}  # finished answers do not tell their prompt
    with run.claimed("chair", {"objects": seen, "words": words.object_of}, () if images is None else images.values(), **words_of_prompt):
        files: Mapping[str, Path | None] = images or {}
        if images is None:
            assert isinstance(run.answerer, AnswersFile)
            files = dict.fromkeys(run.answerer.answers)
        answers, usage = run.ask([Prompt.about(id, None if file is None else str(file), prompt) for id, file in files.items()])
        score = score_chair(words, objects, {id: answer.text for id, answer in zip(files, answers, strict=True)})
        rows = [
            dataclasses.asdict(caption) | {"in_image": sorted(objects[caption.image_id]), "caption": answer.text, "error": answer.error}
            for caption, answer in zip(score.captions, answers, strict=True)
        ]
        shares = {field.name: getattr(score, field.name) for field in dataclasses.fields(score) if field.name != "captions"}
        deviations = [
            _decoding(run.answerer, "CHAIR prescribes none"),
            *([] if images is None else [f"asked with {prompt!r}; CHAIR prescribes no words"]),
            *_refusals(rows, "they count as captions without objects"),
            'plurals, spaces and double words of the synonyms file as in mof.evals.chair; the released script does not count "a bus"',
        ]
        return run.end("chair", rows, {**shares, "captions": len(rows)}, deviations, usage)
