"""CHAIR: which objects a caption names that are not in the image (arXiv 1809.02156), over COCO's 80 classes.

The released rule: an object is in an image if COCO's instances or any of its reference captions have it; every mention in a
caption counts, and is made of a singular word or of two words that belong together. Three of its flaws are mended here,
which moves results slightly against those of the released script:
- It makes singulars by rules that spoil words such as "bus" ("bu"), "tennis" and "glass", so that a bus is never counted (two
  buses are). Here a word is a plural if it is one of a word in the synonyms file; words of that file stay as they are.
- Entries of the synonyms file after two spaces (" motor bike", " cheesecake") are never found. Here spaces do not matter.
- The words that belong together are a list in the script. Here they are the file's own entries of two words, which are the same
  ones and "dining table", and "home plate".
Words are split as nltk's `word_tokenize` does it, as far as letters and signs go; its treatment of clitics plays no part.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TOKEN = re.compile(r"\w+(?:-\w+)*|[^\w\s]")
_ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub")
_VEHICLES = ("jet", "train")
_IRREGULAR_PLURALS = {
    "man": "men",
    "person": "people",
    "child": "children",
    "mouse": "mice",
    "goose": "geese",
    "foot": "feet",
    "tooth": "teeth",
    "ox": "oxen",
}  # fmt: skip; also of words that end so, such as "woman"


class CocoWords:
    """Finds COCO's objects in captions.

    Args:
        synonyms: one line per class: its name and its synonyms, parted by commas. CHAIR's `synonyms.txt` is such a file.

    Raises:
        ValueError: for a file that is not of that form.
    """

    def __init__(self, synonyms: str | Path) -> None:
        lines = Path(synonyms).read_text(encoding="utf-8").splitlines()
        rows = [[" ".join(entry.lower().split()) for entry in line.split(",") if entry.strip()] for line in lines if line.strip()]
        if not rows or not all(rows):
            raise ValueError(f"{synonyms}: expected one line per class, of synonyms parted by commas")
        self.object_of = {entry: row[0] for row in rows for entry in row}
        """Each synonym's class."""
        self._together = {entry: entry for entry in self.object_of if len(entry.split()) == 2} | {"home plate": "home plate"}
        for animal in _ANIMALS:
            self._together |= {f"baby {animal}": animal, f"adult {animal}": animal}  # no person
        self._together |= {f"passenger {vehicle}": vehicle for vehicle in _VEHICLES}
        self._together |= {"bow tie": "tie", "toilet seat": "toilet"}
        known = {word for entry in self.object_of for word in entry.split()} | {w for entry in self._together for w in entry.split()}
        self._singular = {plural: word for word in known for plural in _plurals(word)} | {word: word for word in known}

    def find(self, caption: str) -> list[tuple[str, str]]:
        """(word, class) of every mention, in order."""
        tokens = [self._singular.get(token, token) for token in _TOKEN.findall(caption.lower())]
        words = []
        position = 0
        while position < len(tokens):
            two = " ".join(tokens[position : position + 2])
            words.append(self._together.get(two, tokens[position]))
            position += 2 if two in self._together else 1
        if "toilet" in words:
            words = [word for word in words if word != "seat"]  # it is no chair
        return [(word, self.object_of[word]) for word in words if word in self.object_of]


def _plurals(word: str) -> set[str]:
    """How the plural of a word may be spelled."""
    ending = next((ending for ending in _IRREGULAR_PLURALS if word.endswith(ending)), None)
    irregular = {word.removesuffix(ending) + _IRREGULAR_PLURALS[ending]} if ending else set()
    if word.endswith("y") and word[-2:-1] not in "aeiou":
        return irregular | {word[:-1] + "ies"}
    if word.endswith(("fe", "f")):
        return irregular | {word + "s", word.removesuffix("e").removesuffix("f") + "ves"}
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return irregular | {word + "es"}
    return irregular | {word + "s"} | ({word + "es"} if word.endswith("o") else set())


def read_objects(words: CocoWords, instances: Sequence[str | Path], captions: Sequence[str | Path]) -> dict[str, set[str]]:
    """Which classes are in each image, by the image's id: out of COCO's annotation files.

    Raises:
        ValueError: for a file that is not COCO's, or a category that the synonyms do not know.
    """
    objects: dict[str, set[str]] = {}
    for file in instances:
        document = read_coco(file, "category_id")
        objects |= {str(image["id"]): set() for image in document.get("images", []) if str(image["id"]) not in objects}
        names = {category["id"]: category["name"].lower() for category in document.get("categories", [])}
        for annotation in document["annotations"]:
            name = names.get(annotation["category_id"], annotation["category_id"])
            if name not in words.object_of:
                raise ValueError(f"{file}: the category {name!r} is not in the synonyms file")
            objects.setdefault(str(annotation["image_id"]), set()).add(words.object_of[name])
    for file in captions:
        for annotation in read_coco(file, "caption")["annotations"]:
            found = {name for _, name in words.find(annotation["caption"])}
            objects.setdefault(str(annotation["image_id"]), set()).update(found)
    return objects


def read_coco(file: str | Path, field: str) -> dict[str, Any]:
    """The document of an annotation file whose annotations have `field`. ValueError for any other."""
    try:
        document = json.loads(Path(file).read_text(encoding="utf-8"))
        annotations = document["annotations"]
        good = isinstance(annotations, list) and all(field in one and "image_id" in one for one in annotations)
    except (ValueError, KeyError, TypeError):
        good = False
    if not good:
        raise ValueError(f"{file} is no annotation file of COCO: expected 'annotations' with image_id and {field}")
    return document


@dataclass(frozen=True)
class CaptionResult:
    """One caption."""

    image_id: str
    mentions: list[tuple[str, str]]
    """(word, class)."""
    hallucinated: list[tuple[str, str]]
    """Those of them whose class is not in the image."""
    length: int
    """In words, split at white space."""


@dataclass(frozen=True)
class ChairScore:
    """Shares in [0, 1]."""

    chair_i: float | None
    """Of all mentions of objects, how many are hallucinated; None where no caption mentions any."""
    chair_s: float
    """Of the captions, how many have a hallucinated object."""
    mean_length: float
    """Words per caption: short captions hallucinate less."""
    mentions_per_caption: float
    captions: list[CaptionResult]


def score_chair(words: CocoWords, objects: Mapping[str, set[str]], captions: Mapping[str, str]) -> ChairScore:
    """Captions by image id -> CHAIR.

    Raises:
        ValueError: without captions, or naming images that no annotation knows.
    """
    if not captions:
        raise ValueError("no captions to score")
    if unknown := [id for id in captions if id not in objects]:
        raise ValueError(f"{len(unknown)} captions are of images without annotations, such as {', '.join(unknown[:5])}")
    results = []
    for id, caption in captions.items():
        mentions = words.find(caption)
        hallucinated = [(word, name) for word, name in mentions if name not in objects[id]]
        results.append(CaptionResult(id, mentions, hallucinated, len(caption.split())))
    mentioned, wrong = (sum(len(getattr(one, name)) for one in results) for name in ("mentions", "hallucinated"))
    return ChairScore(
        chair_i=wrong / mentioned if mentioned else None,
        chair_s=statistics.fmean(bool(one.hallucinated) for one in results),
        mean_length=statistics.fmean(one.length for one in results),
        mentions_per_caption=mentioned / len(results),
        captions=results,
    )
