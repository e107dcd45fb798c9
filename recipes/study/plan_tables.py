"""plan_tables shows a plan as rich tables: parts, steps, memory, hours."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table

from study.memory import GIB, GPU
from study.plan import Plan, fits
from study.plan_hours import ASSUMED, RECORDS_PER_IMAGE, TEXT, hours, measured_shares


def plan_tables(plan: Plan, gpu: int = GPU) -> Group:
    """Return the four tables, for rich to print. `gpu` is the memory of a GPU in GiB."""
    return Group(parts_table(plan), steps_table(plan), memory_table(plan, gpu), hours_table(plan))


def parts_table(plan: Plan) -> Table:
    table = _table(
        f"{plan.setting.name}: {plan.tokens_per_image:,} visual tokens per image",
        ["part"],
        ["parameters", "trained in stage 1", "trained in stage 2"],
    )
    for name, count in plan.encoders.items():
        table.add_row(f"encoder {name} (vision tower)", f"{count:,}", "", "")
    table.add_row("adapters", *[f"{plan.adapters:,}"] * 2, "" if plan.lora else f"{plan.adapters:,}")
    table.add_row("language model", f"{plan.llm:,}", "", "" if plan.lora else f"{plan.llm:,}")
    if plan.lora:
        table.add_row("LoRA beside it", f"{plan.lora:,}", "", f"{plan.lora:,}")
    table.add_row("total", f"{plan.total:,}", f"{plan.trainable['align']:,}", f"{plan.trainable['finetune']:,}", style="bold")
    return table


def steps_table(plan: Plan) -> Table:
    table = _table(f"steps on {plan.devices} GPUs", ["stage"], ["steps", "batch", "per GPU", "accumulated", "learning rate"])
    for name, count in plan.steps.items():
        stage = plan.setting.stages[name.split(",")[0]]
        records, passes = stage.split(plan.devices)
        steps = "number of records unknown" if count is None else f"{count:,}"
        table.add_row(name, steps, str(stage.batch_size), str(records), str(passes), f"{stage.learning_rate:g}")
    return table


def memory_table(plan: Plan, gpu: int) -> Table:
    parts = ["weights", "gradients", "optimizer", "gathered", "activations"]
    table = _table(f"estimated GiB per GPU of {gpu} GiB", ["stage", "layout"], [*parts, "total", "fits"])
    for name, stage in plan.setting.stages.items():
        layouts = {"data parallel": False} if stage.lora else {"data parallel": False, "sharded": True}  # LoRA is not sharded
        for layout, sharded in layouts.items():
            for checkpointed in (True, False):
                memory = plan.memory(name, sharded, checkpointed)
                table.add_row(
                    name,
                    layout + (", checkpointed" if checkpointed else ""),
                    *(f"{size / GIB:.1f}" for size in [*(memory[part] for part in parts), sum(memory.values())]),
                    "yes" if fits(memory, gpu) else "no",
                    style="bold" if checkpointed == stage.gradient_checkpointing else "dim",
                )
    return table


def hours_table(plan: Plan) -> Table:
    measured = measured_shares()
    shares = {**ASSUMED, **measured}
    kinds = ", ".join(f"{kind} {share:.0%} ({'measured' if kind in measured else 'assumed'})" for kind, share in shares.items())
    table = _table(f"expected hours on {plan.devices} H100 or H200", ["stage"], ["records", "operations", "hours"])
    for stage in hours(plan, shares):
        table.add_row(stage.stage, f"{stage.records:,}", f"{sum(stage.operations.values()):.1e}", f"{stage.hours:.1f}")
    text = " and ".join(map(str, TEXT.values()))
    table.caption = (
        f"Shares of the peak: {kinds}. Assumed: {text} text tokens a record in stage 1 and 2, {RECORDS_PER_IMAGE} records that share "
        "an image in scoring, images that are decoded as fast as they are needed. The run takes align, score, and finetune with VIG."
    )
    return table


def _table(title: str, texts: list[str], numbers: list[str]) -> Table:
    table = Table(*texts, title=title)
    for heading in numbers:
        table.add_column(heading, justify="right")
    return table
