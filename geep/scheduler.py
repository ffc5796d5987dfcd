"""Cut texts into staircases: whose depth and length are known, who runs with whom.

Integers in, integers out: this room knows nothing of tensors, models or text.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import nnls

Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class CostModel:
    """What a layer costs on a machine: a fixed part and a part for each token.

    Attributes:
        layer_seconds: Seconds of a layer call, however few its tokens.
        token_seconds: Seconds of each token in a layer, in a batch large enough to fill the machine.
    """

    layer_seconds: float
    token_seconds: float

    def __post_init__(self) -> None:
        if not (self.layer_seconds >= 0 and self.token_seconds > 0):
            raise ValueError(
                f"A layer costs some time for each token and none or more besides, got {self.token_seconds} and "
                f"{self.layer_seconds} s; time larger batches."
            )

    @classmethod
    def fit(cls, tokens: ArrayLike, seconds: ArrayLike) -> CostModel:
        """Fit to timed layers: least squares of the relative error, neither part below 0.

        Args:
            tokens: Tokens of each timed layer call, at least two different numbers.
            seconds: How long each took.

        Raises:
            ValueError: If the calls are all of one size, or took no time.
        """
        counts, times = np.asarray(tokens, dtype=np.float64), np.asarray(seconds, dtype=np.float64)
        if len(np.unique(counts)) < 2 or (times <= 0).any():
            raise ValueError("A cost model needs calls of at least two sizes that took some time.")
        design = np.stack([1 / times, counts / times], axis=1)
        (fixed, slope), _ = nnls(design, np.ones(len(times)))
        return cls(float(fixed), float(slope) if slope > 0 else float((times / counts).min()))

    def seconds(self, tokens: ArrayLike) -> NDArray[np.float64]:
        """Time of layer calls with so many tokens each."""
        return self.layer_seconds + self.token_seconds * np.asarray(tokens, dtype=np.float64)

    def batch_tokens(self, *, waste: float = 0.03) -> int:
        """Tokens beyond which the fixed part is at most this share of a layer's time."""
        return max(int(np.ceil(self.layer_seconds / self.token_seconds * (1 - waste) / waste)), 1)


@dataclass(frozen=True, slots=True)
class Staircase:
    """Texts that run together, deepest first, so that layer l runs on a prefix of them.

    Attributes:
        indices: Which texts, as positions in the caller's list, shape (num_texts,).
        exit_layers: Layers each of them runs, non-increasing, shape (num_texts,).
        lengths: Tokens of each, shape (num_texts,).
    """

    indices: Integers
    exit_layers: Integers
    lengths: Integers

    def texts_at(self, layer: int) -> int:
        """Return how many texts run `layer` (counted from 1): the length of its prefix."""
        # exit_layers descend, so their negatives ascend and can be searched.
        return int(np.searchsorted(-self.exit_layers, -layer, side="right"))


def schedule(exit_layers: ArrayLike, lengths: ArrayLike, *, max_batch_tokens: int) -> list[Staircase]:
    """Sort texts by exit layer, then length, and cut them into staircases of at most `max_batch_tokens` tokens.

    Every text appears in exactly one staircase; a text longer than the budget gets a staircase of its own. Within one
    exit layer lengths ascend, so texts of equal length lie side by side (attention runs on them as one block) and
    padded backends waste little.

    Args:
        exit_layers: Layers each text runs, shape (num_texts,), each >= 1.
        lengths: Tokens in each text, shape (num_texts,), each >= 0.
        max_batch_tokens: Limit on the tokens of a staircase.

    Returns:
        Staircases, deepest first. Empty if there are no texts.

    Raises:
        ValueError: If the two arrays differ in shape, a layer is below 1, a length below 0, or the budget below 1.
    """
    layers = np.asarray(exit_layers, dtype=np.int64)
    tokens = np.asarray(lengths, dtype=np.int64)
    if layers.ndim != 1 or layers.shape != tokens.shape:
        raise ValueError(f"exit_layers and lengths must be two equal rows, got shapes {layers.shape}, {tokens.shape}.")
    if max_batch_tokens < 1:
        raise ValueError(f"max_batch_tokens must be at least 1, got {max_batch_tokens}.")
    if layers.size and (layers.min() < 1 or tokens.min() < 0):
        raise ValueError(
            f"exit_layers must be >= 1 and lengths >= 0, got minima {layers.min()} and {tokens.min()}; "
            "texts that exit at layer 0 do not run and are not scheduled."
        )
    order = np.lexsort((tokens, -layers))
    return [
        Staircase(indices=order[start:stop], exit_layers=layers[order[start:stop]], lengths=tokens[order[start:stop]])
        for start, stop in budget_cuts(tokens[order], max_tokens=max_batch_tokens)
    ]


def budget_cuts(lengths: Integers, *, max_tokens: int) -> list[tuple[int, int]]:
    """Cut a row of lengths, in order, into the fewest half-open ranges of at most `max_tokens` tokens each.

    A length above the budget gets a range of its own.
    """
    ends = np.cumsum(lengths)
    cuts = []
    start, used = 0, 0
    while start < len(lengths):
        stop = max(int(np.searchsorted(ends, used + max_tokens, side="right")), start + 1)
        cuts.append((start, stop))
        start, used = stop, int(ends[stop - 1])
    return cuts
