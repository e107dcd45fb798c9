"""hours estimates the hours of a plan: its operations, divided by the share of the hardware's peak at which they run.

The shares are measured by `benchmarks/gpu/run.py` on a GPU (docs/results/gpu.json). Until they are measured, they are assumed, and the
plan says so. Only the operations of matrix products count, with the second forward pass of checkpointed layers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from study.plan import Plan

RESULTS = Path(__file__).parents[2] / "docs" / "results" / "gpu.json"
PEAK = 989e12
"""Dense bfloat16 operations per second of an H100 or H200 (SXM), as published."""
ASSUMED = {"encoders": 0.4, "training": 0.4, "scoring": 0.4}
"""Kind of work -> share of the peak, where it was not measured. LLaVA-1.5 reached 33 % of an A100 with recomputation (10 hours)."""
LINES = {
    "encoders": ("encoders", "CLIP ViT-L/14-336, pixels"),
    "training": ("training", "7B, vocabulary 32k, SelectiveTrainer"),
    "scoring": ("scoring", "7B, vocabulary 32k, vig.score"),
}
"""The line of the benchmark that gives each share, as its part and its name."""
TEXT = {"align": 60, "finetune": 250}
"""Text tokens of a record on average, in LLaVA's captions and in its instruction mix; half of them are answers. An assumption."""
RECORDS_PER_IMAGE = 3
"""Records of the instruction mix that share an image, and so the cache of its tokens in scoring. An assumption."""


@dataclass(frozen=True)
class StageHours:
    """StageHours is the cost of a stage: operations by kind of work, and hours."""

    stage: str
    records: int
    operations: dict[str, float]
    """Kind of work, a key of `ASSUMED` -> operations of all records."""
    hours: float


def hours(plan: Plan, shares: Mapping[str, float], peak: float = PEAK) -> list[StageHours]:
    """Return the stages whose numbers of records are known, in the order in which they run."""
    setting, data = plan.setting, plan.setting.data
    stages: list[tuple[str, int, dict[str, float]]] = []
    image = plan.image_operations
    if data.align_records is not None:
        work = _forward(plan, TEXT["align"]) * _passes(plan, "align")
        stages.append(("align", data.align_records, {"encoders": image, "training": work}))
    if data.finetune_records is not None:
        shown = data.finetune_records - data.text_records
        tokens = plan.tokens_per_image / RECORDS_PER_IMAGE + TEXT["finetune"]
        clean_and_null = {"encoders": 2 * image / RECORDS_PER_IMAGE, "scoring": 2 * _forward(plan, TEXT["finetune"], computed=tokens)}
        stages.append(("score", shown, clean_and_null))
        for name, records in (("finetune", data.finetune_records), ("finetune, VIG", setting.selected_records)):
            with_image = shown / data.finetune_records
            work = _forward(plan, TEXT["finetune"]) * with_image + _forward(plan, TEXT["finetune"], visual=0) * (1 - with_image)
            stages.append((name, records, {"encoders": image * with_image, "training": work * _passes(plan, "finetune")}))
    return [_stage(plan, *stage, shares, peak) for stage in stages]


def _stage(plan: Plan, name: str, records: int, each: Mapping[str, float], shares: Mapping[str, float], peak: float) -> StageHours:
    epochs = 1.0 if name == "score" else plan.setting.stages[name.split(",")[0]].epochs
    operations = {kind: records * epochs * work for kind, work in each.items()}
    seconds = sum(work / (shares[kind] * peak * plan.devices) for kind, work in operations.items())
    return StageHours(name, records, operations, seconds / 3600)


def _passes(plan: Plan, stage: str) -> int:
    """Return the cost of a step in forward passes. Stage 1 needs no gradient of the language model's weights."""
    return (3 if stage == "finetune" else 2) + plan.setting.stages[stage].gradient_checkpointing


def _forward(plan: Plan, text: int, visual: int | None = None, computed: float | None = None) -> float:
    """Return the operations of a record's forward pass through the language model, with the head at its answers only.

    Args:
        visual: visual tokens; by default the tokens of an image.
        computed: number of tokens that are computed; the keys of the others are in a cache.
    """
    length = (plan.tokens_per_image if visual is None else visual) + text
    computed = length if computed is None else computed
    weights = 2 * (plan.llm - plan.embeddings) * computed
    attention = 2 * plan.config.num_hidden_layers * plan.layer.queries * length * computed  # half of all pairs of tokens
    return weights + attention + text / 2 * 2 * plan.config.hidden_size * plan.config.vocab_size


def measured_shares(results: Path = RESULTS) -> dict[str, float]:
    """Return kind of work -> share of the peak that the benchmark measured, without failed lines; {} without the benchmark's file."""
    if not results.is_file():
        return {}
    facts = json.loads(results.read_text())
    if "tiny" in facts["about"]:
        return {}
    lines = {(line["part"], line["name"]): line["share"] for line in facts["lines"]}
    return {kind: share for kind, line in LINES.items() if (share := lines.get(line))}
