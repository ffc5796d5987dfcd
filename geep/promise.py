"""Promises and their exact bounds: counts in, bounds out.

A risk is a value: a row of `RISKS` says what is observed, what bounds it and whether it needs labels. Nothing is known
here of exits, engines or tensors. Read `PairedCounts`, `RISKS`, `Promise`, then `walk`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from scipy.stats import beta, binom

# --------------------------------------------------------------------------------------------------------------------
# Bounds
# --------------------------------------------------------------------------------------------------------------------


def clopper_pearson_upper(successes: int, trials: int, tail: float) -> float:
    """Upper end of the exact one-sided binomial interval at confidence 1 - tail (Clopper and Pearson 1934)."""
    return 1.0 if trials == 0 or successes >= trials else float(beta.ppf(1 - tail, successes + 1, trials - successes))


# Share of the error probability spent on bounding how many answers change. A fifth is near the best from none to
# hundreds of changed texts; the bound is flat around it.
_CHANGED_SHARE = 0.2


@lru_cache(maxsize=2**16)
def drop_bound(spoilt: int, repaired: int, num_texts: int, tail: float) -> float:
    """Upper bound, at confidence 1 - tail, on P(spoilt) - P(repaired), from counts among `num_texts` texts.

    The exact test of Berger and Boos (1994). The share of changed answers d = P(spoilt) + P(repaired) is bounded by
    Clopper and Pearson at a part of `tail`; a drop is refuted if, at every d up to that bound, a difference as small
    as the one seen is less probable than the rest of `tail`. The difference of counts plus `num_texts` is a sum of
    Bernoulli variables while d <= 1/2, so it is unimodal with a mode less than 1 from its mean (Darroch 1964), and its
    lower tail grows with d wherever the tail ends 2 below the mean: there the largest d alone has to be looked at.
    Drops nearer to what was seen than that are not refuted, and with d above 1/2 the bound is d itself.

    Bounding changes and direction each by itself and multiplying is simpler, and wider where texts change both ways.
    """
    spent = tail * _CHANGED_SHARE
    changed = clopper_pearson_upper(spoilt + repaired, num_texts, spent)
    nearest = max((spoilt - repaired + 2) / max(num_texts - 1, 1), 0.0)
    if changed > 0.5 or nearest >= changed:
        return changed
    count = np.arange(binom.ppf(1e-12, num_texts, changed), binom.isf(1e-12, num_texts, changed) + 1)
    weight = binom.pmf(count, num_texts, changed)
    most_spoilt = np.floor((count + spoilt - repaired) / 2)

    def probability(drop: float) -> float:
        """Of a difference at most as large as the one seen; the counts left out add at most 2e-12."""
        return float(weight @ binom.cdf(most_spoilt, count, (1 + drop / changed) / 2)) + 2e-12

    low, high = nearest, changed
    if probability(low) <= tail - spent:
        return low
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if probability(middle) <= tail - spent else (middle, high)
    return high


# --------------------------------------------------------------------------------------------------------------------
# Risks
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PairedCounts:
    """How a run's answers compare with the full model's, text by text.

    Attributes:
        num_texts: Texts compared, at least one.
        changed: Texts answered otherwise than the full model does.
        spoilt: Texts that the full model has right and the run wrong; None without labels.
        repaired: Texts that the full model has wrong and the run right; None without labels.
    """

    num_texts: int
    changed: int
    spoilt: int | None = None
    repaired: int | None = None

    def judged(self) -> tuple[int, int]:
        """Return the texts spoilt and repaired.

        Raises:
            ValueError: If the texts had no labels.
        """
        if self.spoilt is None or self.repaired is None:
            raise ValueError("max_accuracy_drop needs labelled texts, got none with labels; use min_agreement instead.")
        return self.spoilt, self.repaired


@dataclass(frozen=True, slots=True)
class Risk:
    """Something that a run may lose against the full model.

    Attributes:
        name: What it is called in tables.
        observed: The share lost on the texts seen.
        bound: Upper bound on the true share, at confidence 1 - tail, from the texts seen; exact for any sample size.
    """

    name: str
    observed: Callable[[PairedCounts], float]
    bound: Callable[[PairedCounts, float], float]


def _observed_drop(counts: PairedCounts) -> float:
    spoilt, repaired = counts.judged()
    return (spoilt - repaired) / counts.num_texts


def _drop_bound_of(counts: PairedCounts, tail: float) -> float:
    return drop_bound(*counts.judged(), counts.num_texts, tail)


def _observed_disagreement(counts: PairedCounts) -> float:
    return counts.changed / counts.num_texts


def _disagreement_bound_of(counts: PairedCounts, tail: float) -> float:
    return clopper_pearson_upper(counts.changed, counts.num_texts, tail)


RISKS: dict[str, Risk] = {
    "max_accuracy_drop": Risk("accuracy drop", _observed_drop, _drop_bound_of),
    "min_agreement": Risk("disagreement", _observed_disagreement, _disagreement_bound_of),
}
"""What can be promised, by the field of `Promise` that names it."""


# --------------------------------------------------------------------------------------------------------------------
# Promises
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Promise:
    """What the user asks to be kept; exactly one of the two is given.

    Attributes:
        max_accuracy_drop: Accuracy of the full model less accuracy of the pipeline, at most (0.005 = half a point).
        min_agreement: Share of texts answered as the full model answers them, at least; needs no labels.
        confidence: Probability, over the draw of the calibration texts, with which the promise holds.
    """

    max_accuracy_drop: float | None = None
    min_agreement: float | None = None
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if (self.max_accuracy_drop is None) == (self.min_agreement is None):
            raise ValueError(
                "A promise names one of max_accuracy_drop and min_agreement, "
                f"got {self.max_accuracy_drop} and {self.min_agreement}."
            )
        for name in ("max_accuracy_drop", "min_agreement"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ValueError(f"{name} must lie between 0 and 1 (0.005 is half a point), got {value}.")
        if not 0.5 <= self.confidence < 1:
            raise ValueError(f"confidence must lie in [0.5, 1), got {self.confidence}.")

    @property
    def risk(self) -> Risk:
        """What may be lost."""
        return RISKS["min_agreement" if self.max_accuracy_drop is None else "max_accuracy_drop"]

    @property
    def needs_labels(self) -> bool:
        """Whether the promise can be tested on labelled texts only."""
        return self.max_accuracy_drop is not None

    @property
    def allowed(self) -> float:
        """The risk that may not be exceeded."""
        return self.max_accuracy_drop if self.max_accuracy_drop is not None else 1 - (self.min_agreement or 0.0)

    def halved(self) -> Promise:
        """The same promise at half the error probability: what each of two walks has to certify."""
        return replace(self, confidence=1 - (1 - self.confidence) / 2)

    @property
    def texts_needed(self) -> int:
        """Fewest texts with which certifying is tried: those on which a run that changes nothing just suffices."""
        most = 1
        while not self._suffices(most):
            most *= 2
        return bisect_left(range(1, most), True, key=self._suffices) + 1

    def _suffices(self, num_texts: int) -> bool:
        return self.risk.bound(PairedCounts(num_texts, 0, 0, 0), 1 - self.confidence) <= self.allowed

    def __str__(self) -> str:
        if self.max_accuracy_drop is not None:
            what = f"an accuracy drop of at most {self.max_accuracy_drop * 100:g} points"
        else:
            what = f"an agreement of at least {self.min_agreement}"
        return f"{what} at {100 * self.confidence:g} % confidence"


class NothingCertifiedError(ValueError):
    """A promise cannot be certified at all, whatever the speed; the message says why and what to do."""


class TooFewTextsError(NothingCertifiedError):
    """There are too few calibration texts for the promise; the message says how many are needed."""


class ConstantModelError(NothingCertifiedError):
    """The full model gives every text the same answer: agreeing with it, or being as accurate, proves nothing."""


def check_enough(num_texts: int, promise: Promise) -> None:
    """Refuse to certify a promise on too few texts, before any work is done.

    Raises:
        TooFewTextsError: If there are fewer than `Promise.texts_needed`.
    """
    if num_texts < promise.texts_needed:
        raise TooFewTextsError(
            f"{num_texts} calibration texts cannot certify {promise}: at least {promise.texts_needed} "
            "are needed. Give more held-out texts, or ask for less. No speed was set."
        )


# --------------------------------------------------------------------------------------------------------------------
# Walks
# --------------------------------------------------------------------------------------------------------------------


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
