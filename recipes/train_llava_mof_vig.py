"""Two frozen encoders into a language model: align -> score -> select -> finetune -> evaluate.

The embedded miniature, then the two studies on it:
    python recipes/train_llava_mof_vig.py
    python recipes/train_llava_mof_vig.py --compare fusion --seeds 0 1 2 --output_dir runs/fusion
    python recipes/train_llava_mof_vig.py --compare selection --seeds 0 1 2 --output_dir runs/selection

A real language model on real photos; LLaVA-1.5 on eight GPUs, planned and run:
    python recipes/train_llava_mof_vig.py --config recipes/configs/smollm2_photos.yaml --data_dir DATA
    python recipes/train_llava_mof_vig.py --config recipes/configs/llava15_7b.yaml --dry_run
    accelerate launch --config_file recipes/configs/launch/fsdp2.yaml recipes/train_llava_mof_vig.py \\
        --config recipes/configs/llava15_7b.yaml --data_dir DATA --rows interleaved+vig --output_dir runs/llava15_7b
"""

import argparse
import dataclasses
import math
import os
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import PartialState
from rich.console import Console
from transformers import AutoModelForImageTextToText, AutoProcessor, set_seed

from encoders import build_encoder
from mof import MoFForConditionalGeneration, MoFProcessor
from mof.adapter import build_mixer
from mof.evals.answerers import LocalModel
from mof.evals.mmvp import measure
from mof.language_models import load_language_model
from mof.miniature import write_dataset
from mof.miniature.misleading import misleading_questions
from study.plan import plan
from study.plots import plot_selection, plot_study
from study.rows import COMPARISONS, Row, table_rows
from study.run_data import RunData, read_run_data
from study.run_folder import RunFolder
from study.settings import Setting, Stage, read_setting
from study.study_table import study_tables
from vig import Scores, Selection, load_scores, random_selection, score, select
from vig.analyses.image_match import right_against_other_image
from vig.analyses.misleading_text import misleading_text
from vig.nulls import NULLS
from vig.report import write_report
from vig.training import finetune

console = Console()


# --- data
def read_data(setting: Setting, data_dir: Path, run: Callable[[], RunFolder]) -> tuple[RunFolder, RunData]:
    """The run's folder and its records. Files are read first, so that a mistyped path leaves no folder behind."""
    if not setting.data.scenes:
        records = read_run_data(setting.data, data_dir)
        return run(), records
    folder, draw = run(), dataclasses.asdict(setting.data.scenes)
    folder.stage("data", lambda path: write_dataset(path, **draw) if PartialState().is_main_process else None)
    return folder, read_run_data(setting.data, folder.path("data"))


# --- the stages. Each fills a folder of its own and is not done again on --resume.
def build(setting: Setting, row: Row) -> tuple[MoFForConditionalGeneration, MoFProcessor]:
    """A new model: pretrained encoders and language model, random adapters."""
    llm, tokenizer = load_language_model(setting.llm, torch.bfloat16 if setting.bf16 else torch.float32)
    encoders = {}
    for name in row.encoders:  # the same encoder twice gets another name, and an adapter of its own
        encoders[name if name not in encoders else f"{name}_again"] = build_encoder(**setting.encoders[name])
    options = {"pool": tuple(setting.pool), "grid": setting.grid} | dict(row.options)
    mixer = build_mixer(row.fusion, encoders, llm.config.get_text_config().hidden_size, **options)
    model = MoFForConditionalGeneration.from_parts(mixer, llm, tokenizer)
    return model, MoFProcessor.from_parts(model, tokenizer)


def load(folder: Path) -> tuple[MoFForConditionalGeneration, MoFProcessor]:
    """A saved model, on the CPU: the trainer knows where it belongs, or how it is sharded."""
    return AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)


