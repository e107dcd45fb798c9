"""With these functions, the task mmhal_bench of lmms-eval shows a row and rates an answer."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from lmms_eval.llm_judge import Request, ServerConfig, get_server
from PIL import Image

from encoders import read_image

PHOTOS = Path("MMHal-Bench/images")
LEAST_TRUE = 3
"""A rating below this means that something was hallucinated."""
WORDING = """You rate answers of a model to questions about a photo which you cannot see. You are told what is in the photo, and
an answer that a person gave. An answer is hallucinated if it claims anything about the photo that what you are told and common
knowledge do not bear out.
In the photo: {contents}
Question: {question}
Answer of a person: {answer}
Answer of the model: {response}
Reason in a few sentences, then end with a line "Rating: N", where N is
6 for very informative and not hallucinated, with good analysis or reasoning beyond the question,
5 for very informative and not hallucinated,
4 for somewhat informative and not hallucinated,
3 for not informative and not hallucinated,
2 for very informative, but hallucinated,
1 for somewhat informative, but hallucinated,
0 for not informative and hallucinated."""
_RATING = re.compile(r"rating\W*([0-6])\b", re.IGNORECASE)


def doc_to_visual(doc: dict[str, Any]) -> list[Image.Image]:
    return [read_image(PHOTOS / Path(doc["image_src"]).name)]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return the judge's rating. A rating that cannot be read counts as 0, as in the released script."""
    contents = ", ".join(doc["image_content"])
    words = WORDING.format(contents=contents, question=doc["question"], answer=doc["gt_answer"], response=results[0])
    config = ServerConfig(model_name=os.environ.get("MODEL_VERSION", "gpt-4o-2024-11-20"), temperature=0.0, max_tokens=1024)
    server = get_server(os.environ.get("API_TYPE", "openai"), config)
    ratings = _RATING.findall(server.evaluate(Request(messages=[{"role": "user", "content": words}], config=config)).content)
    rating = int(ratings[-1]) if ratings else 0
    return {"mmhal_score": float(rating), "mmhal_rate": float(rating < LEAST_TRUE)}
