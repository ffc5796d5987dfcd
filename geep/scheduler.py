"""Cut texts into staircases: whose depth and length are known, who runs with whom, and what it takes.

Integers in, integers out: this room knows nothing of tensors, models or text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Integers = NDArray[np.int64]


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


# --------------------------------------------------------------------------------------------------------------------
# What a run takes
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CostModel:
    """Seconds of a run as a sum over what it does; the numbers belong to one machine, model, backend and dtype.

    Attributes:
        layer_seconds: Of a layer on a batch, whatever its size.
        token_seconds: Of a layer, for each token.
        check_seconds: Of asking an exit on a batch, whatever its size: classifier, selection, pooling of survivors.
        text_seconds: Of asking an exit, for each text.
    """

    layer_seconds: float
    token_seconds: float
    check_seconds: float = 0.0
    text_seconds: float = 0.0

    def __post_init__(self) -> None:
        if any(not 0 <= value < math.inf for value in astuple(self)) or not any(astuple(self)):
            raise ValueError(f"Costs must be finite, at least 0 and not all 0, got {astuple(self)}.")

    @classmethod
    def fit(cls, layers: Timings, checks: Timings | None = None) -> CostModel:
        """Fit to timed calls: least squares of the relative error, no part below 0.

        Args:
            layers: Layer calls, by tokens.
            checks: Exits asked, by texts; None: they cost nothing.

        Raises:
            ValueError: If calls are all of one size, or took no time.
        """
        return cls(*layers.line(), *((0.0, 0.0) if checks is None else checks.line()))

    def batch_tokens(self, *, waste: float) -> int:
        """Tokens beyond which the fixed part is at most this share of a layer's time; for a `token_seconds` above 0."""
        return max(math.ceil(self.layer_seconds / self.token_seconds * (1 - waste) / waste), 1)


@dataclass(frozen=True, slots=True)
class Timings:
    """Timed calls: how much each worked on, and the seconds it took; both (num_calls,)."""

    sizes: tuple[int, ...]
    seconds: tuple[float, ...]

    def line(self) -> tuple[float, float]:
        """Fixed part of a call and part for each unit of size; neither is negative, the second is above 0.

        Raises:
            ValueError: If the calls are all of one size, or took no time.
        """
        sizes, seconds = np.asarray(self.sizes, dtype=np.float64), np.asarray(self.seconds)
        if len(np.unique(sizes)) < 2 or (seconds <= 0).any():
            raise ValueError(f"A cost needs calls of at least two sizes that took some time, got {self}.")
        design = np.stack([1 / seconds, sizes / seconds], axis=1)
        fixed, slope = np.linalg.lstsq(design, np.ones(len(seconds)), rcond=None)[0]
        if fixed < 0:  # of two parts, the other alone is then the best that is not negative
            fixed, slope = 0.0, design[:, 1].sum() / np.square(design[:, 1]).sum()
        elif slope < 0:
            fixed, slope = design[:, 0].sum() / np.square(design[:, 0]).sum(), 0.0
        # What rounding leaves of a slope of nothing is no price of a token.
        has_slope = slope * sizes.max() > 1e-9 * fixed
        return float(fixed), float(slope if has_slope else (seconds / sizes).min())


def expected_seconds(
    first_layers: Integers,
    exit_layers: Integers,
    lengths: Integers,
    check_layers: Sequence[int],
    cost: CostModel,
    *,
    max_batch_tokens: int,
    window_tokens: int,
    call_size: int | None = None,
) -> float:
    """Seconds that one text takes on average, in a long stream of texts like these or in calls of a few.

    Survivors are pooled, so live tokens fill batches; a layer or exit that any text of a window reaches takes at least
    one. In a call only texts of that call meet: of a layer that a share p of all texts reaches, calls of n texts take
    1 - (1 - p)^n batches. Texts answered by the lexical exit take nothing.

    Args:
        first_layers: Layer at which each text is asked first, (num_texts,).
        exit_layers: Layer at which each is answered, 0 for the lexical exit, (num_texts,).
        lengths: Tokens of each, (num_texts,).
        check_layers: Layers at which texts are asked, the full model's among them.
        cost: What things take.
        max_batch_tokens: Tokens of a batch.
        window_tokens: Tokens that are sorted and pooled together.
        call_size: Texts of a call; None: a stream.

    Raises:
        ValueError: If there are no tokens.
    """
    total = int(lengths.sum())
    if not total:
        raise ValueError("Found no tokens, expected texts to estimate the time of.")

    def batches(are_there: NDArray[np.bool_]) -> float:
        tokens = float(lengths[are_there].sum())
        if not tokens:
            return 0.0
        if call_size is None:
            least = total / window_tokens
        else:
            least = len(lengths) / call_size * (1 - (1 - are_there.mean()) ** call_size)
        return max(tokens / max_batch_tokens, float(least))

    seconds = 0.0
    for layer in range(1, int(exit_layers.max()) + 1):
        live = exit_layers >= layer
        seconds += cost.layer_seconds * batches(live) + cost.token_seconds * float(lengths[live].sum())
    for layer in check_layers:
        asked = (first_layers <= layer) & (exit_layers >= layer)
        seconds += cost.check_seconds * batches(asked) + cost.text_seconds * int(asked.sum())
    return seconds / len(lengths)


def thin_out(layers: Sequence[int], seconds: Callable[[tuple[int, ...]], float]) -> tuple[int, ...]:
    """Choose the layers worth asking at: drop one after another, each time the one whose loss saves most.

    A text's certainty may fall from one exit to the next, so what a check is worth depends on all the others and not
    only on the one before: a dynamic programme over the last check would be exact for another rule. This evaluates
    whole sets, len(layers)² / 2 of them at most.

    Args:
        layers: Layers to begin with, ascending.
        seconds: What a set costs, infinity where it is not allowed.

    Returns:
        The cheapest set on the way; it may be empty.
    """
    kept, least = tuple(layers), seconds(tuple(layers))
    while kept:
        fewer = [kept[:i] + kept[i + 1 :] for i in range(len(kept))]
        costs = [seconds(each) for each in fewer]
        best = int(np.argmin(costs))
        if not costs[best] < least:
            break
        kept, least = fewer[best], costs[best]
    return kept
