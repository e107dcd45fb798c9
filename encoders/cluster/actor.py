"""An actor is a process that works on items. It gets the function that does the work in a parcel."""

from __future__ import annotations

import copyreg
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from encoders.cluster.items import Work


class Parcel:
    """A parcel holds `make` on its way to another process, where models of transformers that were built here must work too."""

    def __init__(self, make: Callable[[], Work[Any, Any]]) -> None:
        self._make = make

    def __reduce__(self) -> tuple[Any, ...]:
        with suppress(ImportError):  # a model that has run holds hooks, which refer to a variable that is another in each process
            from transformers.utils.output_capturing import CompileableContextVar

            copyreg.pickle(CompileableContextVar, lambda _: (_collector, ()))  # type: ignore[arg-type, return-value]
        return _unpacked, (dict(_recorded()), self._make)


def _unpacked(recorded: dict[str, Any], make: Callable[[], Work[Any, Any]]) -> Callable[[], Work[Any, Any]]:
    dict.update(_recorded(), recorded)  # the registry's own method takes a model for a key
    return make


def _recorded() -> dict[str, Any]:
    """Return transformers' registry of the hidden states that models can give, which a model enters when it is built."""
    try:
        from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY
    except ImportError:
        return {}
    return _CAN_RECORD_REGISTRY


def _collector() -> Any:
    from transformers.utils.output_capturing import _active_collector

    return _active_collector


class Actor:
    """An actor runs in a process of its own."""

    def __init__(self, make: Callable[[], Work[Any, Any]], folder: str) -> None:
        with suppress(OSError):  # a machine that does not see the folder from which relative paths start may do without
            os.chdir(folder)
        self._error: Exception | None = None
        try:
            self._work = make()
        except Exception as error:
            self._error = error

    def start(self) -> None:
        if self._error is not None:
            raise self._error

    def work(self, item: Any) -> Any:
        return self._work(item)
