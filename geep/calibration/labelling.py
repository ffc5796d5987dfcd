"""Which labels a walk waits for. Where labels come from, and files, are not known here."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from geep.calibration.ordering import Order
from geep.calibration.runs import Outcomes
from geep.promise import Walk

Integers = NDArray[np.int64]


def labels_needed(outcomes: Outcomes, orders: Sequence[Order], walks: Sequence[Walk], *, most: int) -> Integers:
    """Return texts whose labels let walks go on that ended only for want of them, ascending; none if none did.

    Steps get all the labels that they need, those first that need fewest, as long as no more than `most` texts are
    labelled in all. What is asked depends on what the models answer, and on no label of a step that is still to come.

    Args:
        outcomes: The texts, some of them labelled.
        orders: Settings in the order of each walk.
        walks: How far each has come with the labels there are.
        most: Labels in all, those that are known included.
    """
    known = 0 if outcomes.labels is None else len(outcomes.labels)
    asked = np.empty(0, dtype=np.int64)
    waiting = {
        number: list(order[len(found.trials) :])
        for number, (order, found) in enumerate(zip(orders, walks, strict=True))
        if all(trial.passed for trial in found.trials)
    }
    while waiting := {number: steps for number, steps in waiting.items() if steps}:
        further = {
            number: np.setdiff1d(outcomes.lacking(steps[0]), asked, assume_unique=True)
            for number, steps in waiting.items()
        }
        nearest = min(further, key=lambda number: len(further[number]))
        if known + len(asked) + len(further[nearest]) > most:
            break
        asked = np.union1d(asked, further[nearest])
        waiting[nearest].pop(0)
    return asked
