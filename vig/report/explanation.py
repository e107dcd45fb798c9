"""explain compares a model's answer with the answer of a decoding method: how much the image helps each token, and where tokens look."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, ProcessorMixin

from encoders.pages import colour_scale, write_page
from encoders.pages.thumbnails import thumbnail_uri
from mof.data.prompts import prompt_inputs, ready_for_prompts
from mof.data.records import to_record
from mof.data.rows import RawRecord
from vig.decoding import Decoding
from vig.decoding.attention import EditedAttention, image_tokens
from vig.decoding.contrasts import ICD, Contrast
from vig.decoding.null_chats import Chat, images_of, text_of
from vig.nulls import DROP
from vig.report.encoder_parts import encoder_parts
from vig.report.samples import THUMBNAIL

# Shapes: P tokens of the prompt, K keys, H heads, Y layers, T tokens of an image, N tokens of the answer, V the vocabulary.

UNIT = 1e-5  # share of attention that the page counts as 1, because it holds whole numbers


@dataclass(frozen=True)
class AnswerToken:
    """AnswerToken holds a token of an answer, with its contrast and its attention to the images."""

    text: str
    contrast: float
    """The token's loss with the null images minus its loss with the images, in nats."""
    ends: bool
    """Whether this is a special token, as at the end of an answer."""
    looks: list[list[int]]
    """The attention to the tokens of each `Panel`, row by row, in units of 0.00001: means over layers and heads."""


@dataclass(frozen=True)
class Panel:
    """A panel is an image on which the page draws the attention to the tokens that an encoder made of it."""

    picture: str
    """The image as the model sees it, as a data URI."""
    encoder: str
    grid: tuple[int, int]
    """Rows and columns of the tokens."""


@dataclass(frozen=True)
class Answer:
    """Answer holds an answer, token by token."""

    decoding: str
    tokens: list[AnswerToken]
    shares: list[float]
    """For each panel, the share of attention that goes to its tokens: means over answer tokens, layers and heads."""
    by_encoder: dict[str, list[float]]
    """Encoder -> the contrast of each token through this encoder alone (`vig.report.encoder_parts`); {} where it cannot be told."""


@dataclass(frozen=True)
class Explanation:
    """Explanation holds the answers to a question, with the images that they look at."""

    question: str
    null: str
    """The name of the null image (`vig.nulls`)."""
    instruction: str
    """The text before the question of the null branch; empty for all methods but ICD."""
    pictures: list[str]
    """The images of the conversation, as data URIs."""
    answers: list[Answer]
    """The plain answer, then the method's."""
    panels: list[Panel]
    """Empty for a model whose image tokens form no grid over the image, as with tiles, or whose attention cannot be read."""
    even: float
    """The share of attention that a panel would get if attention were even: its share of the prompt's tokens."""


@dataclass(frozen=True, kw_only=True)
class _Recorded(Decoding):
    """_Recorded decodes by a method (None: plain decoding) and keeps the logits of both branches."""

    name: ClassVar[str] = "explanation"
    method: Decoding | None
    null: Contrast
    watch: bool
    """True if attention is recorded where the method does not edit it."""
    kept: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """The logits [V] with the images and with null images, for each answer token."""

    @property
    def contrasts(self) -> bool:
        return True

    def attention(self, model: PreTrainedModel, input_ids: Tensor, inputs: Mapping[str, Any]) -> EditedAttention | None:
        edited = None if self.method is None else self.method.attention(model, input_ids, inputs)
        return EditedAttention(model, self.name, input_ids, inputs) if edited is None and self.watch else edited

    def null_chat(self, chat: Chat) -> Chat:
        return self.null.null_chat(chat)

    def combine(self, logits: Tensor, null_logits: Tensor, step: int) -> Tensor:
        self.kept.append((logits[0], null_logits[0]))
        return self.method.combine(logits, null_logits, step) if self.method is not None and self.method.contrasts else logits


