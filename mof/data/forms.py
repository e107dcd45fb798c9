"""Records come in many forms. This module brings them to two: turns are under "messages" or "conversations", images are sources.

Nothing is checked here, and no error is raised: a value in an unknown form stays as it is, and `mof.data.records` names its fault.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import sys
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
from PIL import Image

TURNS = ("conversations", "messages", "conversation")
QUESTION_AND_ANSWER = (("prompt", "completion"), ("query", "response"))  # keys of TRL, keys of ms-swift
IMAGE_PARTS = ("image", "image_url", "input_image")
TEXT_PARTS = ("text", "input_text", "output_text")

# Shapes: n images, H, W = rows and columns, C = 1 to 4 channels.


def to_mapping(raw: Any) -> Any:
    """Return a record whose turns are a list under "conversations" or "messages". A record in an unknown form is returned as it is.

    The given record may be a list of turns, may hold the list as JSON text, or may hold question and answer under two separate keys.
    """
    if isinstance(raw, list) and all(isinstance(turn, Mapping) and ("role" in turn or "from" in turn) for turn in raw):
        return {"messages": raw}
    if not isinstance(raw, Mapping):
        return raw
    if any(map(_is_array, raw.values())):
        raw = {key: _without_arrays(value) for key, value in raw.items()}
    turns = first_of(raw, *TURNS)
    if isinstance(turns, list) and turns is not raw.get("conversation"):
        return raw
    if is_empty(turns):
        turns = next((_joined(raw[asked], raw[told]) for asked, told in QUESTION_AND_ANSWER if {asked, told} <= raw.keys()), None)
    elif isinstance(turns, str):
        turns = _parsed(turns)
    if not isinstance(turns, (list, tuple)):
        return raw
    turn_keys = {*TURNS, *(key for pair in QUESTION_AND_ANSWER for key in pair)}
    return {key: value for key, value in raw.items() if key not in turn_keys} | {"messages": list(turns)}


def image_of(part: Mapping[str, Any]) -> Any:
    """Return the image that a part of a message names (a path, bytes, an open image or a mapping of Hugging Face), or None."""
    image = first_of(part, "image", "path", "url", "image_url", "source")
    if isinstance(image, Mapping) and not image.keys() & {"bytes", "path"}:
        image = first_of(image, "url", "data")
    if is_empty(image) or (isinstance(part.get("source"), Mapping) and isinstance(image, str) and ":" not in image):
        encoded = image or part.get("base64")
        image = None if is_empty(encoded) else f"data:;base64,{encoded}"
    return source_of(image)


def source_of(image: Any) -> Any:
    """Return the bytes of a data: address or the path of a file: address. Another value is returned as it is."""
    if isinstance(image, str) and image.startswith("data:"):
        try:
            return base64.b64decode("".join(image.partition(",")[2].split()), validate=True)  # lines may be broken, as in a mail
        except (binascii.Error, ValueError):
            return image
    if isinstance(image, str) and image.startswith("file://"):
        return unquote(urlsplit(image).path)
    return image


def is_image_part(part: Mapping[str, Any]) -> bool:
    """Return whether a part of a message stands for an image. In a row of a table, the part's type may be null."""
    return part.get("type") in IMAGE_PARTS or (part.get("type") is None and is_empty(part.get("text")) and image_of(part) is not None)


def first_of(raw: Mapping[str, Any], *keys: str) -> Any:
    """Return the first value under the keys that is not empty. If all are empty, return the first that is not None, or None."""
    values = [raw[key] for key in keys if raw.get(key) is not None]
    return next((value for value in values if not is_empty(value)), values[0] if values else None)


def whole_characters(text: str) -> str:
    """Return the text with U+FFFD in place of each half of a surrogate pair, which JSON can write and no file in UTF-8 takes."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def is_empty(value: Any) -> bool:
    """Return whether a value counts as absent: null, "", [], and NaN, which stands for null in a DataFrame."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, (str, bytes, list, tuple)) and not value)


def _joined(asked: Any, told: Any) -> list[Any]:
    """Return the turns of a question and an answer, each of which is a text or a list of turns."""
    sides = (("user", asked), ("assistant", told))
    return [turn for role, side in sides for turn in (side if isinstance(side, list) else [{"role": role, "content": side}])]


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def is_tensor(value: Any) -> bool:
    """Return whether a value is a tensor of torch. Without torch, which takes seconds to import, there are none."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _is_array(value: Any) -> bool:
    """Return whether a value is an entry of a data set in the format "numpy" or "torch"."""
    return isinstance(value, (np.ndarray, np.generic)) or is_tensor(value)


def _without_arrays(value: Any) -> Any:
    """Return a value with images, lists and numbers in place of arrays. An image is [H, W, C] in NumPy and [C, H, W] in torch."""
    if isinstance(value, Mapping):
        return {key: _without_arrays(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.dtype == object):
        return [_without_arrays(entry) for entry in value]
    if not _is_array(value):
        return value
    array = value.movedim(-3, -1).cpu().numpy() if is_tensor(value) and value.ndim > 2 else np.asarray(value)
    if array.dtype == np.uint8 and array.ndim in (3, 4) and 1 <= array.shape[-1] <= 4:
        images = array if array.ndim == 4 else array[None]  # [n, H, W, C]
        opened = [Image.fromarray(np.ascontiguousarray(image.squeeze(-1) if image.shape[-1] == 1 else image)) for image in images]
        return opened if array.ndim == 4 else opened[0]
    return array.tolist()
