"""A checkpoint of a training has a list of its files' digests. A training goes on from the last whole checkpoint."""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open

from encoders.saved_folders import DIGESTS, check_folder, record
from encoders.whole_files import read_sealed

logger = logging.getLogger(__name__)


def seal(folder: Path) -> None:
    """Write down the digests of all files of a checkpoint. It is the last step of saving; the main process does it."""
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != DIGESTS]
    record(folder, names)


def last_checkpoint(folder: Path) -> str | None:
    """Return the last checkpoint that is whole, or None without one. A warning names each later checkpoint and its fault.

    The main process reads them; the others wait for it.
    """
    last = [_last_whole(folder) if PartialState().is_main_process else None]
    return broadcast_object_list(last)[0]


def _last_whole(folder: Path) -> str | None:
    written = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for path in sorted(written, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        try:
            _require_whole(path)
        except ValueError as error:
            logger.warning("%s; the training does not go on from this checkpoint", " ".join(str(error).split()))
        else:
            return str(path)
    if written:
        logger.warning("%s: none of the %d checkpoints is whole; the training starts over", folder, len(written))
    return None


def _require_whole(path: Path) -> None:
    """Raise a ValueError naming a file that is damaged, or missing because the process was killed while it wrote the checkpoint."""
    check_folder(path)
    try:
        json.loads((path / "trainer_state.json").read_bytes())  # the Trainer writes it last
    except (OSError, ValueError) as error:
        raise ValueError(f"{path / 'trainer_state.json'} cannot be read ({error})") from error
    if (states := len(list(path.glob("rng_state*.pth")))) < PartialState().num_processes:
        raise ValueError(f"{path} has the random states of {states} processes, expected {PartialState().num_processes}")
    listed = read_sealed(path / DIGESTS)["files"] if (path / DIGESTS).is_file() else {}
    for file in path.iterdir():
        if file.name not in listed:  # an earlier release wrote it, or a process that was killed before it wrote down all digests
            _require_sound(file)


def _require_sound(file: Path) -> None:
    """Raise a ValueError for a damaged file of torch, which has checksums in itself, or of safetensors."""
    try:
        if file.suffix in (".pt", ".pth") and (bad := zipfile.ZipFile(file).testzip()) is not None:
            raise ValueError(f"its part {bad} has another checksum")
        if file.suffix == ".safetensors":
            with safe_open(file, "pt"):
                pass
    except (ValueError, zipfile.BadZipFile, SafetensorError) as error:
        raise ValueError(f"{file} is damaged ({error})") from error


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn the error of a library that cannot write, as on a full disk, into an OSError that names the folder."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error) and "inline_container" not in str(error):
            raise
        reason = " ".join(str(error).split())
        raise OSError(f"{folder} cannot be written: {reason}") from error
