"""Where packed texts lie in a row of tokens, as the host knows it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from geep.backends.protocol import Integers


@dataclass(frozen=True, slots=True)
class LengthRun:
    """Texts of equal length lying side by side: first token, number of texts, tokens of each."""

    start: int
    num_texts: int
    length: int


@dataclass(frozen=True)
class Layout:
    """Texts one after another; what follows from their lengths is computed when it is first asked for, and kept.

    Attributes:
        lengths: Tokens of each text, int64, (num_texts,).
    """

    lengths: Integers

    @cached_property
    def offsets(self) -> Integers:
        """Where each text begins, and the end of the last, int64, (num_texts + 1,)."""
        offsets = np.zeros(len(self.lengths) + 1, dtype=np.int64)
        np.cumsum(self.lengths, out=offsets[1:])
        return offsets

    @cached_property
    def num_tokens(self) -> int:
        """Tokens of all texts."""
        return int(self.offsets[-1])

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return int(self.lengths.max(initial=0))

    @cached_property
    def runs(self) -> tuple[LengthRun, ...]:
        """The texts as runs of equal lengths; empty ones take part in no attention."""
        if not len(self.lengths):
            return ()
        first = np.concatenate(([0], np.flatnonzero(np.diff(self.lengths)) + 1))
        counts = np.diff(np.concatenate((first, [len(self.lengths)])))
        return tuple(
            LengthRun(start, count, length)
            for start, count, length in zip(
                self.offsets[first].tolist(), counts.tolist(), self.lengths[first].tolist(), strict=True
            )
            if length
        )


def check_reach(length: int, reach: int) -> None:
    """Refuse texts for which there are no positions.

    Raises:
        ValueError: If a text is longer than the reach.
    """
    if length > reach:
        raise ValueError(f"The encoder has positions for {reach} tokens, got a text of {length}; cut it.")
