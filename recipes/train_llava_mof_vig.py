"""Join two frozen encoders to a language model: align -> score -> select -> finetune -> evaluate.

These commands run the embedded miniature, then the four studies on it:
    python recipes/train_llava_mof_vig.py
    python recipes/train_llava_mof_vig.py --compare fusion --config recipes/configs/miniature_short.yaml --output runs/fusion
    python recipes/train_llava_mof_vig.py --compare layers --config recipes/configs/miniature_short.yaml --output runs/layers
    python recipes/train_llava_mof_vig.py --compare selection --seeds 0 1 2 --output runs/selection
    python recipes/train_llava_mof_vig.py --compare noise --seeds 0 1 2 3 4 --output runs/noise

These commands run a real language model on real photos, then plan and run LLaVA-1.5 on eight GPUs:
    python recipes/train_llava_mof_vig.py --config recipes/configs/smollm2_photos.yaml --data-dir DATA
    python recipes/train_llava_mof_vig.py --config recipes/configs/llava15_7b.yaml --dry-run
    accelerate launch --config_file recipes/configs/launch/fsdp2.yaml recipes/train_llava_mof_vig.py \\
        --config recipes/configs/llava15_7b.yaml --data-dir DATA --rows interleaved+vig --output runs/llava15_7b

These commands plan and run it on a single GPU of 24 GiB, with LoRA on a language model in 4 bits (QLoRA):
    python recipes/train_llava_mof_vig.py --config recipes/configs/llava15_7b_qlora.yaml --dry-run --devices 1 --gpu-memory 24
    python recipes/train_llava_mof_vig.py --config recipes/configs/llava15_7b_qlora.yaml --data-dir DATA --rows interleaved+vig

study/row_run.py holds the stages of a row. recipes/predictions.md holds the predictions for each study, which were written down before
its rows were run.
"""

import argparse
import dataclasses
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from mof.miniature import write_dataset
from study.command import Options, run_recipe
from study.page import write_run_page
from study.plan import plan
from study.plan_tables import plan_tables
from study.plots import plot_noise, plot_selection, plot_study
from study.result_tables import bars, contrasts, study_tables
from study.row_run import RowRun, console
from study.rows import COMPARISONS, Row, table_rows
from study.run_data import RunData, read_run_data
from study.run_folder import RunFolder
from study.settings import Setting, identity, read_setting
from study.ways import NOISE


def main() -> None:
    args = arguments()
    # On CPUs, processes work together only with `cpu=True`. If one of them has more to do, the others wait for up to seven days.
    PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))
    console.quiet = not PartialState().is_main_process
    setting = read_setting(args.config)
    setting.strict |= args.strict
    if args.dry_run:
        console.print(plan_tables(plan(setting, devices=args.devices), args.gpu_memory))
        return
    if args.quick and setting.data.scenes:
        setting.data.scenes = setting.data.scenes.twentieth()
    all_rows = COMPARISONS[args.compare](setting) if args.compare else table_rows(setting)
    rows = chosen_rows(args.rows, all_rows)
    belongs_to = {"setting": identity(setting), "data_dir": str(args.data_dir.resolve())}
    records = {} if setting.data.scenes else {"finetune": read_run_data(setting.data, args.data_dir)}  # a mistyped path leaves no folder
    folder = RunFolder(args.output or Path("runs") / setting.name, belongs_to, resume=args.resume)
    if setting.data.scenes:
        records = drawn_records(setting, all_rows, folder)
    elif replaced := records["finetune"].mix:
        console.print("detailed descriptions replaced by captions:", replaced)
    results = folder.read("results.json", {"rows": []})["rows"]
    for seed in args.seeds:
        for row in rows:
            console.rule(f"{row.name}, seed {seed}")
            results = [old for old in results if (old["name"], old["seed"]) != (row.name, seed)]
            results.append(RowRun(row, setting, records[row.mix], folder, seed)())
            folder.write("results.json", {"rows": results})
    show(results, args.compare, folder)
    if args.quick:
        console.print("--quick trains on a twentieth of the miniature, to see that everything works: its figures mean nothing")
    if not args.compare and records["finetune"].pairs and PartialState().is_main_process:
        page = folder.path("run.html")
        write_run_page(page, results, records["finetune"].pairs, sorted(folder.folder.glob("seed-*/vig-*.html")))
        console.print(f"all of this on a page: {page}", soft_wrap=True)


