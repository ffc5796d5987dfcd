"""Which labels a walk waits for. Where labels come from, and files, are not known here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geep.calibration.ordering import Order
from geep.calibration.runs import Outcomes
from geep.promise import Walk

Integers = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Wanted:
    """Labels that walks wait for.

    Attributes:
        rows: Texts to label, ascending; none if no walk waits, or if what there is to label is too much.
        next_step: Labels that the nearest setting to be tested lacks; 0 where no walk waits.
    """

    rows: Integers
    next_step: int


def labels_wanted(outcomes: Outcomes, orders: Sequence[Order], walks: Sequence[Walk], *, most: int) -> Wanted:
    """Find the texts whose labels let walks go on that ended only for want of them.

    Settings get all the labels that they need, those first that need fewest, as long as no more than `most` texts are
    labelled in all. What is asked depends on what the models answer, and on no label of a setting still to come.

    Args:
        outcomes: The texts, some of them labelled.
        orders: Settings in the order of each walk.
        walks: How far each has come with the labels there are.
        most: Labels in all, those that are known included.
    """
    known = 0 if outcomes.labels is None else len(outcomes.labels)
    asked, next_step = np.empty(0, dtype=np.int64), 0
    waiting = {
        number: list(order[len(found.trials) :])
        for number, (order, found) in enumerate(zip(orders, walks, strict=True))
        if all(trial.passed for trial in found.trials)
    }
    while waiting := {number: steps for number, steps in waiting.items() if steps}:
        further = {number: np.setdiff1d(outcomes.lacking(steps[0]), asked) for number, steps in waiting.items()}
        nearest = min(further, key=lambda number: len(further[number]))
        next_step = next_step or len(further[nearest])
        if known + len(asked) + len(further[nearest]) > most:
            break
        asked = np.union1d(asked, further[nearest])
        waiting[nearest].pop(0)
    return Wanted(asked, next_step)
