"""Processes on loopback that find each other as those that mlx.launch starts with its ring do."""

from __future__ import annotations

import json
import socket
from pathlib import Path


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def environments(folder: Path, count: int) -> list[dict[str, str]]:
    """What each of `count` processes has in its environment, by rank; one has no ring."""
    hosts = folder / f"hosts{count}.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(count)]))
    ring = [{"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)} for rank in range(count)]
    return ring if count > 1 else [{}]
