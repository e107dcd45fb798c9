"""This module is the only parser of raw records. It turns LLaVA dicts and chat messages into checked `Record`s.

It reads two forms; `mof.data.forms` brings other forms to these:
    {"id": "7", "image": "cat.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", ...}]}
    {"id": "7", "images": ["cat.jpg"], "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text", ...}]}, ...]}
Images may also be in the parts of the messages, {"type": "image", "image": "cat.jpg"}. Then a record may be just a list of messages.
A row of a table has all columns of the table, so a key that holds nothing (null, "" or []) counts as absent.
Each error in a record is a `RecordError` that names the record.
"""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from PIL import Image

from encoders.images.opening import ADDRESSES, ImageError, inside, open_image
from mof.data.digests import SCORED, digest, record_id, unselected
from mof.data.forms import TEXT_PARTS, first_of, image_of, is_empty, is_image_part, source_of, to_mapping

MOST_MISSING = 20  # if the first image files, in this number, are all missing, the folder is wrong
IMAGE_PLACEHOLDER = "<image>"
ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
ROLES |= dict.fromkeys(("chatgpt", "bard", "bing", "model"), "assistant")  # roles of ShareGPT and Gemma
OTHER_MEDIA = ("video", "videos", "audio", "audios")
TOOL_ROLES = ("tool", "function", "observation", "ipython")  # and all that begin so, for example "tool_response" and "function_call"
TOOL_CALLS = ("tool_calls", "function_call")  # keys of a message
LONGEST_MESSAGE = 600  # characters of an error's message; an image in base64 may be kilobytes of text
BASE64 = re.compile(r"(?:[A-Za-z0-9+/]{4}\s*){32,}(?:[A-Za-z0-9+/]{2,3}={1,2}\s*)?")
HALF_CHARACTER = re.compile("[\ud800-\udfff]")  # a lone surrogate: JSON can write it, UTF-8 cannot


ImageSource = str | Image.Image
Part = dict[str, str]  # {"type": "image"} or {"type": "text", "text": ...}
Message = dict[str, Any]  # {"role": ..., "content": list[Part]}


class RecordError(ValueError):
    """A RecordError says that a record cannot be used. The message names the record and its fault; a long message is cut in the middle."""

    def __init__(self, message: str) -> None:
        super().__init__(shortened(message))


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 200


def shown(value: Any) -> str:
    """Return a value as text for a message, bounded in length and depth."""
    return _REPR.repr(value)


def shortened(message: str) -> str:
    """Return a message of at most about `LONGEST_MESSAGE` characters, cut in the middle."""
    if len(message) <= LONGEST_MESSAGE:
        return message
    half = LONGEST_MESSAGE // 2
    return f"{message[:half]} ... ({len(message) - 2 * half} characters) ... {message[-half:]}"


@dataclass(frozen=True)
class Record:
    """A record is a conversation about any number of images, also none."""

    id: str
    """Unique name, to which scores and selections refer."""
    messages: list[Message]
    """Chat messages {"role": "user"|"assistant"|"system", "content": [parts]}: an optional system message, then user and
    assistant in turn."""
    images: list[ImageSource]
    """A file path or an open PIL image for each {"type": "image"} part, in order."""

    @property
    def questions(self) -> list[str]:
        """Return the text of each of the user's messages, without image placeholders."""
        return _texts(self.messages, "user")

    @property
    def answers(self) -> list[str]:
        """Return the text of each of the assistant's messages."""
        return _texts(self.messages, "assistant")


