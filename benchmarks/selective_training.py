"""Compare time and memory of a step of `SelectiveTrainer` and of the ordinary Trainer with the same labels, and measure the overhead.

    python benchmarks/selective_training.py                # vocabularies of 32k and 128k
    python benchmarks/selective_training.py --vocabularies 32000 --repeats 1

The model is a LLaVA with a Llama of 8 layers and width 512, and a small frozen vision tower. A batch has 4 records with 576 image tokens
each; 12 % of the tokens are answers, and 4.5 % are selected and have a loss. A step is forward, backward, clipping and AdamW. The trainers
take turns in a single process with the same model and optimizer, and the shortest time of --repeats counts. The peak memory of forward and
backward beyond weights, gradients and optimizer state (as in the second batch of an accumulated step) is measured in a separate process
for each trainer (Linux). It is measured for the whole model, and for the output head and the loss alone, which are the only parts that a
trainer can change. The overhead is the time of a step in `train()`, compared with a bare loop over the same batches with the same loss.
Compare the ratios, because absolute times mean little on shared cores.
"""

import argparse
import os
import subprocess
import sys
import time
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import itertools

import torch
from accelerate.utils import set_seed
from memory import peak, resident
from torch.utils.data import DataLoader
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback

from vig import SelectiveTrainer
from vig.training.trainer import SupervisedPass

IMAGE_TOKENS, TEXT_TOKENS, BATCH = 576, 80, 4
TOKENS = IMAGE_TOKENS + TEXT_TOKENS  # tokens of a record, of which 12 % are answers
SELECTED = 0.045

Batch = dict[str, torch.Tensor]


def build_model(vocabulary: int) -> LlavaForConditionalGeneration:
    set_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=336, patch_size=14
    )
    text = LlamaConfig(hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8, vocab_size=vocabulary)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=5))
    model.model.vision_tower.requires_grad_(False)
    model.config.use_cache = False
    return model


def build_records(vocabulary: int, count: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    records = []
    for _ in range(count):
        ids = torch.randint(10, vocabulary, (TOKENS,), generator=generator)
        ids[20 : 20 + IMAGE_TOKENS] = 5
        labels = torch.full_like(ids, -100)
        answers = TOKENS - round(0.12 * TOKENS)
        chosen = answers + torch.randperm(TOKENS - answers, generator=generator)[: round(SELECTED * TOKENS)]
        labels[chosen] = ids[chosen]
        records.append({"input_ids": ids, "labels": labels, "pixel_values": torch.randn(3, 336, 336, generator=generator)})
    return records


def collate(records: list[Batch]) -> Batch:
    batch = {key: torch.stack([record[key] for record in records]) for key in records[0]}
    return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}


class Processor:
    """Processor does nothing. SelectiveTrainer needs a processor, but the records here are tokens already."""


def build_trainer(kind: type[Trainer], model: LlavaForConditionalGeneration, records: list[Batch], **options: object) -> Trainer:
    quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no", "use_cpu": True}
    size = {"per_device_train_batch_size": BATCH, "max_steps": 10**6, "lr_scheduler_type": "constant"}
    arguments = TrainingArguments("unused", remove_unused_columns=False, **quiet, **size)
    if kind is SelectiveTrainer:
        options["processing_class"] = Processor()
    trainer = kind(model=model, args=arguments, train_dataset=records, data_collator=collate, **options)
    trainer.remove_callback(PrinterCallback)
    return trainer


def build_optimizer(model: LlavaForConditionalGeneration) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)


def step(trainer: Trainer, optimizer: torch.optim.Optimizer, batch: Batch) -> tuple[float, float, float]:
    """Run a step of the trainer's own code on a batch. Return the loss, the seconds of forward and backward, and the seconds of all."""
    start = time.perf_counter()
    count = (batch["labels"] != -100).sum()
    loss = trainer.training_step(trainer.model, dict(batch), count)
    middle = time.perf_counter()
    torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item(), middle - start, time.perf_counter() - start


KINDS = {"Trainer": Trainer, "SelectiveTrainer": SelectiveTrainer}
PARTS = WHOLE, CHECKPOINTED, HEAD = "all activations", "checkpointed layers", "head and loss alone"  # the memory of each is measured


def compare_steps(vocabulary: int, repeats: int) -> dict[str, list[float]]:
    """Return trainer -> shortest seconds of forward and backward, and of a whole step."""
    model, records = build_model(vocabulary), build_records(vocabulary, BATCH)
    optimizer, batch = build_optimizer(model), collate(records)
    trainers = {name: build_trainer(kind, model, records) for name, kind in KINDS.items()}
    losses = {name: step(trainer, optimizer, collate(records[:1]))[0] for name, trainer in trainers.items()}  # the slow first step
    least = {name: [float("inf")] * 2 for name in KINDS}
    for _ in range(repeats):
        for name, trainer in trainers.items():
            losses[name], *times = step(trainer, optimizer, batch)
            least[name] = list(map(min, least[name], times))
    print(f"vocabulary {vocabulary:>7,}  losses of the last steps, one after the other: {', '.join(f'{x:.5f}' for x in losses.values())}")
    return least


