"""What a backend takes on this machine, and the tokens of a staircase that follow from it."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch

from geep.backends import Backend, TokenBatch
from geep.scheduler import CostModel, Timings

# Sizes of the batches that are timed: around the one where a layer's fixed cost fades on a CPU. Texts of 32 tokens.
_TIMED_TEXTS, _TIMED_LENGTH = (2, 8, 32), 32

# Bounds on the fitted staircase. Below, a staircase's upper layers are too small; above, nothing is gained.
_LEAST_BATCH_TOKENS, _MOST_BATCH_TOKENS = 1024, 8192


def measure_cost(backend: Backend[Any], depth: int) -> CostModel:
    """Time the first layer and the exit at `depth` on a few small batches of a CPU, well below a second.

    The best of three calls counts, since other programs only ever add time.
    """
    layers, checks = [], []
    with torch.inference_mode():
        for count in _TIMED_TEXTS:
            lengths = np.full(count, _TIMED_LENGTH)
            live = backend.start(TokenBatch(np.zeros(int(lengths.sum()), dtype=np.int64), None, lengths))
            layers.append(_seconds(partial(backend.advance, live, 1, count)))
            checks.append(_seconds(partial(_check, backend, live, depth, count)))
    tokens = tuple(count * _TIMED_LENGTH for count in _TIMED_TEXTS)
    return CostModel.fit(Timings(tokens, tuple(layers)), Timings(_TIMED_TEXTS, tuple(checks)))


def _check(backend: Backend[Any], live: Any, depth: int, count: int) -> Any:
    """What asking an exit takes: its classifier, and picking those that go on."""
    sure = backend.exit_logits(live, depth, 0, count).softmax(-1).amax(-1) > 2
    return backend.select(live, np.flatnonzero(~sure.numpy()))


def _seconds(work: Callable[[], object]) -> float:
    """Seconds of the best of three calls, after one that does not count."""
    work()
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return min(times)


def batch_tokens(cost: CostModel | None) -> int:
    """Tokens of a staircase: enough that a layer's fixed cost fades even where most texts have left."""
    if cost is None:
        # Eight times 5,632, where BERT-base's matrix products fill the 132 processors of an H100 evenly (arithmetic,
        # not yet measured): staircases taper, and their upper layers should be worth a launch, too.
        return 45_056
    fitted = -(-cost.batch_tokens(waste=0.01) // 128) * 128
    return min(max(fitted, _LEAST_BATCH_TOKENS), _MOST_BATCH_TOKENS)
