"""CHAIR counts objects that a caption names and that are not in the image (arXiv 1809.02156), over COCO's 80 classes.

By the released rule, an object is in an image if COCO's instances or any reference caption of the image have it. Every mention
in a caption counts. A mention is a singular word, or two words that belong together. Three flaws of the released script are
mended here, so that results differ slightly from its results:
- The script makes singulars by rules that spoil words such as "bus" ("bu"), "tennis" and "glass": it never counts a bus, but
  counts two buses. Here a word is a plural if it is the plural of a word in the synonyms file; words of that file stay unchanged.
- The script never finds entries of the synonyms file after two spaces (" motor bike", " cheesecake"). Here spaces do not matter.
- The script has a list of words that belong together. Here they are the file's own entries of two words, which are the same
  entries and "dining table", and "home plate".
Words are split as by nltk's `word_tokenize`, which also splits forms such as "don't"; this makes no difference here.
"""

from __future__ import annotations

import logging
import random
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from encoders.images.opening import inside
from encoders.text_files import parse_json, read_utf8
from mof.evals.answering import Answer, Prompt
from mof.evals.benchmark import Measure, Measured, Row
from mof.evals.intervals import Figure, Given, Tally
from mof.evals.run import Run

NAME = "chair"
MEASURES = {
    "chair i": Measure("CHAIR", "CHAIR i, %", "mentioned objects that are not in the photo", "lower"),
    "chair s": Measure("CHAIR", "CHAIR s, %", "captions with an object that is not in the photo", "lower", compared=True),
    "chair length": Measure("CHAIR", "words", "words per caption: short captions hallucinate less", "", scale=1),
}
HEADLINE = "chair s", "chair_s"

logger = logging.getLogger(__name__)

_TOKEN = re.compile(r"\w+(?:-\w+)*|[^\w\s]")
_ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub")
_VEHICLES = ("jet", "train")
_IRREGULAR_PLURALS = {
    "man": "men", "person": "people", "child": "children", "mouse": "mice", "goose": "geese", "foot": "feet", "tooth": "teeth",
    "ox": "oxen",
}  # fmt: skip
"""They also hold for words with these endings, such as "woman"."""


class CocoWords:
    """CocoWords finds the objects of COCO in captions.

    Args:
        synonyms: a file like CHAIR's `synonyms.txt`, one line per class: its name and its synonyms, separated by commas.

    Raises:
        ValueError: for a file of another form.
    """

    def __init__(self, synonyms: str | Path) -> None:
        lines = read_utf8(Path(synonyms)).split("\n")
        rows = [[" ".join(entry.lower().split()) for entry in line.split(",") if entry.strip()] for line in lines if line.strip()]
        if not rows or not all(rows):
            raise ValueError(f"{synonyms}: expected a line for each class, with its synonyms separated by commas")
        self.object_of = {entry: row[0] for row in rows for entry in row}
        """Synonym -> class."""
        self._together = {entry: entry for entry in self.object_of if len(entry.split()) == 2} | {"home plate": "home plate"}
        for animal in _ANIMALS:
            self._together |= {f"baby {animal}": animal, f"adult {animal}": animal}  # no person
        self._together |= {f"passenger {vehicle}": vehicle for vehicle in _VEHICLES}
        self._together |= {"bow tie": "tie", "toilet seat": "toilet"}
        known = {word for entry in self.object_of for word in entry.split()} | {w for entry in self._together for w in entry.split()}
        self._singular = {plural: word for word in known for plural in _plurals(word)} | {word: word for word in known}

    def find(self, caption: str) -> list[tuple[str, str]]:
        """Return (word, class) of every mention, in order."""
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
    """Return the possible spellings of a word's plural."""
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
    """Read COCO's annotation files; return image id -> classes in the image. A caption that is no text is left out with a warning.

    Raises:
        ValueError: for a file that is not COCO's, or a category that the synonyms file lacks.
    """
    objects: dict[str, set[str]] = {}
    for file in instances:
        document = read_coco(file, "category_id")
        objects |= {str(image["id"]): set() for image in document.get("images", []) if str(image["id"]) not in objects}
        names = {category["id"]: category["name"].lower() for category in document.get("categories", [])}
        for annotation in document["annotations"]:
            name = names.get(annotation["category_id"]) if isinstance(annotation["category_id"], int | str) else None
            name = annotation["category_id"] if name is None else name
            if not isinstance(name, str) or name not in words.object_of:
                raise ValueError(f"{file}: the category {name!r} is not in the synonyms file")
            objects.setdefault(str(annotation["image_id"]), set()).add(words.object_of[name])
    for file in captions:
        for annotation in read_coco(file, "caption")["annotations"]:
            id, caption = str(annotation["image_id"]), annotation["caption"]
            if not isinstance(caption, str):
                logger.warning("%s: a caption of image %s should be text, got %.100r; it is left out", file, id, caption)
                caption = ""
            objects.setdefault(id, set()).update(name for _, name in words.find(caption))
    return objects


