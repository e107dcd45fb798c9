"""The test suites that transformers runs on each of its own models, processors and image processors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.peer_suites import load_suite, run_suite
from support.tiny import build_model, build_tokenizer
from transformers import LlamaConfig

from mof import MoFConfig, MoFForConditionalGeneration, MoFModel, MoFProcessor
from mof.image_processor import MoFImageProcessor

pytestmark = pytest.mark.slow
ABSENT: dict[str, dict[str, Any]] = {
    ".exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    ".generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "fetch_hub_objects_for_ci": {"url_to_local_path": str},
}
IMAGE_TOKENS, IMAGE_TOKEN = 32, 98


class ModelTester:
    """The model, and a batch, that the suites try out."""

    batch_size, seq_length, is_training = 3, 40, True
    hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 32, 2, 4, 99
    encoder_seq_length = key_length = seq_length
    all_model_classes = (MoFModel, MoFForConditionalGeneration)

    def __init__(self, parent: Any) -> None:
        self.parent = parent

    def get_config(self) -> MoFConfig:
        text = LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=64,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        return MoFConfig(text, {"a": {"name": "tiny-a"}, "b": {"name": "tiny-b"}}, image_token_id=IMAGE_TOKEN, embed_encoders=True)

    def prepare_config_and_inputs_for_common(self) -> tuple[MoFConfig, dict[str, torch.Tensor]]:
        ids = torch.randint(3, IMAGE_TOKEN, (self.batch_size, self.seq_length))
        ids[:, 2 : 2 + IMAGE_TOKENS] = IMAGE_TOKEN
        pixels = torch.rand(self.batch_size, 3, 32, 32)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}

    prepare_config_and_inputs = prepare_config_and_inputs_for_common


MEMBERS = {
    "all_model_classes": ModelTester.all_model_classes,
    "_is_composite": True,
    "skip_test_image_features_output_shape": True,  # several encoders have several widths
    "setUp": lambda self: setattr(self, "model_tester", ModelTester(self)),
}
EDITED = "it edits a saved folder, whose digests we check"
NO_LABELS = "labels are made only for classes that transformers lists by name"
SKIPPED_MODEL_TESTS = {
    "test_bc_cache_name_forward": "both names are ours, so that neither warns",
    "test_correct_missing_keys": "a head that is missing is refused, not drawn at random",
    "test_eager_matches_sdpa_inference*": "it takes image tokens without images, which are refused",
    "test_from_pretrained_no_checkpoint": "there is no folder to build the encoders from",
    "test_generation_tester_mixin_inheritance": "test_generation has the other mixin",
    "test_get_image_features_attentions": "encoders return tokens, and no attentions",
    "test_get_image_features_hidden_states": "encoders return the tokens of the layers that they were built for",
    "test_init_weights_can_init_buffers": "encoders come built, so that nothing is drawn again",
    "test_model_weights_reload_no_missing_tied_weights": EDITED,
    "test_resize_embeddings_untied": "it changes ids, and image tokens with them",
    "test_resize_tokens_embeddings": "it changes ids, and image tokens with them",
    "test_training": NO_LABELS,
    "test_training_gradient_checkpointing": NO_LABELS,
    "test_training_gradient_checkpointing_use_reentrant_false": NO_LABELS,
    "test_training_gradient_checkpointing_use_reentrant_true": NO_LABELS,
}


def test_models() -> None:
    run_suite(load_suite("transformers", "test_modeling_common", ABSENT).ModelTesterMixin, MEMBERS, SKIPPED_MODEL_TESTS)


def test_generation() -> None:
    mixin = load_suite("transformers", "test_modeling_common", ABSENT).GenerationTesterMixin
    if not any(name.startswith("test_") for name in dir(mixin)):
        pytest.skip("GenerationTesterMixin is not in the source distribution of transformers")
    run_suite(mixin, MEMBERS | {"all_generative_model_classes": (MoFForConditionalGeneration,)}, {})


def _processor() -> MoFProcessor:
    tokenizer = build_tokenizer()
    return MoFProcessor.from_parts(build_model(tokenizer), tokenizer)


FIRST_BASE = "it looks for methods in the first base class, which is a mixin of ours"
ADDRESS = "it reads an image from the network"
OPTIONS = "it passes do_rescale, and each encoder rescales for itself"
SKIPPED_PROCESSOR_TESTS = {
    "test_apply_chat_template_assistant_mask": FIRST_BASE,
    "test_apply_chat_template_image*": ADDRESS,
    "test_chat_template_save_loading": EDITED,
    "test_if_input_has_mismatching_tokens_and_mm_data": FIRST_BASE,
    "test_kwargs_overrides_default_subprocessor_kwargs*": OPTIONS,
    "test_processor_text_has_no_visual": ADDRESS,
    "test_replacement_offsets": FIRST_BASE,
    "test_save_load_pretrained_additional_features": "it asks for do_normalize, and each encoder normalises for itself",
    "test_structured_kwargs_nested_from_dict*": OPTIONS,
    "test_subprocessor_defaults_preserved_by_kwargs*": "it takes the mean of pixels, which are uint8 here",
    "test_unstructured_kwargs*": OPTIONS,
}


def test_processor() -> None:
    made = _processor()
    members = {
        "processor_class": MoFProcessor,
        "_setup_tokenizer": classmethod(lambda cls: copy.deepcopy(made.tokenizer)),
        "_setup_image_processor": classmethod(lambda cls: copy.deepcopy(made.image_processor)),
        "prepare_processor_dict": staticmethod(lambda: {"chat_template": made.chat_template, "tokens_per_image": 32}),
    }
    run_suite(load_suite("transformers", "test_processing_common", ABSENT).ProcessorTesterMixin, members, SKIPPED_PROCESSOR_TESTS)


SKIPPED_IMAGE_TESTS = {
    "test_call_numpy_4_channels": "images have three channels, or are PIL images of any mode",
    "test_image_processor_from_dict_with_kwargs_has_attributes": "it asks for do_convert_rgb, and images always become RGB",
    "test_new_models_require_torchvision_backend": "there is a single backend",
    "test_valid_kwargs_set": "the options are our own",
}


def test_image_processor() -> None:
    suite = load_suite("transformers", "test_image_processing_common", ABSENT)

    class Tester(suite.ImageProcessingTester):
        def _get_image_processing_classes(self) -> dict[str, Any]:
            return {"pil": MoFImageProcessor}

        def prepare_image_processor_dict(self) -> dict[str, Any]:
            return {"image_size": 32, "fit": "pad"}

        def expected_output_image_shape(self, images: list[Any]) -> tuple[int, ...]:
            return 3, 32, 32

    run_suite(suite.ImageProcessingTestMixin, {"image_processor_tester_class": Tester}, SKIPPED_IMAGE_TESTS)
