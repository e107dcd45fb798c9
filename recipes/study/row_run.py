"""RowRun trains and measures a row of a run: align, score, select, finetune, evaluate."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from transformers import set_seed

from encoders import FeatureStore, StoredImages, build_encoder, encode_images
from encoders.console import Console
from encoders.saved_models import load_network, load_processor
from mof import MoFForConditionalGeneration, MoFProcessor
from mof.adapter import build_mixer
from mof.evals import mmvp
from mof.evals.answerers import LocalModel
from mof.evals.answering import answer_all
from mof.evals.encoder_worth import encoder_worth
from mof.evals.option_matching import match_answer
from mof.language_models import load_language_model
from mof.miniature.misleading import misleading_questions
from study.page import example_pairs
from study.rows import Row
from study.run_data import RunData
from study.run_folder import RunFolder
from study.separation import separation
from study.settings import Setting, Stage
from study.ways import select_by
from vig import Selection, load_scores, score, select
from vig.analyses.image_match import right_against_other_image
from vig.analyses.misleading_text import misleading_text
from vig.report import write_report
from vig.saved_models import load_in_4bit
from vig.selection.summary import MUCH
from vig.training import finetune
from vig.training.preparation import add_lora

console = Console()
"""The console of a run; a recipe of several processes keeps it quiet in all but the main process."""


@dataclass
class RowRun:
    """RowRun runs the stages of a row with a seed, each in a folder under "seed-N". Rows with the same stage 1 share folder and scores."""

    row: Row
    setting: Setting
    records: RunData
    folder: RunFolder
    seed: int

    def __call__(self) -> dict[str, Any]:
        """Do all stages, and return the row's entry of results.json."""
        row = self.row
        stages = [self.stage("align", row.aligned, self.align)]
        if row.selection not in (None, "everything", "grounded"):
            stages.append(self.stage("score", self.scored, self.score))
        records, told = self.selected(stages[-1].get("auroc", {}))
        stages.append(self.stage("finetune", row.name, lambda folder: self.finetune(folder, records)))
        aligned, tuned = stages[0], stages[-1]
        measured = {key: value for key, value in tuned.items() if key not in ("seconds", "active_tokens", "losses")}
        if row.misled:
            measured |= self.stage("misled", row.name, self.mislead)
        if row.worth:
            measured |= self.stage("worth", row.name, self.weigh)
        return {
            "name": row.name, "selection": row.selection, "keep": row.keep, "noise": row.noise, "visual_tokens": aligned["visual_tokens"],
            "adapter_parameters": aligned["adapter_parameters"], "active_tokens": tuned["active_tokens"],
            "seconds": round(sum(stage["seconds"] for stage in stages), 1), "seed": self.seed,
            **told, **measured, "losses": {"align": aligned["losses"], "finetune": tuned["losses"]},
        } | ({"aligned": aligned["held_out"]} if "held_out" in aligned else {})  # fmt: skip

    def selected(self, aurocs: dict[str, dict[str, float]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Return the records of stage 2, with the tokens that train, and the entries of results.json about a selection by scores.

        Args:
            aurocs: the facts of the scores (`study.separation`), which are printed and returned.
        """
        row, records = self.row, self.records.finetune
        if row.selection in (None, "everything"):
            return records, {}
        if row.selection == "grounded":
            return [record for record in records if self.records.truth[record["id"]]["noise"] is None], {}
        for noise, auroc in aurocs.items():
            console.print(f"AUROC of VIG, records without noise against {noise}: {auroc['vig']:.2f} (0.5 is chance)")
        scores = load_scores(self.path("score", self.scored))
        keep = self.setting.keep if row.keep is None else row.keep
        way = self.heeded(select(scores, keep)) if row.heeds else row.selection
        selection = select_by(way, scores, keep, self.seed)
        summary = selection.summary()
        console.print(f"{row.name}: {summary}")
        told = {
            "selection": way,
            "threshold": summary.threshold,
            "helped_left_out": summary.helped_left_out,
            "negative": float((scores.vig < 0).mean()),
            "auroc": aurocs,
        }
        return selection.apply(records), told

    def heeded(self, rule: Selection) -> str:
        """Return the row's way to select, or the same way with whole samples where the paper's rule warns."""
        if (summary := rule.summary()).helped_left_out < MUCH:
            return str(self.row.selection)
        console.print(f"the paper's rule: {summary}\nso {self.row.name} takes whole samples (heed_warning in the config)")
        return f"{self.row.selection}-samples"

    @property
    def scored(self) -> str:
        """Return the name of the scores, which rows with the same stage 1 and the same records share."""
        return self.row.aligned + self.row.mix.removeprefix("finetune")

    def path(self, stage: str, name: str) -> Path:
        return self.folder.path(f"seed-{self.seed}/{stage}-{name}")

    def stage(self, stage: str, name: str, work: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
        return self.folder.stage(f"seed-{self.seed}/{stage}-{name}", work)

    def align(self, folder: Path) -> dict[str, Any]:
        set_seed(self.seed)
        model, processor = build(self.setting, self.row)
        model.requires_grad_(False)
        for name, parameter in model.mixer.named_parameters():
            parameter.requires_grad_(not name.startswith("encoders."))
        adapters = sum(parameter.numel() for parameter in model.mixer.parameters() if parameter.requires_grad)
        stored = self.stored_images(model, processor)
        facts = train(model, processor, self.records.align, self.setting.align, self.setting, folder, self.seed, stored)
        facts |= {"visual_tokens": model.mixer.tokens_per_image, "adapter_parameters": adapters}
        return facts | held_out_vig(model, processor, self.records, self.setting)

    def stored_images(self, model: MoFForConditionalGeneration, processor: MoFProcessor) -> StoredImages | None:
        """Return the features of all images of both stages, which the first row encodes; None for a row whose encoders run."""
        if not self.row.stored:
            return None
        encoders, view = dict(model.mixer.encoders.items()), processor.image_processor.view
        images = sorted({image for record in [*self.records.align, *self.records.finetune] for image in record["images"]})

        def encode(folder: Path) -> None:
            if PartialState().is_main_process:
                encode_images(images, encoders, folder / "store", embeddings=False, tokens="float16", view=view)

        self.folder.stage("features", encode)
        return StoredImages(FeatureStore(self.folder.path("features/store"), list(encoders)), encoders, view)

    def score(self, folder: Path) -> dict[str, Any]:
        start, setting, records = time.monotonic(), self.setting, self.records.finetune
        model, processor = load(self.path("align", self.row.aligned))
        options = {"batch_size": setting.score_batch_size, "max_length": setting.max_length, "measures": ["loss"]}
        score(model.to(PartialState().device), processor, records, folder, setting.null, **options)
        facts = {"seconds": time.monotonic() - start, "auroc": separation(load_scores(folder), records, self.records.truth)}
        self.folder.write(f"{self.row.mix}.json", records)  # as they were scored, for `mof vig report`
        if PartialState().is_main_process:
            page = self.folder.path(f"seed-{self.seed}/vig-{self.scored}.html")
            selection, named = select(load_scores(folder), keep=setting.keep), str(self.folder.path(f"{self.row.mix}.json"))
            write_report(page, selection, records, image_folder="/", records_name=named)
            console.print(f"the scored records on a page: {page}")
        return facts

    def finetune(self, folder: Path, records: list[dict[str, Any]]) -> dict[str, Any]:
        set_seed(self.seed)
        stage, aligned = self.setting.finetune, self.path("align", self.row.aligned)
        model, processor = load(aligned)
        stored_images = self.stored_images(model, processor)
        if stage.load_in_4bit:
            model = load_in_4bit(aligned, bf16=self.setting.bf16)
        if stage.lora:
            model = add_lora(model, stage.lora)
        else:
            model.requires_grad_(True)
            model.mixer.encoders.requires_grad_(False)
        if self.row.selection == "vig-steps":
            stage = dataclasses.replace(stage, max_steps=stage.steps(len(self.records.finetune)))
        whole = (lambda: load(aligned)[0]) if stage.load_in_4bit else None
        facts = train(model, processor, records, stage, self.setting, folder, self.seed, stored_images, whole)
        if stage.lora:
            model = load(folder)[0].to(PartialState().device)  # with LoRA merged into it
        return facts | evaluate(model, processor, self.records, self.setting)

    def mislead(self, folder: Path) -> dict[str, Any]:
        questions = misleading_questions(self.setting.data.scenes.pairs, np.random.default_rng([self.seed, 1]))
        model, processor = load(self.path("finetune", self.row.name))
        answered = misleading_text(model, processor, questions, batch_size=128, ways=["misled"], progress=True)
        return {"misled_accuracy": answered["misled"].question_accuracy}

    def weigh(self, folder: Path) -> dict[str, Any]:
        questions = self.records.pairs
        answerer = LocalModel(*load(self.path("finetune", self.row.name)), self.row.name, batch_size=64, max_new_tokens=16)
        pictures = list(dict.fromkeys(str(question.image) for question in questions))
        result = encoder_worth(answerer, lambda run: mmvp.eval_mmvp(run, questions, "question"), pictures, folder)
        return {"worth": {name: dataclasses.asdict(worth) for name, worth in (result.encoders | result.pictures).items()}}


# --- parts of the stages
def build(setting: Setting, row: Row) -> tuple[MoFForConditionalGeneration, MoFProcessor]:
    """Return a new model: pretrained encoders and language model, random adapters."""
    llm, tokenizer = load_language_model(setting.llm, torch.bfloat16 if setting.bf16 else torch.float32)
    encoders = {}
    for name in row.encoders:  # an encoder that comes twice gets another name the second time, and another adapter
        layer = {} if row.layer is None else {"layer": row.layer}
        encoders[name if name not in encoders else f"{name}_again"] = build_encoder(**setting.encoders[name] | layer)
    mixer = build_mixer(row.fusion, encoders, llm.config.get_text_config().hidden_size, **setting.mixer_options | dict(row.options))
    model = MoFForConditionalGeneration.from_parts(mixer, llm, tokenizer)
    return model, MoFProcessor.from_parts(model, tokenizer, max_tiles=setting.max_tiles)


def load(folder: Path) -> tuple[MoFForConditionalGeneration, MoFProcessor]:
    """Return a saved model and its processor. The model is on the CPU, because the trainer moves or shards it."""
    processor = load_processor(folder)
    return load_network(folder), processor


def train(
    model: MoFForConditionalGeneration, processor: MoFProcessor, records: list[dict[str, Any]], stage: Stage, setting: Setting,
    folder: Path, seed: int, stored_images: StoredImages | None, whole: Callable[[], MoFForConditionalGeneration] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train the parameters that require gradient, from the folder's last checkpoint. Save model and processor into `folder`.

    For a model in 4 bits, `whole` loads the model into which the trained LoRA is merged.
    """
    per_device, accumulation = stage.split(PartialState().num_processes)
    steps = stage.steps(len(records))
    facts = finetune(
        model, processor, records, folder, whole=whole, gradient_checkpointing=stage.gradient_checkpointing,
        trainer_options={"max_length": setting.max_length, "strict": setting.strict, "stored_images": stored_images}, seed=seed, bf16=setting.bf16,
        learning_rate=stage.learning_rate, weight_decay=stage.weight_decay, warmup_steps=math.ceil(stage.warmup_ratio * steps),
        num_train_epochs=stage.epochs, max_steps=stage.max_steps, per_device_train_batch_size=per_device,
        gradient_accumulation_steps=accumulation, logging_steps=max(1, steps // 10), save_steps=max(1, steps // 4),
        dataloader_num_workers=setting.workers,
    )  # fmt: skip
    if left_out := facts["left_out"]:
        console.print(f"{left_out} times a record was left out, because its image cannot be used; the log names them")
    return {name: facts[name] for name in ("seconds", "active_tokens", "losses")}


def evaluate(model: MoFForConditionalGeneration, processor: MoFProcessor, records: RunData, setting: Setting) -> dict[str, Any]:
    """Return the accuracy on the held-out pairs and the VIG of the held-out captions, as far as the data has them."""
    accuracy: dict[str, Any] = {"pair_accuracy": None, "question_accuracy": None, "by_pattern": {}}
    if records.pairs:
        answerer = LocalModel(model, processor, "the held-out pairs", batch_size=64, max_new_tokens=16)
        asked = [dataclasses.replace(question.prompt("question"), options=()) for question in records.pairs]  # they name their options
        said, _ = answer_all(answerer, asked, progress=True)
        answers = {question.id: answer.text for question, answer in zip(records.pairs, said, strict=True)}
        chosen = [match_answer(answers[question.id], question.options) for question in records.pairs]
        right = [option == question.labels["released"] for option, question in zip(chosen, records.pairs, strict=True)]
        result = mmvp.score(records.pairs, right)
        accuracy = {"pair_accuracy": result.pair_accuracy, "question_accuracy": result.question_accuracy}
        accuracy["option_named"] = sum(option is not None for option in chosen) / len(chosen)
        accuracy["by_pattern"] = {pattern: shares["pair_accuracy"] for pattern, shares in result.by_pattern.items()}
        accuracy["pairs_right"] = [int(first and second) for first, second in zip(right[0::2], right[1::2], strict=True)]
        accuracy["examples"] = {str(question.id): answers[question.id] for pair in example_pairs(records.pairs) for question in pair}
    return accuracy | held_out_vig(model, processor, records, setting)


def held_out_vig(model: MoFForConditionalGeneration, processor: MoFProcessor, records: RunData, setting: Setting) -> dict[str, Any]:
    if not records.held_out:
        return {}
    options = {"batch_size": setting.score_batch_size, "max_length": setting.max_length}
    return {"held_out": right_against_other_image(model, processor, records.held_out, **options)}
