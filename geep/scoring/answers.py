"""What is asked of an engine, and its answers to rows as the columns that a result adds.

Columns become Python's values, or Arrow's arrays, all at once; no record is made of a text. Where they are written to
is not known here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from geep.data.rows import Row
from geep.promise import Traffic


class ScoredColumns(Protocol):
    """What is read off an engine's answers: columns with one row a text."""

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the labels, by id."""

    @property
    def multi_label(self) -> bool:
        """Whether several labels may hold at once."""

    @property
    def probabilities(self) -> NDArray[np.floating[Any]]:
        """Probability of every label, (num_texts, num_labels); read only where all scores are asked for."""

    @property
    def label_ids(self) -> NDArray[np.integer[Any]]:
        """Most likely label, (num_texts,)."""

    @property
    def scores(self) -> NDArray[np.floating[Any]]:
        """Probability of the most likely label, (num_texts,)."""

    @property
    def label_flags(self) -> NDArray[np.bool_]:
        """Which labels hold, (num_texts, num_labels); read only where several may."""

    @property
    def exit_layers(self) -> NDArray[np.integer[Any]]:
        """Encoder layers that were run, (num_texts,)."""

    @property
    def predicted_layers(self) -> NDArray[np.integer[Any]] | None:
        """Layer at which each text was to be asked first, (num_texts,); None where nothing was predicted."""

    @property
    def truncated(self) -> NDArray[np.bool_]:
        """Whether the text was longer than the model reads, (num_texts,)."""

    @property
    def unknown_shares(self) -> NDArray[np.floating[Any]] | None:
        """Share of a text's tokens that the exit table has never seen, (num_texts,); None where there is no table."""

    @property
    def is_finite(self) -> NDArray[np.bool_]:
        """Whether the model gave the text finite logits, (num_texts,); where not, there is no answer."""


class Scorer(Protocol):
    """Anything that predicts: an engine, or a stand-in."""

    @property
    def answered_by(self) -> Mapping[str, object]:
        """All that answers depend on beside the texts, as values that JSON has."""

    def predict_columns(
        self,
        texts: list[str] | list[tuple[str, str]],
        /,
        *,
        top_k: int | None = ...,
        threshold: float = ...,
        keep_broken: bool = ...,
    ) -> ScoredColumns:
        """Return one row a text, in the order of the texts; for no texts, no rows of the same labels.

        With `keep_broken`, a text whose logits are not finite raises nothing and has a row too (`is_finite`).

        Raises:
            ValueError: If `top_k` or `threshold` is out of range, even for no texts.
        """


