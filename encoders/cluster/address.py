"""A Cluster says where the actors of a run are, and how many there are."""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Cluster:
    """A cluster says where the actors are and how many there are. Each actor is a process.

    Args:
        address: the address of a Ray cluster, as `ray.init` takes it; "" is the cluster of this machine, or this machine alone.
        gpus_per_actor: the number of an actor's GPUs, or its share of a GPU. Default: one GPU if the cluster has GPUs. Actors without a GPU
            have all cores of a machine.
        least: the work begins when this number of actors have started.
        most: the largest number of actors. Default: as many as the cluster has room for now.
    """

    address: str = ""
    gpus_per_actor: float | None = None
    least: int = 1
    most: int | None = None

    @contextmanager
    def connected(self) -> Iterator[Any]:
        """Connect to the cluster unless the program is connected, and yield the module ray.

        Raises:
            ValueError: where Ray is not installed.
            ConnectionError: where no cluster has this address.
        """
        try:
            import ray
        except ImportError:
            raise ValueError('--ray needs the library Ray: pip install "mof-vig[cluster]"') from None
        if ray.is_initialized():
            yield ray
            return
        ray.init(self.reachable(), log_to_driver=False, logging_level=logging.ERROR)
        try:
            yield ray
        finally:
            ray.shutdown()

    def reachable(self) -> str:
        """Return the address for `ray.init`: "local" begins a cluster on this machine. Ray itself would try a dead address for minutes.

        Raises:
            ConnectionError: if nothing answers at the address, or at the address in the environment variable RAY_ADDRESS.
        """
        if address := self.address or os.environ.get("RAY_ADDRESS", ""):
            if re.fullmatch(r"[^/]+:\d+", address) and not _answers(address):  # there are others, such as "auto"
                raise ConnectionError(
                    f"no Ray cluster answers at {address}; `ray start --head --port 6379` begins a cluster on its machine"
                )
            return address
        begun = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")  # `ray start` writes it; a crash leaves it there
        address = begun.read_text().strip() if begun.is_file() else ""
        return address if _answers(address) else "local"

    def sized(self, ray: Any) -> tuple[int, dict[str, float]]:
        """Return the largest number of actors, and the resources of an actor: `num_gpus` and `num_cpus`.

        Raises:
            ValueError: for a cluster without room for a single actor, unless `most` says how far it may grow.
        """
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU", 0) >= 1]
        with_gpus = [node for node in nodes if node.get("GPU", 0) > 0]
        gpus = self.gpus_per_actor if self.gpus_per_actor is not None else float(bool(with_gpus))
        if gpus:
            room = sum(int(node["GPU"] / gpus + 1e-9) for node in with_gpus)
            cores = min((int(node["CPU"] * gpus / node["GPU"]) for node in with_gpus), default=1)
        else:
            room, cores = len(nodes), min((int(node["CPU"]) for node in nodes), default=1)
        if not (most := self.most or room):
            have = ", ".join({f"{node.get('GPU', 0):g} GPUs and {node['CPU']:g} cores": None for node in nodes}) or "no node with a core"
            raise ValueError(f"the Ray cluster has no room for an actor with {gpus:g} GPUs; its nodes have {have}")
        return most, {"num_gpus": gpus, "num_cpus": max(cores, 1)}


def _answers(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, ValueError):
        return False
    return True
