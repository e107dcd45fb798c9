"""The one parser of raw records: LLaVA dicts and chat messages in, one checked `Record` out.

Two forms are read, and nothing else about a data set is assumed:
    {"id": "7", "image": "cat.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", ...}]}
    {"id": "7", "images": ["cat.jpg"], "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", ...}]}, ...]}
or, in place of the second, the list of messages alone, with the images in their parts: {"type": "image", "image": "cat.jpg"}.
Everything wrong with a record is a `RecordError` that names the record.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

IMAGE_PLACEHOLDER = "<image>"
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # a lone surrogate: JSON can write it, UTF-8 cannot

ImageSource = str | Image.Image
Part = dict[str, str]  # {"type": "image"} or {"type": "text", "text": ...}


class RecordError(ValueError):
    """A record that cannot be used. The message names the record and what is wrong with it."""


@dataclass(frozen=True)
class Record:
    """One conversation about zero, one or several images."""

    id: str
    """Unique name; scores and selections refer to it."""
    messages: list[dict[str, Any]]
    """Chat messages {"role": "user"|"assistant"|"system", "content": [parts]}: an optional system message, then user and
    assistant in turn."""
    images: list[ImageSource]
    """One per {"type": "image"} part, in order: a file path or an open PIL image."""


def to_record(raw: Any, image_folder: str | os.PathLike[str] | None = None) -> Record:
    """Check a raw dict and bring it into the one form that everything else works on.

    A leading assistant turn is dropped, as LLaVA does (its instruction mix holds a few). White space next to an image
    placeholder is dropped too: how an image is set off from the text is the chat template's business.

    Args:
        raw: a LLaVA dict, a dict of chat messages or a list of them (see the module's docstring). An image is a path, an
            open PIL image, or as Hugging Face data sets keep it, {"bytes": ..., "path": ...} with one of both.
        image_folder: joined in front of relative image paths.

    Raises:
        RecordError: for what is not of that form, unknown or misplaced roles, an image in an answer, a number of placeholders
            that is not the number of images, or an image file that does not exist.
    """
    name = record_id(raw)
    if HALF_CHARACTER.search(name):
        raise RecordError(f"record {name!r}: the id holds half of a surrogate pair, which no file takes")
    if _is_messages(raw):
        raw = {"messages": raw}
    if not isinstance(raw, Mapping):
        raise RecordError(f"record {name!r}: expected a dict, got {raw!r}")
    turns = _turns(name, raw)
    messages = [_to_message(name, turn) for turn in turns]
    if messages and messages[0]["role"] == "assistant":
        messages = messages[1:]
    _check_roles(name, messages)
    images = [_resolve(name, image, image_folder) for image in images_of(raw)]
    placeholders = sum(part["type"] == "image" for message in messages for part in message["content"])
    if placeholders != len(images):
        raise RecordError(
            f"record {name!r}: {placeholders} {IMAGE_PLACEHOLDER} placeholder(s) but {len(images)} image(s); "
            "write one placeholder per image into the user's text"
        )
    return Record(name, messages, images)


def images_of(raw: Any) -> list[Any]:
    """The images of a raw record as it names them: under `image` or `images`, absent, one or a list, or else inside of its
    message parts. Nothing is checked; what is no record has none.
    """
    if _is_messages(raw):
        raw = {"messages": raw}
    if not isinstance(raw, Mapping):
        return []
    images = _first(raw, "images", "image")
    if images is None:
        turns = _first(raw, "conversations", "messages")
        contents = [turn.get("content") for turn in turns if isinstance(turn, Mapping)] if isinstance(turns, list) else []
        parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, Mapping)]
        found = [_first(part, "image", "path", "url") for part in parts if part.get("type") == "image"]
        return [image for image in found if image is not None]
    if isinstance(images, str) and not images:
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]


def record_id(raw: Any) -> str:
    """The record's id; of one without (null is none either), and of what is no record at all, a digest of its content.

    A "token_mask" and "token_weights" do not count, so that a record is trained under the id that it was scored under.
    """
    if not isinstance(raw, Mapping):
        return digest(raw)
    if raw.get("id") is not None:
        return str(raw["id"])
    return digest({key: value for key, value in raw.items() if key not in ("token_mask", "token_weights")})


def digest(value: Any) -> str:
    """16 hex digits of the SHA-256 of a JSON-able value, which may hold PIL images and bytes."""
    try:
        text = json.dumps(value, sort_keys=True, default=_plain)
    except TypeError:  # keys that JSON has not, or that cannot be sorted
        text = json.dumps(_with_text_keys(value), sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _with_text_keys(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {f"{type(key).__name__} {key}": _with_text_keys(one) for key, one in value.items()}
    return [_with_text_keys(one) for one in value] if isinstance(value, (list, tuple)) else value


def _plain(value: Any) -> Any:
    """What JSON cannot say: bytes and the pixels of an image by their hash, anything else by its text."""
    if isinstance(value, bytes):
        return hashlib.sha256(value).hexdigest()
    if not isinstance(value, Image.Image):
        return str(value)
    try:
        pixels = value.tobytes()
    except Exception:  # a broken file, opened but not decoded yet: whoever needs the pixels reports it
        pixels = b""
    return [value.mode, value.size, hashlib.sha256(pixels).hexdigest()]


def _turns(name: str, raw: Mapping[str, Any]) -> list[Any]:
    turns = _first(raw, "conversations", "messages")
    if not isinstance(turns, list) or not turns:
        raise RecordError(f"record {name!r}: expected a list under 'conversations' or 'messages', got {turns!r}")
    return turns


def _to_message(name: str, turn: Any) -> dict[str, Any]:
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
    """ "<image>\\nWhat?" -> [image, "What?"]. Text without a placeholder stays as it is, white space included."""
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


def _check_roles(name: str, messages: list[dict[str, Any]]) -> None:
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != (["user", "assistant"] * len(turns))[: len(turns)]:
        raise RecordError(
            f"record {name!r}: roles are {', '.join(roles) or 'empty'}; expected an optional system message, "
            "then user and assistant in turn"
        )


def _is_messages(raw: Any) -> bool:
    return isinstance(raw, list) and all(isinstance(turn, Mapping) and "role" in turn for turn in raw)


def _first(raw: Mapping[str, Any], *keys: str) -> Any:
    """What is under the first of the keys that holds anything: a table has all of its columns in every row."""
    return next((raw[key] for key in keys if raw.get(key) is not None), None)


def _resolve(name: str, image: Any, folder: str | os.PathLike[str] | None) -> ImageSource:
    if isinstance(image, Mapping) and image.keys() & {"bytes", "path"}:
        image = _first(image, "bytes", "path")
    if isinstance(image, bytes):
        try:
            return Image.open(io.BytesIO(image))  # decoded when it is wanted
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
