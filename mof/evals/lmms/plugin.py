"""Through the entry point `lmms_eval.models`, `lmms-eval --model mof --model_args pretrained=FOLDER` knows our model."""

from __future__ import annotations

from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    return ModelManifest(model_id="mof", simple_class_path="mof.evals.lmms.model.MofLmms")
