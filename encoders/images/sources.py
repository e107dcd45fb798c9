"""ImageSources reads folders, lists of paths, single files and tars as a stream of names and contents of images."""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import re
import sys
import tarfile
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from braceexpand import braceexpand

from encoders.images.opening import ImageError, ImageLimits, suffixes
from encoders.images.remote import is_url, opened_url, remote_files, remote_image
from encoders.text_files import read_regular

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
CHUNK = 2**20  # bytes that are read at a time to skip a tar member
EXTENSIONS = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
MOST_SKIPPED = 2**34
"""Bytes of a member without use, beyond the size of the tar's file: a few kilobytes can decompress to terabytes of zeros."""
LONGEST_HEADER = 2**20  # bytes of a header extension (a long name, for example), because tarfile holds it in memory
MOST_MISSING = 20  # if the first files of a list, in this number, are all missing, the list starts from another folder

Content = Path | bytes | ImageError
"""A file, the bytes of a tar member, or the reason why an image cannot be read."""


def content_key(data: bytes) -> str:
    """Return an image's key in a store: 32 hexadecimal digits of the SHA-256 of its file's bytes. The name does not matter."""
    return hashlib.sha256(data).hexdigest()[:32]


class ImageSources:
    """ImageSources is a stream of (name, content) of images, in a fixed order: the sources as given, and the images of each sorted.

    Names are absolute paths. The name of a tar's member is the tar's path, a slash and the name in the tar. If an earlier member has
    the same name, a number is added. Tars are read from front to back, with a single member in memory at a time. An ImageError takes
    the place of the lost part of a damaged tar, and of a member that is too large.

    Args:
        images: a single source or a list of sources. A source is a folder (searched with its subfolders; links are followed, hidden
            files are left out), an image, a `.txt` file with a path in each line (relative to the `.txt` file), a tar, plain or
            compressed (`TAR_SUFFIXES`), or a pattern of these, with `*`, `**`, `?`, `[...]` or braces as in bash:
            "data/train-{000..127}.tar". A source may also be the URL of an image, a tar, a folder or a pattern:
            "s3://bucket/train-{000..127}.tar" (`encoders.images.remote`).
        limits: the largest member of a tar that is read.

    Attributes:
        given: the sources, as absolute paths.
        total: the number of images, or None with tars, because their members are not known before they are read.

    Raises:
        ValueError: for a path that does not exist, is no source or holds no image, and for a list whose first images are all missing.
    """

    def __init__(self, images: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], limits: ImageLimits | None = None) -> None:
        self._limits = limits
        given = [images] if isinstance(images, (str, os.PathLike)) else list(images)
        self.given = [readable(path) for path in given]
        if not given:
            raise ValueError("no images: give a folder, a list (.txt), an image or a tar")
        self._tars_and_files: list[str | Path | list[Path]] = []  # a URL, a tar, or images
        for pattern in (os.fspath(source) for source in given):
            if is_url(pattern):
                self._tars_and_files += [url for name in _alternatives(pattern) for url in remote_files(name, TAR_SUFFIXES)]
            else:
                self._tars_and_files += [path if _is_tar(path) else _listed(path) for path in _expand(pattern)]
        counts = [len(part) if isinstance(part, list) else 1 for part in self._tars_and_files if not _holds_tar(part)]
        self.total = sum(counts) if len(counts) == len(self._tars_and_files) else None

    def __iter__(self) -> Iterator[tuple[str, Content]]:
        for part in self._tars_and_files:
            if isinstance(part, list):
                yield from ((readable(path), path) for path in part)
            elif _holds_tar(part):
                yield from tar_images(part, self._limits)
            else:
                yield str(part), remote_image(str(part), self._limits or ImageLimits())

    def among(self, names: Iterable[str]) -> list[str]:
        """Return the `names` that belong to these images. All names under a tar's path count, because its members are not known."""
        files = {readable(path) for part in self._tars_and_files for path in (part if isinstance(part, list) else [part])}
        tars = tuple(f"{readable(part)}/" for part in self._tars_and_files if not isinstance(part, list) and _holds_tar(part))
        return [name for name in names if name in files or name.startswith(tars)]


