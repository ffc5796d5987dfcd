"""What is decided at an exit, and the uncertainty that follows. How the engine runs is not known here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import astuple, dataclass, field, fields
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from geep.exits import AGREEMENT, CRITERIA, AgreementScore, Fusing, OnMiss, uncertainty

Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ExitSettings:
    """How certain is certain enough; learned by `geep profile` and `geep calibrate`, kept in `calibration.json`.

    Attributes:
        speed: FastBERT's knob in [0, 1]: an exit answers once its uncertainty is below it; 0 is the full model.
        criterion: Row of `CRITERIA`, or "agreement" (`AgreementScore`).
        temperatures: Divides the logits at each depth (0 is the lexical exit), so that scores mean the same everywhere.
        agreement: Score of each depth but the last, for the criterion "agreement"; empty where none were learned.
        fusing: Weights of each depth's logits and the table's in what is answered there; a depth that is left out
            answers by itself. All layers are fused for a promise about accuracy alone, and never at speed 0.
        on_miss: "continue": an answer at the predicted exit that is not certain enough goes on and is asked again.
            "stop" (the paper): it is final.
        quantile: Of a text's distribution over exits, the quantile that is its predicted layer. Low quantiles ask
            early and often (a check is cheap), high ones late (a stop is final).
        check_layers: Exits at which texts are asked; None: all. The full model answers whoever is left. Where a check
            costs as much as layers do (a GPU with small batches), few are best; fewer also err less often.
        lexical_exit: Whether texts may be answered by the table alone, without the encoder.
    """

    speed: float = 0.0
    criterion: str = "entropy"
    temperatures: dict[int, float] = field(default_factory=dict)
    agreement: dict[int, AgreementScore] = field(default_factory=dict)
    fusing: dict[int, Fusing] = field(default_factory=dict)
    on_miss: OnMiss = "continue"
    quantile: float = 0.5
    check_layers: tuple[int, ...] | None = None
    lexical_exit: bool = False

    def __post_init__(self) -> None:
        # NumPy's numbers, as they come out of a sweep, become Python's: settings are written down.
        for name in ("speed", "quantile"):
            value = getattr(self, name)
            if not isinstance(value, Real):
                raise TypeError(f"{name} must be a number, got {value!r}.")
            object.__setattr__(self, name, float(value))
        object.__setattr__(self, "temperatures", {int(k): float(v) for k, v in self.temperatures.items()})
        if self.check_layers is not None:
            object.__setattr__(self, "check_layers", tuple(int(layer) for layer in self.check_layers))
        if not 0 <= self.speed <= 1:
            raise ValueError(f"speed must lie in [0, 1], got {self.speed}.")
        if not isinstance(self.lexical_exit, bool):
            raise TypeError(f"lexical_exit must be true or false, got {self.lexical_exit!r}.")
        if self.criterion not in (*CRITERIA, AGREEMENT):
            raise ValueError(f"Unknown criterion {self.criterion!r}; known: {sorted((*CRITERIA, AGREEMENT))}.")
        if self.on_miss not in ("stop", "continue"):
            raise ValueError(f"on_miss must be 'stop' or 'continue', got {self.on_miss!r}.")
        if not 0 < self.quantile < 1:
            raise ValueError(f"quantile must lie between 0 and 1, got {self.quantile}.")
        checks = self.check_layers
        if checks is not None and (list(checks) != sorted(set(checks)) or any(layer < 1 for layer in checks)):
            raise ValueError(f"check_layers must be layers from 1 up, in ascending order, got {checks}.")
        if any(not 0 < value < float("inf") for value in self.temperatures.values()):
            raise ValueError(f"temperatures must be positive and finite, got {self.temperatures}.")

    def temperature(self, depth: int) -> float:
        """Temperature at a depth; 1 where none was fitted."""
        return self.temperatures.get(depth, 1.0)

    def asked_layers(self, depths: tuple[int, ...]) -> Integers:
        """Return those of a model's depths at which texts are asked; the last, the full model, always is."""
        asked = depths if self.check_layers is None else (*self.check_layers, depths[-1])
        return np.asarray(asked, dtype=np.int64)

    def answered(self, logits: Tensor, depth: int, lexical: Tensor | None) -> Tensor:
        """What is answered at a depth: logits (..., num_labels), fused with the table's where these settings say so.

        Args:
            logits: Of the exit, or of the full model.
            depth: Layers run.
            lexical: The table's logits of the same texts; None where it was not asked, as at speed 0.
        """
        fusing = None if lexical is None or self.speed == 0 else self.fusing.get(depth)
        return logits if fusing is None or lexical is None else fusing(logits, lexical)

    @property
    def reads_table(self) -> bool:
        """Whether answers at the exits depend on what the table says of the label."""
        return self.criterion == AGREEMENT or bool(self.fusing)

    def uncertainty(self, logits: Tensor, depth: int, *, multi_label: bool, lexical: Tensor | None = None) -> Tensor:
        """Uncertainty of logits (num_texts, num_labels) of the exit at a depth, (num_texts,).

        Args:
            logits: Of an exit other than the full model, as `answered`.
            depth: Layers run; 0 is the lexical exit.
            multi_label: Whether several labels may hold at once.
            lexical: The table's logits of the same texts, where there are some; the criterion "agreement" reads them.
        """
        if self.criterion == AGREEMENT:
            guess = None if depth == 0 else lexical
            return self.agreement[depth].uncertainty(logits, guess, multi_label=multi_label)
        return uncertainty(logits, self.criterion, temperature=self.temperature(depth), multi_label=multi_label)

    def check(self, depths: tuple[int, ...], table_depths: tuple[int, ...] | None) -> None:
        """Check that a model with exits at `depths`, and a table that predicts `table_depths`, can run these settings.

        Raises:
            ValueError: If they need a table that is not there (None), name exits that are not, or need scores that
                were not learned.
        """
        unknown = sorted(set(self.check_layers or ()) - set(depths[:-1]))
        if unknown:
            raise ValueError(f"check_layers names layers {unknown}, the model has exits at {list(depths[:-1])}.")
        if self.criterion == AGREEMENT:
            missing = sorted(set(depths[:-1]) - set(self.agreement))
            missing += [0] if self.lexical_exit and 0 not in self.agreement else []
            if missing:
                raise ValueError(
                    f"The criterion {AGREEMENT!r} has no scores for the exits at layers {missing}; run `geep profile`."
                )
        needs = ["on_miss='stop'"] if self.on_miss == "stop" and self.speed > 0 else []
        needs += ["lexical_exit=True"] if self.lexical_exit else []
        needs += ["fusing"] if self.fusing and self.speed > 0 else []
        strange = sorted(set(self.fusing) - set(depths))
        if strange:
            raise ValueError(f"fusing names layers {strange}, the model has exits at {list(depths)}.")
        if table_depths is None and needs:
            raise ValueError(f"{' and '.join(needs)} needs an exit table, found none; run `geep profile` first.")
        if table_depths is not None and table_depths != depths:
            raise ValueError(
                f"The exit table predicts layers {list(table_depths)}, the model has exits at "
                f"{list(depths)}; run `geep profile` again for this model."
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain words and numbers, for a file; `from_dict` makes equal settings of them."""
        values = {spec.name: getattr(self, spec.name) for spec in fields(self)}
        values["temperatures"] = {str(depth): value for depth, value in self.temperatures.items()}
        for name in ("agreement", "fusing"):
            values[name] = {str(depth): astuple(weights) for depth, weights in values[name].items()}
        return values

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> ExitSettings:
        """Read what `to_dict` gave.

        Raises:
            ValueError: If it is no such thing.
        """
        try:
            scores, weights = found["agreement"].items(), found.get("fusing", {}).items()
            agreement = {int(depth): AgreementScore(*map(float, score)) for depth, score in scores}
            fusing = {int(depth): Fusing(*map(float, pair)) for depth, pair in weights}
            return cls(**{**found, "temperatures": found["temperatures"], "agreement": agreement, "fusing": fusing})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"The settings in calibration.json are damaged ({error}); run `geep calibrate` again, or delete it."
            ) from error

    @property
    def digest(self) -> str:
        """Digest of all of them, the speed included."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()
