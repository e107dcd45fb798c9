"""Scripts in processes of their own, alone or several together as torchrun starts them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

ROOT = Path(__file__).resolve().parents[2]


def environment(**more: str) -> dict[str, str]:
    """The environment of a script: it imports the project and `support`, uses one thread, and no network."""
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


def start(script: str, *arguments: object, count: int = 1) -> list[subprocess.Popen[str]]:
    """`count` processes that run the Python code and find each other by torchrun's variables. torchrun itself would take seconds."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if count > 1 else None
    processes = []
    for rank in range(count):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "TORCHELASTIC_RESTART_COUNT": 0}
        if store is not None:  # it lives here, so that no process has to outlive the others
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
        given = {name: str(value) for name, value in variables.items()} if count > 1 else {}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, env=environment(**given), **pipes))
        processes[-1].store = store
    return processes


def run(script: str, *arguments: object, count: int = 1) -> list[str]:
    """What each process printed. All must end well within fifteen minutes, also on a busy machine."""
    processes = start(script, *arguments, count=count)
    try:
        with ThreadPoolExecutor(count) as threads:  # at once, or a process whose pipe is full would keep the others waiting
            said = list(threads.map(lambda process: process.communicate(timeout=900), processes))
        for process, (_, error) in zip(processes, said, strict=True):
            assert process.returncode == 0, error
    finally:
        kill(processes)
    return [out for out, _ in said]


def kill(processes: list[subprocess.Popen[str]]) -> list[str]:
    """End the processes at once; what they said on standard error."""
    for process in processes:
        process.kill()
    return [process.communicate()[1] if process.stderr and not process.stderr.closed else "" for process in processes]


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
