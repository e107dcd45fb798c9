"""The card of a saved model tells about its parts: language model, encoders and fusion."""

from __future__ import annotations

from typing import Any

import transformers

from encoders.runs import versions

HEAD = {"library_name": "mof-vig", "pipeline_tag": "image-text-to-text", "tags": ["mof-vig", "mixture-of-features"]}
"""The metadata of a new card."""


def model_facts(model: Any) -> dict[str, Any]:
    """Return name -> value for the card of a model that has a config, a mixer and a language model."""
    config, mixer, text = model.config, model.mixer, model.config.get_text_config()
    layers = getattr(text, "num_hidden_layers", None)
    count = sum(parameter.numel() for parameter in model.language_model.parameters())
    facts: dict[str, Any] = {
        "class": f"{type(model).__name__}; open it with mof.{type(model).__name__}.from_pretrained",
        "language model": f"{type(model.language_model).__name__}, {count / 1e6:,.1f} M parameters, width {text.hidden_size}"
        + (f", {layers} layers" if layers else ""),
    }
    for name, encoder in mixer.encoders.items():
        rows, columns = encoder.grid
        tokens = f"{rows} x {columns} tokens of {encoder.width} channels"
        facts[f"encoder {name}"] = f"{encoder.name}, {encoder.image_size} pixels, {tokens}, {'frozen' if encoder.frozen else 'trained'}"
    options = ", ".join(f"{name} {value}" for name, value in config.fusion_options.items() if value)
    facts["fusion"] = config.fusion + (f" ({options})" if options else "")
    facts["tokens of an image"] = mixer.tokens_per_image
    elsewhere = "not in this folder; loaded by name when the model is opened"
    facts["weights of the encoders"] = "in this folder" if config.embed_encoders else elsewhere
    return facts | {"saved with": f"mof-vig {versions('mof-vig')['mof-vig']}, transformers {transformers.__version__}"}
