"""Messages between the processes that `mlx.launch` started.

Every stage imports this module first, so it imports little: `distributed` takes seconds to load.
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

LOST_PROCESS = (
    "another process of this run has ended, or its machine cannot be reached; read its last lines, "
    "then start the same command again to resume"
)


class Channel:
    """Sends JSON between the processes by MLX's collectives. Floats arrive exactly."""

    def __init__(self, group: mx.distributed.Group) -> None:
        self.group = group
        self.rank, self.size = group.rank(), group.size()
        self.busy = False  # whether the other ranks wait for this one to finish a task

    def send(self, message: Any) -> None:
        """Send a message from rank 0 to the other ranks, which call `receive`."""
        self._broadcast(json.dumps(message).encode())

    def receive(self) -> Any:
        """Return the next message of rank 0."""
        return json.loads(self._broadcast(b""))

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, by rank."""
        text = np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)
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
        """Return the elementwise sum over all ranks."""
        return self._wait(mx.distributed.all_sum(values, group=self.group))

    def mean(self, tree: Any) -> Any:
        """Return the mean over all ranks of each array in a tree."""
        averaged = nn.average_gradients(tree, self.group)
        self._wait(averaged)
        return averaged

    def _broadcast(self, text: bytes) -> bytes:
        """Return rank 0's text on every rank. The other ranks add zeros to it."""
        size = int(self.sum(mx.array(len(text))))
        content = np.frombuffer(text, dtype=np.uint8) if text else np.zeros(size, dtype=np.uint8)
        return np.array(self.sum(mx.array(content))).tobytes()

    def _wait(self, result: Any) -> Any:
        """Evaluate `result` and return it. Raises LostProcess when another rank has ended."""
        try:
            mx.eval(result)
        except RuntimeError as error:
            if aborts.of_gpu_error(error) is not None:
                raise  # this process's own GPU command failed
            self.busy = True  # nobody is left for `dismiss` to tell
            raise LostProcess(LOST_PROCESS) from error
        return result


@cache
def open_channel() -> Channel:
    """The channel of this process. Its size is 1 when `mlx.launch` did not start the process."""
    return Channel(mx.distributed.init())


def dismiss() -> None:
    """Tell the other ranks that rank 0 has finished and they may end.

    While they wait for a task's results they cannot receive this. They then end with an error when
    rank 0 is gone.
    """
    if open_channel().size > 1 and not open_channel().busy:
        with suppress(UserError):  # a rank that has ended cannot receive it
            open_channel().send(None)
