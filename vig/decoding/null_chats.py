"""Conversations of the null branch: with null images, without images, or with an instruction that disturbs."""

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


def null_chat(chat: Chat, null: str, seed: int) -> Chat:
    """Return the conversation with null images of the name `null` (`vig.nulls`), or without images for "drop"."""
    if null == DROP:
        return [{**message, "content": [part for part in _parts(message) if not _is_image(part)]} for message in chat]
    nulls = iter(NullImages(null, seed)("of the conversation", images_of(chat)))
    return [
        {**message, "content": [{**part, "image": next(nulls)} if _is_image(part) else part for part in _parts(message)]}
        for message in chat
    ]


def disturbed_chat(chat: Chat, instruction: str) -> Chat:
    """Return the conversation with the instruction before the text of each of the user's messages."""
    changed = []
    for message in chat:
        parts = list(_parts(message))
        first = next((i for i, part in enumerate(parts) if part["type"] == "text"), None)
        if message["role"] == "user" and first is not None:
            parts[first] = {**parts[first], "text": f"{instruction} {parts[first]['text']}"}
        changed.append({**message, "content": parts})
    return changed


def _parts(message: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _is_image(part: Mapping[str, Any]) -> bool:
    return part["type"] == "image"
