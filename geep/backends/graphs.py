"""CUDA graphs of single layers: for small batches, whose kernels are shorter than it takes to launch them.

A graph replays fixed kernels on fixed memory. So there are buffers for a few sizes ("buckets"), tokens are copied into
the smallest that holds them, and a graph is recorded for each (layer, bucket) that is used often enough. What lies in a
buffer beyond the live tokens is left over from earlier batches; it never meets them (see `_Bucket`).
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from geep.backends.tiles import TILE, Tiles

Work = Callable[[], object]
# layer, hidden states (num_tokens, hidden), tiles -> hidden states
RunLayer = Callable[[int, Tensor, Tiles], Tensor]


def bucket_sizes(max_tokens: int) -> list[int]:
    """Sizes of buckets in tokens: 128, 192, 256, 384, …, each 1.33 or 1.5 times the one before, up to `max_tokens`."""
    powers = [TILE << step for step in range(max(max_tokens // TILE, 1).bit_length())]
    return [size for power in powers for size in (power, power + power // 2) if size <= max_tokens]


def max_tiles(num_tokens: int) -> int:
    """Tiles that a bucket has room for: next-fit leaves a tenth free on usual lengths, here a quarter may be."""
    return num_tokens // TILE + num_tokens // (4 * TILE) + 1


class _Bucket:
    """Memory that graphs of one size read and write.

    A live token meets only tokens of its own text: linear layers and norms go row by row, and attention stays in its
    tile, where the bias keeps other slots out. Every index that is left over points into the buffers, and every left
    over row of biases lets something through, so nothing in here becomes NaN by itself.
    """

    def __init__(self, num_tokens: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        tiles = max_tiles(num_tokens)
        self.hidden = torch.zeros(num_tokens, width, dtype=dtype, device=device)
        self.source = torch.zeros(tiles * TILE, dtype=torch.int32, device=device)
        self.slot = torch.zeros(num_tokens, dtype=torch.int32, device=device)
        self.bias = torch.zeros(tiles, 1, TILE, TILE, dtype=dtype, device=device)
        self.replays: dict[int, Work] = {}
        self.uses: Counter[int] = Counter()
        self.holds: weakref.ref[Tensor] | None = None

    def load(self, hidden: Tensor, tiles: Tiles) -> None:
        self.hidden[: len(hidden)].copy_(hidden)
        self.source[: len(tiles.source)].copy_(tiles.source)
        self.slot[: len(tiles.slot)].copy_(tiles.slot)
        self.bias[: tiles.num_tiles].copy_(tiles.bias)


class LayerGraphs:
    """Runs layers on small batches by replaying graphs; see the module's docstring. May be used by several threads.

    Memory is bounded: buffers and graphs exist for the sizes of `bucket_sizes`, and all graphs share one pool for what
    they compute on the way. They may, since only one runs at a time and none leaves a result there.

    Args:
        run: The layer, eager or compiled.
        width: Of the hidden states.
        dtype: Of the hidden states.
        device: Where they are. On a CPU nothing is recorded and a replay runs the layer: so the rest can be tested.
        max_tokens: Batches above it are not for graphs.
        record_after: Uses of a layer at a size before a graph is recorded. Recording takes milliseconds and a replay
            saves microseconds, so a graph must be used a thousand times to be worth it (not yet measured).
    """

    def __init__(
        self,
        run: RunLayer,
        *,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        max_tokens: int,
        record_after: int,
    ) -> None:
        self._run, self._record_after = run, record_after
        self._width, self._dtype, self._device = width, dtype, device
        self._sizes = bucket_sizes(max_tokens)
        self._buckets: dict[int, _Bucket] = {}
        self._lock = threading.Lock()
        self._recorder = _Recorder(device) if device.type == "cuda" else None

    def __call__(self, layer: int, before: Tensor, hidden: Tensor, tiles: Tiles) -> Tensor | None:
        """Run a layer; None where no graph fits, or none is worth recording yet.

        Args:
            layer: Counted from 1.
            before: The hidden states of which `hidden` is a prefix. If they came out of the bucket that is used now,
                they still lie there and are not copied again.
            hidden: (num_tokens, hidden).
            tiles: Their tiles.
        """
        with self._lock, torch.inference_mode():
            bucket = self._bucket(len(hidden), tiles.num_tiles)
            if bucket is None:
                return None
            if self._recorder is not None:
                self._recorder.wait()
            bucket.uses[layer] += 1
            if layer not in bucket.replays:
                if bucket.uses[layer] <= self._record_after:
                    return None
                bucket.replays[layer] = self._record(layer, bucket)
            if bucket.holds is None or bucket.holds() is not before:
                bucket.load(hidden, tiles)
            bucket.replays[layer]()
            # A copy: what is handed out is never changed in place, and the buffer soon will be.
            out = bucket.hidden[: len(hidden)].clone()
            bucket.holds = weakref.ref(out)
            if self._recorder is not None:
                self._recorder.mark()
            return out

    def _bucket(self, num_tokens: int, num_tiles: int) -> _Bucket | None:
        for size in self._sizes:
            if num_tokens <= size and num_tiles <= max_tiles(size):
                if size not in self._buckets:
                    self._buckets[size] = _Bucket(size, self._width, self._dtype, self._device)
                return self._buckets[size]
        return None

    def _record(self, layer: int, bucket: _Bucket) -> Work:
        tiles = Tiles(np.zeros(0, dtype=np.int64), bucket.source, bucket.slot, bucket.bias)

        def work() -> None:
            bucket.hidden.copy_(self._run(layer, bucket.hidden, tiles))

        # Recording runs the work on whatever lies in the buffers.
        bucket.holds = None
        return work if self._recorder is None else self._recorder.record(work)


class _Recorder:
    """Records graphs into one pool of memory, and keeps those who share it in order, whatever their streams."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        self._done = torch.cuda.Event()

    def wait(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._done)

    def mark(self) -> None:
        torch.cuda.current_stream(self._device).record_event(self._done)

    def record(self, work: Work) -> Work:
        """Record work whose memory is fixed; what it allocates comes from the pool."""
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                # Before it is recorded the work must have compiled and made its cuBLAS workspace.
                work()
                work()
            current.wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            # "thread_local": other threads may go on allocating while this one records.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                work()
        return graph.replay
