"""What stricter promises would take: layers, and texts to certify them. Nothing here is a promise."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from geep.calibration import TRIAL_SPEEDS, Outcomes, Route
from geep.engine import ExitSettings
from geep.promise import PairedCounts, Promise

# Stricter by these factors: 99 % agreement becomes 99.5 % and 99.8 %.
_STRICTER = (2, 5)

# Of what may be lost, the share that a speed loses at most on the texts judged by: nearer to it, certifying takes texts
# without end.
_SHARE = 0.4

# More texts than anybody is asked for.
_MOST_TEXTS = 1_000_000


@dataclass(frozen=True, slots=True)
class Prospect:
    """What a promise would take, judged by texts that settings were chosen on; not certified.

    Attributes:
        promise: In words.
        layers: Encoder layers run, mean of all texts; None where no exit would serve.
        num_texts: Fresh texts with which it could be certified, if they are as those judged by; None as above.
    """

    promise: str
    layers: float | None
    num_texts: int | None


def prospects(tuning: Outcomes, settings: ExitSettings, promise: Promise) -> tuple[Prospect, ...]:
    """Say what stricter promises would take at the settings that were chosen.

    Args:
        tuning: Texts that settings were chosen on.
        settings: The settings; their speed does not matter.
        promise: What was asked for.

    Returns:
        One for each of some stricter promises, the nearest first.
    """
    found = [tuning.judged(replace(settings, speed=speed)) for speed in TRIAL_SPEEDS]
    counted = [(each.by(len(each.depths) - 1), each.mean_exit_layer) for each in found]
    return tuple(_prospect(counted, _stricter(promise, factor)) for factor in _STRICTER)


def _prospect(counted: list[tuple[PairedCounts, float]], promise: Promise) -> Prospect:
    each = Route.all_to(promise)[0].each
    serving = [(layers, needed) for counts, layers in counted if (needed := _texts_needed(counts, each)) is not None]
    return Prospect(str(promise), *min(serving, default=(None, None)))


def _stricter(promise: Promise, factor: int) -> Promise:
    allowed = round(promise.allowed / factor, 6)
    if promise.needs_labels:
        return replace(promise, max_accuracy_drop=allowed)
    return replace(promise, min_agreement=round(1 - allowed, 6))


def _texts_needed(counts: PairedCounts, promise: Promise) -> int | None:
    """Texts with which a promise is certified if the same share of them changes as of those counted; None: too many."""
    risk, tail = promise.risk, 1 - promise.confidence
    if risk.observed(counts) > _SHARE * promise.allowed:
        return None
    num_texts = promise.texts_needed
    while num_texts <= _MOST_TEXTS:
        changed, spoilt, repaired = (
            None if part is None else math.ceil(part * num_texts / counts.num_texts)
            for part in (counts.changed, counts.spoilt, counts.repaired)
        )
        if risk.bound(PairedCounts(num_texts, changed or 0, spoilt, repaired), tail) <= promise.allowed:
            return num_texts
        num_texts = math.ceil(1.2 * num_texts)
    return None
