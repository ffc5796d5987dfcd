"""What was certified, of what, on what: one object. How it is found is not known here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from geep.promise import Promise, Traffic


@dataclass(frozen=True, slots=True)
class Certificate:
    """A promise that an engine keeps, and everything that it is bound to.

    Invariant: it speaks of one engine: one with other weights, another tokenizer, table, speed or setting, in another
    dtype, on another backend or with longer texts answers otherwise, and nothing is promised of it. Weights and table
    may not be changed in place. What is promised is the most likely label, or where a text may have several, the labels
    from 0.5 on: a call with another speed or threshold is not covered.

    Attributes:
        promise: What is kept, at which confidence.
        reference: Dtype of the full model that the engine was compared with.
        risk: What was lost on the texts that certified.
        bound: Upper bound on what is lost, at the promise's confidence. 0 where the engine is the reference itself.
        num_texts: Texts that certified it; nothing was fitted or chosen on them.
        texts: Digest of these texts and their labels.
        texts_from: In words, where they came from.
        made_with: All that answers depend on: `Engine.made_with` of the engine that was certified.
        labels_from: In words, how many labels were given one by one, and by whom; empty where every text came with
            its own, or none was needed.
        traffic: What these texts looked like to the engine, which tells whether others are like them (`geep.Drift`);
            None in folders of older versions.
    """

    promise: Promise
    reference: str
    risk: float
    bound: float
    num_texts: int
    texts: str
    texts_from: str
    made_with: Mapping[str, Any]
    labels_from: str = ""
    traffic: Traffic | None = None

    def differences(self, made_with: Mapping[str, Any]) -> list[str]:
        """In words, what is otherwise with an engine made of these; nothing: the certificate speaks of it."""
        mine = self.made_with
        found = []
        for name in sorted({*mine, *made_with}):
            then, now = mine.get(name), made_with.get(name)
            if then != now:
                is_digest = name in ("model", "tokenizer", "table", "ranges", "settings")
                found.append(f"other {name}" if is_digest else f"{name} {now} in place of {then}")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain words and numbers, for a file."""
        return {**asdict(self), "traffic": None if self.traffic is None else self.traffic.to_dict()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Certificate:
        """Read what `to_dict` gave.

        Raises:
            ValueError: If it is no such thing.
        """
        try:
            traffic = fields.get("traffic")
            read = {
                "promise": Promise(**fields["promise"]),
                "made_with": dict(fields["made_with"]),
                "traffic": None if traffic is None else Traffic.from_dict(traffic),
            }
            found = cls(**{**fields, **read})
            for name in ("risk", "bound", "num_texts"):
                if not isinstance(getattr(found, name), int | float):
                    raise TypeError(f"{name} is {getattr(found, name)!r}, expected a number")
            return found
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"The certificate in calibration.json is damaged ({error}); run `geep calibrate` again."
            ) from error
