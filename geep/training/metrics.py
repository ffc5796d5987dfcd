"""How good the full model is on rows that it does not learn from, beside what the most frequent label alone gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class DevMetrics:
    """The full model on the development rows, at the epoch whose weights were kept.

    Attributes:
        num_rows: Rows judged.
        accuracy: Share answered right; where a row has several labels, with exactly its labels.
        macro_f1: Mean F1 over the labels that were there or were answered.
        micro_f1: F1 over all answers together where a row has several labels; None otherwise, as it is the accuracy.
        majority: What always answering the most frequent label gives: accuracy, or micro F1 for several labels.
        num_answers: Different answers given.
        best_epoch: Epochs trained when the weights were kept.
    """

    num_rows: int
    accuracy: float
    macro_f1: float
    micro_f1: float | None
    majority: float
    num_answers: int
    best_epoch: float

    @property
    def score(self) -> float:
        """What the best epoch is chosen by: accuracy, or micro F1 where a row has several labels."""
        return self.accuracy if self.micro_f1 is None else self.micro_f1

    @property
    def learned_nothing(self) -> str | None:
        """That the model has learned nothing, in a sentence; None where it has."""
        measure = "accuracy" if self.micro_f1 is None else "micro F1"
        if self.num_answers == 1:
            found = f"it gives all {self.num_rows} development rows the same answer"
        elif self.score <= self.majority:
            found = (
                f"its {measure} on {self.num_rows} development rows is {self.score:.3f}, and that of always answering "
                f"the most frequent label {self.majority:.3f}"
            )
        else:
            return None
        return (
            f"The model has learned nothing: {found}. Look at the labels and at how many rows there are of each, then "
            "train for more epochs or at another learning rate."
        )


def judge(answers: NDArray[Any], truth: NDArray[Any]) -> dict[str, float]:
    """Compare answers with labels.

    Args:
        answers: Label ids (num_rows,), or ones and zeros (num_rows, num_labels).
        truth: The labels in the same shape.

    Returns:
        The numbers of `DevMetrics`, but for the epoch; no micro F1 for one label a row.
    """
    several = truth.ndim == 2
    truth, answers = truth.astype(np.int64), answers.astype(np.int64)
    num_rows = len(truth)
    if several:
        right = (truth == answers).all(axis=1)
        hit, given, there = (truth & answers).sum(0), answers.sum(0), truth.sum(0)
    else:
        size = int(max(truth.max(), answers.max())) + 1
        right = truth == answers
        hit, given, there = (np.bincount(ids, minlength=size) for ids in (truth[right], answers, truth))
    found = given + there > 0
    f1 = 2 * hit[found] / (given + there)[found]
    measures = {
        "num_rows": float(num_rows),
        "accuracy": float(right.mean()),
        "macro_f1": float(f1.mean()) if len(f1) else 0.0,
        "num_answers": float(len(np.unique(answers, axis=0))),
        "majority": float(there.max() / num_rows),
    }
    if several:
        measures["micro_f1"] = float(2 * hit.sum() / max(given.sum() + there.sum(), 1))
        measures["majority"] = float(2 * there.max() / (num_rows + there.sum()))
    return measures


def metrics_of(entry: Mapping[str, Any]) -> DevMetrics:
    """Make a record of an entry of the Trainer's log, where the measures of `judge` stand with `eval_` before them."""
    micro = entry.get("eval_micro_f1")
    return DevMetrics(
        num_rows=int(entry["eval_num_rows"]),
        accuracy=float(entry["eval_accuracy"]),
        macro_f1=float(entry["eval_macro_f1"]),
        micro_f1=None if micro is None else float(micro),
        majority=float(entry["eval_majority"]),
        num_answers=int(entry["eval_num_answers"]),
        best_epoch=round(float(entry["epoch"]), 4),
    )
