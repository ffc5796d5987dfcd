"""Fused answers: what an exit says and what the table said of the same text, as one answer. Who asks is not known."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

from torch import Tensor

# Lexical logits beyond this say no more: those of labels that no text of the table had are 30 below.
_LEXICAL_LIMIT = 12.0


@dataclass(frozen=True, slots=True)
class Fusing:
    """An exit's answer: own * its logits + table * the table's logits; it costs nothing, the table was read anyway.

    Two numbers a depth, fitted by log-loss on held-out texts (`geep.exits.fit_fusing`); they are a temperature, too.

    Attributes:
        own: Weight of the exit's logits, positive.
        table: Weight of the table's, at least 0.
    """

    own: float
    table: float

    def __post_init__(self) -> None:
        if not (all(math.isfinite(value) for value in astuple(self)) and self.own > 0 and self.table >= 0):
            raise ValueError(
                f"Weights of fused answers must be finite, own above 0 and table at least 0, got {astuple(self)}."
            )

    def scaled(self, by: float) -> Fusing:
        """Weights of the same answers with logits `by` times as large."""
        return Fusing(by * self.own, by * self.table)

    def __call__(self, logits: Tensor, lexical: Tensor) -> Tensor:
        """Fused logits, float32, of an exit's logits and the table's, both (..., num_labels)."""
        return self.own * logits.float() + self.table * limited(lexical)


def limited(lexical: Tensor) -> Tensor:
    """The table's logits as they count in a sum, float32."""
    return lexical.float().clamp(-_LEXICAL_LIMIT, _LEXICAL_LIMIT)
