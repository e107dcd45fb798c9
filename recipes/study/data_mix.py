"""with_captions makes the ShareGPT4V variant of LLaVA's instruction mix: better captions replace its detailed descriptions.

`llava_v1_5_mix665k.json` holds the 23k records of LLaVA's `detail_23k` unmarked among the others. Such a record is recognised by
    - one image, one question, one answer;
    - a question that equals a prompt for these descriptions (`PROMPTS`), case and punctuation apart;
    - an answer of more than `MIN_WORDS` words, which tells it from a one-line caption for a similar prompt.
ShareGPT4V (arXiv 2311.12793) replaces these records by the same number of its captions, and so does `with_captions`.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Sequence

from mof.data.digests import record_id
from mof.data.records import RecordError, images_of, texts_of
from mof.data.rows import RawRecord

MIN_WORDS = 30

PROMPTS = frozenset({
    # The list in LLaVA's paper (arXiv 2304.08485, appendix).
    "describe the following image in detail",
    "describe the image in detail",
    "provide a detailed description of the given image",
    "give an elaborate explanation of the image you see",
    "share a comprehensive rundown of the presented image",
    "offer a thorough analysis of the image",
    "explain the various aspects of the image before you",
    "clarify the contents of the displayed image with great detail",
    "characterize the image using a well detailed description",
    "break down the elements of the image in a detailed manner",
    "walk through the important details of the image",
    "portray the image with a rich descriptive narrative",
    "narrate the contents of the image with precision",
    "analyze the image in a comprehensive and detailed manner",
    "illustrate the image through a descriptive explanation",
    "examine the image closely and share its details",
    "write an exhaustive depiction of the given image",
    # The prompts of the released data.
    "describe the following image",
    "write a detailed description of the given image",
    "explain the visual content of the image in great detail",
    "what do you see happening in this image",
    "what do you think is going on in this snapshot",
    "whats happening in the scene",
    "what is happening in the scene",
    "what is this photo about",
    "what are the key elements in this picture",
    "can you describe the main features of this image for me",
    "can you elaborate on the elements of the picture provided",
})  # fmt: skip
"""Prompts for detailed descriptions, lower case, without punctuation."""


def with_captions(
    instructions: Sequence[RawRecord], captions: Sequence[RawRecord], seed: int = 0
) -> tuple[list[RawRecord], dict[str, int]]:
    """Return the instruction mix with each detailed description replaced, in its place, by a caption record.

    The caption is of the same image if there is such a caption, otherwise it is drawn from the rest. No caption is used twice. The same
    arguments give the same mix. Records keep their ids and contents; the inputs are not changed.

    Args:
        instructions: raw records, such as `llava_v1_5_mix665k.json`.
        captions: raw records with an image each, such as `sharegpt4v_instruct_gpt4-vision_cap100k.json`.

    Returns:
        The new mix, and its counts: "records" of the mix, "replaced" descriptions, "same image" captions, which describe the
        image of the description that they replace, and all given "captions".

    Raises:
        ValueError: when there are no captions or fewer than detailed descriptions, when a caption has no image, or when the
            mix holds no detailed description.
    """
    places = [index for index, record in enumerate(instructions) if is_detailed_description(record)]
    _check(len(places), len(instructions), captions)
    by_image: dict[str | None, list[int]] = defaultdict(list)
    for number in reversed(range(len(captions))):  # so that pop() takes the first
        by_image[_image(captions[number])].append(number)
    chosen: dict[int, int] = {}
    for place in places:
        if same := by_image.get(_image(instructions[place])):
            chosen[place] = same.pop()
    counts = {"records": len(instructions), "replaced": len(places), "same image": len(chosen), "captions": len(captions)}
    rest = sorted(set(range(len(captions))).difference(chosen.values()))
    open_places = [place for place in places if place not in chosen]
    chosen.update(zip(open_places, random.Random(seed).sample(rest, len(open_places)), strict=True))
    return [captions[chosen[place]] if place in chosen else record for place, record in enumerate(instructions)], counts


def is_detailed_description(record: RawRecord) -> bool:
    """Return whether a raw record is a detailed description (see the module's docstring)."""
    try:
        texts = [texts_of(record, role) for role in ("user", "assistant")]
    except RecordError:
        return False
    if _image(record) is None or [len(said) for said in texts] != [1, 1]:
        return False
    (question,), (answer,) = texts
    return _plain(question) in PROMPTS and len(answer.split()) > MIN_WORDS


def _image(record: RawRecord) -> str | None:
    """Return the path of the record's only image; None for a record without a path, or with several images."""
    images = images_of(record)
    return images[0] if len(images) == 1 and isinstance(images[0], str) else None


def _check(descriptions: int, records: int, captions: Sequence[RawRecord]) -> None:
    if not captions:
        raise ValueError("no caption records were given; expected ShareGPT4V's caption file")
    if imageless := [record_id(record) for record in captions if _image(record) is None]:
        raise ValueError(f"{len(imageless)} caption records have no image: {', '.join(imageless[:10])}")
    if not descriptions:
        raise ValueError(f"none of the {records} instruction records is a detailed description; is this LLaVA's mix?")
    if len(captions) < descriptions:
        raise ValueError(f"{len(captions)} captions cannot replace {descriptions} detailed descriptions; give more")


def _plain(question: str) -> str:
    """Return the question in lower case, with single spaces, without punctuation."""
    return " ".join(re.sub(r"[^\w\s]", "", question.lower().replace("-", " ")).split())
