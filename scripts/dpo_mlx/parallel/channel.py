"""How the processes that `mlx.launch` started talk; apart from `team.py`, as every stage looks here
first, and loading what computes takes seconds.
"""

from __future__ import annotations

import json
from contextlib import suppress
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..files.errors import LostProcess, UserError
from ..process import aborts

LOST = (
    "another process of this run was lost, or its machine; see what it said, then start the same "
    "command again, which goes on from here"
)


class Channel:
    """Messages between the processes, by MLX's collectives: JSON, in which floats are exact."""

    def __init__(self, group: mx.distributed.Group) -> None:
        self.group = group
        self.rank, self.size = group.rank(), group.size()
        self.busy = False  # with a task that other ranks wait to end

    def send(self, message: Any) -> None:
        """From rank 0 to all the others, which `receive` it."""
        self._broadcast(json.dumps(message).encode())

    def receive(self) -> Any:
        return json.loads(self._broadcast(b""))

    def gather(self, own: Any) -> list[Any]:
        """What each rank has, by rank."""
        text = np.frombuffer(json.dumps(own).encode(), dtype=np.uint8)
        sizes = self._wait(mx.distributed.all_gather(mx.array([len(text)]), group=self.group))
        longest = max(sizes.tolist())
        padded = mx.array(np.pad(text, (0, longest - len(text))))
        rows = self._wait(mx.distributed.all_gather(padded, group=self.group))
        parts = np.array(rows).reshape(self.size, longest)
        return [
            json.loads(part[:size].tobytes())
            for part, size in zip(parts, sizes.tolist(), strict=True)
        ]

    def sum(self, values: mx.array) -> mx.array:
        """Elementwise, over all ranks."""
        return self._wait(mx.distributed.all_sum(values, group=self.group))

    def mean(self, tree: Any) -> Any:
        """Of each array of a tree, over all ranks."""
        averaged = nn.average_gradients(tree, self.group)
        self._wait(averaged)
        return averaged

    def _broadcast(self, text: bytes) -> bytes:
        size = int(self.sum(mx.array(len(text))))
        own = np.frombuffer(text, dtype=np.uint8) if text else np.zeros(size, dtype=np.uint8)
        return np.array(self.sum(mx.array(own))).tobytes()

    def _wait(self, result: Any) -> Any:
        """Raises UserError when another rank is gone."""
        try:
            mx.eval(result)
        except RuntimeError as error:
            if aborts.of_gpu_error(error) is not None:
                raise  # this process's own GPU command failed
            self.busy = True  # nobody is there to be told that it ends
            raise LostProcess(LOST) from error
        return result


@cache
def open_channel() -> Channel:
    """That of this process; alone when `mlx.launch` did not start it."""
    return Channel(mx.distributed.init())


def dismiss() -> None:
    """Rank 0 has ended: the others may, unless they wait for something else, and are left to find
    that it is gone.
    """
    if open_channel().size > 1 and not open_channel().busy:
        with suppress(UserError):  # who is gone need not be told
            open_channel().send(None)
