"""Scripts in processes of their own, alone or several together as torchrun starts them."""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
from torch.distributed import TCPStore

ROOT = Path(__file__).resolve().parents[2]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["mof.cli.app", "mof.model", "vig.cli.train", "vig.scoring.run", "vig.training.trainer"])
"""Starts a process as a copy of one that has imported all this already, which takes seconds."""
FRESH = multiprocessing.get_context("spawn")
"""Starts a new Python, which has imported nothing of ours."""


def environment(**more: str) -> dict[str, str]:
    """The environment of a script: it imports the project and `support`, uses one thread, and no network."""
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


def start(script: str, *arguments: object, count: int = 1, by: BaseContext = SERVER) -> list[BaseProcess]:
    """`count` processes that run the Python code and find each other by torchrun's variables. torchrun itself would take seconds."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if count > 1 else None
    processes = []
    for rank in range(count):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "TORCHELASTIC_RESTART_COUNT": 0}
        if store is not None:  # it lives here, so that no process has to outlive the others
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
        given = {name: str(value) for name, value in variables.items()} if count > 1 else {}
        printed = [NamedTemporaryFile("r") for _ in ("output", "errors")]  # noqa: SIM115  removed with the process
        files = [file.name for file in printed]
        processes.append(by.Process(target=_execute, args=(script, [*map(str, arguments)], environment(**given), files)))
        processes[-1].start()
        atexit.register(processes[-1].kill)  # Python waits at its end for processes, also for those of a test that failed
        processes[-1].printed, processes[-1].store = printed, store
    return processes


def _execute(script: str, arguments: list[str], variables: dict[str, str], files: list[str]) -> None:
    gc.freeze()  # each training runs the garbage collector, which would look through all libraries
    for descriptor, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY), descriptor)
    os.environ.clear()
    os.environ.update(variables)
    torch.set_num_threads(1)  # OMP_NUM_THREADS comes too late: torch is here already
    sys.argv = ["-c", *arguments]
    exec(script, {"__name__": "__main__"})


def run(script: str, *arguments: object, count: int = 1, by: BaseContext = SERVER) -> list[str]:
    """What each process printed. All must end well within fifteen minutes, also on a busy machine."""
    processes = start(script, *arguments, count=count, by=by)
    try:
        while running := [process.sentinel for process in processes if process.exitcode is None]:
            assert wait(running, timeout=900), "a process is still running"
            assert all(process.exitcode in (None, 0) for process in processes), kill(processes)
    finally:
        kill(processes)
    return [process.printed[0].read() for process in processes]


def kill(processes: list[BaseProcess]) -> list[str]:
    """End the processes at once; what they said on standard error."""
    for process in processes:
        process.kill()
        process.join()
    return [process.printed[1].read() for process in processes]


def held_after(calls: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function; after so many calls, the next call waits until the process is killed. 0: none waits."""
    done = 0

    def held(*args: Any, **options: Any) -> Any:
        nonlocal done
        if calls and done == calls:
            time.sleep(600)
        done += 1
        return function(*args, **options)

    return held


@contextmanager
def held_lock(path: Path) -> Iterator[None]:
    """Hold the lock of a file in another process, which is killed at the end."""
    code = "import sys; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
            yield
        finally:
            holder.kill()