def readable(path: str | os.PathLike[str]) -> str:
    """Return the absolute path as text, a different text for each path. Bytes of a file name that are no UTF-8 are written as \\xff.

    A URL is returned as it is.
    """
    return path if isinstance(path, str) and is_url(path) else _as_text(os.path.abspath(path))


def _as_text(name: str) -> str:
    """Return as text a name that Python read from a file system or a tar. A backslash that looks like a written byte becomes \\x5c."""
    name_bytes = re.sub(rb"\\(?=x(?:5c|[89a-f][0-9a-f]))", rb"\\x5c", os.fsencode(name))
    return name_bytes.decode("utf-8", "backslashreplace")


def exists(name: str) -> bool:
    """Return whether the file exists to which `readable` gave this name. For a tar's member, return whether the tar exists.

    The files of URLs are taken to exist.
    """
    if is_url(name):
        return True
    path = re.sub(rb"\\x(5c|[89a-f][0-9a-f])", lambda match: bytes.fromhex(match[1].decode()), name.encode())
    return _may_be_there(name) or _may_be_there(path) or any(_is_tar(parent) for parent in Path(name).parents)


def _may_be_there(path: str | bytes) -> bool:
    """Return whether a file exists, or cannot be looked for (no permission, a server that fails): its features are not to be deleted."""
    try:
        os.lstat(path)
    except (OSError, ValueError) as error:
        return getattr(error, "errno", None) not in (None, errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
    return True


def _is_tar(path: Path) -> bool:
    return path.name.lower().endswith(TAR_SUFFIXES) and path.is_file()


def _holds_tar(source: str | Path | list[Path]) -> bool:
    """Return whether a source is a tar."""
    return isinstance(source, Path) or (isinstance(source, str) and source.lower().endswith(TAR_SUFFIXES))


def _listed(path: Path) -> list[Path]:
    """Return the image files of a folder or a list, or the image file itself."""
    if path.is_dir():
        return _in_folder(path)
    if path.suffix.lower() in suffixes():
        return [path]
    if path.suffix.lower() != ".txt":
        raise ValueError(
            f"{path} is no source of images; expected a folder, a list of paths (.txt), an image, or {', '.join(TAR_SUFFIXES)}"
        )
    content = read_regular(path)
    if content.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
        raise ValueError(f"{path} is written in UTF-16; save it in UTF-8")
    lines = content.decode("utf-8-sig", "surrogateescape").split("\n")  # other separators may stand in a name
    files = [_named(path.parent, line) for line in lines if line.strip(" \t\r")]
    if not files:
        raise ValueError(f"{path} lists no images; expected one path per line, relative to {path.parent}")
    if len(files) >= MOST_MISSING and not any(map(os.path.lexists, files[:MOST_MISSING])):
        raise ValueError(f"{path}: its first {MOST_MISSING} images are missing, such as {files[0]}; paths are relative to {path.parent}")
    return files


def _named(folder: Path, line: str) -> Path:
    """Return the file that a line of a list names. Spaces around a name belong to it only if there is a file with them."""
    exact, bare = line.removesuffix("\r"), line.strip(" \t\r")
    return folder / (exact if exact != bare and os.path.lexists(folder / exact) else bare)


def _in_folder(folder: Path) -> list[Path]:
    """Return the folder's image files, sorted by path. A folder is read once, even if several links lead to it.

    A subfolder that cannot be opened is returned too, so that it is listed as a failure.
    """
    images, unopened, visited, tars, endings = list[Path](), list[OSError](), set[str](), 0, tuple(suffixes())
    for root, folders, files in os.walk(folder, followlinks=True, onerror=unopened.append):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if (real := os.path.realpath(root)) in visited:
            folders.clear()
            continue
        visited.add(real)
        seen = [name for name in files if not name.startswith(".")]
        images += [Path(root, name) for name in seen if name.lower().endswith(endings)]
        tars += sum(name.lower().endswith(TAR_SUFFIXES) for name in seen)
    images += [Path(error.filename) for error in unopened]
    if not images:
        hint = f"; its {tars} tars are read by giving '{folder}/*.tar'" if tars else ""
        raise ValueError(f"no images in {folder}: no file there, or in its subfolders, ends like an image (.jpg, .png, .webp, ...){hint}")
    return sorted(images)


def _expand(pattern: str) -> list[Path]:
    """Return the paths that a pattern stands for, sorted within each alternative of its braces."""
    if os.path.lexists(pattern):  # a literal name may hold brackets
        return [Path(pattern)]
    paths: list[Path] = []
    for name in _alternatives(pattern):
        matches = sorted(glob.glob(name, recursive=True)) if glob.has_magic(name) else [name] * os.path.lexists(name)
        if not matches:
            raise ValueError(f"{name}: no such file or folder" + (f" (of {pattern})" if name != pattern else ""))
        paths += map(Path, matches)
    return paths


def _alternatives(pattern: str) -> list[str]:
    """Return the patterns that braces stand for, without duplicates. If the braces do not match, return the pattern itself."""
    try:
        return list(dict.fromkeys(braceexpand(pattern, escape=False)))
    except ValueError:  # braces that do not match
        return [pattern]


class _StrictHeader(tarfile.TarInfo):
    """_StrictHeader ends an archive at the end marker only. tarfile also takes a damaged or missing header for the end."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:  # type: ignore[override]
        try:
            return super().fromtarfile(archive)
        except tarfile.HeaderError as error:
            if type(error).__name__ == "EOFHeaderError":  # public in tarfile, but not declared there
                raise
            raise tarfile.ReadError(f"{error}; a complete tar has an end marker") from error

    @classmethod
    def frombuf(cls, *args: Any, **options: Any) -> tarfile.TarInfo:  # type: ignore[override]
        header = super().frombuf(*args, **options)
        if header.size > LONGEST_HEADER and header.type in EXTENSIONS:
            raise tarfile.ReadError(f"a header of {header.size:,} bytes")
        return header


def tar_images(path: Path | str, limits: ImageLimits | None = None) -> Iterator[tuple[str, Content]]:
    """Yield (name, content) of a tar's images in order, and (name of the tar, ImageError) for a part that cannot be read.

    Args:
        path: a file, or a URL.
    """
    limits, endings = limits or ImageLimits(), tuple(suffixes())
    tar, last = readable(path), "its beginning"
    names = dict[str, int]()
    try:
        with (
            opened_url(path) if isinstance(path, str) else path.open("rb") as stream,
            tarfile.open(fileobj=stream, mode="r|*", tarinfo=_StrictHeader) as archive,
        ):
            size = path.stat().st_size if isinstance(path, Path) else getattr(stream, "size", None) or sys.maxsize  # if it is not told
            for member in archive:
                base = os.path.basename(member.name)
                if member.isreg() and base.lower().endswith(endings) and not base.startswith("."):
                    name = _unused(f"{tar}/{_as_text(member.name)}", names)
                    yield name, _member(archive, member, name, limits)
                _skip_rest(archive, most=size + MOST_SKIPPED)
                last = _as_text(member.name)
    except Exception as error:  # tarfile and the decompressors raise errors of many kinds (ValueError, EOFError, ...) for bad bytes
        yield tar, ImageError(f"{tar}: cannot be read on after {last}, what follows is lost ({error})")
    else:
        if not names:
            yield tar, ImageError(f"{tar}: holds no images")


def _unused(name: str, used: dict[str, int]) -> str:
    """Return the name, with a number added if it is used already. `used` holds the last number of each name."""
    unused = name
    while unused in used:
        used[name] += 1
        unused = f"{name} ({used[name]})"
    used[unused] = 1
    return unused


def _member(archive: tarfile.TarFile, member: tarfile.TarInfo, name: str, limits: ImageLimits) -> bytes | ImageError:
    """Return the content of the tar's member `name`, or the reason why it is not read."""
    try:
        limits.check_bytes(name, member.size)
    except ImageError as error:
        return error
    file = archive.extractfile(member)
    assert file is not None, "it is a regular file"
    return file.read()


def _skip_rest(archive: tarfile.TarFile, most: int) -> None:
    """Read the rest up to the next header, at most `most` bytes. tarfile would not notice a cut, and would expand a file with holes."""
    stream: Any = archive.fileobj
    if archive.offset - stream.tell() > most:
        raise tarfile.ReadError(f"a member of {archive.offset - stream.tell():,} bytes; unpack the tar, or take the member out")
    while (rest := archive.offset - stream.tell()) > 0:
        if not stream.read(min(CHUNK, rest)):
            raise tarfile.ReadError("unexpected end of data")
