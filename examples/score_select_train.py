"""Score records by VIG, select the tokens that need the image, and train on them: `python examples/score_select_train.py FOLDER`.

It draws records of the miniature into FOLDER and takes less than a minute. The adapters are new and learn for a few steps only, so
the scores here mean little; `recipes/train_llava_mof_vig.py` trains them for real.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from encoders import build_encoder
from mof import InterleavedMoF, MoFForConditionalGeneration, MoFProcessor
from mof.data import read_records
from mof.language_models import load_language_model
from mof.miniature import write_dataset
from vig import SelectiveTrainer, score, select


def main(folder: Path) -> None:
    write_dataset(folder, align=64, finetune=48, pairs=1)  # or your own records
    encoders = {"clip": build_encoder("mini-clip"), "dinov2": build_encoder("mini-dino")}
    llm, tokenizer = load_language_model("mini-lm")
    mixer = InterleavedMoF(encoders, hidden_size=llm.config.hidden_size)
    model = MoFForConditionalGeneration.from_parts(mixer, llm, tokenizer)
    processor = MoFProcessor.from_parts(model, tokenizer)

    def train(records: list[Any], name: str, steps: int) -> None:
        arguments = TrainingArguments(str(folder / name), max_steps=steps, learning_rate=1e-3, save_strategy="no", report_to="none")
        SelectiveTrainer(model, arguments, processing_class=processor, image_folder=folder / "images", train_dataset=records).train()

    train(read_records(folder / "align.json"), "aligned", steps=16)
    records = read_records(folder / "finetune.json")
    scores = score(model, processor, records, output_dir=folder / "scores", image_folder=folder / "images")
    chosen = select(scores, keep=0.7)
    print(scores, chosen, sep="\n")
    train(chosen.apply(records), "trained", steps=8)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
