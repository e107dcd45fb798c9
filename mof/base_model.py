"""MoFModel is the multimodal model without a head: encoders, their mixer, and a decoder. Image features replace image tokens."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import torch_compilable_check
from transformers.utils.generic import can_return_tuple

from mof.checkpoints import StrictCheckpoints, build_configured_mixer
from mof.config import MoFConfig
from mof.generation import CACHE_NAMES
from mof.mixer import Mixer

# Shapes: R records, L tokens per record, M images of all records in order, S the side of an image, T tokens per image,
# D the width of the language model.


class MoFModel(StrictCheckpoints):
    """MoFModel replaces the embeddings of image tokens by image features, and runs the language model without its head.

    A call returns hidden states. `MoFForConditionalGeneration` is the model with the head.
    """

    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_flash_attn = _supports_sdpa = _supports_flex_attn = _supports_attention_backend = True
    _can_compile_fullgraph = True
    _skip_keys_device_placement: ClassVar[list[str]] = ["cache", "past_key_values"]
    _language_models: ClassVar[Any] = AutoModel

    def __init__(self, config: MoFConfig, mixer: Mixer | None = None, language_model: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        if language_model is None:
            language_model = self._language_models.from_config(config.text_config, trust_remote_code=False)
        mixer = build_configured_mixer(config) if mixer is None else mixer
        self._hold(mixer.to(language_model.dtype), language_model)
        self._skip_referred_keys()
        self.post_init()

    def _hold(self, mixer: Mixer, language_model: PreTrainedModel) -> None:
        """Keep both parts, and record which arguments the language model takes."""
        self.mixer, self.language_model = mixer, language_model
        parameters = inspect.signature(language_model.forward).parameters
        self._llm_takes_positions = "position_ids" in parameters
        self.cache_name = next((name for name in CACHE_NAMES if name in parameters), "")  # empty for a model without a cache
        self._has_layer_tables = "per_layer_inputs" in inspect.signature(language_model.base_model.forward).parameters
        self._is_stateful = language_model._is_stateful  # transformers refuses to roll back a model with a state
        self._recurrent = self._is_stateful and not self._llm_takes_positions  # the cache is a state, which has no length

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
        **kwargs: Any,
    ) -> Any:
        """Return the language model's output: hidden states, or logits for a model with a head.

        Args:
            input_ids: [R, L], each image as T image tokens. Records may have any number of images, also none.
            pixel_values: [M, 3, S, S] uint8, or float in [0, 1]: all images of the batch, in order.
            encoder_features: [M, F] in place of pixel_values: the encoders' features in a feature store (see `Mixer.unpack`).
            image_features: [M, T, D] in place of pixel_values: the mixer's output. D is the width of the token embeddings.
            past_key_values, cache: the language model's cache of earlier tokens. Both names work with every version of transformers.
            inputs_embeds: [R, L, D] in place of input_ids: the token embeddings. They may hold image features already. Images that are
                given replace the embeddings of the image token.
            **kwargs: further arguments of the language model.

        Raises:
            ValueError: if the numbers of image tokens and image features differ, and for several tokens after a recurrent state.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if past_key_values is not None and not self._remembers(cache):  # peft gives its prefix in this way, beside an empty cache
            cache = past_key_values
        if self._recurrent and self._remembers(cache):
            self._refuse_several(input_ids if inputs_embeds is None else inputs_embeds)
            attention_mask = None  # the state already leaves out padding
        if self.cache_name:
            kwargs[self.cache_name] = cache
        elif cache is not None:
            raise ValueError(f"{type(self.language_model).__name__} takes none of the caches {', '.join(CACHE_NAMES)}; give none")
        if input_ids is not None and self._has_layer_tables:
            kwargs["per_layer_inputs"] = self._look_up_layers(input_ids)
        inputs = {"pixel_values": pixel_values, "encoder_features": encoder_features, "image_features": image_features}
        images = {name: value for name, value in inputs.items() if value is not None}
        inputs_embeds = self._embed(input_ids, inputs_embeds, images, cache)  # [R, L, D]
        if self._llm_takes_positions:
            if position_ids is None:
                position_ids = self._count_positions(attention_mask, inputs_embeds.shape[1], cache)  # [R, L]
            kwargs["position_ids"] = position_ids
        return self.language_model(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)

    def _remembers(self, cache: Any) -> bool:
        """Return whether the cache holds earlier tokens."""
        return cache is not None and bool(cache.has_previous_state() if self._recurrent else cache.get_seq_length() > 0)

    def _refuse_several(self, tokens: Any) -> None:
        """Raise a ValueError for several tokens, because transformers continues from a recurrent state with a single token [R, 1, ...]."""
        if tokens.shape[1] > 1:
            raise ValueError(
                f"{type(self.language_model).__name__} continues from a state by one token at a time, not by {tokens.shape[1]}: give the "
                "whole text without the cache"
            )

    def _count_positions(self, attention_mask: Any, new: int, cache: Any) -> Tensor | None:
        """Return the positions [R, new] of the last `new` tokens, without counting padding. None leaves them to the language model.

        A mask [R, L] that is longer than `new` covers padding among the earlier tokens too.
        """
        if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
            return None
        if attention_mask.shape[1] == new and self._remembers(cache):
            return None
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -new:]

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None, images: dict[str, Tensor], cache: Any) -> Tensor:
        """Return the embeddings [R, L, D] of input_ids [R, L] or inputs_embeds, with image features in place of the image tokens."""
        embeds = self.get_input_embeddings()(input_ids) if inputs_embeds is None else inputs_embeds  # [R, L, D]
        if images or not self._is_known_text(embeds, inputs_embeds, cache):
            slots = self._find_image_tokens(input_ids, embeds)  # [R, L]
            self._check_counts(slots, images)  # before the encoders, because the check waits for the device
        if images:
            features = self._features(**images)  # [M, T, D]
            if features.shape[-1] != embeds.shape[-1]:
                raise ValueError(f"image_features have {features.shape[-1]} channels, the token embeddings {embeds.shape[-1]}")
            return embeds.masked_scatter(slots.unsqueeze(-1), features.to(embeds.device, embeds.dtype))  # [R, L, D]
        if not self.training or inputs_embeds is not None:
            return embeds
        # Data-parallel training waits for every parameter's gradient, so text-only batches must touch the adapters too.
        blank = torch.zeros(1, 3, self.mixer.image_size, self.mixer.image_size, dtype=torch.uint8, device=embeds.device)
        return embeds + 0 * self.mixer(blank).sum()  # [R, L, D]

    def _is_known_text(self, embeds: Tensor, inputs_embeds: Tensor | None, cache: Any) -> bool:
        """Return whether image tokens need not be counted, because the user gave embeddings or the tokens come from generation."""
        if inputs_embeds is not None or embeds.shape[1] == 1:
            return True
        return not torch.compiler.is_compiling() and self._remembers(cache)

    def _find_image_tokens(self, input_ids: Tensor | None, embeds: Tensor) -> Tensor:
        """Return [R, L]: whether each token is an image token. Without input_ids, the embedding of the image token is searched."""
        if input_ids is not None:
            return input_ids == self.config.image_token_id
        token = torch.tensor([self.config.image_token_id], device=embeds.device)
        return (embeds == self.get_input_embeddings()(token).to(embeds.dtype)).all(-1)

    def _check_counts(self, slots: Tensor, images: dict[str, Tensor]) -> None:
        """Raise a ValueError unless `slots` [R, L] marks as many image tokens as the images have features."""
        each, count = self._tokens_of_each(images), sum(len(value) for value in images.values())
        marked = slots.sum()
        if torch.compiler.is_compiling():  # a graph cannot read the number, and up to torch 2.9 not for transformers' check either
            torch._assert_async(marked == count * each, f"the number of image tokens is not that of {count} images of {each} tokens")
            return
        torch_compilable_check(
            marked == count * each,
            lambda: (
                f"Image features and image tokens do not match: {int(marked)} image tokens in input_ids, but {count * each} image features "
                f"({count} images of {each} tokens): give one image per placeholder, and expand placeholders with MoFProcessor"
            ),
        )

    def _tokens_of_each(self, images: dict[str, Tensor]) -> int:
        """Return T, the number of tokens of an image."""
        features = images.get("image_features")
        return self.mixer.tokens_per_image if features is None else features.shape[1]

    def _look_up_layers(self, input_ids: Tensor) -> Tensor | None:
        """Return the rows that the layers of Gemma 3n and 4 add to each token, [R, L, layers, channels] for input_ids [R, L].

        The result is None for a language model without these tables. An image token gets the row of padding, as in transformers.
        """
        decoder, config = self.language_model.base_model, self.language_model.config.get_text_config()
        if not config.hidden_size_per_layer_input:
            return None
        padding = config.pad_token_id or 0
        known = (input_ids != self.config.image_token_id) & (input_ids < config.vocab_size_per_layer_input)  # [R, L]
        rows = decoder.embed_tokens_per_layer(input_ids.where(known, padding))  # [R, L, layers * channels]
        return rows.unflatten(-1, (-1, config.hidden_size_per_layer_input))  # [R, L, layers, channels]

    @can_return_tuple
    def get_image_features(
        self, pixel_values: Tensor | None = None, encoder_features: Tensor | None = None, **kwargs: Any
    ) -> BaseModelOutputWithPooling:
        """Return the features [M, T, D] that replace the image tokens, as `pooler_output` and as `last_hidden_state`.

        Args:
            pixel_values: [M, 3, S, S].
            encoder_features: [M, F] in place of pixel_values.
        """
        features = self._features(pixel_values, encoder_features)
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=features)

    def _features(
        self, pixel_values: Tensor | None = None, encoder_features: Tensor | None = None, image_features: Tensor | None = None
    ) -> Tensor:
        """Return image features [M, T, D] for the image input that is given."""
        if image_features is not None:
            return image_features
        if encoder_features is not None:
            return self.mixer.fuse(self.mixer.unpack(encoder_features.to(self.dtype)))
        return self.mixer(pixel_values)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_decoder(self) -> nn.Module:
        return self.language_model.base_model

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        return self.mixer if modality == "image" else super().get_encoder(modality)

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing, because adapters keep torch's initialisation, and encoders and language model come with their weights."""


AutoModel.register(MoFConfig, MoFModel, exist_ok=True)
# In a checkpoint, the decoder is inside of a language model with a head.
register_checkpoint_conversion_mapping("MoFModel", [WeightRenaming(r"^language_model.model.", "language_model.")], overwrite=True)
