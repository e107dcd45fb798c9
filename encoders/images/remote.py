"""Images may lie on storage that fsspec knows: "s3://bucket/train-{000..127}.tar", "hf://...", "file://...". They are read in turn."""

from __future__ import annotations

import glob
from contextlib import AbstractContextManager
from typing import Any

from encoders.images.opening import ImageError, ImageLimits, suffixes
from encoders.storage import reached


def is_url(source: str) -> bool:
    return "://" in source


def remote_files(url: str, tars: tuple[str, ...]) -> list[str]:
    """Return the URLs that a URL stands for, sorted: matches of wildcards, the images in a folder, or the file itself.

    Args:
        tars: endings of tars.

    Raises:
        ValueError: for a URL of no file, or of a storage whose library is not installed.
        OSError: for storage that cannot be reached.
    """
    with reached(url) as (storage, path):
        if glob.has_magic(path):
            files = storage.glob(path)
        elif storage.isdir(path):
            files = [file for file in storage.find(path) if file.lower().endswith(tuple(suffixes()))]
        else:
            files = [path] if storage.isfile(path) else []
    if unknown := [file for file in files if not file.lower().endswith((*tars, *suffixes()))]:
        raise ValueError(f"{url}: {unknown[0]} is no source of images; expected an image or {', '.join(tars)}")
    if not files:
        raise ValueError(f"{url}: no such file or folder, or no images there")
    return sorted(map(storage.unstrip_protocol, files))


def opened_url(url: str) -> AbstractContextManager[Any]:
    """Return a file of bytes that reads from the URL."""
    import fsspec

    return fsspec.open(url, "rb")


def remote_image(url: str, limits: ImageLimits) -> bytes | ImageError:
    """Return the content of an image file, or the reason why it is not read."""
    try:
        with opened_url(url) as file:
            limits.check_bytes(url, file.size)
            return file.read()
    except ImageError as error:
        return error
    except Exception as error:  # of the storage's library
        return ImageError(f"{url}: cannot be read ({type(error).__name__}: {error})")
