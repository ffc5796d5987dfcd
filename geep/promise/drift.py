"""Whether texts are still like those that a promise was certified on, told without labels.

A promise speaks of texts drawn as the calibration texts were. What changes when others come is seen at once, and costs
nothing to watch: texts are answered at other layers, and hold tokens that the exit table has never seen.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import exp, sqrt
from typing import Any

import numpy as np
from scipy.stats import kstwobign

from geep.promise.traffic import Traffic

_RARE = 0.001
_LARGE = 0.05


@dataclass(frozen=True, slots=True)
class Drift:
    """How far live texts are from those that certified.

    Attributes:
        layers: Largest difference, over all layers, between the shares of texts answered by that layer: the distance
            of Kolmogorov and Smirnov, in [0, 1].
        unknown: Mean share of a live text's tokens that the table has never seen, less that of the certifying texts;
            None where it is not known.
        p_layers: At most how probable it is that the layers of texts of the same kind differ as much by chance; doubled
            where unknown tokens are compared, too (Bonferroni).
        p_unknown: The same of unknown tokens; None where they are not known.
        num_texts: Live texts.
    """

    layers: float
    unknown: float | None
    p_layers: float
    p_unknown: float | None
    num_texts: int

    @property
    def p_value(self) -> float:
        """At most how probable it is that texts of the same kind differ as much by chance, in one or the other."""
        return self.p_layers if self.p_unknown is None else min(self.p_layers, self.p_unknown)

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
        """Whether a difference is at least 0.05, and this very one not by chance: then promises should be renewed.

        What is seen of texts of the same and of another source is measured (docs/results.md).
        """
        tested = ((self.layers, self.p_layers), (self.unknown, self.p_unknown))
        return any(p is not None and p < _RARE and abs(found or 0.0) >= _LARGE for found, p in tested)

    def to_dict(self) -> dict[str, Any]:
        """Plain words and numbers, what they come to among them."""
        came_to = {"p_value": self.p_value, "figure": self.figure, "is_large": self.is_large}
        return {**asdict(self), **came_to}

    @classmethod
    def between(cls, reference: Traffic, live: Traffic) -> Drift:
        """Compare live traffic with that of the texts that certified, of the same engine at the same speed.

        The exit layers are compared by the test of Kolmogorov and Smirnov, which errs on the safe side where, as here,
        many texts have the same layer; unknown tokens by Bernstein's inequality, which holds of few texts, too: most
        texts have no unknown token, so that the spread within a handful of them says nothing.

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
        p_layers = float(kstwobign.sf(distance * sqrt(size)))
        before, after = reference.unknown_share, live.unknown_share
        if before is None or after is None:
            return cls(distance, None, p_layers, None, live.num_texts)
        p_unknown = _chance_of(reference, live, after - before)
        return cls(distance, after - before, min(1.0, 2 * p_layers), min(1.0, 2 * p_unknown), live.num_texts)


def _chance_of(reference: Traffic, live: Traffic, difference: float) -> float:
    """Bernstein's bound on the probability of such a difference of two means of shares, of texts of one kind.

    If they are of one kind, their variance is that of all of them together.
    """
    if not difference:
        return 1.0
    both, fewest = reference + live, min(reference.num_texts, live.num_texts)
    variance = both.unknown_squares / both.num_texts - (both.unknown_share or 0.0) ** 2
    of_difference = max(variance, 0.0) * (1 / reference.num_texts + 1 / live.num_texts)
    return min(1.0, 2 * exp(-(difference**2) / (2 * (of_difference + abs(difference) / (3 * fewest)))))
