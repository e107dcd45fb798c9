"""The card of a trained model tells its training, and the selection of its records by VIG."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from encoders.saved_folders import card_path
from encoders.whole_files import read_sealed

SETTINGS = ("num_train_epochs", "learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "lora", "load_in_4bit")


def training_facts(records: Path, count: int, settings: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return name -> value for the card.

    Args:
        records: the file of the records; the card beside it, if there is any, tells how they were selected.
        count: number of the records.
        settings: the identity of the run, with the arguments of the training.
        facts: the facts that `finetune` returned.
    """
    rows = {"records": f"{count:,} of {records.name}", "steps": f"{facts['steps']:,}", "supervised tokens": f"{facts['active_tokens']:,}"}
    for name, losses in (("loss", facts["losses"]), ("evaluation loss", facts.get("eval_losses"))):
        if losses:
            rows[name] = f"{losses[0]:.3f} -> {losses[-1]:.3f}"
    rows |= {name.replace("_", " "): settings[name] for name in SETTINGS if settings.get(name)}
    return rows | _selection(card_path(records))


def _selection(card: Path) -> dict[str, Any]:
    """Return the facts of the card of selected records, or nothing for records that were not selected."""
    if not card.is_file():
        return {}
    content = read_sealed(card)
    counts, null = content["counts"], content.get("null") or {}
    rule = "at random" if content["threshold"] is None else f"by {content['measure']} >= {content['threshold']:.4f}"
    kept, tokens = (f"{counts[f'{name}_kept']:,} of {counts[f'{name}_total']:,}" for name in ("samples", "tokens"))
    scorer = Path(content["model"]["name"] or "").name or content["model"]["class"]
    return {"selection": f"{kept} records, {tokens} tokens, {rule}", "scored by": scorer, "null image": null.get("name", "unknown")}
