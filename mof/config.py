"""MoFConfig is the configuration of a multimodal model: its language model, its encoders, and their fusion."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig, PreTrainedConfig

from mof.adapter import FUSIONS
from mof.auto_map import NamesCode


class MoFConfig(NamesCode, PreTrainedConfig):
    """MoFConfig is the configuration of `MoFForConditionalGeneration`.

    Args:
        text_config: the configuration of any causal language model of transformers (or its dict). None is a default Llama.
        encoders: name -> `spec`, from which `encoders.build_encoder` rebuilds the encoder; in the order of fusion.
        fusion: a key of `mof.adapter.FUSIONS`, for example "interleaved".
        fusion_options: further arguments of the fusion: pool, grid, weights, window.
        image_token_id: the token whose embeddings the image features replace.
        embed_encoders: save the encoders' weights with the model. By default a checkpoint refers to the encoders by their spec.
        encoder_order: the names in the order of fusion, because config.json sorts its keys. By default the order of `encoders`.
        embedding_width: the width of the language model's token embeddings; None if it is the hidden size.

    Raises:
        ValueError: for an unknown fusion, an order that does not name the encoders, or a trainable encoder, whose training
            would be lost without `embed_encoders`.
    """

    model_type = "mof"
    sub_configs: ClassVar[dict[str, Any]] = {"text_config": AutoConfig}

    def __init__(
        self,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        encoders: dict[str, dict[str, Any]] | None = None,
        fusion: str = "interleaved",
        fusion_options: dict[str, Any] | None = None,
        image_token_id: int | None = None,
        embed_encoders: bool = False,
        encoder_order: list[str] | None = None,
        embedding_width: int | None = None,
        **kwargs: Any,
    ) -> None:
        # This comes first, because it resets the attention of the sub-configs, and text_config may belong to a model in use.
        super().__init__(**kwargs)
        if not isinstance(text_config, PreTrainedConfig):
            text_config = dict(text_config or {})
            text_config = AutoConfig.for_model(text_config.pop("model_type", "llama"), **text_config)
        if fusion not in FUSIONS:
            raise ValueError(f"unknown fusion {fusion!r}; expected one of {', '.join(FUSIONS)}")
        self.text_config: PreTrainedConfig = text_config
        if kwargs.get("attn_implementation") is not None:
            self._attn_implementation = kwargs["attn_implementation"]  # the setter also sets it for the language model
        encoders = encoders or {}
        self.encoder_order = list(encoders) if encoder_order is None else encoder_order
        if sorted(self.encoder_order) != sorted(encoders):
            raise ValueError(f"encoder_order {self.encoder_order} does not name the encoders {sorted(encoders)}")
        self.encoders = {name: encoders[name] for name in self.encoder_order}
        self.fusion = fusion
        self.fusion_options = fusion_options or {}
        self.image_token_id = image_token_id
        self.embed_encoders, self.embedding_width = embed_encoders, embedding_width
        trainable = [name for name, spec in self.encoders.items() if spec.get("trainable")]
        if trainable and not embed_encoders:
            raise ValueError(f"encoders {trainable} are trainable, so a reference cannot restore them: set embed_encoders=True")

    @property
    def vocab_size(self) -> int:
        """Return the number of tokens that the language model knows. Trainers read it here."""
        return self.text_config.vocab_size

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        self.text_config.vocab_size = value

    @property
    def tie_word_embeddings(self) -> bool:
        """Return whether the language model's head shares the weights of the embeddings."""
        return self.text_config.tie_word_embeddings

    @tie_word_embeddings.setter
    def tie_word_embeddings(self, value: bool) -> None:
        self.text_config.tie_word_embeddings = value

    def to_dict(self) -> dict[str, Any]:
        """Return the content of config.json, without the path from which the language model was loaded."""
        contents = super().to_dict()
        contents["text_config"].pop("_name_or_path", None)
        return contents


AutoConfig.register(MoFConfig.model_type, MoFConfig, exist_ok=True)
