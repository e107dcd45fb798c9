"""A conversation of the null branch has null images, no images, or an instruction that disturbs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from encoders.images.reading import read_image
from vig.nulls import DROP, NullImages

Chat = Sequence[Mapping[str, Any]]
"""Chat messages {"role", "content"}, with the images in their parts: {"type": "image", "image": PIL image or file}."""


def has_image(chat: Chat) -> bool:
    return any(_is_image(part) for message in chat for part in _parts(message))


def images_of(chat: Chat) -> list[Image.Image]:
    """Return the images of a conversation. ImageError for an image that cannot be read."""
    return [read_image(part["image"]) for message in chat for part in _parts(message) if _is_image(part)]


def text_of(message: Mapping[str, Any]) -> str:
    """Return the texts of a message, a line each."""
    return "\n".join(part["text"] for part in _parts(message) if part["type"] == "text")


def null_chat(chat: Chat, null: str, seed: int, instruction: str = "") -> Chat:
    """Return the conversation with null images of the name `null` (`vig.nulls`), or without images for "drop".

    An instruction stands before the first text of each of the user's messages.
    """
    nulls = iter(() if null == DROP else NullImages(null, seed)("of the conversation", images_of(chat)))
    changed = []
    for message in chat:
        parts: list[Mapping[str, Any]] = []
        begins = instruction if message["role"] == "user" else ""
        for part in _parts(message):
            if part["type"] == "text" and begins:
                parts.append({**part, "text": f"{begins} {part['text']}"})
                begins = ""
            elif not _is_image(part):
                parts.append(part)
            elif null != DROP:
                parts.append({**part, "image": next(nulls)})
        changed.append({**message, "content": parts})
    return changed


def _parts(message: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _is_image(part: Mapping[str, Any]) -> bool:
    return part["type"] == "image"
