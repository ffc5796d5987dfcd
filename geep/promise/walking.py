"""Speeds held against a promise one after another, on fresh texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from geep.promise.bounds import PairedCounts
from geep.promise.promises import Promise


@dataclass(frozen=True, slots=True)
class Trial:
    """One speed held against a promise: its mean layers, the risk observed and the bound on the true one."""

    speed: float
    mean_exit_layer: float
    risk: float
    bound: float
    passed: bool

    @classmethod
    def of(cls, promise: Promise, counts: PairedCounts, *, speed: float, mean_exit_layer: float) -> Trial:
        """Hold what a run at a speed did against a promise."""
        bound = promise.risk.bound(counts, 1 - promise.confidence)
        return cls(speed, mean_exit_layer, promise.risk.observed(counts), bound, bound <= promise.allowed)


@dataclass(frozen=True, slots=True)
class Walk:
    """Outcome of `walk`: the last speed that passed, None if not even the first did, and all that were tried."""

    kept: Trial | None
    trials: tuple[Trial, ...]

    @property
    def speed(self) -> float:
        """The speed that is kept; 0, the full model, where none passed."""
        return 0.0 if self.kept is None else self.kept.speed


def walk(trial_at: Callable[[float], Trial], speeds: Iterable[float]) -> Walk:
    """Find a speed that keeps a promise: fixed-sequence testing (Learn then Test, Angelopoulos et al. 2021).

    Speeds are walked in order and tested with an exact bound at the full confidence; the walk ends at the first that
    fails, and the last that passed is kept. Since nothing is tested after a failure, the probability of ever keeping
    a speed that breaks the promise is at most 1 - confidence, whatever the order, as long as it was fixed before
    looking at these texts. The texts must be fresh: neither trained on nor used to choose criterion, table,
    temperatures or the order.

    Args:
        trial_at: Holds a speed against the promise, on fresh texts.
        speeds: Speeds to try, in an order chosen before looking at these texts.

    Returns:
        The walk.
    """
    trials: list[Trial] = []
    kept = None
    for speed in speeds:
        trial = trial_at(speed)
        trials.append(trial)
        if not trial.passed:
            break
        kept = trial
    return Walk(kept, tuple(trials))
