"""misleading_questions asks about held-out scenes after a false statement ("blind faith in text", arXiv 2503.02199)."""

from typing import Any

import numpy as np

from mof.miniature.language import answer, question, word
from mof.miniature.scenes import PATTERNS, render, sample_pair


def misleading_questions(pairs: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Return the questions of `pairs` pairs for each of the nine patterns. Each question has an image and a false statement.

    The false statement is true of the pair's other scene, and has the words of a training answer.
    """
    questions = []
    for pattern, i in [(pattern, i) for pattern in PATTERNS for i in range(pairs)]:
        scenes = sample_pair(rng, pattern)
        words = [word(pattern, getattr(scene, PATTERNS[pattern])) for scene in scenes]
        asked = question(scenes[0], pattern, rng, other=words[1])
        for right, (scene, other) in zip(words, (scenes, scenes[::-1]), strict=True):
            questions.append({
                "pair": f"{pattern}-{i}", "question": asked, "image": render(scene, rng), "options": sorted(words), "answer": right,
                "false_statement": answer(other, pattern),
            })  # fmt: skip
    return questions
