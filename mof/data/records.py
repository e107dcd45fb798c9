"""The only parser of raw records: LLaVA dicts and chat messages in, one checked `Record` out.

Two forms are read, and nothing else about a data set is assumed:
    {"id": "7", "image": "cat.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", ...}]}
    {"id": "7", "images": ["cat.jpg"], "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", ...}]}, ...]}
Images may also lie in the parts of the messages, {"type": "image", "image": "cat.jpg"}; a record may then be its list of messages.
A row of a table has all columns of the table: a key that holds nothing (null, "" or []) counts as absent.
Each error in a record is a `RecordError` that names the record.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

IMAGE_PLACEHOLDER = "<image>"
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
SCORED = "scored_digest"
"""The key under which a selected record has its digest, without the keys `SELECTED`."""
SELECTED = ("token_mask", "token_weights", SCORED)
"""The keys that a selection adds to a record."""
HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # a lone surrogate: JSON can write it, UTF-8 cannot


ImageSource = str | Image.Image
Part = dict[str, str]  # {"type": "image"} or {"type": "text", "text": ...}
Message = dict[str, Any]  # {"role": ..., "content": list[Part]}


class RecordError(ValueError):
    """A record that cannot be used. The message names the record and what is wrong with it."""


@dataclass(frozen=True)
class Record:
    """One conversation about zero, one or several images."""

    id: str
    """Unique name; scores and selections refer to it."""
    messages: list[Message]
    """Chat messages {"role": "user"|"assistant"|"system", "content": [parts]}: an optional system message, then user and
    assistant in turn."""
    images: list[ImageSource]
    """One per {"type": "image"} part, in order: a file path or an open PIL image."""

    @property
    def questions(self) -> list[str]:
        """The text of each of the user's messages, without image placeholders."""
        return _texts(self.messages, "user")

    @property
    def answers(self) -> list[str]:
        """The text of each of the assistant's messages."""
        return _texts(self.messages, "assistant")


def to_record(raw: Any, image_folder: str | os.PathLike[str] | None = None) -> Record:
    """Check a raw record and return it in the form that everything else works on.

    A leading assistant turn is dropped, as LLaVA does (its instruction mix holds a few). White space next to an image
    placeholder is dropped too: the chat template sets images off from the text.

    Args:
        raw: a LLaVA dict, a dict of chat messages or a list of them (see the module's docstring). An image is a path, an
            open PIL image, or as Hugging Face data sets keep it, {"bytes": ..., "path": ...} with one of both.
        image_folder: joined in front of relative image paths.

    Raises:
        RecordError: for another form, unknown or misplaced roles, an image in an answer, a number of placeholders that is not
            the number of images, or an image file that does not exist.
    """
    name = record_id(raw)
    messages = _messages_of(name, raw)
    images = [_resolve(name, image, image_folder) for image in images_of(raw)]
    placeholders = sum(part["type"] == "image" for message in messages for part in message["content"])
    if placeholders != len(images):
        raise RecordError(
            f"record {name!r}: {placeholders} {IMAGE_PLACEHOLDER} placeholder(s) but {len(images)} image(s); "
            "write one placeholder per image into the user's text"
        )
    return Record(name, messages, images)


def texts_of(raw: Any, role: str) -> list[str]:
    """Return the text of each message of `role` ("user", "assistant" or "system"), without image placeholders.

    `Record.questions` and `Record.answers` of a raw record whose image files need not exist.

    Raises:
        RecordError: as `to_record`, but the images are not looked at.
    """
    return _texts(_messages_of(record_id(raw), raw), role)


def images_of(raw: Any) -> list[Any]:
    """Return the images under `images` or `image` of a raw record, or else the images in its message parts, as the record names them.

    Nothing is checked; an object that is no record has no images.
    """
    raw = to_mapping(raw)
    if not isinstance(raw, Mapping):
        return []
    if not _is_empty(images := _first(raw, "images", "image")):
        return list(images) if isinstance(images, (list, tuple)) else [images]
    turns = _first(raw, "conversations", "messages")
    contents = [_first(turn, "value", "content") for turn in turns if isinstance(turn, Mapping)] if isinstance(turns, list) else []
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, Mapping)]
    named = [_first(part, "image", "path", "url") for part in parts if part.get("type") == "image"]
    return [image for image in named if image is not None]


def with_images(raw: Any, images: Sequence[Any]) -> dict[str, Any]:
    """Return a copy of a raw record that names these images, at least one, in place of its own."""
    assert images, "without images, images in message parts would count again"
    return {key: value for key, value in to_mapping(raw).items() if key != "image"} | {"images": list(images)}


def to_mapping(raw: Any) -> Any:
    """Return a list of chat messages as a record that holds them; any other value unchanged."""
    is_messages = isinstance(raw, list) and all(isinstance(turn, Mapping) and "role" in turn for turn in raw)
    return {"messages": raw} if is_messages else raw


def record_id(raw: Any) -> str:
    """Return the id of a raw record, or a digest of its content if it has none.

    The digest leaves out the keys `SELECTED`, so that a record is trained under the id that it was scored under.
    """
    if not isinstance(raw, Mapping):
        return digest(raw)
    if not _is_empty(raw.get("id")):
        return str(raw["id"])
    return digest(unselected(raw))


