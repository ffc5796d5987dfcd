"""What a run may lose, and exact bounds on it from counts. What is asked to be kept is not known here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
        num_texts: Texts compared. Of none, nothing is known: nothing was lost, and all may be.
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
    return (spoilt - repaired) / max(counts.num_texts, 1)


def _drop_bound_of(counts: PairedCounts, tail: float) -> float:
    return drop_bound(*counts.judged(), counts.num_texts, tail)


def _observed_disagreement(counts: PairedCounts) -> float:
    return counts.changed / max(counts.num_texts, 1)


def _disagreement_bound_of(counts: PairedCounts, tail: float) -> float:
    return clopper_pearson_upper(counts.changed, counts.num_texts, tail)


RISKS: dict[str, Risk] = {
    "max_accuracy_drop": Risk("accuracy drop", _observed_drop, _drop_bound_of),
    "min_agreement": Risk("disagreement", _observed_disagreement, _disagreement_bound_of),
}
"""What can be promised, by the field of `Promise` that names it."""