@dataclass(frozen=True)
class Answers:
    """Answers to rows, in the order of the rows.

    Attributes:
        label_names: Names of the labels, by id.
        label_ids: Most likely label of each row.
        best: Its probability.
        exit_layers: Encoder layers that were run.
        predicted_layers: Exit layer predicted before the run, None where none was.
        truncated: Whether the text was longer than the model reads.
        is_finite: Whether there is an answer at all.
        unknown_shares: Share of a text's tokens that the exit table has never seen, (num_rows,); None without a table.
        flags: Which labels hold, (num_rows, num_labels); None where only one can.
        probabilities: Of every label, (num_rows, num_labels); None where they are not asked for.
        top_k: How many of them each row shows, most likely first; None: all, in the model's order.
    """

    label_names: tuple[str, ...]
    label_ids: list[int]
    best: list[float]
    exit_layers: list[int]
    predicted_layers: list[int | None]
    truncated: list[bool]
    is_finite: list[bool]
    unknown_shares: NDArray[np.floating[Any]] | None
    flags: NDArray[np.bool_] | None
    probabilities: NDArray[np.floating[Any]] | None
    top_k: int | None

    @classmethod
    def of(cls, columns: ScoredColumns, *, scores: bool, top_k: int | None) -> Answers:
        """Take the columns of an engine's answers."""
        predicted = columns.predicted_layers
        return cls(
            label_names=tuple(columns.label_names),
            label_ids=columns.label_ids.tolist(),
            best=columns.scores.tolist(),
            exit_layers=columns.exit_layers.tolist(),
            predicted_layers=[None] * len(columns.exit_layers) if predicted is None else predicted.tolist(),
            truncated=columns.truncated.tolist(),
            is_finite=columns.is_finite.tolist(),
            unknown_shares=columns.unknown_shares,
            flags=columns.label_flags if columns.multi_label else None,
            probabilities=columns.probabilities if scores else None,
            top_k=top_k,
        )

    @classmethod
    def mixed(cls, parts: Sequence[Answers], order: Sequence[int]) -> Answers:
        """Join parts and take their rows in an order."""

        def taken(columns: Iterable[list[Any]]) -> list[Any]:
            values = list(chain.from_iterable(columns))
            return [values[index] for index in order]

        def joined(columns: Iterable[NDArray[Any] | None]) -> NDArray[Any] | None:
            known = [column for column in columns if column is not None]
            return np.concatenate(known)[list(order)] if known else None

        return replace(
            parts[0],
            label_ids=taken(part.label_ids for part in parts),
            best=taken(part.best for part in parts),
            exit_layers=taken(part.exit_layers for part in parts),
            predicted_layers=taken(part.predicted_layers for part in parts),
            truncated=taken(part.truncated for part in parts),
            is_finite=taken(part.is_finite for part in parts),
            unknown_shares=joined(part.unknown_shares for part in parts),
            flags=joined(part.flags for part in parts),
            probabilities=joined(part.probabilities for part in parts),
        )

    def __len__(self) -> int:
        return len(self.exit_layers)

    @property
    def traffic(self) -> Traffic:
        """What the rows looked like to the engine."""
        return Traffic.of(np.array(self.exit_layers, dtype=np.int64), self.unknown_shares)

    def values(self) -> dict[str, list[Any]]:
        """Columns by their names, in the order of the result, as values that JSON has."""
        columns: dict[str, list[Any]] = {
            "label": [self.label_names[index] for index in self.label_ids],
            "score": self.best,
        }
        if self.flags is not None:
            columns["labels"] = self._held(self.flags)
        columns["exit_layer"] = self.exit_layers
        columns["predicted_layer"] = self.predicted_layers
        columns["truncated"] = self.truncated
        if self.probabilities is not None:
            columns["scores"] = self._scores(self.probabilities)
        return columns

    def arrays(self) -> dict[str, pa.Array]:
        """The same columns as typed arrays; their types are the same whatever the rows, and without any."""
        names = pa.array(self.label_names, type=pa.string())
        columns = {
            "label": names.take(pa.array(self.label_ids, type=pa.int64())),
            "score": pa.array(self.best, type=pa.float64()),
        }
        if self.flags is not None:
            ends = np.cumsum(self.flags.sum(axis=1))
            held = names.take(pa.array(self.flags.nonzero()[1]))
            columns["labels"] = pa.ListArray.from_arrays(pa.array([0, *ends.tolist()], type=pa.int32()), held)
        columns["exit_layer"] = pa.array(self.exit_layers, type=pa.int32())
        columns["predicted_layer"] = pa.array(self.predicted_layers, type=pa.int32())
        columns["truncated"] = pa.array(self.truncated, type=pa.bool_())
        if self.probabilities is not None:
            columns["scores"] = self._struct(self.probabilities)
        return columns

    def _held(self, flags: NDArray[np.bool_]) -> list[list[str]]:
        """Names of the labels that hold, in the model's order."""
        held = [self.label_names[index] for index in flags.nonzero()[1].tolist()]
        ends = np.cumsum(flags.sum(axis=1)).tolist()
        return [held[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def _scores(self, probabilities: NDArray[np.floating[Any]]) -> list[dict[str, float]]:
        names = self.label_names
        if self.top_k is None:
            return [dict(zip(names, row, strict=True)) for row in probabilities.tolist()]
        top = self._top(probabilities, self.top_k)
        shown = np.take_along_axis(probabilities, top, axis=1).tolist()
        return [
            {names[index]: value for index, value in zip(indices, row, strict=True)}
            for indices, row in zip(top.tolist(), shown, strict=True)
        ]

    def _struct(self, probabilities: NDArray[np.floating[Any]]) -> pa.StructArray:
        table = probabilities.astype(np.float64).T
        fields = [pa.array(column) for column in table]
        if self.top_k is not None:
            hidden = np.ones(probabilities.shape, dtype=bool)
            np.put_along_axis(hidden, self._top(probabilities, self.top_k), values=False, axis=1)
            fields = [pa.array(column, mask=mask) for column, mask in zip(table, hidden.T, strict=True)]
        return pa.StructArray.from_arrays(fields, names=list(self.label_names))

    @staticmethod
    def _top(probabilities: NDArray[np.floating[Any]], count: int) -> NDArray[np.integer[Any]]:
        """The most likely labels of each row, (num_rows, count or fewer); equally likely ones in the model's order."""
        return np.argsort(-probabilities, axis=1, kind="stable")[:, :count]


@dataclass(frozen=True)
class Question:
    """An engine, and how it is asked.

    Attributes:
        engine: What predicts.
        scores: Whether the scores of labels are asked for.
        top_k: Of how many labels, most likely first; None: of all.
        threshold: Probability from which a label of a multi-label model holds; None: the engine's default.
    """

    engine: Scorer
    scores: bool
    top_k: int | None
    threshold: float | None

    def about(self, rows: Sequence[Row]) -> Answers:
        """Ask about rows, or about none; rows with and without a second text go in calls of their own."""
        is_pair = [row.text_pair is not None for row in rows]
        if not any(is_pair):
            return self._ask([row.text for row in rows])
        pairs = [(row.text, row.text_pair) for row in rows if row.text_pair is not None]
        if all(is_pair):
            return self._ask(pairs)
        singles = [row.text for row in rows if row.text_pair is None]
        parts = [self._ask(singles), self._ask(pairs)]
        next_single, next_pair = iter(range(len(singles))), iter(range(len(singles), len(rows)))
        return Answers.mixed(parts, [next(next_pair if paired else next_single) for paired in is_pair])

    def _ask(self, texts: list[str] | list[tuple[str, str]]) -> Answers:
        if self.threshold is None:
            columns = self.engine.predict_columns(texts, top_k=self.top_k, keep_broken=True)
        else:
            columns = self.engine.predict_columns(texts, top_k=self.top_k, threshold=self.threshold, keep_broken=True)
        answers = Answers.of(columns, scores=self.scores, top_k=self.top_k)
        if len(answers) != len(texts):
            raise RuntimeError(f"The engine gave {len(answers)} predictions for {len(texts)} texts; expected as many.")
        return answers
