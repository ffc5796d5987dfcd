"""Walks and the order of settings in them, fixed on the texts that settings are chosen on.

Read `Route`. The texts that certify are not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from math import inf

import numpy as np

from geep.calibration.choosing import TRIAL_SPEEDS, Choice
from geep.calibration.runs import Outcomes
from geep.engine import ExitSettings
from geep.promise import Promise, Trial

Order = tuple[ExitSettings, ...]

_PLACES = np.arange(len(TRIAL_SPEEDS))

WALK_SPEEDS: tuple[float, ...] = tuple(
    np.interp(np.arange(0, _PLACES[-1] + 0.1, 1 / 4), _PLACES, TRIAL_SPEEDS).round(6).tolist()
)
"""Speeds of a walk: `TRIAL_SPEEDS`, and three between each two. Steps cost no certainty, as nothing is tested after a
failure, and of small ones the last that passes is nearer to what may be lost."""

# A careful walk's settings are weighed by how often answers change, at so many times what accuracy may lose: changes
# that spoil and changes that repair cancel in part.
_CHANGED_FOR_LOST = 2.0

# Of the error probability, for the daring walk: what it may find passes easily or not at all.
_DARING = 0.2


@dataclass(frozen=True, slots=True)
class Route:
    """A walk to a promise, alone or beside another one that shares the error probability.

    Attributes:
        each: What it has to certify: the promise at its share of the error probability.
        weighed: What settings are weighed by on the tuning texts.
        from_safest: Whether it begins at the speed that looks safest there, else at the lowest.
    """

    each: Promise
    weighed: Promise
    from_safest: bool = False

    @classmethod
    def all_to(cls, promise: Promise, *, few_labels: bool = False) -> tuple[Route, ...]:
        """The walks that certify a promise, the careful one first; the faster result is kept.

        A careful one for every promise: settings that change few answers, from the lowest speed on. What tells how many
        answers are right takes thousands of rows; how many change, some hundreds tell. For a promise about accuracy a
        daring one joins it, with a fifth of the error probability: settings that looked most accurate, all layers
        fused with the table perhaps, from the speed on that looked safest. It finds what the careful one misses where
        exits repair more than they spoil. It takes labels of all texts.
        """
        if not promise.needs_labels:
            return (cls(promise, promise),)
        changed = min(_CHANGED_FOR_LOST * promise.allowed, 0.5)
        unchanged = replace(promise, max_accuracy_drop=None, min_agreement=1 - changed)
        if promise.conditional or few_labels:
            return (cls(promise, unchanged),)
        daring = promise.sharing(_DARING)
        return cls(promise.sharing(1 - _DARING), unchanged), cls(daring, daring, from_safest=True)

    def order(self, tuning: Outcomes, choice: Choice, *, rounded: bool = False) -> Order:
        """Settings in the order of the walk.

        Args:
            tuning: Texts to choose settings on.
            choice: The settings that were chosen there.
            rounded: Whether the full model itself is held against another one: a careful walk then begins with it.
        """
        if self.each.conditional:
            found: Order = _openings(tuning, choice, self.weighed)
        else:
            first = _safest(choice.trials) if self.from_safest else 0.0
            found = tuple(replace(choice.settings, speed=speed) for speed in WALK_SPEEDS if speed >= first)
        if rounded and not self.from_safest:
            return (replace(choice.settings, speed=0.0), *found)
        return found


def _safest(trials: Sequence[Trial]) -> float:
    """The speed that looks safest on the tuning texts, the highest of several.

    A walk from speed 0 has to pass where a handful of answers change: there the bound is wide and one text of bad
    luck ends it, long before speeds at which as many answers are repaired as spoilt. A daring walk begins there. It
    may fail at its first step, if what looked safest was luck.
    """
    return min(trials, key=lambda trial: (trial.bound, -trial.speed)).speed


def _openings(tuning: Outcomes, choice: Choice, promise: Promise) -> Order:
    """Settings that open one exit after another, from the deepest to the first, at the speed that needs fewest layers.

    At an early exit of a low speed hardly a text leaves, and of few texts nothing can be certified. Where all leave
    later, there is nobody to be worse off; so exits are closed until enough is known of those who would leave there
    (Ringel et al., ICML 2024, who open thresholds from the last depth backwards).
    """
    asked = choice.settings.asked_layers(tuning.engine.depths).tolist()[:-1]
    closed = replace(choice.settings, lexical_exit=False)
    opened = [replace(closed, check_layers=tuple(asked[first:])) for first in reversed(range(len(asked)))]
    if choice.settings.lexical_exit:
        opened.append(choice.settings)
    orders = [[replace(settings, speed=speed) for settings in opened] for speed in TRIAL_SPEEDS]
    tried = [[tuning.trial(settings, promise) for settings in order] for order in orders]
    # Where the tuning texts certify nothing, what looks good on them has to do.
    for is_kept in (lambda trial: trial.passed, lambda trial: trial.risk <= promise.allowed):
        reached = [list(takewhile(is_kept, trials)) for trials in tried]
        if any(reached):
            break
    best = min(
        range(len(orders)), key=lambda number: [trial.mean_exit_layer for trial in reached[number][-1:]] or [inf]
    )
    faster = (replace(opened[-1], speed=speed) for speed in WALK_SPEEDS if speed > TRIAL_SPEEDS[best])
    return (*orders[best], *faster)
