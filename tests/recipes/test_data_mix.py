"""The ShareGPT4V variant of the instruction mix, on made-up records that look like the real ones."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mof.data.records import to_record
from mof.data.rows import read_records
from study.data_mix import MIN_WORDS, PROMPTS, is_detailed_description, with_captions

LONG = " ".join(["The image shows a street with many people and a red bus."] * 5)


def record(name: str, question: str, answer: str = LONG, image: str | None = "coco/train2017/1.jpg") -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, "conversations": turns} | ({} if image is None else {"image": image})


def caption(name: str, image: str) -> dict:
    return record(name, "What do you see happening in this image?\n<image>", "A caption. " + LONG, image)


@pytest.mark.parametrize(
    "question",
    [
        "<image>\nAnalyze the image in a comprehensive and detailed manner.",
        "Can you describe the main features of this image for me?\n<image>",
        "What's happening in the scene?\n<image>",
        "<image>\nPORTRAY the image with a rich, descriptive narrative",
        "<image>\nCharacterize the image using a well-detailed description",
    ],
)
def test_a_detailed_description_is_recognised(question: str):
    assert is_detailed_description(record("d", question))


@pytest.mark.parametrize(
    "other",
    [
        record("vqa", "<image>\nWhat is the man holding?\nAnswer the question using a single word or phrase.", "A bat"),
        record("short", "<image>\nDescribe the following image.", " ".join(["word"] * MIN_WORDS)),
        record("reasoning", "<image>\nWhat might happen next in the scene, and what is happening in the scene?"),
        record("textcaps", "<image>\nProvide a one-sentence caption for the provided image.\nReference OCR token: A, B"),
        record("text", "What do you see happening in this image?", image=None),
        {"id": "multi", "image": "a.jpg", "conversations": record("", "<image>\nDescribe the following image.")["conversations"] * 2},
        {"id": "backwards", "image": "a.jpg", "conversations": record("", "<image>\nDescribe the following image.")["conversations"][::-1]},
        {"id": "messages", "messages": []},
    ],
    ids=lambda other: other["id"],
)  # fmt: skip
def test_other_records_are_not(other: dict):
    assert not is_detailed_description(other)


def test_every_prompt_is_in_the_form_it_is_compared_in():
    for prompt in PROMPTS:
        assert is_detailed_description(record("d", f"<image>\n{prompt.capitalize()}?"))


def test_descriptions_give_way_in_place_and_the_same_image_comes_first():
    detail = "<image>\nDescribe the following image."
    mix = [
        record("a", "<image>\nWhat colour is it?", "Red"),
        record("b", detail, image="coco/train2017/7.jpg"),
        record("c", "Hello?", image=None),
        record("d", detail, image="coco/train2017/8.jpg"),
    ]
    captions = [caption(f"s{i}", f"sam/images/{i}.jpg") for i in range(3)] + [caption("c7", "coco/train2017/7.jpg")]
    before = copy.deepcopy((mix, captions))
    new, counts = with_captions(mix, captions)
    assert [row["id"] for row in new[:3]] == ["a", "c7", "c"] and new[3] in captions[:3]
    assert counts == {"records": 4, "replaced": 2, "same image": 1, "captions": 4}
    assert (mix, captions) == before  # nothing was changed in place
    assert with_captions(mix, captions) == (new, counts)  # and nothing depends on chance
    choices = {with_captions(mix, captions, seed=seed)[0][3]["id"] for seed in range(20)}
    assert choices == {"s0", "s1", "s2"}


@settings(deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=1, max_size=20), st.lists(st.integers(0, 5), min_size=20))
def test_no_caption_is_used_twice_and_none_is_lost_to_another_image(kinds: list[tuple[bool, int]], images: list[int]):
    kinds = [*kinds, (True, 0)]
    mix = [
        record(str(i), "<image>\nDescribe the following image." if detailed else "<image>\nWhat is it?", image=f"{image}.jpg")
        for i, (detailed, image) in enumerate(kinds)
    ]
    captions = [caption(f"cap{i}", f"{image}.jpg") for i, image in enumerate(images)]
    if len(captions) < sum(detailed for detailed, _ in kinds):
        with pytest.raises(ValueError, match=rf"\b{len(captions)} captions"):
            with_captions(mix, captions)
        return
    new, counts = with_captions(mix, captions)
    placed = [row["id"] for row in new if row["id"].startswith("cap")]
    assert len(placed) == len(set(placed)) == counts["replaced"] == sum(detailed for detailed, _ in kinds)
    assert all(kept is old for kept, old, (detailed, _) in zip(new, mix, kinds, strict=True) if not detailed)
    wanted = [image for detailed, image in kinds if detailed]
    assert counts["same image"] == sum(min(wanted.count(image), images.count(image)) for image in set(wanted))


def test_errors_say_what_is_missing():
    mix = [record("d", "<image>\nDescribe the following image.", image=f"{i}.jpg") for i in range(3)]
    with pytest.raises(ValueError, match="caption"):
        with_captions(mix, [])
    with pytest.raises(ValueError, match="2 captions.* 3 "):
        with_captions(mix, [caption("1", "a.jpg"), caption("2", "b.jpg")])
    with pytest.raises(ValueError, match="bare"):
        with_captions(mix, [record("bare", "Hello?", image=None)])
    with pytest.raises(ValueError, match=" 1 instruction"):
        with_captions([record("q", "<image>\nWhat is it?")], [caption("1", "a.jpg")])


@pytest.mark.data
def test_real_instruction_records_stay_and_made_up_descriptions_go(shared_data: Path):
    folder = shared_data / "coco"
    real = read_records(folder / "llava_instruct.json")
    assert not any(is_detailed_description(row) for row in real)  # one-sentence captions are not detailed
    images = sorted({row["image"] for row in real if "image" in row})
    detailed = [record(f"detail-{i}", "<image>\nDescribe the following image.", image=image) for i, image in enumerate(images)]
    captions = [caption(f"cap-{i}", image) for i, image in enumerate(reversed(images))]
    mix, counts = with_captions([*real, *detailed], captions)
    assert mix[: len(real)] == real and counts["same image"] == counts["replaced"] == len(images)
    assert [row["image"] for row in mix[len(real) :]] == images
    photos = next(path for path in (folder / "train2017", folder) if (path / images[0]).is_file())
    assert all(to_record(row, photos).images for row in mix[len(real) :])
