"""CUDA graphs of layers and of exits: for small batches, whose kernels are shorter than it takes to launch them.

A graph replays fixed kernels on fixed memory. So there are buffers for a few sizes ("buckets"), tokens are copied into
the smallest that holds them, and a graph is recorded for each layer and each exit in a bucket from its third use on.
What lies in a buffer beyond the live tokens is left over from earlier batches; it never meets them (see `_Bucket`).
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from geep.backends.mixers import TILE
from geep.backends.tiles import Tiles
from geep.modeling import Spans

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


def max_texts(num_tokens: int) -> int:
    """Texts that a bucket has room for; batches of shorter ones on average run their exits without graphs."""
    return num_tokens // 4 + 1


@dataclass(frozen=True, slots=True)
class BucketShape:
    """What all buckets have in common.

    Attributes:
        width: Of the hidden states.
        num_labels: Of the logits.
        tells_texts_apart: Whether exits are told where the first text of a pair ends.
        dtype: Of the hidden states.
        device: Where they are.
    """

    width: int
    num_labels: int
    tells_texts_apart: bool
    dtype: torch.dtype
    device: torch.device


class TextPlaces(NamedTuple):
    """Where texts lie, on the device: tiles, offsets (num_texts + 1,), first texts of pairs (num_texts,) or None."""

    tiles: Tiles
    offsets: Tensor
    firsts: Tensor | None


class _Bucket:
    """Memory that graphs of one size read and write.

    A live token meets only tokens of its own text: linear layers and norms go row by row, and attention stays in its
    tile, where the bias keeps other slots out. Every index that is left over points into the buffers, and every left
    over row of biases lets something through, so nothing in here becomes NaN by itself.

    Exits see all tokens, cut into texts: first those that were loaded, then one of all tokens behind them, then empty
    ones. While texts leave nothing is loaded: the offsets of those that stay are a prefix, and nobody reads the others.
    """

    def __init__(self, num_tokens: int, shape: BucketShape) -> None:
        tiles, texts, device = max_tiles(num_tokens), max_texts(num_tokens), shape.device
        self.hidden = torch.zeros(num_tokens, shape.width, dtype=shape.dtype, device=device)
        self.source = torch.zeros(tiles * TILE, dtype=torch.int32, device=device)
        self.slot = torch.zeros(num_tokens, dtype=torch.int32, device=device)
        self.bias = torch.zeros(tiles, 1, TILE, TILE, dtype=shape.dtype, device=device)
        self.offsets = torch.full((texts + 2,), num_tokens, dtype=torch.int32, device=device)
        self.offsets[:1].zero_()
        self.firsts = torch.zeros(texts + 1, dtype=torch.int32, device=device) if shape.tells_texts_apart else None
        # Exits are judged in float32 at least: so the cast is in the graph.
        precise = torch.promote_types(shape.dtype, torch.float32)
        self.logits = torch.zeros(texts + 1, shape.num_labels, dtype=precise, device=device)
        self.replays: dict[Hashable, Work] = {}
        self.uses: Counter[Hashable] = Counter()
        self.holds: weakref.ref[Tensor] | None = None
        self.has_texts = False

    def load(self, hidden: Tensor, places: TextPlaces) -> None:
        num_tokens, tiles, num_texts = len(self.hidden), places.tiles, len(places.offsets) - 1
        self.hidden[: len(hidden)].copy_(hidden)
        # Of texts that were let go some tokens may be named that lie nowhere here.
        torch.clamp(tiles.source, max=num_tokens - 1, out=self.source[: len(tiles.source)])
        self.slot[: len(tiles.slot)].copy_(tiles.slot)
        self.bias[: tiles.num_tiles].copy_(tiles.bias)
        self.has_texts = num_texts <= max_texts(num_tokens)
        if self.has_texts:
            self.offsets[: num_texts + 1].copy_(places.offsets)
            self.offsets[num_texts + 1 :].fill_(num_tokens)
            if self.firsts is not None and places.firsts is not None:
                self.firsts[:num_texts].copy_(places.firsts)
                self.firsts[num_texts:].zero_()

    def spans(self) -> Spans:
        """Where texts lie, afresh: what follows from it belongs into the graph that asks."""
        return Spans(self.offsets, len(self.hidden), TILE, self.firsts)

    def has(self, hidden: Tensor) -> bool:
        """Whether its hidden states are these very ones."""
        return self.holds is not None and self.holds() is hidden


class LayerGraphs:
    """Runs layers, and the exits behind them, on small batches by replaying graphs; see the module's docstring.

    May be used by several threads. Memory is bounded: buffers and graphs exist for the sizes of `bucket_sizes`, and all
    graphs share one pool for what they compute on the way. They may, since only one runs at a time and none leaves a
    result there.

    Args:
        run: The layer, eager or compiled.
        shape: Of the buckets. On a CPU nothing is recorded and a replay runs the work: so the rest can be tested.
        max_tokens: Batches above it are not for graphs.
        record_after: Uses of a layer or an exit at a size before a graph is recorded.
    """

    def __init__(self, run: RunLayer, shape: BucketShape, *, max_tokens: int, record_after: int) -> None:
        self._run, self._shape, self._record_after = run, shape, record_after
        self._sizes = bucket_sizes(max_tokens)
        self._buckets: dict[int, _Bucket] = {}
        self._lock = threading.Lock()
        self._recorder = _Recorder(shape.device) if shape.device.type == "cuda" else None

    def __call__(self, layer: int, before: Tensor, hidden: Tensor, places: TextPlaces) -> Tensor | None:
        """Run a layer; None where no graph fits, or none is worth recording yet.

        Args:
            layer: Counted from 1, as `run` counts.
            before: The hidden states of which `hidden` is a prefix. If they came out of a bucket last and still lie
                there, the prefix stays in it and is not copied again, until it fills less than half: on few tokens a
                layer takes less than a copy.
            hidden: (num_tokens, hidden).
            places: Where their texts lie.
        """
        with self._lock, torch.inference_mode():
            bucket = self._holding(before)
            if bucket is None or 2 * len(hidden) < len(bucket.hidden):
                bucket = self._smallest(len(hidden), places.tiles.num_tiles)
            if bucket is None:
                return None
            if layer not in bucket.replays:
                if not self._is_due(bucket, layer):
                    return None
                tiles = Tiles(np.zeros(0, dtype=np.int64), bucket.source, bucket.slot, bucket.bias)
                bucket.holds = None  # recording runs the layer on whatever lies there
                self._record(bucket, layer, lambda: bucket.hidden.copy_(self._run(layer, bucket.hidden, tiles)))
            self._take_turn()
            if not bucket.has(before):
                bucket.load(hidden, places)
            bucket.replays[layer]()
            # A copy: what is handed out is never changed in place, and the buffer soon will be.
            out = bucket.hidden[: len(hidden)].clone()
            bucket.holds = weakref.ref(out)
            return out

    def exit_logits(
        self, head: Any, hidden: Tensor, start: int, stop: int, finish: Callable[[Tensor], Tensor]
    ) -> Tensor | None:
        """Run an exit on texts that a layer has just left in a bucket; None where there is no such bucket, or no graph.

        Args:
            head: The exit; a graph is recorded for each.
            hidden: What `__call__` gave.
            start: First text.
            stop: The one behind the last.
            finish: What exits read hidden states through; the same at every call.

        Returns:
            Logits (stop - start, num_labels), in float32 where the exit's dtype is below.
        """
        with self._lock, torch.inference_mode():
            bucket = self._holding(hidden)
            if bucket is None or not bucket.has_texts:
                return None
            if head not in bucket.replays:
                if not self._is_due(bucket, head):
                    return None
                read: Any = head.forward_packed
                self._record(bucket, head, lambda: bucket.logits.copy_(read(finish(bucket.hidden), bucket.spans())))
            self._take_turn()
            bucket.replays[head]()
            return bucket.logits[start:stop].clone()

    def _holding(self, hidden: Tensor) -> _Bucket | None:
        return next((bucket for bucket in self._buckets.values() if bucket.has(hidden)), None)

    def _smallest(self, num_tokens: int, num_tiles: int) -> _Bucket | None:
        for size in self._sizes:
            if num_tokens <= size and num_tiles <= max_tiles(size):
                if size not in self._buckets:
                    self._take_turn()
                    self._buckets[size] = _Bucket(size, self._shape)
                return self._buckets[size]
        return None

    def _is_due(self, bucket: _Bucket, what: Hashable) -> bool:
        """Count a use; whether it is time to record."""
        bucket.uses[what] += 1
        return bucket.uses[what] > self._record_after

    def _record(self, bucket: _Bucket, what: Hashable, work: Work) -> None:
        self._take_turn()
        bucket.replays[what] = work if self._recorder is None else self._recorder.record(work)

    def _take_turn(self) -> None:
        if self._recorder is not None:
            self._recorder.take_turn()


class _Recorder:
    """Records graphs into one pool of memory, and keeps those who share it in order, whatever their streams."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        self._last: torch.cuda.Stream | None = None

    def take_turn(self) -> None:
        """Wait, on the device, for what another stream did last with the buffers; usually there is but one stream."""
        current = torch.cuda.current_stream(self._device)
        if self._last is not None and self._last != current:
            current.wait_stream(self._last)
        self._last = current

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
