"""Whether texts are still like those that a promise was certified on, told without labels.

A promise speaks of texts drawn as the calibration texts were. What changes when others come is seen at once, and costs
nothing to watch: texts are answered at other layers, and hold tokens that the exit table has never seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np
from scipy.stats import kstwobign, ttest_ind_from_stats

from geep.promise.traffic import Traffic

# Two figures are tested, each at half of this.
_RARE = 0.001
_LARGE = 0.1


@dataclass(frozen=True, slots=True)
class Drift:
    """How far live texts are from those that certified.

    Attributes:
        layers: Largest difference, over all layers, between the shares of texts answered by that layer: the distance
            of Kolmogorov and Smirnov, in [0, 1].
        unknown: Mean share of a live text's tokens that the table has never seen, less that of the certifying texts;
            None where it is not known.
        p_value: How probable it is that texts of the same kind differ as much by chance, in one figure or the other.
        num_texts: Live texts.
    """

    layers: float
    unknown: float | None
    p_value: float
    num_texts: int

    @property
    def figure(self) -> float:
        """One number to watch, in [0, 1]: the larger of the two differences."""
        return max(self.layers, abs(self.unknown or 0.0))

    @property
    def is_certain(self) -> bool:
        """Whether chance is ruled out (p < 0.001). Of many texts a small drift is certain, too: look at the figure."""
        return self.p_value < _RARE

    @property
    def is_large(self) -> bool:
        """Whether chance is ruled out and the figure at least 0.1: then promises should be certified anew.

        What is seen of texts of the same and of another source is measured (docs/results.md).
        """
        return self.is_certain and self.figure >= _LARGE

    @classmethod
    def between(cls, reference: Traffic, live: Traffic) -> Drift:
        """Compare live traffic with that of the texts that certified, of the same engine at the same speed.

        The exit layers are compared by the test of Kolmogorov and Smirnov, which errs on the safe side where, as here,
        many texts have the same layer; unknown tokens by Welch's t-test. Of both the smaller p-value counts, doubled
        (Bonferroni).

        Raises:
            ValueError: If one of them has no texts.
        """
        if not reference.num_texts or not live.num_texts:
            raise ValueError(
                f"Found {reference.num_texts} texts that certified and {live.num_texts} live ones, expected some of "
                "each; drift is a comparison."
            )
        layers = sorted({*reference.exit_layers, *live.exit_layers})
        then, now = (
            np.cumsum([part.exit_layers.get(layer, 0) for layer in layers]) / part.num_texts
            for part in (reference, live)
        )
        distance = float(np.abs(then - now).max())
        size = reference.num_texts * live.num_texts / (reference.num_texts + live.num_texts)
        p_values = [float(kstwobign.sf(distance * sqrt(size)))]
        before, after, unknown = reference.unknown_share, live.unknown_share, None
        if before is not None and after is not None:
            unknown = after - before
            p_values.append(_chance_of(reference, live))
        return cls(distance, unknown, min(1.0, len(p_values) * min(p_values)), live.num_texts)


def _chance_of(reference: Traffic, live: Traffic) -> float:
    """The p-value of the means' difference; of texts that are all alike, whether the means are the same."""
    means, deviations, counts = zip(*map(_moments, (reference, live)), strict=True)
    if min(counts) < 2:
        return 1.0
    if not any(deviations):
        return float(means[0] == means[1])
    both = (number for moments in zip(means, deviations, counts, strict=True) for number in moments)
    return float(ttest_ind_from_stats(*both, equal_var=False).pvalue)


def _moments(traffic: Traffic) -> tuple[float, float, int]:
    """Mean, standard deviation and number of the shares of unknown tokens."""
    count, total = traffic.num_texts, traffic.unknown or 0.0
    variance = max(traffic.unknown_squares - total * total / count, 0.0) / max(count - 1, 1)
    return total / count, sqrt(variance), count
