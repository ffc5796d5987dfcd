"""What a user asks to be kept. How it is bounded is not known here."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from geep.promise.bounds import Risk


@dataclass(frozen=True, slots=True)
class Promise:
    """What the user asks to be kept; exactly one of the two is given.

    Attributes:
        max_accuracy_drop: Accuracy of the full model less accuracy of the pipeline, at most (0.005 = half a point).
        min_agreement: Share of texts answered as the full model answers them, at least; needs no labels.
        confidence: Probability, over the draw of the calibration texts, with which the promise holds.
        conditional: Whether it must also hold among the texts that are answered at or before each depth at which texts
            are asked: those that leave early then pay no more than the others.
    """

    max_accuracy_drop: float | None = None
    min_agreement: float | None = None
    confidence: float = 0.95
    conditional: bool = False

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
        # Bounds need SciPy; who only reads what was promised does not.
        from geep.promise.bounds import RISKS

        return RISKS["min_agreement" if self.max_accuracy_drop is None else "max_accuracy_drop"]

    @property
    def needs_labels(self) -> bool:
        """Whether the promise can be tested on labelled texts only."""
        return self.max_accuracy_drop is not None

    @property
    def allowed(self) -> float:
        """The risk that may not be exceeded."""
        return self.max_accuracy_drop if self.max_accuracy_drop is not None else 1 - (self.min_agreement or 0.0)

    def sharing(self, share: float) -> Promise:
        """The same promise at a share of the error probability: what one of several walks has to certify."""
        return replace(self, confidence=1 - (1 - self.confidence) * share)

    @property
    def texts_needed(self) -> int:
        """Fewest texts with which certifying is tried: those on which a run that changes nothing just suffices."""
        most = 1
        while not self._suffices(most):
            most *= 2
        return bisect_left(range(1, most), True, key=self._suffices) + 1

    def _suffices(self, num_texts: int) -> bool:
        from geep.promise.bounds import PairedCounts

        return self.risk.bound(PairedCounts(num_texts, 0, 0, 0), 1 - self.confidence) <= self.allowed

    def __str__(self) -> str:
        if self.max_accuracy_drop is not None:
            what = f"an accuracy drop of at most {self.max_accuracy_drop * 100:g} points"
        else:
            what = f"an agreement of at least {self.min_agreement}"
        among = " among the texts answered by any depth" if self.conditional else ""
        return f"{what}{among} at {100 * self.confidence:g} % confidence"


class NothingCertifiedError(ValueError):
    """A promise cannot be certified at all, whatever the speed; the message says why and what to do."""


class TooFewTextsError(NothingCertifiedError):
    """There are too few calibration texts for the promise; the message says how many are needed."""


class ConstantModelError(NothingCertifiedError):
    """The full model gives every text the same answer: agreeing with it, or being as accurate, proves nothing."""


def check_enough(num_texts: int, promise: Promise, *, note: str = "") -> None:
    """Refuse to certify a promise on too few texts, before any work is done.

    Raises:
        TooFewTextsError: If there are fewer than `Promise.texts_needed`.
    """
    if num_texts < promise.texts_needed:
        raise TooFewTextsError(
            f"{num_texts} calibration texts cannot certify {promise}: at least {promise.texts_needed} "
            f"are needed.{note} Give more held-out texts, or ask for less. No speed was set."
        )
