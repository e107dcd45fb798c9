"""Files that cannot hold a digest themselves, such as saved models, CSV and plain JSON, have it in a sealed JSON file beside them."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from encoders.digests import DamagedError, checks, damaged, file_digest
from encoders.model_cards import CARD
from encoders.text_files import one_line, parse_json, read_utf8
from encoders.whole_files import read_sealed, write_sealed

logger = logging.getLogger(__name__)

DIGESTS = "digests.json"
WEIGHTS = ".safetensors"
"""Suffix of the large files, which a processor does not read."""


@contextmanager
def recording(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Record in the folder's `digests.json` the files that are written into it while the context is open.

    Files that were there before keep their recorded digests, so that damage to them is still noticed.
    """
    path = Path(folder)
    before = _states(path)
    yield
    after = _states(path)
    record(path, [name for name, state in after.items() if before.get(name) != state], before.keys() - after.keys())


def record(folder: Path, written: Iterable[str], deleted: Collection[str] = ()) -> None:
    """Record files of the folder, by their names in it, in its `digests.json`, and remove the entries of deleted files."""
    digests = {name: file_digest(folder / name) for name in sorted(written)}
    if not digests and not deleted:
        return
    try:
        known = read_sealed(folder / DIGESTS)["files"] if (folder / DIGESTS).is_file() else {}
    except DamagedError:  # files that are not written now lose their digests
        known = {}
    write_sealed(folder / DIGESTS, {"files": {name: digest for name, digest in (known | digests).items() if name not in deleted}})


def check_folder(folder: str | os.PathLike[str], without: str = "", *, expected: bool = False) -> None:
    """Raise a DamagedError that names the damaged files of a folder. A folder without `digests.json`, or a missing folder, passes.

    Args:
        without: suffix of files that are not checked.
        expected: warn of a folder without `digests.json`.
    """
    path = Path(folder) / DIGESTS
    if checks() and expected and Path(folder).is_dir() and not path.is_file():
        logger.warning("%s is missing, so damage to the files beside it is not noticed; saving the model again writes it", path)
    if not checks() or not path.is_file():
        return
    listed = {name: digest for name, digest in read_sealed(path)["files"].items() if not (without and name.endswith(without))}
    if faults := damaged(Path(folder), listed):
        raise DamagedError(
            f"{'; '.join(faults.values())}. Write the folder again, or put back a copy; after changes of your own, delete {path}"
        )


def require_config(folder: Path) -> None:
    """Raise a ValueError for a folder without the config.json of a model: transformers takes a mistyped folder for a name on the hub."""
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} holds no config.json: expected a folder that save_pretrained wrote")
    config = parse_json(read_utf8(file), file)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ValueError(f"{file} names no model_type: expected a folder that save_pretrained wrote")


@contextmanager
def loading(folder: Path) -> Iterator[None]:
    """Turn an error of transformers about a folder into a ValueError of ours, which names the folder and is cut to a sane length."""
    try:
        yield
    except (OSError, ValueError, KeyError, RecursionError) as error:
        from encoders.weight_files import WeightsError  # slow, unless a model was loaded

        if isinstance(error, (DamagedError, WeightsError)):  # they end in advice
            raise
        raise ValueError(f"{folder} cannot be loaded as an image-text-to-text model: {one_line(error)}") from error


def card_path(file: Path) -> Path:
    """Return the path of the card of a data file, which lists the file's digest: selected.card.json beside selected.json."""
    return file.with_name(f"{file.stem}.card.json")


def check_listed(file: Path, listing: Path, remedy: str) -> None:
    """Raise a DamagedError if the sealed JSON `listing` has another digest of the file. A file in no listing passes.

    A listing of a single file is compared whatever that file's name is: both may have been renamed, or belong to different files.

    Args:
        remedy: the advice to a user of a damaged file, for the message.
    """
    if not checks() or not listing.is_file():
        return
    listed = read_sealed(listing).get("files", {})
    noted = next(iter(listed.values())) if len(listed) == 1 else listed.get(file.name)
    if noted is not None and file_digest(file) != noted:
        raise DamagedError(
            f"{file} is damaged, or was edited: {listing} has another digest; {remedy}, or delete {listing.name} after changes of your own"
        )


def _states(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Return inode, time and size of each file of a folder, which may be missing. A model card is left out, because people edit it."""
    files = [entry for entry in os.scandir(folder) if entry.is_file()] if folder.is_dir() else []
    states = {entry.name: entry.stat() for entry in files if entry.name not in (DIGESTS, CARD)}
    return {name: (state.st_ino, state.st_mtime_ns, state.st_size) for name, state in states.items()}
