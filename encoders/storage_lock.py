"""A run whose folder is on other storage holds a lock there, so that no run on another machine writes to the folder."""

from __future__ import annotations

import json
import logging
import os
import platform
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from secrets import token_hex
from typing import Any

from encoders.storage import HELD, reached, url_of

logger = logging.getLogger(__name__)

BEAT, EXPIRY = 30.0, 120.0
"""Seconds after which a run renews its lock, and after which a lock no longer counts."""
SETTLING = 3.0
"""Seconds in which all runs that take over the same lock have written to it. The last run has the lock."""


class StorageLock:
    """StorageLock is an object in the storage that names the machine and process of a run. The run renews it while it is alive.

    After a run was suspended or offline for so long that another run took over its lock, it can upload and remove nothing more.

    Args:
        path: the lock in a copy.
        machine: digits of this machine.
    """

    def __init__(self, path: Path, machine: str) -> None:
        self._path, self._url = path, str(url_of(path))
        boot = Path("/proc/sys/kernel/random/boot_id")  # of Linux; cloned machines may have the same name
        machine = f"{machine} {boot.read_text().strip()}" if boot.exists() else machine
        self._holder = {"run": token_hex(8), "machine": machine, "host": platform.node(), "process": os.getpid()}
        self._renewed, self._lost = 0.0, ""
        self._ended, self._thread = threading.Event(), threading.Thread(target=self._keep, daemon=True)

    def take(self) -> None:
        """Take the lock.

        Raises:
            ValueError: while another process holds it.
        """
        with reached(self._url) as (storage, key):
            holder = _read(storage, key)
            if not holder:
                with suppress(FileExistsError):  # another run was faster
                    storage.pipe_file(key, self._content(), mode="create")
            elif self._is_dead_here(holder):
                storage.pipe_file(key, self._content())
            elif time.time() - holder["time"] > EXPIRY and self._stays(holder, storage, key):
                storage.pipe_file(key, self._content())
                time.sleep(SETTLING)
            holder = _read(storage, key)
        if not self._is_own(holder):
            raise ValueError(
                f"another run is writing to {self._path.parent}: {_named(holder)}. Wait for it or end it, then run this again. If it is "
                f"dead, its lock {self._url} counts no more in {EXPIRY:.0f} seconds"
            )
        HELD[self._path.parent] = self.confirm
        self._thread.start()

    def release(self) -> None:
        """Delete the lock, if it was taken and is still held."""
        self._ended.set()
        if self._thread.ident is not None:
            HELD.pop(self._path.parent, None)
            self._thread.join()
            with suppress(OSError), reached(self._url) as (storage, key):
                if self._is_own(_read(storage, key)):
                    storage.rm_file(key)

    def confirm(self) -> None:
        """Check that the run still holds the lock. The storage is only asked if the lock was not renewed in time.

        Raises:
            ValueError: after another run took it over.
        """
        if self._lost or time.time() - self._renewed > EXPIRY:
            self._renew()

    def _keep(self) -> None:
        while not self._ended.wait(BEAT) and not self._lost:
            try:
                self._renew()
            except (OSError, ValueError) as error:
                logger.warning("the lock was not renewed: %s", error)

    def _renew(self) -> None:
        with reached(self._url) as (storage, key):
            if not self._lost and not self._is_own(holder := _read(storage, key)):  # a run that took it over may have ended by now
                self._lost = _named(holder) if holder else "its lock is gone"
            if self._lost:
                raise ValueError(
                    f"another run took over {self._path.parent} while this one was suspended or offline ({self._lost}); run this again"
                )
            storage.pipe_file(key, self._content())

    def _content(self) -> bytes:
        self._renewed = time.time()
        return json.dumps({**self._holder, "time": self._renewed}).encode()

    def _is_own(self, holder: Mapping[str, Any]) -> bool:
        return holder.get("run") == self._holder["run"]

    def _is_dead_here(self, holder: Mapping[str, Any]) -> bool:
        from psutil import pid_exists  # only here

        return holder["machine"] == self._holder["machine"] and not pid_exists(holder["process"])

    def _stays(self, holder: Mapping[str, Any], storage: Any, key: str) -> bool:
        """Return whether nobody renews a lock that looks old. If the clock of its machine is behind ours, its run may be alive."""
        logger.warning("waiting %.0f seconds to see whether %s renews its lock %s", 1.5 * BEAT, _named(holder), self._url)
        time.sleep(1.5 * BEAT)
        return _read(storage, key) == holder


def _read(storage: Any, key: str) -> dict[str, Any]:
    """Return the content of a lock, {} without a lock."""
    try:
        return dict(json.loads(storage.cat_file(key)))
    except FileNotFoundError:
        return {}


def _named(holder: Mapping[str, Any]) -> str:
    return f"process {holder.get('process')} on {holder.get('host')}"