def to_record(raw: Any, image_folder: str | os.PathLike[str] | None = None) -> Record:
    """Check a raw record and return it as a `Record`, on which all other code works.

    A leading assistant turn is dropped, as LLaVA does (its instruction mix holds a few). White space next to an image
    placeholder is dropped too, because the chat template separates images from the text.

    Args:
        raw: a LLaVA dict, a dict of chat messages or a list of chat messages (see the module's docstring). An image is a path, an
            open PIL image, or {"bytes": ..., "path": ...} as in Hugging Face data sets, where either value may be null.
        image_folder: the folder in which relative image paths start. Absolute paths must lie in it; None and "/" allow any path.

    Raises:
        RecordError: for another form, unknown or misplaced roles, an image in an answer, different numbers of placeholders and
            images, an image file that does not exist or lies outside of `image_folder`, or a video or sound without an image.
    """
    name = record_id(raw)
    messages = _messages_of(name, raw)
    images = [_resolve(name, image, image_folder) for image in images_of(raw)]
    placeholders = sum(part["type"] == "image" for message in messages for part in message["content"])
    if not placeholders and _asks_in_plain_text(raw):  # the images then belong to the first question, as in TRL
        question = next(message for message in messages if message["role"] == "user")
        question["content"] = [*({"type": "image"} for _ in images), *question["content"]]
        placeholders = len(images)
    if placeholders != len(images):
        raise RecordError(
            f"record {name!r}: {placeholders} {IMAGE_PLACEHOLDER} placeholder(s) but {len(images)} image(s); "
            "write one placeholder per image into the user's text"
        )
    if not images and (media := [key for key in OTHER_MEDIA if isinstance(to_mapping(raw).get(key), (str, list, Mapping)) and raw[key]]):
        raise RecordError(f"record {name!r}: the {media[0]} would not be seen, since only images and texts are read; take the record out")
    return Record(name, messages, images)


def texts_of(raw: Any, role: str) -> list[str]:
    """Return the text of each message of `role` ("user", "assistant" or "system"), without image placeholders.

    It returns the same as `Record.questions` and `Record.answers`, but the image files need not exist.

    Raises:
        RecordError: as in `to_record`, but the images are not checked.
    """
    return _texts(_messages_of(record_id(raw), raw), role)


def images_of(raw: Any) -> list[Any]:
    """Return the images that a raw record names: under `images` or `image`, or else in its message parts.

    Nothing is checked. For an object that is no record the list is empty.
    """
    raw = to_mapping(raw)
    if not isinstance(raw, Mapping):
        return []
    if not is_empty(images := first_of(raw, "images", "image")):
        return [source_of(image) for image in images] if isinstance(images, (list, tuple)) else [source_of(images)]
    turns = first_of(raw, "conversations", "messages")
    contents = [first_of(turn, "value", "content") for turn in turns if isinstance(turn, Mapping)] if isinstance(turns, list) else []
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, Mapping)]
    return [image for part in parts if is_image_part(part) and (image := image_of(part)) is not None]


def refuse_missing_images(records: Sequence[Any], image_folder: str | os.PathLike[str] | None) -> None:
    """Raise a ValueError if the image files of the first records are all missing, because then the folder is wrong, not a record."""
    named = (image for raw in records for image in images_of(raw) if isinstance(image, str) and not image.startswith(ADDRESSES))
    paths = [os.path.join(image_folder or "", image) for image in islice(named, MOST_MISSING)]
    if len(paths) == MOST_MISSING and not any(map(os.path.lexists, paths)):
        raise ValueError(
            f"the first {MOST_MISSING} images of the records are missing, such as {paths[0]}: give the folder that the image paths start "
            f"from (--images), not {image_folder}"
        )


def require_unchanged(raw: Any) -> None:
    """Raise a RecordError for a selected record that was changed later. Its token mask belongs to the record before the change."""
    if isinstance(raw, Mapping) and raw.get(SCORED) is not None and digest(unselected(raw)) != raw[SCORED]:
        raise RecordError(
            f"record {record_id(raw)!r} has changed since it was scored and selected; select from the records as they were scored, "
            "or score the new records"
        )


def _messages_of(name: str, raw: Any) -> list[Message]:
    """Return the checked messages of a raw record. Its images are not checked."""
    if HALF_CHARACTER.search(name):
        raise RecordError(f"record {name!r}: the id holds half of a surrogate pair, which no file takes")
    raw = to_mapping(raw)
    if not isinstance(raw, Mapping):
        raise RecordError(f"record {name!r}: expected a dict, got {shown(raw)}")
    turns = first_of(raw, "conversations", "messages")
    if not isinstance(turns, list) or not turns:
        raise RecordError(f"record {name!r}: expected a list under 'conversations' or 'messages', got {shown(turns)}")
    messages = [_to_message(name, turn) for turn in turns]
    if messages[0]["role"] == "assistant":
        messages = messages[1:]
    _check_roles(name, messages)
    return messages


