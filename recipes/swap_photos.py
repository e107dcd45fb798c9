"""Ask whether selection by VIG finds records whose photo was swapped, with SmolLM2 and real photos.

    python recipes/swap_photos.py --data-dir DATA --output runs/swapped --figures swapped.json
    python recipes/swap_photos.py --data-dir DATA --output runs/swapped --resume --seeds 1 2

Stage 1 is that of recipes/configs/smollm2_swapped.yaml. In stage 2, each seed takes 40 % of the COCO records and shifts their
photos among them, and draws another order of the records. Records of a fifth of the photos are held out. Each way to select (--ways)
trains from the same stage 1. It is measured on the held-out records, by their loss with their photo, with another photo, and by the
difference. Rows are trained seed by seed, and a run that is interrupted goes on with --resume. `--seeds` without a number measures stage 1
only.

recipes/predictions.md holds the predictions, which were written down before the first run.
"""

import dataclasses
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import ttest_1samp

from encoders.console import Console
from encoders.whole_files import write_json
from mof.data.records import images_of
from mof.data.rows import RawRecord
from mof.evals.text_tables import TextTable
from study.command import Options, run_recipe
from study.row_run import RowRun, load
from study.rows import Row
from study.run_data import RunData, one_per_image, read_run_data, spaced
from study.run_folder import RunFolder
from study.settings import Setting, identity, read_setting
from vig import load_scores
from vig.analyses.comparison import match_table
from vig.analyses.image_match import auroc, image_match, right_against_other_image, with_other_images
from vig.scoring.calibration import with_swapped_images

WAYS = ("vig", "everything", "random", "grounded", "vig-samples", "lowest-loss")
SHARE, HELD_OUT = 0.4, 0.2
MEASURES = {"own photo": "loss_right_photo", "other photo": "loss_other_photo", "difference": "mean_vig"}


