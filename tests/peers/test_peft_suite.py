"""The tests that peft runs on all kinds of models, with our model in the place of a decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from support.peer_suites import load_suite
from support.tiny import build_llm, build_model, build_tokenizer

from mof import MoFForConditionalGeneration

pytestmark = pytest.mark.slow

TARGETS = r".*language_model.*(q_proj|v_proj)"
CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lora": (peft.LoraConfig, {"task_type": "CAUSAL_LM", "r": 4, "target_modules": TARGETS, "init_lora_weights": False}),
    "ia3": (peft.IA3Config, {"task_type": "CAUSAL_LM", "target_modules": TARGETS, "feedforward_modules": [], "init_ia3_weights": False}),
    "prefix": (peft.PrefixTuningConfig, {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}),
    "prompt": (peft.PromptTuningConfig, {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4}),
}
TESTS = (
    "model_attr",
    "adapter_name",
    "prepare_for_training",
    "save_pretrained",
    "save_pretrained_selected_adapters",
    "from_pretrained_config_construction",
    "load_multiple_adapters",
    "merge_layers",
    "safe_merge",
    "generate",
    "training",
    "training_gradient_checkpointing",
    "delete_adapter",
    "unload_adapter",
    "disable_adapter",
    "passing_input_embeds_works",
    "get_base_model_state_dict",
)


@pytest.mark.parametrize("test", TESTS)
@pytest.mark.parametrize("config", CONFIGS)
def test_peft(config: str, test: str, tmp_path: Path) -> None:
    suite = load_suite("peft", "testing_common", {"diffusers": {"StableDiffusionPipeline": type("StableDiffusionPipeline", (), {})}})
    tokenizer = build_tokenizer()
    build_model(tokenizer, build_llm(tokenizer, initializer_range=0.05)).save_pretrained(tmp_path / "model")

    class Tester(suite.PeftCommonTester):
        transformers_class = MoFForConditionalGeneration

        def prepare_inputs_for_testing(self) -> dict[str, torch.Tensor]:
            ids = torch.tensor([[1, 1, 1], [1, 2, 1]])
            return {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 1]])}

    kind, options = CONFIGS[config]
    arguments = (str(tmp_path / "model"), kind, options.copy())
    run = getattr(Tester(), f"_test_{test}")
    run("", *arguments) if test == "passing_input_embeds_works" else run(*arguments)