class StepTimes(TrainerCallback):
    def __init__(self, steps: int) -> None:
        self.steps, self.ends = steps, []

    def on_step_end(self, args: object, state: object, control: object, **kwargs: object) -> None:
        self.ends.append(time.perf_counter())
        control.should_training_stop = len(self.ends) % self.steps == 0


def compare_loops(vocabulary: int, repeats: int, steps: int = 4) -> dict[str, float]:
    """Return the shortest seconds between the ends of two steps, for `train()` and for a loop that does nothing but the steps."""
    model, records = build_model(vocabulary), build_records(vocabulary, BATCH * steps)
    optimizer = build_optimizer(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    times = StepTimes(steps)
    trainer = build_trainer(SelectiveTrainer, model, records, callbacks=[times], optimizers=(optimizer, schedule))
    least = {"train()": float("inf"), "bare loop": float("inf")}
    for _ in range(repeats):
        times.ends.clear()
        trainer.train()
        least["train()"] = min(least["train()"], *_differences(times.ends))
        least["bare loop"] = min(least["bare loop"], *_differences(bare_loop(model, optimizer, schedule, records)))
    return least


def bare_loop(
    model: LlavaForConditionalGeneration, optimizer: torch.optim.Optimizer, schedule: object, records: list[Batch]
) -> list[float]:
    ends = []
    model.train()
    for batch in DataLoader(records, BATCH, shuffle=True, collate_fn=collate):
        labels = batch.pop("labels")
        supervised = SupervisedPass(labels)
        with supervised.at(model.get_output_embeddings(), untouched=True):
            loss = supervised.result(model(**batch).logits)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ends.append(time.perf_counter())
    return ends


def _differences(ends: list[float]) -> list[float]:
    return [b - a for a, b in itertools.pairwise(ends)]


def peak_memory(name: str, vocabulary: int, part: str) -> tuple[float, float]:
    """Return the GB that forward and backward need beyond the memory before, and the GB of the whole process (Linux)."""
    model, records = build_model(vocabulary), build_records(vocabulary, BATCH)
    if part == CHECKPOINTED:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer, batch = build_optimizer(model), collate(records)
    trainer = build_trainer(KINDS[name], model, records)
    short = {
        "input_ids": batch["input_ids"][:1, :20],
        "labels": batch["input_ids"][:1, :20],
        "attention_mask": batch["attention_mask"][:1, :20],
    }
    step(trainer, optimizer, short)  # makes optimizer state and thread pools
    count = (batch["labels"] != -100).sum()
    trainer.training_step(model, dict(short), count)  # makes gradients
    hidden = torch.randn(BATCH, TOKENS, 512, requires_grad=True)  # [B, S, D]
    before = resident()
    if part == HEAD:
        head_loss(name, model, hidden, batch["labels"]).backward()
    else:
        trainer.training_step(model, dict(batch), count)
    return peak() - before, peak()


def head_loss(name: str, model: LlavaForConditionalGeneration, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the loss that the trainer `name` computes from the last layer's output."""
    head = model.get_output_embeddings()
    if name == "Trainer":
        return model.loss_function(head(hidden), labels, vocab_size=model.config.text_config.vocab_size)
    supervised = SupervisedPass(labels)
    with supervised.at(head, untouched=True):
        return supervised.result(head(hidden))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[32_000, 128_000])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)  # a measurement in a separate process
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.memory:
        name, vocabulary, part = arguments.memory
        print(*peak_memory(name, int(vocabulary), part))
        return
    for vocabulary in arguments.vocabularies:
        least = compare_steps(vocabulary, arguments.repeats)
        for name, (passes, whole) in least.items():
            ratios = [slow / fast for slow, fast in zip(least["Trainer"], (passes, whole), strict=True)]
            print(
                f"vocabulary {vocabulary:>7,}  {name:<18} {passes:6.2f} s forward and backward  {ratios[0]:5.2f} x"
                f"  {whole:6.2f} s a step  {ratios[1]:5.2f} x",
                flush=True,
            )
        for part in PARTS:
            memory = {}
            for name in KINDS:
                command = [sys.executable, __file__, "--memory", name, str(vocabulary), part]
                at_once = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**18)}  # freed memory goes back to the system
                out = subprocess.run(command, check=True, capture_output=True, text=True, env=at_once).stdout
                memory[name] = [float(x) for x in out.splitlines()[-1].split()]
            for name, (of_step, in_all) in memory.items():
                less = memory["Trainer"][0] / of_step
                print(
                    f"vocabulary {vocabulary:>7,}  {name:<18} {of_step:5.2f} GB  {less:5.1f} x less, {in_all:5.2f} GB in all, {part}",
                    flush=True,
                )
        loops = compare_loops(vocabulary, arguments.repeats)
        over = loops["train()"] / loops["bare loop"] - 1
        print(
            f"vocabulary {vocabulary:>7,}  train() {loops['train()']:.3f} s a step, bare loop {loops['bare loop']:.3f} s: {over:+.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
