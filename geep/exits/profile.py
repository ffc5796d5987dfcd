"""What every exit would answer on texts, and which of them would have answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from geep.exits.criteria import AGREEMENT, AgreementScore, OnMiss, answer_of, same_answers, uncertainty

Flags = NDArray[np.bool_]
Floats = NDArray[np.float32]
Integers = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ExitProfile:
    """What every exit would answer on texts, and how sure it would be.

    The last column is all layers as deployed. Column 0 may be the lexical exit, at depth 0. The full model, which
    promises are about, is the last column too, or, for a quantised engine, the model that was quantised.

    Attributes:
        depths: Encoder layers run at each column, ascending, (num_depths,).
        uncertainty: Uncertainty in [0, 1], (num_texts, num_depths).
        agrees: Whether the answer equals the full model's, (num_texts, num_depths).
        correct: Whether the answer equals the label, (num_texts, num_depths); None without labels.
        full_correct: Whether the full model's answer equals the label, (num_texts,); None without labels, or where
            the full model is the last column.
    """

    depths: tuple[int, ...]
    uncertainty: Floats
    agrees: Flags
    correct: Flags | None
    full_correct: Flags | None = None

    def __len__(self) -> int:
        return len(self.uncertainty)

    @property
    def reference_correct(self) -> Flags | None:
        """Whether the full model's answer equals the label, (num_texts,); None without labels."""
        if self.full_correct is not None or self.correct is None:
            return self.full_correct
        return self.correct[:, -1]

    def exit_indices(self, speed: float) -> Integers:
        """Column of the first exit with an uncertainty below `speed`, else of the full model, (num_texts,)."""
        return follow(self, np.zeros(len(self), dtype=np.int64), speed=speed, on_miss="continue")

    def exit_layers(self, speed: float) -> Integers:
        """Encoder layers each text runs until the first exit below `speed` (FastBERT's rule), (num_texts,)."""
        return np.asarray(self.depths, dtype=np.int64)[self.exit_indices(speed)]

    def select(self, rows: Integers) -> ExitProfile:
        """Return the profile of some texts."""
        return ExitProfile(
            self.depths,
            self.uncertainty[rows],
            self.agrees[rows],
            None if self.correct is None else self.correct[rows],
            None if self.full_correct is None else self.full_correct[rows],
        )

    def from_depth(self, depth: int) -> ExitProfile:
        """Return the profile of the exits at `depth` and deeper."""
        first = next(i for i, d in enumerate(self.depths) if d >= depth)
        return ExitProfile(
            self.depths[first:],
            self.uncertainty[:, first:],
            self.agrees[:, first:],
            None if self.correct is None else self.correct[:, first:],
            self.full_correct,
        )


def profile_exits(
    exit_logits: Tensor,
    depths: Sequence[int],
    *,
    criterion: str = "entropy",
    temperatures: Sequence[float] | None = None,
    agreement: Sequence[AgreementScore] | None = None,
    labels: Tensor | None = None,
    reference: Tensor | None = None,
    multi_label: bool = False,
) -> ExitProfile:
    """Describe texts by the logits of all their exits.

    Profile texts that the model was not trained on: exits are over-confident on training texts (docs/method.md).

    Args:
        exit_logits: Logits of every exit, the full model last, (num_depths, num_texts, num_labels).
        depths: Encoder layers run at each, ascending; 0 is the lexical exit.
        criterion: Row of `CRITERIA`, or "agreement".
        temperatures: One for each depth; None: 1.
        agreement: Scores of all depths but the last, for the criterion "agreement", which takes no temperatures.
        labels: Label ids (num_texts,), or 0/1 (num_texts, num_labels) for multi-label; None where unknown.
        reference: Logits of the full model (num_texts, num_labels), where it is not the last exit.
        multi_label: Whether several labels may hold at once.

    Raises:
        ValueError: If the shapes do not fit.
    """
    if len(depths) != len(exit_logits):
        raise ValueError(f"Got logits of {len(exit_logits)} exits and {len(depths)} depths; they must be as many.")
    if criterion == AGREEMENT:
        unsure = _disagreement(exit_logits, depths, agreement or (), multi_label=multi_label)
    else:
        scales = [1.0] * len(depths) if temperatures is None else list(temperatures)
        unsure = torch.stack(
            [
                uncertainty(logits, criterion, temperature=t, multi_label=multi_label)
                for logits, t in zip(exit_logits, scales, strict=True)
            ],
            dim=1,
        )
    answers = answer_of(exit_logits, multi_label=multi_label)  # (num_depths, num_texts[, num_labels])
    full = answers[-1] if reference is None else answer_of(reference, multi_label=multi_label)

    right = full_right = None
    if labels is not None:
        truth = labels.bool() if multi_label else labels
        right = same_answers(answers, truth, multi_label=multi_label).T.numpy()
        full_right = None if reference is None else same_answers(full, truth, multi_label=multi_label).numpy()
    agrees = same_answers(answers, full, multi_label=multi_label).T.numpy()
    return ExitProfile(tuple(depths), unsure.float().numpy(), agrees, right, full_right)


def _disagreement(
    exit_logits: Tensor, depths: Sequence[int], scores: Sequence[AgreementScore], *, multi_label: bool
) -> Tensor:
    """Uncertainty by the learned criterion, (num_texts, num_depths); the full model agrees with itself."""
    if len(scores) != len(depths) - 1:
        raise ValueError(f"Got {len(scores)} agreement scores for {len(depths)} depths; all but the last need one.")
    lexical = exit_logits[0] if depths[0] == 0 else None
    columns = [
        score.uncertainty(logits, None if depth == 0 else lexical, multi_label=multi_label)
        for score, logits, depth in zip(scores, exit_logits, depths, strict=False)
    ]
    return torch.stack([*columns, torch.zeros(exit_logits.shape[1])], dim=1)


def follow(profile: ExitProfile, predicted: Integers, *, speed: float, on_miss: OnMiss) -> Integers:
    """Column at which each text is answered, given the column predicted for it: the engine's rule on a profile.

    "stop": the predicted exit answers. "continue": the predicted exit and all deeper ones are asked in turn, and the
    first with an uncertainty below `speed` answers; the full model answers whatever its uncertainty.

    Args:
        profile: Profile of the texts.
        predicted: Predicted column of each text, (num_texts,).
        speed: Threshold in [0, 1]; 0 is the full model under "continue".
        on_miss: What happens where the answer at the predicted exit is not certain enough.
    """
    if on_miss == "stop":
        return predicted
    sure = profile.uncertainty < speed
    sure[:, -1] = True
    sure &= np.arange(len(profile.depths)) >= predicted[:, None]
    return sure.argmax(1)
