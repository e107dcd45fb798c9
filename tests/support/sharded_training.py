"""A script for `accelerate launch`: trains tiny models through SelectiveTrainer, sharded as the launch config says.

test_sharded_training.py starts it and compares what it writes with an explicit training on one process.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import nn
from transformers import ProcessorMixin, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from mof import MoFProcessor
from mof.data.collator import SupervisedCollator
from support.tiny import build_llm, build_model, build_tokenizer
from support.tiny_llava import build_llava
from vig import SelectiveTrainer
from vig.training import finetune

STEPS, ACCUMULATE, RANKS, SIZE = 3, 2, 2, 2
RECORDS_PER_STEP = ACCUMULATE * RANKS * SIZE
ADAM = {
    "learning_rate": 1e-2,
    "adam_epsilon": 1e-3,
    "max_grad_norm": 1.0,
}  # a large epsilon, or the rounding of gradients that are 0 but for it would count
RESUMED = ("llava", "mof")


def build(case: str) -> tuple[nn.Module, ProcessorMixin]:
    if case in ("mof", "bf16"):
        torch.manual_seed(0)
        tokenizer = build_tokenizer()
        model = build_model(tokenizer, build_llm(tokenizer, torch.bfloat16 if case == "bf16" else torch.float32))
        for parameter in model.parameters():
            if parameter.requires_grad:  # as the recipe does it
                parameter.data = parameter.data.float()
        return model, MoFProcessor.from_parts(model, tokenizer)
    model, processor = build_llava(tie_word_embeddings=case == "tied")
    # As LLaVA does it. Also, FSDP2's optimizer checkpoint is refused where a trainable parameter never had a gradient.
    model.model.vision_tower.requires_grad_(False)
    if case != "lora":
        return model, processor
    import peft

    torch.manual_seed(1)
    options = {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["multi_modal_projector"], "init_lora_weights": False}
    return peft.get_peft_model(model, peft.LoraConfig(r=2, **options)), processor


def build_records(processor: ProcessorMixin, images: Path) -> list[dict[str, Any]]:
    """Uneven numbers of supervised tokens, some with weights; rank 1 has none in its first batch, and none at all in step 2.

    In its last batch rank 1 has no image.
    """
    collator, chance = SupervisedCollator(processor, 2048, images), random.Random(0)
    plain = json.loads((images / "records.json").read_text())
    records = []
    for index in range(STEPS * RECORDS_PER_STEP):
        record = plain[index % len(plain)] | {"id": str(index)}
        if index >= (STEPS * ACCUMULATE * RANKS - 1) * SIZE:
            turns = [{"from": "human", "value": "What is two and two?"}, {"from": "gpt", "value": "Four dogs."}]
            record = {"id": str(index), "conversations": turns}
        count = int((collator([record])["labels"] != -100).sum())
        share = 0.0 if index // SIZE in (1, 5, 7) else chance.choice((0.2, 0.5, 1.0))  # of a batch; odd ones are rank 1's
        mask = [chance.random() < share for _ in range(count)]
        weighed = {"token_weights": [2 * chance.random() * kept for kept in mask]}
        records.append(record | (weighed if index % 3 == 0 else {"token_mask": mask}))
    return records


def find_state(case: str) -> None:
    """What accelerate would find with GPUs. It shards on accelerators only, though nothing of that depends on them."""
    unset_hf_deepspeed_config()  # that of the training before
    units = "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES"  # the launch config names the encoder classes of the real model
    if os.environ.pop(units, None) and case == "mof":
        os.environ[units] = "TinyEncoder"
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if case == "bf16" else "no"
    AcceleratorState._reset_state(reset_partial_state=True)
    state = PartialState(backend="gloo")
    assert state.num_processes == RANKS and state.device.type == "cpu", state
    if state.distributed_type != DistributedType.DEEPSPEED:
        state.distributed_type = DistributedType.MULTI_GPU


def train(case: str, images: Path, folder: Path, resume: bool) -> SelectiveTrainer:
    find_state(case)
    model, processor = build(case)
    if case == "llava":
        model.activation_checkpointing_enable({"use_reentrant": False})
    args = TrainingArguments(
        str(folder),
        per_device_train_batch_size=SIZE,
        gradient_accumulation_steps=ACCUMULATE,
        max_steps=STEPS,
        optim="adamw_torch",
        lr_scheduler_type="constant",
        train_sampling_strategy="sequential",
        save_strategy="steps" if case in RESUMED else "no",
        save_steps=STEPS - 1,
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
        accelerator_config={"use_configured_state": True},
        **ADAM,
    )
    records = build_records(processor, images)
    trainer = SelectiveTrainer(model, args, train_dataset=records, processing_class=processor, image_folder=images)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{STEPS - 1}") if resume else None)
    return trainer


def train_half(images: Path, folder: Path) -> None:
    """A model in bfloat16 through `finetune`."""
    find_state("bf16")
    model, processor = build("llava")
    model.bfloat16()
    options = {"use_cpu": False, "save_strategy": "no", "accelerator_config": {"use_configured_state": True}, "dataloader_num_workers": 0}
    sizes = {"per_device_train_batch_size": SIZE, "gradient_accumulation_steps": ACCUMULATE, "max_steps": STEPS, "learning_rate": 1e-2}
    finetune(model, processor, build_records(processor, images), folder, trainer_options={"image_folder": images}, **sizes, **options)


def sharding(trainer: SelectiveTrainer) -> str:
    """Seen after a backward pass: after a forward pass FSDP2 keeps the head together for the backward pass to come."""
    if trainer.is_deepspeed_enabled:
        return f"ZeRO-{trainer.model_wrapped.zero_optimization_stage()}"
    return type(trainer.model.get_output_embeddings().weight).__name__


def main() -> None:
    images, out = map(Path, sys.argv[1:3])
    torch.set_num_threads(1)
    if sys.argv[3:] == ["half"]:
        train_half(images, out / "half")
        torch.distributed.destroy_process_group()
        return
    for case in sys.argv[3:]:
        for resume in [False, True][: 1 + (case in RESUMED)]:
            trainer = train(case, images, out / case, resume)
            sharded_by = sharding(trainer)
            folder = out / (case + "-resumed" * resume)
            trainer.save_model(str(folder))
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            evaluated = trainer.evaluate(trainer.train_dataset[:RECORDS_PER_STEP])["eval_loss"]
            facts = {"losses": losses, "tokens": trainer.supervised_tokens, "evaluated": evaluated, "sharding": sharded_by}
            if trainer.args.process_index == 0:
                (folder / "found.json").write_text(json.dumps(facts))
            torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
