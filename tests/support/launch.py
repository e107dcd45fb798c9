"""Scripts in processes of their own, alone or several together as torchrun starts them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def environment(**more: str) -> dict[str, str]:
    """The environment of a script: it imports the project and `support`, uses one thread, and no network."""
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


def start(script: str, *arguments: object, count: int = 1) -> list[subprocess.Popen[str]]:
    """`count` processes that run the Python code and find each other by torchrun's variables. torchrun itself would take seconds."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", script, *map(str, arguments)]
    processes = []
    for rank in range(count):
        together = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
        variables = {name: str(value) for name, value in together.items()} | {"MASTER_ADDR": "127.0.0.1"} if count > 1 else {}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, env=environment(**variables), **pipes))
    return processes


def run(script: str, *arguments: object, count: int = 1) -> list[str]:
    """What each process printed. All must end well within five minutes."""
    processes = start(script, *arguments, count=count)
    outputs = []
    try:
        for process in processes:
            out, error = process.communicate(timeout=300)
            assert process.returncode == 0, error
            outputs.append(out)
    finally:
        kill(processes)
    return outputs


def kill(processes: list[subprocess.Popen[str]]) -> list[str]:
    """End the processes at once; what they said on standard error."""
    for process in processes:
        process.kill()
    return [process.communicate()[1] if process.stderr and not process.stderr.closed else "" for process in processes]
