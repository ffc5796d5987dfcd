"""What texts looked like to an engine, in sums. What is made of it is not known here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Traffic:
    """What texts looked like to an engine, in sums: the traffic of several calls is the sum of theirs.

    Attributes:
        exit_layers: Texts by encoder layers run, lowest layer first.
        unknown: Sum over texts of the share of their tokens that the exit table has never seen; None where there is no
            table.
        unknown_squares: Sum of the squares of these shares.
    """

    exit_layers: Mapping[int, int] = field(default_factory=dict)
    unknown: float | None = None
    unknown_squares: float = 0.0

    @classmethod
    def of(cls, exit_layers: NDArray[np.integer[Any]], unknown: NDArray[np.floating[Any]] | None) -> Traffic:
        """Sum columns with one row a text, (num_texts,)."""
        layers, counts = np.unique(exit_layers, return_counts=True)
        mix = dict(zip(layers.tolist(), counts.tolist(), strict=True))
        if unknown is None:
            return cls(mix)
        shares = unknown.astype(np.float64)
        return cls(mix, float(shares.sum()), float(np.square(shares).sum()))

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Traffic:
        """Read what `to_dict` gave.

        Raises:
            KeyError, TypeError, ValueError: If it is no such thing.
        """
        layers = {int(layer): int(count) for layer, count in fields["exit_layers"].items()}
        unknown = fields["unknown"]
        return cls(layers, None if unknown is None else float(unknown), float(fields["unknown_squares"]))

    def to_dict(self) -> dict[str, Any]:
        """Plain words and numbers, for a file: keys are words there."""
        return {**asdict(self), "exit_layers": {str(layer): count for layer, count in self.exit_layers.items()}}

    @property
    def num_texts(self) -> int:
        """Texts seen."""
        return sum(self.exit_layers.values())

    @property
    def mean_exit_layer(self) -> float:
        """Encoder layers a text; 0 where no text was seen."""
        return sum(layer * count for layer, count in self.exit_layers.items()) / max(self.num_texts, 1)

    @property
    def unknown_share(self) -> float | None:
        """Mean share of a text's tokens that the table has never seen; None where that is not known."""
        return None if self.unknown is None or not self.num_texts else self.unknown / self.num_texts

    def __add__(self, other: Traffic) -> Traffic:
        """Return the traffic of both; what one of them does not know is not known of both."""
        parts = [part for part in (self, other) if part.num_texts]
        mix = Counter[int]()
        for part in parts:
            mix.update(part.exit_layers)
        known = [part.unknown for part in parts if part.unknown is not None]
        unknown = sum(known) if parts and len(known) == len(parts) else None
        squares = 0.0 if unknown is None else sum(part.unknown_squares for part in parts)
        return Traffic(dict(sorted(mix.items())), unknown, squares)
