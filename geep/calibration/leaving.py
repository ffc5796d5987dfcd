"""Where texts were answered, and how these answers compare with the full model's: overall, and by each depth.

How texts are run and labels are had is not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geep.exits import ExitProfile
from geep.promise import PairedCounts, Promise

Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Leavers:
    """The texts that are answered at or before a depth.

    Attributes:
        depth: Encoder layers; 0 is the table alone.
        num_texts: Texts answered there or before.
        risk: What was lost among them, by the promise's risk; 0 where there are none.
    """

    depth: int
    num_texts: int
    risk: float


@dataclass(frozen=True, eq=False)
class Answered:
    """Where texts are answered and what that changes, (num_texts,) each.

    Attributes:
        column: Column of `depths` at which each text is answered.
        depths: Encoder layers run at each column, (num_depths,).
        changed: Whether the answer is another than the full model's.
        spoilt: Whether the full model is right and the answer wrong; None without labels.
        repaired: Whether the full model is wrong and the answer right; None without labels.
    """

    column: Integers
    depths: tuple[int, ...]
    changed: Flags
    spoilt: Flags | None
    repaired: Flags | None

    @classmethod
    def of(cls, profile: ExitProfile, column: Integers) -> Answered:
        """Read it off a profile of all the texts, labelled all or none."""
        rows = np.arange(len(profile))
        spoilt = repaired = None
        if profile.correct is not None and profile.reference_correct is not None:
            full, deployed = profile.reference_correct, profile.correct[rows, column]
            spoilt, repaired = full & ~deployed, ~full & deployed
        return cls(column, profile.depths, ~profile.agrees[rows, column], spoilt, repaired)

    @property
    def mean_exit_layer(self) -> float:
        """Encoder layers run, mean of all texts."""
        return float(np.asarray(self.depths)[self.column].mean())

    def by(self, column: int) -> PairedCounts:
        """Counts among the texts that are answered at or before a column."""
        among = self.column <= column
        spoilt, repaired = (
            None if flags is None else int((flags & among).sum()) for flags in (self.spoilt, self.repaired)
        )
        return PairedCounts(int(among.sum()), int((self.changed & among).sum()), spoilt, repaired)

    def strata(self, promise: Promise, asked: Sequence[int]) -> list[PairedCounts]:
        """Counts that a promise is held against: of all texts; of a conditional one, also by each column asked."""
        last = len(self.depths) - 1
        columns = sorted({*asked, last}) if promise.conditional else [last]
        return [self.by(column) for column in columns]

    def leavers(self, promise: Promise, asked: Sequence[int]) -> tuple[Leavers, ...]:
        """What a promise's risk was among the texts answered by each of the columns asked."""
        counts = [(self.depths[column], self.by(column)) for column in asked]
        return tuple(Leavers(depth, each.num_texts, promise.risk.observed(each)) for depth, each in counts)
