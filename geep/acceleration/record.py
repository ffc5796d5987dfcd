"""What came of accelerating a classifier, in plain words and numbers. How it was done is not known here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from geep.acceleration.prospects import Prospect


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast a model answers, and how often as the full model does, on texts that nothing was learned or chosen on.

    Attributes:
        layers: Encoder layers run, mean of all texts.
        texts_per_second: From raw text, on some hundred texts; the better of two runs.
        agreement: Share of texts answered as the full model answers them.
    """

    layers: float
    texts_per_second: float
    agreement: float


@dataclass(frozen=True, slots=True)
class Acceleration:
    """What `accelerate` did.

    Attributes:
        promise: What was asked for, in words.
        speed: The certified speed; 0, the full model, where none is.
        before: The full model: the classifier as it was given.
        after: The model at the certified speed.
        calibration: What was certified and how (`Calibration.record`); where nothing could be, "refused" says why.
        depths: Layers with an exit.
        losses: Of each exit, cross-entropy with the full model's probabilities on texts that it did not learn from.
        num_texts: Different texts that were given.
        copies: Texts that were given more than once, less one each: they are left out.
        num_learned: Texts that exits and table learned from.
        num_chosen: Texts that settings were chosen on.
        num_certified: Texts that certify.
        prospects: What stricter promises would take.
        seconds: What it took, without what was done before it was stopped.
        was_finished: Whether the folder was there already, and nothing was done.
    """

    promise: str
    speed: float
    before: Pace
    after: Pace
    calibration: Mapping[str, Any]
    depths: tuple[int, ...]
    losses: tuple[float, ...]
    num_texts: int
    copies: int
    num_learned: int
    num_chosen: int
    num_certified: int
    prospects: tuple[Prospect, ...] = ()
    seconds: float = 0.0
    was_finished: bool = False

    def record(self) -> dict[str, Any]:
        """Return plain words and numbers, for a file; `from_record` makes an equal one of them."""
        return asdict(self)

    @classmethod
    def from_record(cls, found: Mapping[str, Any]) -> Acceleration:
        """Read what `record` gave."""
        fields: dict[str, Any] = dict(found)
        fields |= {name: tuple(found[name]) for name in ("depths", "losses")}
        fields |= {name: Pace(**found[name]) for name in ("before", "after")}
        fields["prospects"] = tuple(Prospect(**each) for each in found.get("prospects", ()))
        return cls(**fields)
