"""When an exit's answer is certain enough: what the engine asks at every exit.

Read `CRITERIA` (logits to uncertainty), then `AgreementScore` (the learned one).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Flags = NDArray[np.bool_]

OnMiss = Literal["stop", "continue"]


def entropy(probabilities: Tensor) -> Tensor:
    """Entropy over its largest possible value (FastBERT's uncertainty): 0 for certain, 1 for uniform."""
    return torch.special.entr(probabilities).sum(-1) / math.log(max(probabilities.shape[-1], 2))


def confidence(probabilities: Tensor) -> Tensor:
    """One minus the largest probability, scaled so that the uniform distribution gives 1."""
    num_labels = max(probabilities.shape[-1], 2)
    return (1 - probabilities.amax(-1)) * (num_labels / (num_labels - 1))


def margin(probabilities: Tensor) -> Tensor:
    """One minus the gap between the two largest probabilities: 1 where they are equal."""
    top = probabilities.topk(2, dim=-1).values
    return 1 - (top[..., 0] - top[..., 1])


CRITERIA: dict[str, Callable[[Tensor], Tensor]] = {"entropy": entropy, "confidence": confidence, "margin": margin}


def uncertainty(logits: Tensor, criterion: str, *, temperature: float = 1.0, multi_label: bool = False) -> Tensor:
    """Turn logits (…, num_labels) into uncertainties (…,) in [0, 1].

    With several labels at once, each label is a two-way distribution and the least certain label decides.

    Raises:
        ValueError: If the criterion is not in `CRITERIA`.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"Unknown criterion {criterion!r}; known: {sorted(CRITERIA)}.")
    scaled = logits.float() / temperature
    if multi_label:
        on = torch.sigmoid(scaled)
        return CRITERIA[criterion](torch.stack([on, 1 - on], dim=-1)).amax(-1).clamp(0, 1)
    return CRITERIA[criterion](torch.softmax(scaled, dim=-1)).clamp(0, 1)


AGREEMENT = "agreement"
"""Name of the criterion that is learned (`AgreementScore`) and therefore no row of `CRITERIA`."""


# Margins beyond this say no more; the lexical logits of labels that no training text had are this far off.
_MARGIN_LIMIT = 12.0


@dataclass(frozen=True, slots=True)
class AgreementScore:
    """How likely an exit's answer is the full model's: logistic(bias + own * margin + table * lexical margin).

    The margin is what the exit's answer is ahead of its best rival by, in logits; the lexical margin is what the exit
    table's guess says of the same answer against its best rival, below 0 where the table would answer otherwise.
    Probabilities calibrated on labels (temperatures) answer another question: near the last layer an exit that is
    unsure of the label still agrees with the full model, so one threshold on them keeps texts far too long.

    Attributes:
        bias: Log-odds of agreement at margins of 0.
        own: Weight of the exit's margin.
        table: Weight of the lexical margin; 0 for the lexical exit itself.
    """

    bias: float
    own: float
    table: float

    def __post_init__(self) -> None:
        if not all(math.isfinite(value) for value in astuple(self)):
            raise ValueError(f"Weights of an agreement score must be finite, got {astuple(self)}.")

    def uncertainty(self, logits: Tensor, lexical: Tensor | None, *, multi_label: bool = False) -> Tensor:
        """Probability that the full model would answer otherwise, (num_texts,).

        Arguments as in `geep.exits.fit_agreement_score`.
        """
        own, table = margins(logits, lexical, multi_label=multi_label)
        return torch.sigmoid(-(self.bias + self.own * own + self.table * table))


def margins(logits: Tensor, lexical: Tensor | None, *, multi_label: bool) -> tuple[Tensor, Tensor]:
    """Margin of an exit's answer in its own logits and in the table's; 0 for the latter where there is no table."""
    logits = logits.float()
    if multi_label:
        # Each label is a two-way choice with the margin |logit|; the least certain one decides.
        own = logits.abs().amin(-1)
        table = own.new_zeros(own.shape) if lexical is None else torch.where(logits > 0, lexical, -lexical).amin(-1)
    else:
        top = logits.topk(2, dim=-1).values
        own = top[..., 0] - top[..., 1]
        table = own.new_zeros(own.shape)
        if lexical is not None:
            answer = logits.argmax(-1, keepdim=True)
            rivals = lexical.float().scatter(-1, answer, -torch.inf).amax(-1)
            table = lexical.gather(-1, answer)[..., 0] - rivals
    return own.clamp(max=_MARGIN_LIMIT), table.float().clamp(-_MARGIN_LIMIT, _MARGIN_LIMIT)


def probabilities_of(logits: Tensor, *, multi_label: bool) -> Tensor:
    """Probabilities of logits (…, num_labels): of one label out of all, or of each for itself for multi-label."""
    return torch.sigmoid(logits) if multi_label else torch.softmax(logits, dim=-1)


def same_answers(answers: Tensor, others: Tensor, *, multi_label: bool) -> Tensor:
    """Whether answers, as `answer_of` gives them, are the same as others: all labels of a text, for multi-label."""
    return (answers == others).all(-1) if multi_label else answers == others


def answer_of(logits: Tensor, *, multi_label: bool) -> Tensor:
    """The answer that logits (…, num_labels) stand for: a label id (…,), or flags (…, num_labels) for multi-label."""
    return logits > 0 if multi_label else logits.argmax(-1)
