"""Repeat the paper's analyses of VIG on real photos: image match, attention to the image, misleading text.

    python recipes/train_llava_mof_vig.py --config recipes/configs/smollm2_photos.yaml --data-dir DATA --rows interleaved+vig
    python recipes/analyse_photos.py runs/smollm2_photos/seed-0/align-interleaved \\
        runs/smollm2_photos/seed-0/finetune-interleaved+vig --data-dir DATA

- VIG and attention are measured on captions of photos that no training has shown, one caption for each photo. The partly matching and
  the conflicting image are other held-out photos, whose captions share most and fewest words with the caption (see
  `mof vig image-match --help`).
- Two questions ask whether an object is in a COCO photo: the first about an object that is there, the second about an object that is
  not. The false statement before a question claims the opposite of the right answer. Stage 2 sees these photos, but its records name
  none of these objects.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mof.data.records import RecordError, images_of, texts_of
from mof.data.rows import RawRecord
from mof.evals.chair import read_coco
from study.command import analyse, analysis_options, run_recipe
from study.run_data import one_per_image, read_run_data
from study.settings import read_setting
from vig.analyses.image_match import with_other_images

CONFIG = Path(__file__).parent / "configs/smollm2_photos.yaml"
INSTANCES, PHOTOS = "coco/instances_train.json", "coco/train2017"


def object_questions(instances: Path, photos: Path, records: Sequence[RawRecord], rng: np.random.Generator) -> list[dict[str, Any]]:
    """Return two questions for each photo: about an object that is there, and about an object that is not.

    A photo is left out if the records name all objects that are there.
    """
    document = read_coco(instances, "category_id")
    names = {category["id"]: category["name"] for category in document["categories"]}
    present: dict[int, set[str]] = {}
    for annotation in document["annotations"]:
        present.setdefault(annotation["image_id"], set()).add(names[annotation["category_id"]])
    told: dict[str, str] = {}
    for record in records:
        for image in images_of(record):
            told[Path(image).name] = told.get(Path(image).name, "") + _words(record)
    questions = []
    for image in document["images"]:
        file, seen = image["file_name"], present.get(image["id"], set())
        fresh = [name for name in sorted(names.values()) if not re.search(rf"\b{name}\b", told.get(file, ""))]
        there, not_there = [name for name in fresh if name in seen], [name for name in fresh if name not in seen]
        if there and not_there:
            for name, answer, claim in ((str(rng.choice(there)), "Yes", "no"), (str(rng.choice(not_there)), "No", "a")):
                questions.append({
                    "pair": file, "image": str(photos / file), "options": ["Yes", "No"], "answer": answer,
                    "question": f"Is there a {name} in the image? Answer yes or no.",  # as in the records of stage 2
                    "false_statement": f"There is {claim} {name} in the image.",
                })  # fmt: skip
    return questions


def _words(record: RawRecord) -> str:
    """Return the questions and answers of a record; training leaves out records that cannot be parsed."""
    try:
        return "\n".join(["", *texts_of(record, "user"), *texts_of(record, "assistant")])
    except RecordError:
        return ""


def main() -> None:
    options = analysis_options(__doc__)
    options.data_folder("folder to which the paths in the training config are relative")
    args = options.parse_args()
    records = read_run_data(read_setting(CONFIG).data, args.data_dir)
    groups = one_per_image(with_other_images(records.held_out, args.seed))
    rng = np.random.default_rng(args.seed)
    questions = object_questions(args.data_dir / INSTANCES, args.data_dir / PHOTOS, records.finetune, rng)
    analyse(args, groups, questions)


if __name__ == "__main__":
    run_recipe(main)