@torch.no_grad()
def explain(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    chat: Chat,
    method: Decoding | None = None,
    max_new_tokens: int = 128,
) -> Explanation:
    """Return the model's greedy answer to a conversation, and the answer of a decoding method beside it.

    Args:
        model: any image-text-to-text model of transformers; attention is shown where its language model can give it.
        chat: messages that end with a question, with at least one image.
        method: the decoding method of the second answer. A contrast has its own null images; other methods get blurred images.

    Raises:
        ValueError: for a conversation without images, and where the method refuses the model.
    """
    images = images_of(chat)
    if not images:
        raise ValueError("an explanation compares the answer with the answer to a null image, but the conversation has no image")
    null = method if isinstance(method, Contrast) and method.contrasts else Contrast(null="blur")
    ready_for_prompts(processor)
    encode = partial(_encode, model, processor)
    inputs = encode([chat])
    options = {"do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens, "return_dict_in_generate": True}

    def run(way: Decoding | None, watch: bool) -> tuple[_Recorded, Any]:
        recorded = _Recorded(method=way, null=null, watch=watch)
        return recorded, model.generate(**inputs, **options, **recorded.options([chat], encode), output_attentions=watch)

    places, panels = _panels(model, inputs, images)
    try:
        runs = [run(None, bool(panels))]
    except ValueError:  # attention that cannot be edited cannot be watched
        places, panels = [], []
        runs = [run(None, False)]
    runs += [] if method is None else [run(method, bool(panels))]
    # "same" and a missing image leave nothing that an encoder could see in place of the image
    null_inputs = encode([null.null_chat(chat)]) if null.null not in ("same", DROP) else {}
    parts = partial(encoder_parts, model, inputs, null_inputs)
    answers = [_answer(processor.tokenizer, recorded, made, places, parts) for recorded, made in runs]
    even = len(places[0]) / inputs["input_ids"].shape[1] if places else 0.0
    instruction = null.instruction if isinstance(null, ICD) else ""
    pictures = [thumbnail_uri(image, THUMBNAIL) for image in images]
    return Explanation(text_of(chat[-1]), null.null, instruction, pictures, answers, panels, even)


def _encode(model: PreTrainedModel, processor: Any, chats: Sequence[Chat]) -> Any:
    return prompt_inputs(processor, chats, add_generation_prompt=True).to(model.device, model.dtype)


def _answer(tokenizer: Any, recorded: _Recorded, made: Any, places: Sequence[Tensor], parts: Callable[..., dict[str, Any]]) -> Answer:
    """Return the answer that `generate` made, with the attention to the tokens at each of `places` [T].

    Args:
        parts: `encoder_parts` for this prompt.
    """
    answer = made.sequences[0, -len(recorded.kept) :]  # [N]
    ids = answer.tolist()
    tokens, shares, clean = [], [0.0] * len(places), []
    for step, (token, text, logits) in enumerate(zip(ids, _texts(tokenizer, ids), recorded.kept, strict=True)):
        losses = [-branch.float().log_softmax(dim=-1)[token] for branch in logits]
        clean.append(losses[0])
        looks = [_look(made.attentions[step], place) for place in places]  # each [T]
        shares = [share + float(look.sum()) / len(ids) for share, look in zip(shares, looks, strict=True)]
        whole = [(look / UNIT).round().int().tolist() for look in looks]
        tokens.append(AnswerToken(text, float(losses[1] - losses[0]), token in tokenizer.all_special_ids, whole))
    decoding = "greedy" if recorded.method is None else str(recorded.method)
    return Answer(decoding, tokens, shares, parts(answer, torch.stack(clean)))


def _look(layers: Sequence[Tensor | None], place: Tensor) -> Tensor:
    """Return the attention [T] from the last token to the tokens at `place` [T]: mean over layers and heads."""
    rows = [layer[0, :, -1].float().mean(dim=0) for layer in layers if layer is not None]  # Y of [K]
    longest = max(map(len, rows))
    padded = torch.stack([F.pad(row, (longest - len(row), 0)) for row in rows])  # [Y, K]: sliding windows see the last tokens only
    return padded.mean(dim=0)[place.to(padded.device)].cpu()


def _texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return the text that each token adds. A character of several tokens belongs to the last of them."""
    texts, shown = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end])
        begun = text.endswith("\ufffd") and end < len(ids)
        texts.append("" if begun else text[len(shown) :])
        shown = shown if begun else text
    return texts


def _panels(model: Any, inputs: Mapping[str, Any], images: Sequence[Image.Image]) -> tuple[list[Tensor], list[Panel]]:
    """Return a panel for each image and encoder, and the places of its tokens in the prompt; none where tokens form no grid."""
    marked = image_tokens(model, inputs["input_ids"])
    pixels = inputs.get("pixel_values")
    if marked is None or pixels is None or pixels.ndim != 4 or len(pixels) != len(images):
        return [], []
    every = marked[0].nonzero().flatten().cpu()
    each = len(every) // len(images)
    side = round(each**0.5)
    grid, parts = getattr(model, "image_layout", ((side, side), {"the image": range(each)}))  # other models: a square of tokens
    if not each or len(every) % len(images) or any(len(part) != grid[0] * grid[1] for part in parts.values()):
        return [], []
    places, panels = [], []
    for own, picture in zip(every.split(each), pixels, strict=True):
        shown = _shown(picture)
        for name, part in parts.items():
            places.append(own[list(part)])
            panels.append(Panel(shown, name, grid))
    return places, panels


def _shown(pixels: Tensor) -> str:
    """Return pixels [3, H, W] as a data URI. Normalised pixels are stretched to the full range of colours."""
    values = pixels.float().cpu()
    if pixels.dtype != torch.uint8:
        values = (values - values.amin()) / (values.amax() - values.amin()).clamp(min=1e-6) * 255
    return thumbnail_uri(Image.fromarray(values.round().byte().permute(1, 2, 0).numpy()), THUMBNAIL)


def first_question(raw: RawRecord, image_folder: str | os.PathLike[str] | None) -> Chat:
    """Return a record's conversation up to its first answer, with the images. RecordError for a record that cannot be read."""
    record = to_record(raw, image_folder)
    images = iter(record.images)
    asked = itertools.takewhile(lambda message: message["role"] != "assistant", record.messages)
    return [
        {**message, "content": [{**part, "image": next(images)} if part["type"] == "image" else part for part in message["content"]]}
        for message in asked
    ]


def write_explanation(
    file: str | os.PathLike[str],
    model: PreTrainedModel,
    processor: ProcessorMixin,
    chat: Chat,
    method: Decoding | None = None,
    *,
    model_name: str,
    max_new_tokens: int = 128,
) -> None:
    """Explain the answer to a conversation (`explain`), and write an HTML file that needs no other file. ValueError as `explain`."""
    explanation = explain(model, processor, chat, method, max_new_tokens)
    scale = colour_scale([token.contrast for answer in explanation.answers for token in answer.tokens])
    template = Path(__file__).with_name("explanation.html.jinja")
    write_page(Path(file), template, explanation=explanation, model=model_name, scale=scale)