def unselected(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a record without the keys that a selection adds."""
    return {key: value for key, value in raw.items() if key not in SELECTED} if any(key in raw for key in SELECTED) else raw


def require_unchanged(raw: Any) -> None:
    """Raise a RecordError for a selected record that was changed later: its mask, and the scores behind it, belong to another record."""
    if isinstance(raw, Mapping) and raw.get(SCORED) is not None and digest(unselected(raw)) != raw[SCORED]:
        raise RecordError(
            f"record {record_id(raw)!r} has changed since it was scored and selected; select from the records as they were scored, "
            "or score the new records"
        )


def digest(value: Any) -> str:
    """Return 16 hex digits of the SHA-256 of a JSON-able value, which may hold PIL images and bytes."""
    try:
        text = _to_json(value)
    except TypeError:  # keys that JSON does not know, or that cannot be sorted
        text = _to_json(_with_text_keys(value))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _with_text_keys(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {f"{type(key).__name__} {key}": _with_text_keys(item) for key, item in value.items()}
    return [_with_text_keys(item) for item in value] if isinstance(value, (list, tuple)) else value


def _plain(value: Any) -> Any:
    """Return a value that JSON can hold: the hash of bytes or of an image's pixels, otherwise the text of the value."""
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if not isinstance(value, Image.Image):
        return str(value)
    try:
        pixels = value.tobytes()
    except Exception:  # a broken file, opened but not decoded yet; the reader of its pixels reports it
        pixels = b""
    return [value.mode, value.size, hashlib.sha256(pixels).hexdigest()]


_to_json = json.JSONEncoder(sort_keys=True, default=_plain).encode  # made once, as millions of records are digested


def _messages_of(name: str, raw: Any) -> list[Message]:
    """Return the checked messages of a raw record; its images are not looked at."""
    if HALF_CHARACTER.search(name):
        raise RecordError(f"record {name!r}: the id holds half of a surrogate pair, which no file takes")
    raw = to_mapping(raw)
    if not isinstance(raw, Mapping):
        raise RecordError(f"record {name!r}: expected a dict, got {raw!r}")
    turns = _first(raw, "conversations", "messages")
    if not isinstance(turns, list) or not turns:
        raise RecordError(f"record {name!r}: expected a list under 'conversations' or 'messages', got {turns!r}")
    messages = [_to_message(name, turn) for turn in turns]
    if messages[0]["role"] == "assistant":
        messages = messages[1:]
    _check_roles(name, messages)
    return messages


def _to_message(name: str, turn: Any) -> Message:
    if not isinstance(turn, Mapping):
        raise RecordError(f"record {name!r}: expected a dict for each message, got {turn!r}")
    role = _first(turn, "from", "role")
    if not isinstance(role, str) or role not in ROLES:
        raise RecordError(f"record {name!r}: unknown role {role!r}; expected one of {', '.join(ROLES)}")
    content = _first(turn, "value", "content")
    if isinstance(content, str):
        parts = _split(content)
    elif isinstance(content, list):
        parts = [_to_part(name, part) for part in content]
    else:
        raise RecordError(f"record {name!r}: the {role} message must hold text or a list of parts, got {content!r}")
    if any(HALF_CHARACTER.search(part.get("text", "")) for part in parts):
        raise RecordError(f"record {name!r}: the {role} message holds half of a surrogate pair, which no tokenizer takes: {content!r}")
    if ROLES[role] != "user" and any(part["type"] == "image" for part in parts):
        raise RecordError(f"record {name!r}: an image in a {role} message; images belong to the user's messages")
    return {"role": ROLES[role], "content": parts}


def _split(text: str) -> list[Part]:
    """Return [image, "What?"] for "<image>\\nWhat?". Text without a placeholder stays as it is, white space included."""
    if IMAGE_PLACEHOLDER not in text:
        return [{"type": "text", "text": text}]
    parts: list[Part] = []
    for index, piece in enumerate(text.split(IMAGE_PLACEHOLDER)):
        if index:
            parts.append({"type": "image"})
        if piece.strip():
            parts.append({"type": "text", "text": piece.strip()})
    return parts


def _to_part(name: str, part: Any) -> Part:
    if isinstance(part, Mapping):
        if part.get("type") == "image":
            return {"type": "image"}
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            return {"type": "text", "text": part["text"]}
    raise RecordError(f"record {name!r}: expected a part of type 'text' or 'image', got {part!r}")


def _check_roles(name: str, messages: list[Message]) -> None:
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != (["user", "assistant"] * len(turns))[: len(turns)]:
        raise RecordError(
            f"record {name!r}: roles are {', '.join(roles) or 'empty'}; expected an optional system message, "
            "then user and assistant in turn"
        )


def _texts(messages: list[Message], role: str) -> list[str]:
    contents = [message["content"] for message in messages if message["role"] == role]
    return ["\n".join(part["text"] for part in content if part["type"] == "text") for content in contents]


def _first(raw: Mapping[str, Any], *keys: str) -> Any:
    """Return the first value under the keys that is not empty; else the first that is not None; else None."""
    values = [raw[key] for key in keys if raw.get(key) is not None]
    return next((value for value in values if not _is_empty(value)), values[0] if values else None)


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, (str, bytes, list, tuple)) and not value)


def _resolve(name: str, image: Any, folder: str | os.PathLike[str] | None) -> ImageSource:
    if isinstance(image, Mapping) and image.keys() & {"bytes", "path"}:
        image = _first(image, "bytes", "path")
    if isinstance(image, bytes):
        try:
            return Image.open(io.BytesIO(image))  # decoded when its pixels are needed
        except Exception as error:  # Pillow's readers raise many kinds for bad bytes
            raise RecordError(
                f"record {name!r}: bytes that are no image ({type(error).__name__}; they start with {image[:12]!r})"
            ) from error
    if isinstance(image, Image.Image):
        return image
    if not isinstance(image, (str, os.PathLike)):
        raise RecordError(f"record {name!r}: expected a path or an open image, got {image!r}")
    path = os.path.join(folder or "", image)
    if not os.path.isfile(path):
        raise RecordError(f"record {name!r}: no image file {path}; relative paths are looked up in image_folder={folder}")
    return path
