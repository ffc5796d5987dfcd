"""One copy to the device where there would be many: integers of several rows travel in one pinned buffer."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from geep.backends.protocol import Integers

# Rows begin at multiples of 16 bytes: compiled code copies inputs that do not.
_ALIGN = 4


class _Buffer:
    """A host buffer, and when the device has taken what was in it."""

    def __init__(self) -> None:
        self.host = torch.empty(0, dtype=torch.int32)
        self.taken: torch.cuda.Event | None = None


class Staging:
    """Sends rows of integers to a device as int32, without a wait for work that is under way there.

    Buffers take turns: while the device copies one, the next is filled. Before a buffer is filled again its last copy
    must have happened, so the host is at most `num_buffers` uploads ahead. May be used by several threads.
    """

    def __init__(self, device: torch.device, num_buffers: int = 2) -> None:
        self._device = device
        self._buffers = [_Buffer() for _ in range(num_buffers)]
        self._turn = 0
        self._lock = threading.Lock()

    def upload(self, rows: Sequence[Integers]) -> list[Tensor]:
        """Return the rows on the device, views of one int32 tensor; values must lie in the range of int32."""
        sizes = [-(-len(row) // _ALIGN) * _ALIGN for row in rows]
        starts = np.cumsum([0, *sizes]).tolist()
        there = torch.empty(starts[-1], dtype=torch.int32, device=self._device)
        with self._lock:
            buffer = self._buffers[self._turn]
            self._turn = (self._turn + 1) % len(self._buffers)
            if buffer.taken is not None:
                buffer.taken.synchronize()
            self._fill(buffer, rows, starts)
            there.copy_(buffer.host[: starts[-1]], non_blocking=True)
            if self._device.type == "cuda":
                buffer.taken = torch.cuda.current_stream(self._device).record_event(buffer.taken)
        return [there[start : start + len(row)] for start, row in zip(starts, rows, strict=False)]

    def _fill(self, buffer: _Buffer, rows: Sequence[Integers], starts: Sequence[int]) -> None:
        if buffer.host.shape[0] < starts[-1]:
            size = 1 << (starts[-1] - 1).bit_length()
            buffer.host = torch.empty(size, dtype=torch.int32, pin_memory=self._device.type == "cuda")
        host = buffer.host.numpy()
        for start, row in zip(starts, rows, strict=False):
            host[start : start + len(row)] = row