def drawn_records(setting: Setting, rows: list[Row], folder: RunFolder) -> dict[str, RunData]:
    """Draw the miniature's images and records, unless they are drawn already. Return mix -> records, for the mixes of the study's rows."""
    scenes = dataclasses.asdict(setting.data.scenes)
    noise, seed = scenes.pop("noise"), scenes.pop("seed")
    mixes = {row.mix: noise if row.noise is None else NOISE[row.noise] for row in rows}
    name, later = ("data", 0) if set(mixes) == {"finetune"} else ("data-noise", 1)  # the study looks at pairs that nothing was tried on

    def draw(path: Path) -> None:
        if PartialState().is_main_process:
            write_dataset(path, **scenes, seed=seed + later, mixes=mixes, progress=True)

    folder.stage(name, draw)
    return {mix: read_run_data(dataclasses.replace(setting.data, finetune=[f"{mix}.json"]), folder.path(name)) for mix in mixes}


def chosen_rows(names: list[str] | None, rows: list[Row]) -> list[Row]:
    """Return the rows of the run or study that --rows names, or all rows without --rows."""
    if unknown := set(names or []) - {row.name for row in rows}:
        raise ValueError(f"no rows {sorted(unknown)}; this run has {', '.join(row.name for row in rows)}")
    return [row for row in rows if not names or row.name in names]


def show(results: list[dict[str, Any]], compare: str | None, folder: RunFolder) -> None:
    console.print(*study_tables(results))
    for row in results:
        if "held_out" in row:
            console.print(row["name"], "on held-out captions:", row["held_out"])
    if results[0]["by_pattern"]:
        console.print(contrasts(results) if compare == "noise" else bars(results))
        if compare == "fusion":
            console.print(contrasts(results, "name", ("interleaved", "clip")))
        if PartialState().is_main_process:
            plot = {"selection": plot_selection, "noise": plot_noise}.get(compare or "", plot_study)
            console.print("picture:", *plot(results, folder.path("plots")), soft_wrap=True)
    console.print(f"results: {folder.path('results.json')}", soft_wrap=True)


def arguments() -> argparse.Namespace:
    options = Options(__doc__)
    here = Path(__file__).parent / "configs"
    options.add_argument("--config", type=Path, default=here / "miniature.yaml", help=f"one of {here}/*.yaml, or your own")
    options.data_folder("folder to which the paths in the config are relative")
    options.output("folder of the run; default: runs/NAME of the setting")
    options.add_argument("--rows", nargs="+", help="only these rows of the table")
    options.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of training; every row is trained with each")
    options.add_argument(
        "--compare", choices=COMPARISONS,
        help="a study: every fusion with its controls, every layer of the first encoder, every selection at several shares, or every "
        "selection with several kinds of noise",
    )  # fmt: skip
    options.add_argument("--resume", action="store_true", help="go on with the run in --output")
    options.add_argument(
        "--strict", action="store_true", help="end at the first image that cannot be used, instead of leaving its record out"
    )
    options.add_argument("--dry-run", action="store_true", help="no training: parameters, tokens, memory and steps")
    options.add_argument("--devices", type=int, default=8, help="GPUs to plan for, with --dry-run")
    options.add_argument("--gpu-memory", type=int, default=80, help="GiB of a GPU to plan for, with --dry-run")
    options.add_argument("--quick", action="store_true", help="a twentieth of the miniature, to see that everything works")
    return options.parse_args()


if __name__ == "__main__":
    run_recipe(main)