def read_coco(file: str | Path, field: str) -> dict[str, Any]:
    """Return the content of an annotation file whose annotations have `field`. ValueError for any other file."""
    wanted = {"annotations": ("image_id", field), "images": ("id",), "categories": ("id", "name")}
    try:
        document = parse_json(read_utf8(Path(file)), file)
        lists = {name: document[name] if name == "annotations" else document.get(name, []) for name in wanted}
        good = all(keys <= entry.keys() for name, entries in lists.items() for keys in [set(wanted[name])] for entry in entries)
        good = good and all(isinstance(entry[wanted[name][0]], int | str) for name, entries in lists.items() for entry in entries)
        good = good and all(isinstance(category["name"], str) for category in lists["categories"])
    except (ValueError, KeyError, TypeError, AttributeError):
        good = False
    if not good:
        raise ValueError(
            f"{file} is no annotation file of COCO: expected 'annotations' with image_id and {field}, 'images' with id and 'categories' "
            "with id and name"
        )
    return document


def photos(instances: Sequence[Path], folder: Path, count: int | None) -> dict[str, Path]:
    """Return image id -> file of the photos that COCO's instances files list and that are in the folder, or of `count` of them.

    Raises:
        ValueError: for a folder with fewer of these photos.
    """
    listed = [image for file in instances for image in read_coco(file, "category_id").get("images", [])]
    if not all(isinstance(image.get("file_name"), str) for image in listed):
        raise ValueError(f"{instances[0]}: expected a file_name for each of its 'images'")
    files = {str(image["id"]): Path(inside(folder, image["file_name"])) for image in listed}
    present = {id: file for id, file in files.items() if file.is_file()}
    if not present or (count is not None and count > len(present)):
        raise ValueError(
            f"{folder} holds {len(present)} of the {len(files)} photos that {instances[0]} lists; expected {count or 'at least 1'}"
        )
    chosen = sorted(present) if count is None else random.Random(0).sample(sorted(present), count)
    return {id: present[id] for id in chosen}


@dataclass(frozen=True)
class CaptionResult:
    """CaptionResult holds the mentions of a caption."""

    image_id: str
    mentions: list[tuple[str, str]]
    """(word, class)."""
    hallucinated: list[tuple[str, str]]
    """The mentions whose class is not in the image."""
    length: int
    """Number of words, split at white space."""


@dataclass(frozen=True)
class ChairScore:
    """ChairScore holds shares in [0, 1]."""

    chair_i: float | None
    """Share of hallucinated mentions; None if no caption mentions an object."""
    chair_s: float
    """Share of captions with a hallucinated object."""
    mean_length: float
    """Words per caption: short captions hallucinate less."""
    mentions_per_caption: float
    captions: list[CaptionResult]


def score_chair(words: CocoWords, objects: Mapping[str, set[str]], captions: Mapping[str, str]) -> ChairScore:
    """Score captions, given by image id.

    Raises:
        ValueError: without captions, or for images without annotations, which are named.
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
    mentioned, wrong = (sum(len(getattr(result, name)) for result in results) for name in ("mentions", "hallucinated"))
    return ChairScore(
        chair_i=wrong / mentioned if mentioned else None,
        chair_s=statistics.fmean(bool(result.hallucinated) for result in results),
        mean_length=statistics.fmean(result.length for result in results),
        mentions_per_caption=mentioned / len(results),
        captions=results,
    )


def eval_chair(run: Run, words: CocoWords, objects: Mapping[str, set[str]], images: Mapping[str, Path | None], prompt: str | None) -> Row:
    """Measure CHAIR.

    Args:
        objects: image id -> classes in the image.
        images: image id -> file of each image to describe; None for finished captions.
        prompt: None for finished captions, which do not tell their prompt.
    """

    def score(answers: list[Answer]) -> tuple[list[Row], Row, list[str]]:
        scored = score_chair(words, objects, {id: answer.final for id, answer in zip(images, answers, strict=True)})
        rows = [
            asdict(caption) | {"in_image": sorted(objects[caption.image_id]), "caption": answer.text, "error": answer.error}
            for caption, answer in zip(scored.captions, answers, strict=True)
        ]
        notes = [] if prompt is None else [f"asked with {prompt!r}; CHAIR prescribes no words"]
        notes.append(f'plurals, spaces and double words are found as {__name__} says; the released script does not count "a bus"')
        return rows, vars(scored) | {"captions": len(rows)}, notes

    seen = {id: sorted(names) for id, names in objects.items() if prompt is None or id in images}
    prompts = [Prompt.about(id, None if file is None else str(file), prompt or "") for id, file in images.items()]
    data, settings = {"objects": seen, "words": words.object_of}, {} if prompt is None else {"prompt": prompt}
    refused = "they count as captions without objects"
    return run.measure(NAME, prompts, data, score, decoding="CHAIR prescribes none", refused=refused, **settings)


def measured(result: Row, rows: list[Row]) -> Measured:
    units = [f"{row['image_id']}: {row['in_image']}" for row in rows]
    wrong, mentions = (np.array([len(row[name]) for row in rows]) for name in ("hallucinated", "mentions"))
    figures: dict[str, Figure] = {"chair s": Tally.of(units, wrong > 0, 1), "chair length": Given(result["mean_length"])}
    if mentions.any():
        figures["chair i"] = Tally.of(units, wrong, mentions)
    return Measured(f"{len(rows)} captions", figures)