def with_swaps(data: RunData, seed: int) -> RunData:
    """Return the data with swapped photos in `SHARE` of the stage 2 records, and with the COCO records to measure on as held out.

    The seed draws the swapped records and the order of all records. Text-only records are neither swapped nor held out.
    """
    photos = sorted({image for record in data.finetune for image in record["images"]})
    unseen = set(spaced(photos, HELD_OUT))
    held_out = [record for record in data.finetune if not unseen.isdisjoint(record["images"])]
    order = np.random.default_rng([seed, 3]).permutation(len(data.finetune))
    records = [dict(data.finetune[i]) for i in order if unseen.isdisjoint(data.finetune[i]["images"])]
    drawn = [record for record in records if record["images"]]
    drawn = sorted(drawn[: round(SHARE * len(drawn))], key=lambda record: record["images"])
    shifted = [drawn[(i + len(drawn) // 2) % len(drawn)]["images"] for i in range(len(drawn))]  # half a round away lies another photo
    for record, images in zip(drawn, shifted, strict=True):
        if record["images"] == images:
            raise ValueError(f"more than half of the {len(drawn)} drawn records show {images[0]}, so it cannot be swapped in all of them")
        record["images"] = images
    swapped = {record["id"] for record in drawn}
    truth = {record["id"]: {"noise": "swapped" if record["id"] in swapped else None} for record in records}
    mixed = [records[i] for i in np.random.default_rng([seed, 4]).permutation(len(records))]
    return dataclasses.replace(data, align=[], finetune=mixed, held_out=held_out, truth=truth)


def measure_aligned(folder: Path, captions: Sequence[RawRecord], held_out: Sequence[RawRecord], setting: Setting) -> dict[str, Any]:
    """Return the figures of the model of stage 1: the VIG of captions, and the losses of held-out records of stage 2.

    A caption of each photo is scored with this photo, with another photo at random, and with a photo that has alike captions.
    """
    model, processor = load(folder)
    groups = one_per_image(with_other_images(captions))
    shown = at_random(groups["matching"]) | {"alike": groups["partly matching"]}
    rows = image_match(model, processor, shown, **options(setting))
    Console().print(match_table(rows, folder.name))
    held = right_against_other_image(model, processor, held_out, **options(setting))
    return {"captions": {name: dataclasses.asdict(row) for name, row in rows.items()}, "held_out": held}


def measure_records(folder: Path, records: Sequence[RawRecord], output: Path, setting: Setting) -> dict[str, Any]:
    """Return AUROC of the VIG of records with their photo against the same records with another photo, for each kind of record.

    The kind is the last part of the id: a caption, questions about objects, or a question where an object is. Every second photo counts.
    """
    half = set(spaced(sorted({image for record in records for image in images_of(record)}), 0.5))
    shown = at_random([record for record in records if not half.isdisjoint(images_of(record))])
    rows = image_match(*load(folder), shown, output, **options(setting))
    Console().print(match_table(rows, folder.name))
    own, other = ({score.id: score.vig for score in load_scores(output / name)} for name in shown)
    kinds = {id: id.rpartition("-")[2] for id in sorted(own.keys() & other.keys())}
    ids = {kind: [id for id in kinds if kinds[id] == kind] for kind in sorted(set(kinds.values()))} | {"all": list(kinds)}
    return {kind: auroc(np.array([own[id] for id in same]), np.array([other[id] for id in same])) for kind, same in ids.items()}


def at_random(records: Sequence[RawRecord]) -> dict[str, Sequence[RawRecord]]:
    """Return the records with their own photos, and with photos of other records that are drawn."""
    order = np.random.default_rng(0).permutation(len(records))
    return {"own": records, "at random": with_swapped_images([records[i] for i in order], None)}


def options(setting: Setting) -> dict[str, int]:
    return {"batch_size": setting.score_batch_size, "max_length": setting.max_length}


def tables(rows: Sequence[Mapping[str, Any]]) -> Iterator[TextTable]:
    """Yield the losses of each way in nats, and its differences to `random` and `everything` with 95 % by Student's t over seeds."""
    values = {(row["selection"], row["noise"]): [row["held_out"][key] for key in MEASURES.values()] for row in rows}
    ways = list(dict.fromkeys(row["selection"] for row in rows))
    cells = {}
    for way in ways:
        same = [row for row in rows if row["selection"] == way]
        means = np.mean([values[way, row["noise"]] for row in same], axis=0)
        tokens = statistics.fmean(row["active_tokens"] for row in same)
        cells[way] = [*(f"{mean:.3f}" for mean in means), f"{tokens:,.0f}", str(len(same))]
    yield TextTable("loss of held-out COCO records, nats, mean of the seeds", [*MEASURES, "tokens", "seeds"], cells, "way")
    for control in ("random", "everything"):
        cells = {}
        for way in ways:
            seeds = [noise for name, noise in values if name == way and (control, noise) in values]
            if seeds and way != control:
                cells[way] = [*map(_mean, np.transpose([np.subtract(values[way, seed], values[control, seed]) for seed in seeds]))]
        yield TextTable(f"minus {control}, nats [95 % over seeds]", list(MEASURES), cells, "way")


def _mean(values: np.ndarray) -> str:
    mean = f"{values.mean():+.3f}"
    if len(values) < 2:
        return mean
    low, high = ttest_1samp(values, 0).confidence_interval(0.95)
    return f"{mean} [{low:+.3f}, {high:+.3f}]"


def main() -> None:
    line = Options(__doc__)
    line.add_argument("--config", type=Path, default=Path(__file__).parent / "configs/smollm2_swapped.yaml")
    line.data_folder("folder to which the paths in the config are relative")
    line.output("folder of the run", default=Path("runs/swapped"))
    line.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS, help="selections of stage 2, as in study/ways.py")
    line.add_argument(
        "--seeds", type=int, nargs="*", default=[0, 1, 2], help="draw swaps and the order of records; without a number: no stage 2"
    )
    line.add_argument("--figures", type=Path, help="JSON file for the figures")
    line.add_argument("--resume", action="store_true", help="go on with the run in --output")
    args = line.parse_args()
    setting, console = read_setting(args.config), Console()
    data = read_run_data(setting.data, args.data_dir)
    folder = RunFolder(args.output, {"setting": identity(setting), "data_dir": str(args.data_dir.resolve())}, resume=args.resume)
    fused = Row(setting.fusion, tuple(setting.encoders), setting.fusion)
    aligned = RowRun(fused, setting, dataclasses.replace(data, held_out=[]), folder, 0)
    aligned.stage("align", fused.aligned, aligned.align)
    own = aligned.path("align", fused.aligned)
    before = folder.stage("before", lambda _: measure_aligned(own, data.held_out, with_swaps(data, 0).held_out, setting))
    records = folder.stage("records", lambda stage: measure_records(own, data.finetune, stage, setting))
    rows: list[dict[str, Any]] = folder.read("results.json", {"rows": []})["rows"]
    for seed in args.seeds:
        swapped, noise = with_swaps(data, seed), f"swapped-{seed}"
        for way in args.ways:
            row = dataclasses.replace(fused, name=f"{way} {noise}", selection=way, noise=noise, like=fused.name, stored=True)
            rows = [old for old in rows if old["name"] != row.name] + [RowRun(row, setting, swapped, folder, 0)()]
            folder.write("results.json", {"rows": rows})
    aurocs = {
        file.parent.name.removeprefix(f"score-{fused.aligned}-"): json.loads(file.read_text(encoding="utf-8"))["auroc"]["swapped"]
        for file in sorted(folder.folder.glob("seed-0/score-*/stage.json"))
    }
    if rows:
        console.print(*tables(rows))
    console.print("AUROC of each kind of record:", {kind: figure[0] for kind, figure in records.items()})
    console.print("AUROC against swapped records:", aurocs)
    if args.figures:
        write_json(args.figures, {"before": before, "records": records, "rows": rows, "auroc": aurocs})


if __name__ == "__main__":
    run_recipe(main)
