"""Answers: columns of many, and the record of one. How they came about is not known here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar, overload

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from geep.exits import probabilities_of
from geep.promise import Traffic

Integers = NDArray[np.int64]
Floats = NDArray[np.float32]
Flags = NDArray[np.bool_]
Number = TypeVar("Number", bound=np.generic)


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer to one text.

    Attributes:
        label: Name of the most likely label.
        score: Its probability.
        scores: Probability of every label, in the model's order, or of the `top_k` most likely, most likely first;
            for multi-label models each on its own.
        labels: Names of the labels that hold: the most likely one; for multi-label models all with a probability of at
            least the threshold, which may be none.
        exit_layer: Encoder layers that were run; 0: the table alone answered.
        predicted_layer: Layer at which the engine meant to ask first; None where nothing was predicted.
        truncated: Whether the text was cut at the longest length.
    """

    label: str
    score: float
    scores: dict[str, float]
    labels: tuple[str, ...]
    exit_layer: int
    predicted_layer: int | None
    truncated: bool


@dataclass(frozen=True, eq=False)
class Predictions(Sequence[Prediction]):
    """Answers to many texts as columns, one row a text, in the caller's order: arrays instead of a record for each.

    Indexing and iterating give `Prediction` records, made when they are asked for.

    Attributes:
        label_names: Names of the labels, by id.
        probabilities: float32, (num_texts, num_labels); for multi-label models each on its own.
        exit_layers: Encoder layers that were run, int64, (num_texts,).
        predicted_layers: Layer at which each text was to be asked first, int64, (num_texts,); None where nothing was
            predicted.
        truncated: Whether the text was cut, (num_texts,).
        unknown_shares: Share of a text's tokens that the exit table has never seen, float32, (num_texts,); None where
            there is no table.
        multi_label: Whether several labels may hold at once.
        threshold: Probability from which a label holds, for multi-label models.
        top_k: Labels in a record's `scores`; None: all.
    """

    label_names: tuple[str, ...]
    probabilities: Floats
    exit_layers: Integers
    predicted_layers: Integers | None
    truncated: Flags
    unknown_shares: Floats | None = None
    multi_label: bool = False
    threshold: float = 0.5
    top_k: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must lie in [0, 1], got {self.threshold}; 0.5 is usual.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}; leave it out for all labels.")

    @classmethod
    def of_logits(cls, logits: Tensor, *, multi_label: bool, **columns: object) -> Predictions:
        """Make the columns of logits (num_texts, num_labels)."""
        probabilities = probabilities_of(logits, multi_label=multi_label)
        return cls(probabilities=probabilities.numpy(), multi_label=multi_label, **columns)  # type: ignore[arg-type]

    @classmethod
    def join(cls, parts: Sequence[Predictions]) -> Predictions:
        """Put the answers of several parts of the same run, at least one, behind one another."""
        first = parts[0]
        if len(parts) == 1:
            return first
        return cls(
            first.label_names,
            np.concatenate([part.probabilities for part in parts]),
            np.concatenate([part.exit_layers for part in parts]),
            _joined([part.predicted_layers for part in parts]),
            np.concatenate([part.truncated for part in parts]),
            _joined([part.unknown_shares for part in parts]),
            first.multi_label,
            first.threshold,
            first.top_k,
        )

    @property
    def traffic(self) -> Traffic:
        """What the texts looked like to the engine, to be compared with those that certified (`geep.Drift`)."""
        return Traffic.of(self.exit_layers, self.unknown_shares)

    @cached_property
    def label_ids(self) -> Integers:
        """Most likely label, (num_texts,)."""
        return self.probabilities.argmax(-1).astype(np.int64)

    @property
    def is_finite(self) -> Flags:
        """Whether there is an answer, (num_texts,): False where logits were not finite and the text was kept."""
        return np.asarray(np.isfinite(self.probabilities).all(axis=1))

    @property
    def labels(self) -> NDArray[np.object_]:
        """Name of the most likely label, (num_texts,): one string for each label, however many texts have it."""
        return np.array(self.label_names, dtype=object)[self.label_ids]

    @property
    def scores(self) -> Floats:
        """Probability of the most likely label, (num_texts,)."""
        return np.take_along_axis(self.probabilities, self.label_ids[:, None], axis=1)[:, 0]

    @property
    def label_flags(self) -> Flags:
        """Which labels hold, (num_texts, num_labels): the most likely one, or all from the threshold on."""
        if self.multi_label:
            return self.probabilities >= self.threshold
        return np.arange(len(self.label_names)) == self.label_ids[:, None]

    def __len__(self) -> int:
        return len(self.probabilities)

    @overload
    def __getitem__(self, index: int) -> Prediction: ...

    @overload
    def __getitem__(self, index: slice) -> list[Prediction]: ...

    def __getitem__(self, index: int | slice) -> Prediction | list[Prediction]:
        """Return the record of a text, or those of a slice of the texts."""
        if isinstance(index, slice):
            return list(self._records(index))
        row = range(len(self))[index]
        return next(self._records(slice(row, row + 1)))

    def __iter__(self) -> Iterator[Prediction]:
        return self._records(slice(None))

    def _records(self, rows: slice) -> Iterator[Prediction]:
        """Make records of some rows; the columns become Python's numbers all at once."""
        names = self.label_names
        exit_layers, truncated = self.exit_layers[rows].tolist(), self.truncated[rows].tolist()
        predicted: list[int | None] = [None] * len(exit_layers)
        if self.predicted_layers is not None:
            predicted = self.predicted_layers[rows].tolist()
        best, table = self.label_ids[rows].tolist(), self.probabilities[rows].tolist()
        # Stable, so that equally likely labels keep the model's order, which is also that of `label_ids`.
        orders = None
        if self.top_k is not None:
            orders = np.argsort(-self.probabilities[rows], axis=1, kind="stable")[:, : self.top_k].tolist()
        flags = self.label_flags[rows].tolist() if self.multi_label else None
        for number, (label, row) in enumerate(zip(best, table, strict=True)):
            labels: tuple[str, ...] = (names[label],)
            if flags is not None:
                labels = tuple(name for name, holds in zip(names, flags[number], strict=True) if holds)
            if orders is None:
                scores = dict(zip(names, row, strict=True))
            else:
                scores = {names[each]: row[each] for each in orders[number]}
            yield Prediction(
                label=names[label],
                score=row[label],
                scores=scores,
                labels=labels,
                exit_layer=exit_layers[number],
                predicted_layer=predicted[number],
                truncated=truncated[number],
            )


def _joined(columns: Sequence[NDArray[Number] | None]) -> NDArray[Number] | None:
    """A column of all parts of a run, which has it for all of them or for none."""
    known = [column for column in columns if column is not None]
    return np.concatenate(known) if known else None
