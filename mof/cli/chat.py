"""`mof chat`: a question about an image."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from transformers import AutoModelForImageTextToText, AutoProcessor

from encoders import read_image
from encoders.command_options import Device, MaxNewTokens, Model, usable_device
from mof.auto_classes import register_auto_classes
from mof.data.prompts import ready_for_prompts


def chat(
    question: Annotated[str, typer.Argument(help="The question about the image.")],
    model: Model,
    image: Annotated[Path, typer.Option(help="Image file.")],
    max_new_tokens: MaxNewTokens = 128,
    device: Device = None,
) -> None:
    """Ask any saved image-text-to-text model about an image.

    The answer is decoded greedily.

    \b
    Example:
      mof chat --model runs/mof --image photo.jpg "Is the door open?"
    """
    if not (model / "config.json").is_file():  # or transformers takes a mistyped folder for the name of a model on the hub
        raise ValueError(f"{model} holds no config.json: expected a folder that save_pretrained wrote")
    place = usable_device(device)
    register_auto_classes()
    content = [{"type": "image", "image": read_image(image)}, {"type": "text", "text": question}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    try:
        network = AutoModelForImageTextToText.from_pretrained(model, trust_remote_code=False)
        processor = AutoProcessor.from_pretrained(model, trust_remote_code=False)
        ready_for_prompts(processor)
        inputs = processor.apply_chat_template([{"role": "user", "content": content}], **options).to(place)
    except ValueError as error:
        raise ValueError(f"{model} cannot be used as an image-text-to-text model with a chat template: {error}") from error
    network = network.eval().to(place)
    tokens = network.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)  # [1, prompt + answer]
    answer = tokens[0, inputs["input_ids"].shape[1] :]  # [answer]
    typer.echo(processor.decode(answer, skip_special_tokens=True).strip())
