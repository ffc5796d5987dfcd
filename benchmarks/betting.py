"""How often bounds by betting certify a drop, beside the exact bound that calibration uses.

Texts are drawn of which a share d is answered otherwise than by the full model, and of these a share spoilt, the rest
repaired. Counted is how often each bound, at 95 %, certifies that at most half a point is lost:

- `exact`: `geep.promise.drop_bound` (Berger and Boos),
- `adaptive`: capital that grows while the drop is below the half point (Waudby-Smith and Ramdas, 2024), with bets from
  mean and variance of the texts before, stopped where it is largest,
- `mixture`: the mean capital of twenty fixed bets at the end.

    python benchmarks/betting.py

prints a table. The order of the texts, which adaptive bets depend on, is that in which they are drawn.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from geep.promise import drop_bound

Differences = NDArray[np.float64]  # 1 spoilt, -1 repaired, 0 as before; (rounds, num_texts)

ALLOWED, TAIL = 0.005, 0.05
WORLDS = ((0.0, 0.5), (0.002, 0.5), (0.002, 1.0), (0.005, 0.5), (0.01, 0.5), (0.02, 0.5), (0.03, 0.5), (0.01, 0.6))

# A bet never risks more than this share of the capital.
_MOST_RISKED = 0.9


def exact(drawn: Differences) -> NDArray[np.bool_]:
    """Whether each round is certified by the exact bound."""
    counts = zip((drawn > 0).sum(1).tolist(), (drawn < 0).sum(1).tolist(), strict=True)
    return np.array([drop_bound(spoilt, repaired, drawn.shape[1], TAIL) <= ALLOWED for spoilt, repaired in counts])


def adaptive(drawn: Differences) -> NDArray[np.bool_]:
    """Whether capital by adaptive bets against a drop of half a point ever reaches 1 / tail."""
    gains, border = (1 - drawn) / 2, (1 - ALLOWED) / 2
    count = np.arange(1, drawn.shape[1] + 1)
    total, squares = gains.cumsum(1), (gains**2).cumsum(1)
    mean = (0.5 + total) / (count + 1)
    variance = (0.25 + squares - 2 * mean * total + count * mean**2) / (count + 1)
    before = [
        np.concatenate([np.full((len(drawn), 1), first), each[:, :-1]], axis=1)
        for first, each in ((0.5, mean), (0.25, variance))
    ]
    edge = before[0] - border
    bets = np.clip(edge / (before[1] + edge**2), 0, _MOST_RISKED / border)
    return np.log1p(bets * (gains - border)).cumsum(1).max(1) >= np.log(1 / TAIL)


def mixture(drawn: Differences) -> NDArray[np.bool_]:
    """Whether the mean capital of fixed bets reaches 1 / tail in the end."""
    border = (1 - ALLOWED) / 2
    bets = np.geomspace(0.01, 0.95, 20) / border
    capital = sum(
        (drawn == value).sum(1)[:, None] * np.log1p(bets * ((1 - value) / 2 - border)) for value in (1, 0, -1)
    )
    return np.logaddexp.reduce(np.asarray(capital), axis=1) - np.log(len(bets)) >= np.log(1 / TAIL)


METHODS: dict[str, Callable[[Differences], NDArray[np.bool_]]] = {
    "exact": exact,
    "adaptive": adaptive,
    "mixture": mixture,
}


def certified(num_texts: int, changed: float, spoilt: float, *, rounds: int, seed: int = 0) -> dict[str, float]:
    """Share of rounds that each method certifies."""
    drawn = np.random.default_rng(seed).random((rounds, num_texts))
    differences = np.where(drawn < changed * spoilt, 1.0, np.where(drawn < changed, -1.0, 0.0))
    return {name: float(method(differences).mean()) for name, method in METHODS.items()}


def main(arguments: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, nargs="+", default=[1500, 2500, 10_000])
    parser.add_argument("--rounds", type=int, default=200)
    asked = parser.parse_args(arguments)
    print("  ".join(("texts", "changed", "spoilt", *METHODS)))
    for num_texts in asked.texts:
        for changed, spoilt in WORLDS:
            found = certified(num_texts, changed, spoilt, rounds=asked.rounds)
            print(
                "  ".join(
                    (
                        f"{num_texts:5}",
                        f"{changed:7.3f}",
                        f"{spoilt:6.1f}",
                        *(f"{share:.2f}" for share in found.values()),
                    )
                )
            )


if __name__ == "__main__":
    main(sys.argv[1:])