def _to_message(name: str, turn: Any) -> Message:
    if not isinstance(turn, Mapping):
        raise RecordError(f"record {name!r}: expected a dict for each message, got {shown(turn)}")
    role = first_of(turn, "from", "role")
    given, role = role, role.strip().lower() if isinstance(role, str) else None
    calls = [value.values() if isinstance(value, Mapping) else [value] for key in TOOL_CALLS if (value := turn.get(key))]
    if (role or "").startswith(TOOL_ROLES) or not all(is_empty(value) for values in calls for value in values):
        raise RecordError(f"record {name!r}: calls of tools and their results are not supported; take the record out ({shown(given)} turn)")
    if role not in ROLES:
        raise RecordError(f"record {name!r}: unknown role {shown(given)}; expected one of {', '.join(ROLES)}")
    content = first_of(turn, "value", "content")
    if isinstance(content, str):
        parts = _split(content)
    elif isinstance(content, list):
        parts = [_to_part(name, part) for part in content]
    else:
        raise RecordError(f"record {name!r}: the {role} message must hold text or a list of parts, got {shown(content)}")
    if any(HALF_CHARACTER.search(part.get("text", "")) for part in parts):
        raise RecordError(f"record {name!r}: the {role} message holds half of a surrogate pair, which no tokenizer takes: {shown(content)}")
    if ROLES[role] != "user" and any(part["type"] == "image" for part in parts):
        raise RecordError(f"record {name!r}: an image in a {role} message; images belong to the user's messages")
    return {"role": ROLES[role], "content": parts}


def _split(text: str) -> list[Part]:
    """Return the parts of a text with image placeholders: [image, "What?"] for "What?\\n<image>".

    A single image is put first, wherever its placeholder stands, as in LLaVA's loader. Several images stay in place. Text without a
    placeholder stays as it is, white space included.
    """
    if IMAGE_PLACEHOLDER not in text:
        return [{"type": "text", "text": text}]
    pieces = text.split(IMAGE_PLACEHOLDER)
    if len(pieces) == 2:
        pieces = ["", "".join(pieces)]
    parts: list[Part] = []
    for index, piece in enumerate(pieces):
        if index:
            parts.append({"type": "image"})
        if piece.strip():
            parts.append({"type": "text", "text": piece.strip()})
    return parts


def _to_part(name: str, part: Any) -> Part:
    if isinstance(part, Mapping):
        if is_image_part(part):
            return {"type": "image"}
        if part.get("type") in (None, *TEXT_PARTS) and isinstance(part.get("text"), str):
            return {"type": "text", "text": part["text"]}
    raise RecordError(f"record {name!r}: expected a part of type 'text' or 'image', got {shown(part)}")


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


def _asks_in_plain_text(raw: Any) -> bool:
    """Return whether the first question of a chat is plain text, so that nothing in it can say where an image stands."""
    turns = first_of(to_mapping(raw), "conversations", "messages")
    question: Mapping[str, Any] = next((turn for turn in turns if ROLES.get(str(turn.get("role")).strip().lower()) == "user"), {})
    return isinstance(question.get("content"), str)


def _resolve(name: str, image: Any, folder: str | os.PathLike[str] | None) -> ImageSource:
    if isinstance(image, Mapping) and image.keys() & {"bytes", "path"}:
        image = first_of(image, "bytes", "path")
    if isinstance(image, (bytes, bytearray, memoryview)):
        try:
            image = bytes(image)
            return open_image(image, f"<image of {len(image)} bytes>")  # the image is decoded when its pixels are needed
        except ImageError as error:
            raise RecordError(f"record {name!r}: {error}") from error
    if isinstance(image, Image.Image):
        return image
    if not isinstance(image, (str, os.PathLike)):
        raise RecordError(f"record {name!r}: expected a path or an open image, got {shown(image)}")
    if isinstance(image, str) and image.startswith(ADDRESSES):
        advice = "what follows the comma is not base64" if image.startswith("data:") else "download it and name the file"
        raise RecordError(f"record {name!r}: the image is an address, {shown(image)}: {advice}")
    try:
        path = os.fspath(image) if folder is None else inside(folder, image)
    except ImageError as error:
        raise RecordError(f"record {name!r}: {_not_base64(image) or error}") from error
    if not os.path.isfile(path):
        reason = f"no image file {path}; relative paths are looked up in image_folder={folder}"
        raise RecordError(f"record {name!r}: {_not_base64(image) or reason}")
    return path


def _not_base64(image: str | os.PathLike[str]) -> str | None:
    """Return advice for a path that looks like an image in base64, or None for another path."""
    if BASE64.fullmatch(os.fspath(image)) is None:
        return None
    return f"the image looks like base64, {shown(image)}; write 'data:image/png;base64,' in front of it"
