"""MoFForConditionalGeneration is the multimodal model with a head. It returns logits and a loss, and generates.

`mof.base_model` puts image features in the places of image tokens.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

from mof.base_model import MoFModel
from mof.config import MoFConfig
from mof.generation import ImageGenerationMixin
from mof.language_model_fit import refuse_unfit
from mof.language_models import add_image_token, generation_config
from mof.llava.parts import Checkpoint, OwnCheckpoint
from mof.llava.reading import Folder, read_checkpoint
from mof.llava.weights import merge_lora
from mof.mixer import Mixer
from mof.quantization import adopt_quantization

# Shapes: R records, L tokens per record.


class MoFForConditionalGeneration(MoFModel, ImageGenerationMixin):
    """MoFForConditionalGeneration is a `MoFModel` whose language model has a head. It returns logits and a loss, and generates.

    `from_parts` makes a model, and `from_pretrained` loads a model.
    """

    _language_models = AutoModelForCausalLM

    @classmethod
    def from_parts(
        cls, mixer: Mixer, llm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, embed_encoders: bool = False
    ) -> MoFForConditionalGeneration:
        """Return the model that joins a mixer and a causal language model, in the language model's dtype and on its device.

        An `<image>` token is added to the tokenizer, and a row to the embeddings if no row is left for it.

        Raises:
            ValueError: for adapters that do not map to the width of the language model's embeddings, and for a language model that
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
        """Return the model of a LLaVA, released MoF, Hugging Face LLaVA or LoRA folder. `load_checkpoint` also returns its processor.

        Args:
            checkpoint: the folder, or the parts that `mof.llava.reading.read_checkpoint` returned.
            **options: options of `read_checkpoint`, for a folder.
        """
        if not isinstance(checkpoint, (Checkpoint, OwnCheckpoint)):
            checkpoint = read_checkpoint(checkpoint, **options)
        if isinstance(checkpoint, Checkpoint):
            parts = checkpoint.mixer, checkpoint.language_model, checkpoint.tokenizer
            return cls._join(*parts, checkpoint.embed_encoders).eval()
        model = cls.from_pretrained(checkpoint.folder)
        return (model if checkpoint.adapter is None else merge_lora(model, checkpoint.adapter)).eval()

    @property
    def model(self) -> MoFModel:
        """Return the model without the head. It holds the same modules, which are looked up at each call, because peft replaces them."""
        base = MoFModel.__new__(MoFModel)
        nn.Module.__init__(base)
        base.config, base.training = self.config, self.training
        base._hold(self.mixer, self.language_model.base_model)
        return base

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
        """Return the language model's output, with its loss if labels are given. `MoFModel` explains the other arguments.

        Args:
            labels: [R, L], -100 for a token without loss.
            logits_to_keep: the number of last tokens whose logits are computed, or their indices; 0 for all.
            **kwargs: further arguments of the language model, for example `num_items_in_batch` (the Trainer's global token count).
        """
        output = super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            encoder_features=encoder_features,
            image_features=image_features,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache=cache,
            inputs_embeds=inputs_embeds,
            labels=labels,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )
        # Older versions of transformers reorder beams only in an output of this class.
        if self._recurrent and self.cache_name and not isinstance(output, tuple):
            return CausalLMOutputWithPast(output.loss, output.logits, getattr(output, self.cache_name), output.hidden_states)
        return output

    @property
    def image_layout(self) -> tuple[tuple[int, int], dict[str, range]]:
        """Return rows and columns of an image's tokens, and each encoder's tokens among the T of an image, for drawings of attention."""
        return self.mixer.token_grid, self.mixer.token_places

    def get_output_embeddings(self) -> nn.Module | None:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)


AutoModelForImageTextToText.register(MoFConfig, MoFForConditionalGeneration, exist_ok=True)
AutoModelForMultimodalLM.register(MoFConfig, MoFForConditionalGeneration, exist_ok=True)
# `transformers serve` and the pipeline "any-to-any" find models by these names.
MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[MoFConfig.model_type] = MoFForConditionalGeneration.__name__
