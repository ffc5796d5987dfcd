"""Settings held against a promise one after another, on fresh texts. What a setting is, is not known here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from geep.promise.bounds import PairedCounts
from geep.promise.promises import Promise

Step = TypeVar("Step")


@dataclass(frozen=True, slots=True)
class Trial:
    """One speed held against a promise: its mean layers, the risk observed and the bound on the true one.

    Of a conditional promise, risk and bound are those among the texts of the depth whose bound is the worst.
    """

    speed: float
    mean_exit_layer: float
    risk: float
    bound: float
    passed: bool

    @classmethod
    def of(cls, promise: Promise, *strata: PairedCounts, speed: float, mean_exit_layer: float) -> Trial:
        """Hold what a run at a speed did against a promise, which must hold in each of the strata given.

        Each is tested at the full confidence: the promise is broken as soon as it is in one of them, and a run that
        breaks it there passes only if that one test errs (an intersection-union test, Berger 1982).
        """
        risk, tail = promise.risk, 1 - promise.confidence
        bounds = [risk.bound(counts, tail) for counts in strata]
        bound = max(bounds)
        worst = strata[bounds.index(bound)]
        return cls(speed, mean_exit_layer, risk.observed(worst), bound, bound <= promise.allowed)


@dataclass(frozen=True, slots=True)
class Walk:
    """Outcome of `walk`: the last trial that passed, None if not even the first did, and all that were made."""

    kept: Trial | None
    trials: tuple[Trial, ...]

    @property
    def speed(self) -> float:
        """The speed that is kept; 0, the full model, where none passed."""
        return 0.0 if self.kept is None else self.kept.speed

    @property
    def num_passed(self) -> int:
        """Steps that passed: the first ones of those that were tried."""
        return sum(trial.passed for trial in self.trials)


def walk(trial_at: Callable[[Step], Trial], steps: Iterable[Step]) -> Walk:
    """Find settings that keep a promise: fixed-sequence testing (Learn then Test, Angelopoulos et al. 2021).

    Steps (speeds, or settings) are walked in order and tested with an exact bound at the full confidence; the walk ends
    at the first that fails, and the last that passed is kept. Since nothing is tested after a failure, the probability
    of ever keeping one that breaks the promise is at most 1 - confidence, whatever the order, as long as it was fixed
    before looking at these texts. Nor does it matter why a walk ends sooner: what is not tested is not kept. The texts
    must be fresh: neither trained on nor used to choose criterion, table, temperatures or the order.

    Args:
        trial_at: Holds a step against the promise, on fresh texts.
        steps: What to try, in an order chosen before looking at these texts.

    Returns:
        The walk.
    """
    trials: list[Trial] = []
    kept = None
    for step in steps:
        trial = trial_at(step)
        trials.append(trial)
        if not trial.passed:
            break
        kept = trial
    return Walk(kept, tuple(trials))
