"""Temperatures and agreement scores, from logits of texts that the model was not trained on."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional as F

from geep.exits.criteria import AgreementScore, margins
from geep.exits.fusing import Fusing, limited

Flags = NDArray[np.bool_]


def fit_temperature(logits: Tensor, labels: Tensor, *, multi_label: bool = False) -> float:
    """Temperature that minimises the log-loss of logits (num_texts, num_labels) on labels (Guo et al. 2017).

    Labels are ids (num_texts,), or for several labels zeros and ones (num_texts, num_labels); or a teacher's
    probabilities (num_texts, num_labels), which a student then gives as nearly as a temperature can.

    Labels are trusted a little less than wholly, as if each label had been given to two further texts together (the
    rule of succession): where all of a few answers are right, the loss alone would be the less, the surer the scores.

    The loss is convex in the inverse temperature, so a golden-section search over [1/20, 20] finds the one minimum.
    """
    logits = logits.float()
    doubt = _doubt(logits, labels, multi_label=multi_label)
    if multi_label:
        target = labels.float() * (1 - doubt) + doubt / 2

    def loss(inverse: float) -> float:
        if multi_label:
            return float(F.binary_cross_entropy_with_logits(logits * inverse, target))
        return float(F.cross_entropy(logits * inverse, labels, label_smoothing=doubt))

    low, high = 1 / 20, 20.0
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(60):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if loss(left) <= loss(right):
            high = right
        else:
            low = left
    return 2 / (low + high)


def _doubt(logits: Tensor, labels: Tensor, *, multi_label: bool) -> float:
    """How little labels are trusted; a teacher's probabilities are, as they stand."""
    is_teacher = labels.ndim == logits.ndim and not (multi_label and bool(((labels == 0) | (labels == 1)).all()))
    return 0.0 if is_teacher else 2 / (len(logits) + 2)


def fit_fusing(logits: Tensor, lexical: Tensor, labels: Tensor, *, multi_label: bool = False) -> Fusing:
    """Weights of an exit's logits and the table's that minimise the log-loss of their sum on held-out texts.

    The loss is convex in the two weights. Where the table is of no use, or says the contrary, its weight is 0 and the
    other an inverse temperature.

    Args:
        logits: Of the exit, (num_texts, num_labels).
        lexical: The table's logits of the same texts, which it was not made from.
        labels: As in `fit_temperature`: ids, flags, or a teacher's probabilities.
        multi_label: Whether several labels may hold at once.
    """
    own, table = logits.double(), limited(lexical).double()
    doubt = _doubt(logits, labels, multi_label=multi_label)
    target = labels.double() * (1 - doubt) + doubt / 2 if multi_label else labels
    target = target.double() if target.is_floating_point() else target
    weights = torch.tensor([1.0, 0.1], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([weights], max_iter=60, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        found = weights[0] * own + weights[1] * table
        if multi_label:
            loss = F.binary_cross_entropy_with_logits(found, target)
        else:
            loss = F.cross_entropy(found, target, label_smoothing=doubt)
        loss.backward()
        return loss

    with torch.enable_grad():
        optimiser.step(closure)
    first, second = weights.tolist()
    if not (1 / 20 <= first <= 20 and 0 <= second <= 20):
        return Fusing(1 / fit_temperature(logits, labels, multi_label=multi_label), 0.0)
    return Fusing(first, second)


# scikit-learn's C on standardised margins: exits near the top disagree on a handful of texts only.
_INVERSE_PENALTY = 0.3


def fit_agreement_score(
    logits: Tensor, lexical: Tensor | None, agrees: Flags, *, multi_label: bool = False
) -> AgreementScore:
    """Fit the weights of an agreement score on texts that the model was not trained on.

    Args:
        logits: Of the exit, (num_texts, num_labels).
        lexical: The table's logits of the same texts; None where there is no table or the exit is the table.
        agrees: Whether the exit's answer is the full model's, (num_texts,).
        multi_label: Whether several labels may hold at once.
    """
    features = torch.stack(margins(logits, lexical, multi_label=multi_label), dim=-1).double().numpy()
    differing = int((~agrees).sum())
    if differing in (0, len(agrees)):
        # Nothing to tell apart: the smoothed share, whatever the margins.
        return AgreementScore(math.log((len(agrees) - differing + 1) / (differing + 1)), 0.0, 0.0)
    mean, scale = features.mean(0), features.std(0)
    scale[scale == 0] = 1.0
    model = LogisticRegression(C=_INVERSE_PENALTY).fit((features - mean) / scale, agrees)
    weights = model.coef_[0] / scale
    return AgreementScore(float(model.intercept_[0] - weights @ mean), float(weights[0]), float(weights[1]))
