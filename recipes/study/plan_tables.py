"""A plan as rich tables: parts, steps, memory."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table

from study.memory import GIB, LAYOUTS
from study.plan import Plan


def plan_tables(plan: Plan) -> Group:
    """Return the three tables, for rich to print."""
    return Group(parts_table(plan), steps_table(plan), memory_table(plan))


def parts_table(plan: Plan) -> Table:
    table = Table("part", title=f"{plan.name}: {plan.tokens_per_image:,} visual tokens per image")
    for header in ("parameters", "trained in stage 1", "trained in stage 2"):
        table.add_column(header, justify="right")
    for name, count in plan.encoders.items():
        table.add_row(f"encoder {name} (vision tower)", f"{count:,}", "", "")
    table.add_row("adapters", f"{plan.adapters:,}", f"{plan.adapters:,}", f"{plan.adapters:,}")
    table.add_row("language model", f"{plan.llm:,}", "", f"{plan.llm:,}")
    table.add_row("total", f"{plan.total:,}", f"{plan.trainable['align']:,}", f"{plan.trainable['finetune']:,}", style="bold")
    return table


def steps_table(plan: Plan) -> Table:
    table = Table("stage", title=f"steps on {plan.devices} GPUs")
    for header in ("steps", "batch", "per GPU", "accumulated", "learning rate"):
        table.add_column(header, justify="right")
    for name, count in plan.steps.items():
        stage = plan.stages[name.split(",")[0]]
        records, passes = stage.split(plan.devices)
        steps = "number of records unknown" if count is None else f"{count:,}"
        table.add_row(name, steps, str(stage.batch_size), str(records), str(passes), f"{stage.learning_rate:g}")
    return table


def memory_table(plan: Plan) -> Table:
    table = Table("stage", "layout", title=f"estimated GiB per GPU of {plan.gpu_memory:g} GiB")
    columns = ("weights", "gradients", "optimizer", "gathered", "activations", "total", "fits")
    for header in columns:
        table.add_column(header, justify="right")
    for stage in plan.stages:
        for layout in LAYOUTS:
            for checkpointed in (True, False):
                memory = plan.memory(stage, layout, checkpointed)
                used = checkpointed == plan.stages[stage].gradient_checkpointing
                numbers = (memory.weights, memory.gradients, memory.optimizer, memory.gathered, memory.activations, memory.total)
                table.add_row(
                    stage,
                    layout + (", checkpointed" if checkpointed else ""),
                    *(f"{number / GIB:.1f}" for number in numbers),
                    "yes" if plan.fits(memory) else "no",
                    style="bold" if used else "dim",
                )
    return table
