"""The multimodal model: a mixer of encoders in front of any causal language model of transformers."""

from __future__ import annotations

import inspect
import os
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import CausalLMOutputWithPast

from mof.checkpoints import build_configured_mixer, complete, refuse_stray_keys, shell_of
from mof.config import MoFConfig
from mof.language_models import add_image_token, generation_config
from mof.llava.parts import Checkpoint, OwnCheckpoint
from mof.llava.reading import Folder, read_checkpoint
from mof.llava.weights import merge_lora
from mof.mixer import Mixer

# Shapes: R records, L tokens per record, M images of all records in order, S the side of an image, T tokens per image,
# D the width of the language model, V its vocabulary.

ENCODERS_PREFIX = "mixer.encoders."  # keys of the encoders' weights in a state dict
IMAGE_INPUTS = ("pixel_values", "encoder_features", "image_features")  # of which a call gives one
CACHE_NAMES = ("cache", "past_key_values", "cache_params")  # from transformers 5.24 on, before it, and Mamba's before it
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


class MoFForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Image features replace the embeddings of image tokens; everything after that is the language model's own code.

    Make one with `from_parts`, or load one with `from_pretrained`.
    """

    config_class = MoFConfig
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_flash_attn = _supports_sdpa = _supports_flex_attn = _supports_attention_backend = True
    _skip_keys_device_placement: ClassVar[list[str]] = ["cache", "past_key_values"]

    def __init__(self, config: MoFConfig, mixer: Mixer | None = None, language_model: PreTrainedModel | None = None) -> None:
        super().__init__(config)
        if language_model is None:
            language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.mixer = (build_configured_mixer(config) if mixer is None else mixer).to(language_model.dtype)
        self.language_model = language_model
        parameters = inspect.signature(language_model.forward).parameters
        self._llm_takes_positions = "position_ids" in parameters
        self._cache_name = next((name for name in CACHE_NAMES if name in parameters), "")
        self._is_stateful = language_model._is_stateful  # transformers refuses to roll back a model with a state
        self._recurrent = self._is_stateful and not self._llm_takes_positions  # nothing but a state, which knows no length
        self._skip_referred_keys()
        self.post_init()

    @classmethod
    def from_parts(
        cls, mixer: Mixer, llm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, embed_encoders: bool = False
    ) -> MoFForConditionalGeneration:
        """Join a mixer and a causal language model; the mixer takes the language model's dtype and device.

        An `<image>` token is added to the tokenizer, and a row to the embeddings if there is none left for it.

        Raises:
            ValueError: when the adapters do not map to the language model's width.
        """
        width = llm.config.get_text_config().hidden_size
        if mixer.hidden_size != width:
            raise ValueError(f"the mixer maps to {mixer.hidden_size} channels, the language model has {width}")
        image_token_id = add_image_token(tokenizer, llm)
        config = MoFConfig(llm.config, image_token_id=image_token_id, embed_encoders=embed_encoders, **mixer.spec)
        config.dtype = llm.dtype
        model = cls(config, mixer.to(llm.device), llm)
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
            return cls.from_parts(*parts, embed_encoders=checkpoint.embed_encoders).eval()
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
        """The language model's output, and its loss when labels are given.

        Args:
            input_ids: [R, L], each image as T image tokens. Records may have one image, several or none.
            pixel_values: [M, 3, S, S] uint8, or float in [0, 1]: all images of the batch, in order.
            encoder_features: [M, F] in place of pixel_values: what a feature store holds of the encoders (`Mixer.unpack`).
            image_features: [M, T, D] in place of pixel_values: the mixer's output.
            past_key_values, cache: what the language model remembers of earlier tokens; both names serve with every transformers.
            inputs_embeds: [R, L, D] in place of input_ids; then the images must be in it already.
            labels: [R, L], -100 where no loss is taken.
            **kwargs: the language model's own, `num_items_in_batch` (the Trainer's global token count) among them.

        Raises:
            ValueError: when image tokens and image features differ in number.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        decoding = self._remembers(cache)
        if not decoding and past_key_values is not None:  # peft gives its prefix under this name, beside an empty cache
            cache, decoding = past_key_values, self._remembers(past_key_values)
        if decoding and self._recurrent:
            attention_mask = None  # the state has left out padding already
        if self._cache_name:
            kwargs[self._cache_name] = cache
        elif cache is not None:
            raise ValueError(f"{type(self.language_model).__name__} takes none of the caches {', '.join(CACHE_NAMES)}; give none")
        if input_ids is not None:
            images = sum(len(x) for x in (pixel_values, encoder_features, image_features) if x is not None)
            takes_images = images or not decoding
            if takes_images:  # first of all: counting waits for the device, and here the encoders are not yet in its queue
                self._check_counts(input_ids, images, self.mixer.tokens_per_image if image_features is None else image_features.shape[1])
            inputs_embeds = self.get_input_embeddings()(input_ids)  # [R, L, D]
            if pixel_values is not None or encoder_features is not None:
                image_features = self.get_image_features(pixel_values, encoder_features)  # [M, T, D]
            if takes_images:
                inputs_embeds = self._insert_images(inputs_embeds, input_ids, image_features)
        assert inputs_embeds is not None
        if position_ids is None and attention_mask is not None and attention_mask.ndim == 2:
            new = inputs_embeds.shape[1]
            if attention_mask.shape[1] > new or not decoding:  # the mask tells of padding among the earlier tokens too
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
        if self._recurrent and not isinstance(output, tuple):  # older transformers reorder beams only in what bears this name
            return CausalLMOutputWithPast(output.loss, output.logits, getattr(output, self._cache_name), output.hidden_states)
        return output

    def _remembers(self, cache: Any) -> bool:
        """Whether the cache holds earlier tokens."""
        return cache is not None and (cache.has_previous_state() if self._recurrent else cache.get_seq_length() > 0)

    def get_image_features(self, pixel_values: Tensor | None = None, encoder_features: Tensor | None = None) -> Tensor:
        """pixel_values [M, 3, S, S] or encoder_features [M, F] -> [M, T, D]: what takes the place of the image tokens."""
        if encoder_features is None:
            return self.mixer(pixel_values)
        return self.mixer.fuse(self.mixer.unpack(encoder_features.to(self.dtype)))

    def _check_counts(self, input_ids: Tensor, images: int, each: int) -> None:
        """ValueError unless input_ids [R, L] holds `each` image tokens per image."""
        found = int((input_ids == self.config.image_token_id).sum())
        if found != images * each:
            raise ValueError(
                f"{found} image tokens in input_ids, but {images * each} image features ({images} images of {each} tokens): "
                "give one image per placeholder, and expand placeholders with MoFProcessor"
            )

    def _insert_images(self, embeds: Tensor, input_ids: Tensor, features: Tensor | None) -> Tensor:
        """Put features [M, T, D] into embeds [R, L, D] where input_ids [R, L] holds image tokens."""
        if features is not None:
            slots = input_ids == self.config.image_token_id  # [R, L]
            return embeds.masked_scatter(slots.unsqueeze(-1), features.to(embeds))  # [R, L, D]
        if not self.training:
            return embeds
        # Data-parallel training waits for every parameter's gradient, so text-only batches must touch the adapters too.
        blank = torch.zeros(1, 3, self.mixer.image_size, self.mixer.image_size, dtype=torch.uint8, device=embeds.device)
        return embeds + 0 * self.get_image_features(blank).sum()  # [R, L, D]

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, *args: Any, is_first_iteration: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """With a KV cache, images enter with the prompt only."""
        # A recurrent state goes past transformers, which would make attention masks for it.
        state = {name: kwargs.pop(name) for name in CACHE_NAMES if name in kwargs} if self._recurrent else {}
        inputs = super().prepare_inputs_for_generation(input_ids, *args, is_first_iteration=is_first_iteration, **kwargs) | state
        if not is_first_iteration and kwargs.get("use_cache", True):
            inputs |= dict.fromkeys(IMAGE_INPUTS)
        return inputs

    def _prepare_cache_for_generation(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers, which would ask a recurrent language model's cache for its length; those make their own."""
        if not self._recurrent:
            super()._prepare_cache_for_generation(*args, **kwargs)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Beams and several samples per prompt: images lie flat over the batch, so they repeat by record, not by row."""
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

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """As in transformers; the encoders' weights are written only with `config.embed_encoders`."""
        self._skip_referred_keys()
        super().save_pretrained(save_directory, **kwargs)

    def _skip_referred_keys(self) -> None:
        """Tell transformers which keys checkpoints leave out: those of encoders that the config refers to."""
        referred = [] if self.config.embed_encoders else [key for key in self.state_dict() if key.startswith(ENCODERS_PREFIX)]
        self._keys_to_ignore_on_save = set(referred)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *args: Any,
        config: MoFConfig | None = None,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As in transformers, but strict: every key is accounted for. Encoders by reference are built from their spec.

        Raises:
            ValueError: listing the keys that the checkpoint misses or that it should not have.
        """
        path = pretrained_model_name_or_path
        hub = {key: kwargs.pop(key) for key in HUB_OPTIONS if key in kwargs}
        if config is None:
            config, kwargs = cls.config_class.from_pretrained(path, return_unused_kwargs=True, **hub, **kwargs)
        # Encoders come from several libraries, few of which can be built inside transformers' meta-device context.
        mixer = build_configured_mixer(config)
        model, info = super().from_pretrained(
            path, *args, config=config, mixer=shell_of(mixer, config.embed_encoders), output_loading_info=True, **hub, **kwargs
        )
        refuse_stray_keys(info, path)
        complete(model.mixer, mixer, config.embed_encoders)
        model._skip_referred_keys()
        return (model, info) if output_loading_info else model

    def adjust_generation_fn(self, *args: Any, mixer: Mixer | None = None, **kwargs: Any) -> None:
        """As in transformers, which would take the mixer that `from_pretrained` hands to `__init__` for a setting of generation."""
        super().adjust_generation_fn(*args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: adapters keep torch's initialisation, and encoders and language model come with weights of their own."""
