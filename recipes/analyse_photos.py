"""The paper's analyses of VIG on real photos: what fits the photo, who looks at it, who believes the text.

    python recipes/train_llava_mof_vig.py --config recipes/configs/smollm2_photos.yaml --data_dir DATA --rows interleaved+vig
    python recipes/analyse_photos.py runs/smollm2_photos/seed-0/align-interleaved \\
        runs/smollm2_photos/seed-0/finetune-interleaved+vig --data_dir DATA

- VIG and attention are those of one caption each of the photos that training never saw. The partly matching and the conflicting
  image are other such photos, whose captions share most and fewest words with it (see `mof vig image-match --help`).
- The questions ask of COCO's photos for an object that is there and for one that is not, as its instances say; the false
  statement before a question claims the opposite. Stage 2 sees these photos, but its records speak of none of these objects.
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from rich.console import Console

from mof.data.records import images_of
from mof.evals.chair import read_coco
from study.run_data import read_run_data
from study.settings import read_setting
from vig.analyses.comparison import compare_models
from vig.analyses.image_match import with_other_images

CONFIG = Path(__file__).parent / "configs/smollm2_photos.yaml"
INSTANCES, PHOTOS = "coco/instances_train.json", "coco/train2017"
console = Console()


def one_per_image(groups: Mapping[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Of the records on an image only the first, in all groups."""
    first = {record["image"]: i for i, record in reversed(list(enumerate(groups["matching"])))}
    return {name: [records[i] for i in sorted(first.values())] for name, records in groups.items()}


def object_questions(instances: Path, photos: Path, records: Sequence[Mapping[str, Any]], rng: np.random.Generator) -> list[dict[str, Any]]:
    """A pair for each photo: is an object there that is, and one that is not. Left out are photos without an object that their
    records do not speak of."""
    document = read_coco(instances, "category_id")
    names = {category["id"]: category["name"] for category in document["categories"]}
    present: dict[int, set[str]] = {}
    for annotation in document["annotations"]:
        present.setdefault(annotation["image_id"], set()).add(names[annotation["category_id"]])
    told: dict[str, str] = {}
    for record in records:
        for image in images_of(record):
            told[Path(image).name] = told.get(Path(image).name, "") + json.dumps(record["conversations"])
    questions = []
    for image in document["images"]:
        file, seen = image["file_name"], present.get(image["id"], set())
        fresh = [name for name in sorted(names.values()) if not re.search(rf"\b{name}\b", told.get(file, ""))]
        there, not_there = [name for name in fresh if name in seen], [name for name in fresh if name not in seen]
        if there and not_there:
            yes, no = str(rng.choice(there)), str(rng.choice(not_there))
            shown = {"pair": file, "image": str(photos / file), "options": ["Yes", "No"]}
            questions += [
                shown | {"question": asked(yes), "answer": "Yes", "false_statement": f"There is no {yes} in the image."},
                shown | {"question": asked(no), "answer": "No", "false_statement": f"There is a {no} in the image."},
            ]
    return questions


def asked(name: str) -> str:
    """As in the records of stage 2."""
    return f"Is there a {name} in the image? Answer yes or no."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help="folders of saved models")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="what the paths of the training config are relative to")
    parser.add_argument("--seed", type=int, default=0, help="of the images and objects drawn")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    records = read_run_data(read_setting(CONFIG).data, args.data_dir)
    groups = one_per_image(with_other_images(records.held_out, args.seed))
    rng = np.random.default_rng(args.seed)
    questions = object_questions(args.data_dir / INSTANCES, args.data_dir / PHOTOS, records.finetune, rng)
    found = compare_models(args.models, groups, questions)
    console.print(*found.tables())
    if args.output:
        args.output.write_text(json.dumps(found.figures(), indent=1) + "\n")


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
