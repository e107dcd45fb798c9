"""load_processor and load_network open any image-text-to-text model of transformers from a folder that save_pretrained wrote."""

from __future__ import annotations

from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin

from encoders.saved_folders import WEIGHTS, check_folder, loading, require_config


def load_processor(folder: Path, *, trust_remote_code: bool = False) -> ProcessorMixin:
    """Load the processor of a saved model.

    Args:
        trust_remote_code: run Python files of the folder; without it, a folder that needs its own files is refused.

    Raises:
        ValueError: for a folder without a model, or with damaged files (`encoders.digests`).
    """
    require_config(folder)
    for point in entry_points(group="mof.auto_classes"):
        point.load()()  # transformers' Auto classes learn the models of this package
    check_folder(folder, without=WEIGHTS)
    with loading(folder):
        return AutoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code)


def load_network(folder: Path, **options: Any) -> PreTrainedModel:
    """Load the model on the CPU. `load_processor` must have been called before.

    Raises:
        DamagedError: for files that were changed since the model was saved; the message names them.
        ValueError: for a folder that holds another kind of model.
    """
    check_folder(folder)
    with loading(folder):
        return AutoModelForImageTextToText.from_pretrained(folder, **{"trust_remote_code": False, **options})