def train(
    model: MoFForConditionalGeneration, processor: MoFProcessor, records: list[dict[str, Any]], stage: Stage, setting: Setting,
    folder: Path, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Train what requires gradient; save model and processor into `folder`. Goes on from the folder's last checkpoint."""
    per_device, accumulation = stage.split(PartialState().num_processes)
    steps = stage.steps(len(records))
    facts = finetune(
        model, processor, records, folder, gradient_checkpointing=stage.gradient_checkpointing,
        trainer_options={"max_length": setting.max_length, "strict": setting.strict}, seed=seed, bf16=setting.bf16,
        learning_rate=stage.learning_rate, weight_decay=stage.weight_decay, warmup_steps=math.ceil(stage.warmup_ratio * steps),
        num_train_epochs=stage.epochs, max_steps=stage.max_steps, per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation, logging_steps=max(1, steps // 10), save_steps=max(1, steps // 4),
        dataloader_num_workers=setting.workers,
    )  # fmt: skip
    if left_out := facts["left_out"]:
        console.print(f"{left_out} times a record was left out, because its image cannot be used; the log names them")
    return {name: facts[name] for name in ("seconds", "active_tokens", "losses")}


def run_row(row: Row, setting: Setting, records: RunData, run: RunFolder, seed: int) -> dict[str, Any]:
    """All stages of one row; returns its line of results.json."""

    def align(folder: Path) -> dict[str, Any]:
        set_seed(seed)
        model, processor = build(setting, row)
        model.requires_grad_(False)
        for name, parameter in model.mixer.named_parameters():
            parameter.requires_grad_(not name.startswith("encoders."))
        facts = train(model, processor, records.align, setting.align, setting, folder, seed)
        return facts | {"visual_tokens": model.mixer.tokens_per_image} | held_out_vig(model, processor, records, setting)

    def choose(folder: Path) -> dict[str, Any]:
        start = time.monotonic()
        model, processor = load(aligned)
        score(
            model.to(PartialState().device), processor, records.finetune, folder, setting.null, batch_size=setting.score_batch_size,
            max_length=setting.max_length,
        )  # fmt: skip
        seconds = time.monotonic() - start
        run.write("finetune.json", records.finetune)  # as they were scored, for `mof vig report`
        if PartialState().is_main_process:
            report = run.path(f"seed-{seed}/vig-{row.aligned}.html")
            write_report(report, select(load_scores(folder), keep=setting.keep), records.finetune, image_folder=".")
            console.print(f"what was scored, to look at: {report}")
        return {"seconds": seconds}

    def finetune(folder: Path) -> dict[str, Any]:
        set_seed(seed)
        model, processor = load(aligned)
        model.requires_grad_(True)
        model.mixer.encoders.requires_grad_(False)
        facts = train(model, processor, chosen, setting.finetune, setting, folder, seed)
        return facts | evaluate(model, processor, records, setting)

    def mislead(folder: Path) -> dict[str, Any]:
        questions = misleading_questions(setting.data.scenes.pairs, np.random.default_rng([seed, 1]))
        model, processor = load(run.path(f"seed-{seed}/finetune-{row.name}"))
        return {"misled_accuracy": misleading_text(model, processor, questions, progress=True)["misled"].question_accuracy}

    aligned, scored = run.path(f"seed-{seed}/align-{row.aligned}"), run.path(f"seed-{seed}/score-{row.aligned}")
    facts = [run.stage(f"seed-{seed}/align-{row.aligned}", align)]
    chosen = records.finetune
    if row.selection:
        facts.append(run.stage(f"seed-{seed}/score-{row.aligned}", choose))
        selection = select_by(row.selection, load_scores(scored), row.keep or setting.keep, seed)
        console.print(f"{row.name}: {selection.summary()}")
        chosen = selection.apply(records.finetune)
    facts.append(run.stage(f"seed-{seed}/finetune-{row.name}", finetune))
    measured = {key: value for key, value in facts[-1].items() if key not in ("seconds", "active_tokens", "losses")}
    if row.misled:
        measured |= run.stage(f"seed-{seed}/misled-{row.name}", mislead)
    return {
        "name": row.name, "selection": row.selection, "keep": row.keep, "visual_tokens": facts[0]["visual_tokens"], "active_tokens": facts[-1]["active_tokens"],
        "seconds": round(sum(fact["seconds"] for fact in facts), 1), "seed": seed, **measured,
        "losses": {"align": facts[0]["losses"], "finetune": facts[-1]["losses"]},
    } | ({"aligned": facts[0]["held_out"]} if "held_out" in facts[0] else {})  # fmt: skip


def select_by(way: str, scores: Scores, keep: float, seed: int) -> Selection:
    """One of `study.rows.WAYS`."""
    if way == "vig-tokens":
        return select(scores, keep=1, token_keep=keep)
    selection = select(scores, keep=keep, token_threshold=None if way.endswith("samples") else "shared")
    if way.startswith("random"):
        return random_selection(scores, selection, seed, "samples" if way == "random-samples" else "both")
    return selection


# --- measuring
def evaluate(model: MoFForConditionalGeneration, processor: MoFProcessor, records: RunData, setting: Setting) -> dict[str, Any]:
    """Accuracy on the held-out pairs, where there are any, and VIG on held-out captions, where there are any."""
    accuracy: dict[str, Any] = {"pair_accuracy": None, "question_accuracy": None, "by_pattern": {}}
    if records.pairs:
        answerer = LocalModel(model, processor, "the held-out pairs", batch_size=64, max_new_tokens=16)
        found = measure(answerer, records.pairs, prompt="question", progress=True)  # the questions name their options
        accuracy = {"pair_accuracy": found.pair_accuracy, "question_accuracy": found.question_accuracy}
        accuracy["by_pattern"] = {pattern: shares["pair_accuracy"] for pattern, shares in found.by_pattern.items()}
    return accuracy | held_out_vig(model, processor, records, setting)


def held_out_vig(model: MoFForConditionalGeneration, processor: MoFProcessor, records: RunData, setting: Setting) -> dict[str, Any]:
    if not records.held_out:
        return {}
    options = {"batch_size": setting.score_batch_size, "max_length": setting.max_length}
    return {"held_out": right_against_other_image(model, processor, records.held_out, **options)}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).parent / "configs"
    parser.add_argument("--config", type=Path, default=here / "miniature.yaml", help=f"one of {here}/*.yaml, or your own")
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="what the config's paths are relative to")
    parser.add_argument("--output_dir", type=Path, help="default: runs/NAME of the setting")
    parser.add_argument("--rows", nargs="+", help="only these rows of the table")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--compare", choices=COMPARISONS, help="a study: every fusion with its controls, or every selection at several shares"
    )
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output_dir")
    parser.add_argument(
        "--strict", action="store_true", help="end at the first image that cannot be used, instead of leaving its record out"
    )
    parser.add_argument("--dry_run", action="store_true", help="no training: parameters, tokens, memory and steps")
    parser.add_argument("--devices", type=int, default=8, help="GPUs to plan for, with --dry_run")
    parser.add_argument("--quick", action="store_true", help="a twentieth of the miniature, to see that everything works")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    # Several processes on CPUs find each other only when asked to; where one of them has more to do, the others wait, however long.
    PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(days=7))
    console.quiet = not PartialState().is_main_process
    setting = read_setting(args.config, **({"strict": True} if args.strict else {}))
    if setting.null not in NULLS:
        raise ValueError(f"{args.config}: null {setting.null!r} is none of {', '.join(NULLS)}")
    if args.dry_run:
        console.print(plan(setting, devices=args.devices))
        return
    if args.quick and setting.data.scenes:
        setting.data.scenes = dataclasses.replace(setting.data.scenes, **{k: v // 20 for k, v in vars(setting.data.scenes).items()})
    rows = COMPARISONS[args.compare](setting) if args.compare else table_rows(setting)
    if unknown := set(args.rows or []) - {row.name for row in rows}:
        raise ValueError(f"no rows {sorted(unknown)}; this run has {', '.join(row.name for row in rows)}")
    rows = [row for row in rows if not args.rows or row.name in args.rows]
    same = {name: value for name, value in dataclasses.asdict(setting).items() if name != "strict"}  # which a resumed run may change
    identity = {"setting": same, "data_dir": str(args.data_dir.resolve())}
    folder = args.output_dir or Path("runs") / setting.name
    run, records = read_data(setting, args.data_dir, lambda: RunFolder(folder, identity, resume=args.resume))
    if records.summary:
        console.print(records.summary)
    results = run.read("results.json", {"rows": []})["rows"]
    for seed in args.seeds:
        for row in rows:
            console.rule(f"{row.name}, seed {seed}")
            results = [old for old in results if (old["name"], old["seed"]) != (row.name, seed)]
            results.append(run_row(row, setting, records, run, seed))
            run.write("results.json", {"rows": results})
    for table in study_tables(results):
        console.print(table)
    for row in results:
        if "held_out" in row:
            console.print(row["name"], "on held-out captions:", row["held_out"])
    if args.compare and PartialState().is_main_process:
        plot = plot_study if args.compare == "fusion" else plot_selection
        plot(results, run.path("plots"))
    console.print(f"results: {run.path('results.json')}")


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers fork after the tokenizer was used
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()  # of loading and saving weights; that of training stays
    try:
        main()
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
