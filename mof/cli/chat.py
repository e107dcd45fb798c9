"""`mof chat` asks a model about an image, or holds a conversation with it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import TextStreamer

from encoders import read_image
from encoders.command_options import DecodingName, Device, MaxNewTokens, Model, TrustRemoteCode, usable_device
from encoders.saved_models import load_network, load_processor
from encoders.terminal import plain, say
from encoders.text_files import one_line
from mof.data.prompts import prompt_inputs, ready_for_prompts
from mof.evals.decoding import Decoding, load_decoding, load_explainer


def chat(
    model: Model,
    question: Annotated[str | None, typer.Argument(help="The question. Without it, questions are read from the terminal.")] = None,
    image: Annotated[Path | None, typer.Option(help="Image file that the conversation is about.")] = None,
    max_new_tokens: MaxNewTokens = 128,
    device: Device = None,
    trust_remote_code: TrustRemoteCode = False,
    decoding: DecodingName = None,
    explain: Annotated[
        Path | None,
        typer.Option(help="HTML file to write: the answer with and without --decoding, what the image adds to each token, and attention."),
    ] = None,
) -> None:
    """Talk to any saved image-text-to-text model, with or without an image.

    The answers are decoded greedily and printed word by word. Without a question, each line that you type is the next question
    of a conversation, which Ctrl-D ends.

    \b
    Example:
      mof chat --model runs/mof --image photo.jpg "Is the door open?"
      mof chat --model runs/mof --image photo.jpg
      mof chat --model runs/mof --image photo.jpg --decoding vcd --explain page.html "Is the door open?"
    """
    method = load_decoding(decoding)
    if explain is not None and (question is None or image is None):
        raise ValueError("--explain shows the answer to one question about an image: give the question and --image")
    pictures = [] if image is None else [{"type": "image", "image": read_image(image)}]
    network, processor = load_saved(model, usable_device(device), trust_remote_code)
    messages: list[dict[str, Any]] = []
    for text in _questions() if question is None else [question]:
        content = [*([] if messages else pictures), {"type": "text", "text": text}]
        messages.append({"role": "user", "content": content})
        with _named(model):
            inputs = _inputs(processor, messages, network)
        answer = _answer(network, processor, inputs, max_new_tokens, _further(method, processor, messages, network))
        if explain is not None:
            load_explainer()(explain, network, processor, messages, method, model_name=str(model), max_new_tokens=max_new_tokens)
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})


def load_saved(model: Path, device: str, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Return the model of a folder, on a device, and its processor, ready for prompts.

    Raises:
        DamagedError: for files that were changed since the model was saved; the message names them.
        ValueError: for a folder without an image-text-to-text model, or whose chat template does not come to an end.
    """
    processor = load_processor(model, trust_remote_code=trust_remote_code)
    network = load_network(model, trust_remote_code=trust_remote_code)
    with _named(model):
        ready_for_prompts(processor)
    return network.eval().to(device), processor


@contextmanager
def _named(model: Path) -> Iterator[None]:
    """Name the model in errors of transformers."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{model} cannot be used as an image-text-to-text model with a chat template: {one_line(error)}") from error


def _questions() -> Iterator[str]:
    """Yield the lines of the standard input that are not empty."""
    prompt = ""
    if sys.stdin.isatty():
        say("Type a question; Ctrl-D ends the conversation.", err=True)
        prompt = "> "
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        if line:
            yield line


def _further(method: Decoding | None, processor: Any, messages: list[dict[str, Any]], network: Any) -> dict[str, Any]:
    """Return the arguments of `generate` for a decoding method, none for plain decoding."""
    return {} if method is None else method.options([messages], lambda chats: _inputs(processor, chats[0], network))


def _inputs(processor: Any, messages: list[dict[str, Any]], network: Any) -> Any:
    return prompt_inputs(processor, [messages], add_generation_prompt=True).to(network.device, network.dtype)


def _answer(network: Any, processor: Any, inputs: Any, max_new_tokens: int, further: dict[str, Any]) -> str:
    """Print the answer while the model gives it, and return it."""
    streamer = _Printed(processor, skip_prompt=True, skip_special_tokens=True)
    tokens = network.generate(**inputs, **further, do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, streamer=streamer)
    return processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()  # [prompt + answer]


class _Printed(TextStreamer):
    """_Printed prints an answer without white space before its first word, and without control characters."""

    begun = False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = text if self.begun else text.lstrip()
        self.begun |= bool(text)
        super().on_finalized_text(plain(text), stream_end)
