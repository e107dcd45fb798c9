"""The multimodal model: a mixer of encoders in front of any causal language model of transformers."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

from mof.checkpoints import StrictCheckpoints, build_configured_mixer
from mof.config import MoFConfig
from mof.language_model_fit import refuse_unfit
from mof.language_models import add_image_token, generation_config
from mof.llava.parts import Checkpoint, OwnCheckpoint
from mof.llava.reading import Folder, read_checkpoint
from mof.llava.weights import merge_lora
from mof.mixer import Mixer
from mof.quantization import adopt_quantization

# Shapes: R records, L tokens per record, M images of all records in order, S the side of an image, T tokens per image,
# D the width of the language model, V its vocabulary.

IMAGE_INPUTS = ("pixel_values", "encoder_features", "image_features")  # a call gives one of them
CACHE_NAMES = ("cache", "past_key_values", "cache_params")  # since transformers 5.24; before 5.24; Mamba's before 5.24


class MoFForConditionalGeneration(StrictCheckpoints, GenerationMixin):
    """Image features replace the embeddings of image tokens; after that, all code is the language model's own.

    `from_parts` makes a model; `from_pretrained` loads a model.
    """

    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_flash_attn = _supports_sdpa = _supports_flex_attn = _supports_attention_backend = True
    _skip_keys_device_placement: ClassVar[list[str]] = ["cache", "past_key_values"]

    def __init__(self, config: MoFConfig, mixer: Mixer | None = None, language_model: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        if language_model is None:
            language_model = AutoModelForCausalLM.from_config(config.text_config, trust_remote_code=False)
        self.mixer = (build_configured_mixer(config) if mixer is None else mixer).to(language_model.dtype)
        self.language_model = language_model
        parameters = inspect.signature(language_model.forward).parameters
        self._llm_takes_positions = "position_ids" in parameters
        self.cache_name = next((name for name in CACHE_NAMES if name in parameters), "")  # empty for a model without a cache
        self._has_layer_tables = "per_layer_inputs" in inspect.signature(language_model.base_model.forward).parameters
        self._is_stateful = language_model._is_stateful  # transformers refuses to roll back a model with a state
        self._recurrent = self._is_stateful and not self._llm_takes_positions  # its cache is a state, which has no length
        self._skip_referred_keys()
        self.post_init()

    @classmethod
    def from_parts(
        cls, mixer: Mixer, llm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, embed_encoders: bool = False
    ) -> MoFForConditionalGeneration:
        """Return the model that joins a mixer and a causal language model, in the language model's dtype and on its device.

        An `<image>` token is added to the tokenizer, and a row to the embeddings if no row is left for it.

        Raises:
            ValueError: when the adapters do not map to the width of the language model's embeddings, and for a language model that
                cannot read embeddings, padding on the left or its own cache (`mof.language_model_fit`).
        """
        model = cls._join(mixer, llm, tokenizer, embed_encoders)
        refuse_unfit(model)
        return model

    @classmethod
    def _join(
        cls, mixer: Mixer, llm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, embed_encoders: bool
    ) -> MoFForConditionalGeneration:
        width, hidden = llm.get_input_embeddings().weight.shape[1], llm.config.get_text_config().hidden_size
        if mixer.hidden_size != width:
            raise ValueError(
                f"the mixer maps to {mixer.hidden_size} channels, the token embeddings of {type(llm).__name__} have {width}: "
                f"make the mixer with hidden_size={width}"
            )
        image_token_id = add_image_token(tokenizer, llm)
        config = MoFConfig(llm.config, image_token_id=image_token_id, embed_encoders=embed_encoders, **mixer.spec)
        config.embedding_width = None if width == hidden else width
        config.dtype = llm.dtype
        model = cls(config, mixer.to(llm.device), llm)
        adopt_quantization(model, llm)
        model.generation_config = generation_config(llm, tokenizer, image_token_id)
        return model

    @classmethod
    def from_checkpoint(cls, checkpoint: Folder | Checkpoint | OwnCheckpoint, **options: Any) -> MoFForConditionalGeneration:
        """Return the model of a LLaVA, released MoF, Hugging Face LLaVA or LoRA folder; `load_checkpoint` gives its processor too.

        Args:
            checkpoint: the folder, or the parts that `mof.llava.reading.read_checkpoint` returned.
            **options: those of `read_checkpoint`, for a folder.
        """
        if not isinstance(checkpoint, (Checkpoint, OwnCheckpoint)):
            checkpoint = read_checkpoint(checkpoint, **options)
        if isinstance(checkpoint, Checkpoint):
            parts = checkpoint.mixer, checkpoint.language_model, checkpoint.tokenizer
            return cls._join(*parts, checkpoint.embed_encoders).eval()
        model = cls.from_pretrained(checkpoint.folder)
        return (model if checkpoint.adapter is None else merge_lora(model, checkpoint.adapter)).eval()

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        encoder_features: Tensor | None = None,
        image_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return the language model's output, with its loss when labels are given.

        Args:
            input_ids: [R, L], each image as T image tokens. Records may have one image, several or none.
            pixel_values: [M, 3, S, S] uint8, or float in [0, 1]: all images of the batch, in order.
            encoder_features: [M, F] in place of pixel_values: the encoders' features in a feature store (see `Mixer.unpack`).
            image_features: [M, T, D] in place of pixel_values: the mixer's output. D is the width of the token embeddings.
            past_key_values, cache: the language model's cache of earlier tokens; both names work with every transformers.
            inputs_embeds: [R, L, D] in place of input_ids; then the images must be in it already.
            labels: [R, L], -100 where no loss is taken.
            **kwargs: further arguments of the language model, such as `num_items_in_batch` (the Trainer's global token count).

        Raises:
            ValueError: when image tokens and image features differ in number.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if past_key_values is not None and not self._remembers(cache):  # peft gives its prefix so, beside an empty cache
            cache = past_key_values
        decoding = self._remembers(cache)
        if decoding and self._recurrent:
            attention_mask = None  # the state has left out padding already
        if self.cache_name:
            kwargs[self.cache_name] = cache
        elif cache is not None:
            raise ValueError(f"{type(self.language_model).__name__} takes none of the caches {', '.join(CACHE_NAMES)}; give none")
        if input_ids is not None:
            inputs_embeds = self._embed(input_ids, pixel_values, encoder_features, image_features, decoding)  # [R, L, D]
            if self._has_layer_tables:
                kwargs["per_layer_inputs"] = self._look_up_layers(input_ids)
        assert inputs_embeds is not None
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            new = inputs_embeds.shape[1]
            if attention_mask.shape[1] > new or not decoding:  # the mask covers padding among the earlier tokens too
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -new:]  # [R, L]: padding moves no token
        if self._llm_takes_positions:
            kwargs["position_ids"] = position_ids
        output = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            labels=labels,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        # Older transformers reorder beams only in an output of this class.
        if self._recurrent and self.cache_name and not isinstance(output, tuple):
            return CausalLMOutputWithPast(output.loss, output.logits, getattr(output, self.cache_name), output.hidden_states)
        return output

    def _remembers(self, cache: Any) -> bool:
        """Return whether the cache holds earlier tokens."""
        return cache is not None and (cache.has_previous_state() if self._recurrent else cache.get_seq_length() > 0)

    def _embed(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None,
        encoder_features: Tensor | None,
        image_features: Tensor | None,
        decoding: bool,
    ) -> Tensor:
        """Return the embeddings [R, L, D] of input_ids [R, L], with image features where the image tokens stand."""
        images = sum(len(x) for x in (pixel_values, encoder_features, image_features) if x is not None)
        if decoding and not images:
            return self.get_input_embeddings()(input_ids)
        # Counting waits for the device, so it comes first: the encoders are not yet in the device's queue.
        self._check_counts(input_ids, images, self.mixer.tokens_per_image if image_features is None else image_features.shape[1])
        embeds = self.get_input_embeddings()(input_ids)  # [R, L, D]
        if pixel_values is not None or encoder_features is not None:
            image_features = self.get_image_features(pixel_values, encoder_features)  # [M, T, D]
        if image_features is not None:
            if image_features.shape[-1] != embeds.shape[-1]:
                raise ValueError(f"image_features have {image_features.shape[-1]} channels, the token embeddings {embeds.shape[-1]}")
            slots = input_ids == self.config.image_token_id  # [R, L]
            return embeds.masked_scatter(slots.unsqueeze(-1), image_features.to(embeds))  # [R, L, D]
        if not self.training:
            return embeds
        # Data-parallel training waits for every parameter's gradient, so text-only batches must touch the adapters too.
        blank = torch.zeros(1, 3, self.mixer.image_size, self.mixer.image_size, dtype=torch.uint8, device=embeds.device)
        return embeds + 0 * self.get_image_features(blank).sum()  # [R, L, D]

    def _look_up_layers(self, input_ids: Tensor) -> Tensor | None:
        """Return the rows that the layers of Gemma 3n and 4 add to each token, [R, L, layers, channels] for input_ids [R, L].

        The result is None for a language model without such tables.

        Image tokens count as padding there, as in transformers.
        """
        decoder, config = self.language_model.base_model, self.language_model.config.get_text_config()
        if not config.hidden_size_per_layer_input:
            return None
        padding = config.pad_token_id or 0
        known = (input_ids != self.config.image_token_id) & (input_ids < config.vocab_size_per_layer_input)  # [R, L]
        rows = decoder.embed_tokens_per_layer(input_ids.where(known, padding))  # [R, L, layers * channels]
        return rows.unflatten(-1, (-1, config.hidden_size_per_layer_input))  # [R, L, layers, channels]

    def get_image_features(self, pixel_values: Tensor | None = None, encoder_features: Tensor | None = None) -> Tensor:
        """Return the features [M, T, D] that replace the image tokens, for pixel_values [M, 3, S, S] or encoder_features [M, F]."""
        if encoder_features is None:
            return self.mixer(pixel_values)
        return self.mixer.fuse(self.mixer.unpack(encoder_features.to(self.dtype)))

    def _check_counts(self, input_ids: Tensor, images: int, each: int) -> None:
        """Raise a ValueError unless input_ids [R, L] holds `each` image tokens per image."""
        count = int((input_ids == self.config.image_token_id).sum())
        if count != images * each:
            raise ValueError(
                f"{count} image tokens in input_ids, but {images * each} image features ({images} images of {each} tokens): "
                "give one image per placeholder, and expand placeholders with MoFProcessor"
            )

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, is_first_iteration: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Prepare a step of generation. With a cache, images enter with the prompt only.

        Raises:
            ValueError: for a language model whose cache has another name (RWKV), unless `use_cache=False`.
        """
        if not self.cache_name and kwargs.get("use_cache", True):
            name = type(self.language_model).__name__
            raise ValueError(f"{name} takes no cache named {', '.join(CACHE_NAMES)}; generate with use_cache=False")
        # A recurrent state bypasses transformers, which would make attention masks for it.
        state = {name: kwargs.pop(name) for name in CACHE_NAMES if name in kwargs} if self._recurrent else {}
        inputs = super().prepare_inputs_for_generation(input_ids, *args, is_first_iteration=is_first_iteration, **kwargs) | state
        if not is_first_iteration and kwargs.get("use_cache", True):
            inputs |= dict.fromkeys(IMAGE_INPUTS)
        return inputs

    def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """Make the cache, except for language models that make their own: recurrent ones, and those that transformers names."""
        if not self._recurrent and self.language_model._supports_default_dynamic_cache():
            super()._prepare_cache_for_generation(*args, **kwargs)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Repeat the inputs for beams or samples. Images lie flat over the batch, so they are repeated record by record."""
        images = {key: kwargs.pop(key) for key in IMAGE_INPUTS if kwargs.get(key) is not None}
        if images and expand_size > 1:
            tokens = (input_ids == self.config.image_token_id).sum(dim=1)  # [R]
            counts = (tokens // self.mixer.tokens_per_image).tolist()
            for key, value in images.items():
                by_record = value.split(counts)  # R of [M_r, ...]
                images[key] = torch.cat([chunk for chunk in by_record for _ in range(expand_size)])  # [M * expand_size, ...]
        input_ids, kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        return input_ids, kwargs | images

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: adapters keep torch's initialisation; encoders and language model come with weights of their own."""


AutoModelForImageTextToText.register(MoFConfig, MoFForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(MoFConfig, MoFForConditionalGeneration, exist_ok=True)
# `transformers serve` and the pipeline "any-to-any" look for models by these names.
MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[MoFConfig.model_type] = MoFForConditionalGeneration.__name__
