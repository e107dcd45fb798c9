"""The columns of a report."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measure:
    """One column of a report."""

    benchmark: str
    title: str
    says: str
    """The figure's meaning, and the figure of a model that guesses."""
    better: str = "higher"
    """"higher", "lower" or "" for neither."""
    chance: float | None = None
    scale: float = 100
    compared: bool = False
    """True if the report lists differences between models."""


MEASURES: dict[str, Measure] = {
    "mmvp-vlm pairs": Measure(
        "MMVP-VLM", "right pairs, %", "pairs of photos whose two captions each find their photo", chance=0.25, compared=True
    ),
    "mmvp-vlm likeness": Measure(
        "MMVP-VLM", "likeness", "mean cosine of a pair's two photos x 100; near 100, the encoder is blind to the difference", "lower"
    ),
    "mmvp pairs": Measure(
        "MMVP", "right pairs, %", "pairs of photos with both questions right, by released labels: the headline", chance=0.25, compared=True
    ),
    "mmvp questions": Measure("MMVP", "right questions, %", "single questions right; never to be compared with pairs", chance=0.5),
    "mmvp pairs corrected": Measure(
        "MMVP", "right pairs, mended labels, %", "the same pairs with the four known wrong labels corrected", chance=0.25
    ),
    "mmvp likelihood pairs": Measure(
        "MMVP", "right pairs by likelihood, %", "the likelier option counts in place of the generated answer", chance=0.25
    ),
    "mmvp judge pairs": Measure("MMVP", "right pairs by judge, %", "a language model says whether the answer is right", chance=0.25),
    "pope accuracy": Measure("POPE", "accuracy, %", "yes-or-no questions about objects; mean over the strategies", chance=0.5),
    "pope f1": Measure("POPE", "F1, %", "of yes; mean over the strategies; always saying yes gives 66.7", compared=True),
    "pope yes": Measure("POPE", "said yes, %", "half of the questions are to be answered with yes", ""),
    "chair i": Measure("CHAIR", "CHAIR i, %", "mentioned objects that are not in the photo", "lower"),
    "chair s": Measure("CHAIR", "CHAIR s, %", "captions with an object that is not in the photo", "lower", compared=True),
    "chair length": Measure("CHAIR", "words", "words per caption: short captions hallucinate less", "", scale=1),
    "mmhal_bench mmhal_score": Measure("MMHal-Bench", "score, 0 to 6", "a judge rates how informative and true answers are", scale=1),
    "mmhal_bench mmhal_rate": Measure("MMHal-Bench", "hallucinated, %", "answers that the judge rates below 3", "lower"),
    "llava_in_the_wild gpt_eval_llava_all": Measure(
        "LLaVA-Bench", "relative score, %", "a judge's points in % of those of GPT-4's answers", scale=1
    ),
    "mmvet gpt_eval_score": Measure("MM-Vet", "score, %", "a judge grades open answers", scale=1),
    "mmbench_en_dev_static gpt_eval_score": Measure(
        "MMBench dev", "circular accuracy, %", "right in every rotation of the options; chosen letters are found by rule", scale=1
    ),
    "docvqa_val anls": Measure("DocVQA val", "ANLS, %", "likeness of letters to the nearest right answer, 0 below a half"),
    "docvqa_val accuracy": Measure("DocVQA val", "accuracy, %", "answers equal to a right one, but for case and white space"),
    "gqa exact_match": Measure("GQA", "accuracy, %", "answers equal to the right one"),
    "scienceqa_img exact_match": Measure("ScienceQA, images", "accuracy, %", "right letters, of the questions with an image"),
    "cv_bench cv_bench_acc": Measure("CV-Bench", "accuracy, %", "right letters over all questions"),
}
"""The measures in the order of the table. A measure of lmms-eval is called by its task and its metric."""
