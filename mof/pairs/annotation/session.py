"""The pairs of a folder with what was said about them: what the page shows and saves."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

from mof.pairs.annotation.annotation import Annotation, State
from mof.pairs.annotation.journal import ConflictError, Journal, Saved
from mof.pairs.annotation.pair_table import PairTable

JOURNAL = "annotations.jsonl"


class Session:
    """Args:
        folder: what `mof blind-pairs` wrote; annotations go into `annotations.jsonl` in it.

    Raises:
        ValueError: for a folder without pairs, or whose annotations cannot be read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.table = PairTable(folder)
        self.journal = Journal(self.table.folder / JOURNAL)
        self.states()

    def saved(self) -> list[Saved]:
        """Of every pair of the table, in its order."""
        everything = self.journal.all()
        return [everything.get(pair.names, Saved()) for pair in self.table.pairs]

    def states(self) -> list[State]:
        """Of every pair of the table, in its order."""
        everything = self.journal.all()
        return [everything[pair.names].annotation.state if pair.names in everything else "todo" for pair in self.table.pairs]

    def progress(self) -> dict[str, Any]:
        """How many pairs are done, skipped and flagged, and the number of the first that is none of these (None: all are)."""
        states = self.states()
        counts = Counter(states)
        first = states.index("todo") if "todo" in states else None
        return {"pairs": len(states), "done": counts["done"], "skipped": counts["skipped"], "flagged": counts["flagged"], "first": first}

    def show(self, number: int) -> dict[str, Any]:
        """One pair, for the page. IndexError for a number that there is not."""
        pair = self.table.pairs[number]
        states = self.states()
        todo = next((n for n in (*range(number + 1, len(states)), *range(number)) if states[n] == "todo"), None)
        return dataclasses.asdict(pair) | _shown(self.journal.get(pair.names)) | {"number": number, "next_todo": todo}

    def save(self, number: int, request: Any) -> dict[str, Any]:
        """Save {"revision", "annotation"}.

        Raises:
            ValueError: for a request that is not of this form.
            ConflictError: when the pair was changed since the revision; `conflict` makes a reply of it.
        """
        if not isinstance(request, dict) or not isinstance(request.get("revision"), int):
            raise ValueError("expected an object of revision and annotation")
        annotation = Annotation.from_json(request.get("annotation"))
        return _shown(self.journal.save(self.table.pairs[number].names, request["revision"], annotation))


def conflict(error: ConflictError) -> dict[str, Any]:
    """What stands in the way, for the page."""
    return _shown(error.current)


def _shown(saved: Saved) -> dict[str, Any]:
    annotation = saved.annotation
    return {
        "revision": saved.revision,
        "annotation": dataclasses.asdict(annotation),
        "state": annotation.state,
        "missing": annotation.missing(),
    }
