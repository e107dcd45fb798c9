"""Measure, without training, which kinds of noise VIG tells from true answers, on records of the miniature that no model has seen.

    python recipes/measure_noise.py runs/noise/seed-0/align-interleaved runs/noise/seed-1/align-interleaved --nulls blur drop

Each model scores the same records. Each of the six kinds of noise of `mof.miniature.noise` is in an eighth of the records, and a quarter
has no noise. Records that ask for a yes or no are left out, because none of them has noise. The measure is the area under the ROC curve:
the probability that a record (or word) that the image supports has a higher score than a record (or word) that the image does not support.
"""

import tempfile
from pathlib import Path

from encoders.console import Console
from encoders.whole_files import write_json
from mof.data import read_records
from mof.miniature import write_dataset
from mof.miniature.noise import KINDS
from study.command import Options, run_recipe
from study.run_data import read_truth
from study.separation import separation, separation_tables
from vig import score
from vig.nulls import NULL_NAMES
from vig.saved_models import load_model
from vig.selection.measures import MEASURES

console = Console()
YES_NO = frozenset(("Yes.", "No."))


def main() -> None:
    options = Options(__doc__)
    options.add_argument("models", type=Path, nargs="+", help="folders of saved models")
    options.add_argument("--nulls", nargs="+", choices=NULL_NAMES, default=["blur"], help="null images")
    options.add_argument("--records", type=int, default=2000, help="records to draw; a tenth of them is text only")
    options.add_argument("--seed", type=int, default=2, help="seed of the records; the recipe of training uses 0 and 1")
    options.output("JSON file for the figures")
    args = options.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        mixes = {"finetune": dict.fromkeys(KINDS, 0.125)}
        write_dataset(data, align=0, finetune=args.records, pairs=0, seed=args.seed, mixes=mixes, progress=True)
        drawn, truth = read_records(data / "finetune.json"), read_truth(data / "finetune.json")
        records = [record for record in drawn if YES_NO.isdisjoint(turn["value"] for turn in record["conversations"])]
        for number, path in enumerate(args.models):
            model, processor = load_model(path)
            for null in args.nulls:
                target = Path(folder) / f"scores-{number}-{null}"
                scores = score(
                    model,
                    processor,
                    records,
                    target,
                    null,
                    image_folder=data / "images",
                    batch_size=64,
                    measures=("loss", "logit", "entropy"),
                )
                named = [name for name, measure in MEASURES.items() if not measure.nulls or null in measure.nulls]
                rows.append({"model": str(path), "null": null, "table": separation(scores, records, truth, named)})
    console.print(*separation_tables(rows))
    if args.output:
        write_json(args.output, rows)


if __name__ == "__main__":
    run_recipe(main)
