"""CHAIR on captions whose objects are written down here; the synonyms are a small list of this test's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mof.evals.chair import CocoWords, read_objects, score_chair

SYNONYMS = """person, man, woman, child, people, baby, passenger, adult
bus, minibus
airplane, jet, air plane
motorcycle,  motor bike, scooter
bicycle, bike
dog, puppy
bear
hot dog
teddy bear, teddy
train
giraffe
sheep
mouse
knife
wine glass
cup, glassful
tie
chair, seat
toilet
dining table, table
sports ball, ball
skis, ski
bench
"""


@pytest.fixture
def words(tmp_path: Path) -> CocoWords:
    (tmp_path / "synonyms.txt").write_text(SYNONYMS)
    return CocoWords(tmp_path / "synonyms.txt")


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A man and two dogs.", "person dog"),
        ("MEN, women & children", "person person person"),
        ("Some people with knives, mice, benches, skis and sheep", "person knife mouse bench skis sheep"),
        ("A bus behind two buses", "bus bus"),
        ("Two wine glasses and a glass", "wine glass;"),
        ("A hot dog and a dog", "hot dog;dog"),
        ("Hot dogs", "hot dog;"),
        ("It is hot, dog", "dog"),
        ("A teddy bear; a bear", "teddy bear;bear"),
        ("A baby giraffe and a baby", "giraffe person"),
        ("an adult bear, adult sheep", "bear sheep"),
        ("A passenger train with passengers", "train person"),
        ("A passenger jet", "airplane"),
        ("a man in a bow tie", "person tie"),
        ("a toilet seat", "toilet"),
        ("a toilet with its seat up, near a chair", "toilet chair"),
        ("a seat", "chair"),
        ("motor bikes", "motorcycle"),
        ("an air plane on the dining table", "airplane;dining table"),
        ("sports balls on a table", "sports ball;dining table"),
        ("The dog's ball", "dog;sports ball"),
        ("a well-behaved puppy-dog", ""),
        ("doggedly busy bears' ties", "bear tie"),
        ("", ""),
    ],
)  # fmt: skip
def test_mentions(words: CocoWords, caption: str, expected: str) -> None:
    names = [name for name in (expected.split(";") if ";" in expected else expected.split(" ")) if name]
    assert [name for _, name in words.find(caption)] == names


def test_by_hand(words: CocoWords) -> None:
    objects = {"1": {"person", "dog"}, "2": {"bus"}, "3": set(), "4": {"cup"}}
    captions = {
        "1": "A man, another man and a dog near a bus",  # 4 mentions, 1 not there
        "2": "A bus with a puppy and a dog",  # 3, 2
        "3": "Nothing to see",  # 0
        "4": "A cup",  # 1, 0
    }
    measured = score_chair(words, objects, captions)
    assert measured.chair_i == 3 / 8
    assert measured.chair_s == 2 / 4
    assert measured.mean_length == (10 + 8 + 3 + 2) / 4
    assert measured.mentions_per_caption == 2
    assert measured.captions[1].hallucinated == [("puppy", "dog"), ("dog", "dog")]
    assert score_chair(words, objects, {"3": "Nothing"}).chair_i is None
    with pytest.raises(ValueError, match=r"\b1 .*\b9$"):
        score_chair(words, objects, captions | {"9": "x"})
    with pytest.raises(ValueError, match="no captions"):
        score_chair(words, objects, {})


def test_objects_are_in_instances_or_captions(words: CocoWords, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    instances, captions = tmp_path / "instances.json", tmp_path / "captions.json"
    document = {
        "images": [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "2.jpg"}],
        "categories": [{"id": 7, "name": "wine glass"}, {"id": 8, "name": "dining table"}],
        "annotations": [{"image_id": 1, "category_id": 7}, {"image_id": 1, "category_id": 8}],
    }
    instances.write_text(json.dumps(document))
    captions.write_text(json.dumps({"annotations": [{"image_id": 1, "caption": "Two puppies"}, {"image_id": 3, "caption": "A jet"}]}))
    assert read_objects(words, [instances], [captions]) == {"1": {"wine glass", "dining table", "dog"}, "2": set(), "3": {"airplane"}}
    rows = [{"image_id": 1, "caption": None}, {"image_id": 3, "caption": "A jet"}]
    captions.write_text(json.dumps({"annotations": rows}), encoding="utf-8-sig")
    assert read_objects(words, [], [captions]) == {"1": set(), "3": {"airplane"}} and "caption of image 1 should be text" in caplog.text
    document["categories"][0]["name"] = "wardrobe"
    instances.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"instances\.json.*'wardrobe'"):
        read_objects(words, [instances], [captions])
    for wrong in ("[", "[]", "{}", '{"annotations": [{"image_id": 1}]}', '{"annotations": [5]}'):
        captions.write_text(wrong)
        with pytest.raises(ValueError, match=r"captions\.json"):
            read_objects(words, [], [captions])
    (tmp_path / "none.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"none\.txt"):
        CocoWords(tmp_path / "none.txt")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(["dog", "dogs", "hot", "bear", "teddy", "toilet", "seat", "baby", "the", ",", "bus"]), max_size=12))
def test_every_mention_is_a_word_of_its_class(words: CocoWords, caption: list[str]) -> None:
    mentions = words.find(" ".join(caption))
    assert all(words.object_of[word] == name for word, name in mentions)
    assert len(mentions) <= sum(word not in ("the", ",", "hot") for word in caption)
    if "toilet" in caption:
        assert not any(word == "seat" for word, _ in mentions)


@pytest.mark.data
def test_real_annotations(shared_data: Path) -> None:
    words = CocoWords(shared_data / "chair" / "synonyms.txt")
    assert len(set(words.object_of.values())) == 80
    files = [shared_data / "coco" / "instances_train.json"], [shared_data / "coco" / "captions_train.json"]
    objects = read_objects(words, *files)
    reference: dict[str, str] = {}
    for annotation in json.loads(files[1][0].read_text())["annotations"]:
        reference.setdefault(str(annotation["image_id"]), annotation["caption"])
    assert len(reference) == 80
    faithful = score_chair(words, objects, reference)
    assert (faithful.chair_i, faithful.chair_s) == (0, 0) and faithful.mentions_per_caption > 1
    absent = {id: next(name for name in sorted(set(words.object_of.values())) if name not in objects[id]) for id in reference}
    invented = score_chair(words, objects, {id: f"{caption} Also a {absent[id]}." for id, caption in reference.items()})
    assert invented.chair_s == 1
    assert invented.chair_i == pytest.approx(80 / (80 + 80 * faithful.mentions_per_caption))
