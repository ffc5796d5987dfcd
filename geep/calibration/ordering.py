"""The order in which settings are held against a promise, fixed on the texts that settings are chosen on.

Read `Search`, then its `orders`. The texts that certify are not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from math import inf

from geep.calibration.choosing import TRIAL_SPEEDS, Choice
from geep.calibration.runs import Outcomes
from geep.engine import ExitSettings
from geep.promise import Promise, Trial

Order = tuple[ExitSettings, ...]

# Without labels settings are weighed by how often answers change, at so many times what accuracy may lose: changes that
# spoil and changes that repair cancel in part.
_CHANGED_FOR_LOST = 3.0


@dataclass(frozen=True, slots=True)
class Search:
    """How a speed is looked for.

    Attributes:
        each: What each walk has to certify: the promise at its share of the error probability.
        weighed: What settings are weighed by on the tuning texts.
        num_walks: Walks that share the error probability.
    """

    each: Promise
    weighed: Promise
    num_walks: int

    @classmethod
    def of(cls, promise: Promise, *, few_labels: bool = False) -> Search:
        """One walk for a conditional promise, and where labels are had one by one: else two, each at half of the error.

        Among many texts, of which few need a label, a single one does not end the walk from speed 0. Settings are then
        weighed by what takes no labels; so they are for a conditional promise, of which tuning texts that leave at one
        exit are too few to tell more.
        """
        two = not promise.conditional and not few_labels
        blind = promise.needs_labels and not two
        each = promise.halved() if two else promise
        changed = min(_CHANGED_FOR_LOST * promise.allowed, 0.5)
        weighed = replace(each, max_accuracy_drop=None, min_agreement=1 - changed) if blind else each
        return cls(each, weighed, 1 + two)

    def orders(self, tuning: Outcomes, choice: Choice, *, quantised: bool = False) -> tuple[Order, ...]:
        """Settings in the order of each walk; full model first where that, quantised, has to be certified as well."""
        if self.each.conditional:
            orders: tuple[Order, ...] = (_openings(tuning, choice, self.weighed),)
        else:
            speeds = (TRIAL_SPEEDS, _from_safest(choice.trials))[: self.num_walks]
            orders = tuple(tuple(replace(choice.settings, speed=speed) for speed in order) for order in speeds)
        if not quantised:
            return orders
        first, *others = orders
        return ((replace(choice.settings, speed=0.0), *first), *others)


def _from_safest(trials: Sequence[Trial]) -> list[float]:
    """Speeds from the one that looks safest on the tuning texts upwards.

    The walk from speed 0 has to pass where a handful of answers change: there the bound is wide and one text of bad
    luck ends it, long before speeds at which as many answers are repaired as spoilt. This walk begins there. It may
    fail at its first step, if what looked safest was luck: then the other walk's result stands.
    """
    safest = min(range(len(trials)), key=lambda number: (trials[number].bound, -number))
    return [trial.speed for trial in trials[safest:]]


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
    faster = (replace(opened[-1], speed=speed) for speed in TRIAL_SPEEDS[best + 1 :])
    return (*orders[best], *faster)
