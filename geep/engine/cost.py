"""What a backend takes on this machine, and how many tokens a staircase has."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig

from geep.backends import Backend, TokenBatch
from geep.scheduler import CostModel, Timings

# Sizes of the batches that are timed: around the one where a layer's fixed cost fades on a CPU. Texts of 32 tokens.
_TIMED_TEXTS, _TIMED_LENGTH = (1, 2, 8, 32), 32

# Multiplications of a layer beside which its fixed cost, some hundred microseconds on a CPU, is about a hundredth.
# 8 and 16 bits multiply at least twice as fast.
_PRODUCTS_OF_A_BATCH = 1_600_000_000

# Below, a staircase's upper layers are too small; above, nothing is gained.
_LEAST_BATCH_TOKENS, _MOST_BATCH_TOKENS = 1024, 8192


def measure_cost(backend: Backend[Any], depth: int, *, device: str) -> CostModel:
    """Time the first layer and the exit at `depth` on a few small batches of a CPU, well below a second.

    The best of three calls counts, since other programs only ever add time.

    Raises:
        ValueError: If the backend's model is not on a CPU, where work is timed by waiting for it.
    """
    if device != "cpu":
        raise ValueError(f"Time is estimated on CPUs only, found {device}; choose by layers there, without --by-time.")
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


def batch_tokens(encoder: PreTrainedConfig, dtype: str, device: str) -> int:
    """Tokens of a staircase: enough that a layer's fixed cost fades even where most texts have left.

    It follows from the encoder's size alone: the same texts are cut alike on every machine and in every run, so that a
    run that goes on where another stopped gives the same bytes.

    Args:
        encoder: The encoder's configuration.
        dtype: One of `DTYPES`.
        device: Kind of device.
    """
    if device != "cpu":
        # Eight times 5,632, where BERT-base's matrix products fill the 132 processors of an H100 evenly (arithmetic,
        # not yet measured): staircases taper, and their upper layers should be worth a launch, too.
        return 45_056
    hidden = encoder.hidden_size
    products = 4 * hidden**2 + 2 * hidden * getattr(encoder, "intermediate_size", 4 * hidden)
    enough = _PRODUCTS_OF_A_BATCH * (1 if dtype == "float32" else 2) // products
    return min(max(-(-enough // 128) * 128, _LEAST_BATCH_TOKENS), _MOST_BATCH_TOKENS)
