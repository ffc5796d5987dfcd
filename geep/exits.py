"""When an exit's answer is certain enough: criteria, profiles of what every exit would say, and calibrated promises.

Read in this order: `CRITERIA` (logits -> uncertainty), `AgreementScore` (the learned one), `ExitProfile` (texts x
exits), `follow` (which exit answers), `calibrate` (which threshold keeps a promise). All of it is arithmetic on logits
that were computed elsewhere; the room knows nothing of batches, tokens or backends.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import beta, binom
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional as F

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]
OnMiss = Literal["stop", "continue"]

# --------------------------------------------------------------------------------------------------------------------
# Criteria
# --------------------------------------------------------------------------------------------------------------------


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


def fit_temperature(logits: Tensor, labels: Tensor, *, multi_label: bool = False) -> float:
    """Temperature that minimises the log-loss of logits (num_texts, num_labels) on labels (Guo et al. 2017).

    The loss is convex in the inverse temperature, so a golden-section search over [1/20, 20] finds the one minimum.
    """
    logits = logits.float()

    def loss(inverse: float) -> float:
        if multi_label:
            return float(F.binary_cross_entropy_with_logits(logits * inverse, labels.float()))
        return float(F.cross_entropy(logits * inverse, labels))

    low, high = 1 / 20, 20.0
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(60):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if loss(left) <= loss(right):
            high = right
        else:
            low = left
    return 2 / (low + high)


AGREEMENT = "agreement"
"""Name of the criterion that is learned (`AgreementScore`) and therefore no row of `CRITERIA`."""

# Margins beyond this say no more; the lexical logits of labels that no training text had are this far off.
_MARGIN_LIMIT = 12.0

# scikit-learn's C on standardised margins: exits near the top disagree on a handful of texts only.
_INVERSE_PENALTY = 0.3


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

    @classmethod
    def fit(cls, logits: Tensor, lexical: Tensor | None, agrees: Flags, *, multi_label: bool = False) -> AgreementScore:
        """Fit the weights on texts that the model was not trained on.

        Args:
            logits: Of the exit, (num_texts, num_labels).
            lexical: The table's logits of the same texts; None where there is no table or the exit is the table.
            agrees: Whether the exit's answer is the full model's, (num_texts,).
            multi_label: Whether several labels may hold at once.
        """
        features = torch.stack(_margins(logits, lexical, multi_label=multi_label), dim=-1).double().numpy()
        differing = int((~agrees).sum())
        if differing in (0, len(agrees)):
            # Nothing to tell apart: the smoothed share, whatever the margins.
            return cls(math.log((len(agrees) - differing + 1) / (differing + 1)), 0.0, 0.0)
        mean, scale = features.mean(0), features.std(0)
        scale[scale == 0] = 1.0
        model = LogisticRegression(C=_INVERSE_PENALTY).fit((features - mean) / scale, agrees)
        weights = model.coef_[0] / scale
        return cls(float(model.intercept_[0] - weights @ mean), float(weights[0]), float(weights[1]))

    def uncertainty(self, logits: Tensor, lexical: Tensor | None, *, multi_label: bool = False) -> Tensor:
        """Probability that the full model would answer otherwise, (num_texts,); arguments as in `fit`."""
        own, table = _margins(logits, lexical, multi_label=multi_label)
        return torch.sigmoid(-(self.bias + self.own * own + self.table * table))


def _margins(logits: Tensor, lexical: Tensor | None, *, multi_label: bool) -> tuple[Tensor, Tensor]:
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


# --------------------------------------------------------------------------------------------------------------------
# Profiles
# --------------------------------------------------------------------------------------------------------------------


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

    def equal(left: Tensor, right: Tensor) -> Tensor:
        return (left == right).all(-1) if multi_label else left == right

    right = full_right = None
    if labels is not None:
        truth = labels.bool() if multi_label else labels
        right = equal(answers, truth).T.numpy()
        full_right = None if reference is None else equal(full, truth).numpy()
    return ExitProfile(tuple(depths), unsure.float().numpy(), equal(answers, full).T.numpy(), right, full_right)


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


def answer_of(logits: Tensor, *, multi_label: bool) -> Tensor:
    """The answer that logits (…, num_labels) stand for: a label id (…,), or flags (…, num_labels) for multi-label."""
    return logits > 0 if multi_label else logits.argmax(-1)


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


# --------------------------------------------------------------------------------------------------------------------
# Promises
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Promise:
    """What the user asks to be kept; exactly one of the two is given.

    Attributes:
        max_accuracy_drop: Accuracy of the full model less accuracy of the pipeline, at most (0.005 = half a point).
        min_agreement: Share of texts answered as the full model answers them, at least; needs no labels.
        confidence: Probability, over the draw of the calibration texts, with which the promise holds.
    """

    max_accuracy_drop: float | None = None
    min_agreement: float | None = None
    confidence: float = 0.95

    def __post_init__(self) -> None:
        if (self.max_accuracy_drop is None) == (self.min_agreement is None):
            raise ValueError(
                "A promise names one of max_accuracy_drop and min_agreement, "
                f"got {self.max_accuracy_drop} and {self.min_agreement}."
            )
        for name in ("max_accuracy_drop", "min_agreement"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise ValueError(f"{name} must lie between 0 and 1 (0.005 is half a point), got {value}.")
        if not 0.5 <= self.confidence < 1:
            raise ValueError(f"confidence must lie in [0.5, 1), got {self.confidence}.")

    @property
    def allowed(self) -> float:
        """The risk that may not be exceeded."""
        return self.max_accuracy_drop if self.max_accuracy_drop is not None else 1 - (self.min_agreement or 0.0)

    def halved(self) -> Promise:
        """The same promise at half the error probability: what each of two walks has to certify."""
        return replace(self, confidence=1 - (1 - self.confidence) / 2)

    @property
    def texts_needed(self) -> int:
        """Fewest texts with which certifying is tried: those on which a run that changes nothing just suffices."""
        tail = 1 - self.confidence
        if self.max_accuracy_drop is None:
            return math.ceil(math.log(tail) / math.log1p(-self.allowed))
        # With so many texts the bound on the share of changed answers suffices by itself.
        enough = math.ceil(math.log(tail * _CHANGED_SHARE) / math.log1p(-self.allowed))
        return bisect_left(range(1, enough), True, key=lambda n: drop_bound(0, 0, n, tail) <= self.allowed) + 1


@dataclass(frozen=True, slots=True)
class TrialPoint:
    """One threshold of a calibration: its speed, mean layers, observed risk and the bound on the true risk."""

    speed: float
    mean_exit_layer: float
    risk: float
    bound: float
    passed: bool


@dataclass(frozen=True, slots=True)
class Calibration:
    """Outcome of `calibrate`: the speed to run at, and every threshold that was tried on the way."""

    speed: float
    trials: tuple[TrialPoint, ...]
    num_texts: int


class TooFewTextsError(ValueError):
    """There are too few calibration texts for the promise; the message says how many are needed."""


def clopper_pearson_upper(successes: int, trials: int, tail: float) -> float:
    """Upper end of the exact one-sided binomial interval at confidence 1 - tail (Clopper and Pearson 1934)."""
    return 1.0 if trials == 0 or successes >= trials else float(beta.ppf(1 - tail, successes + 1, trials - successes))


# Share of the error probability spent on bounding how many answers change. A fifth is near the best from none to
# hundreds of changed texts; the bound is flat around it.
_CHANGED_SHARE = 0.2


def risk_bound(full: Flags, deployed: Flags, tail: float) -> float:
    """Upper bound, at confidence 1 - tail, on accuracy(full) - accuracy(deployed), from paired outcomes.

    A pair matters only if exactly one of the two is right: see `drop_bound`.
    """
    return drop_bound(int((full & ~deployed).sum()), int((~full & deployed).sum()), len(full), tail)


@lru_cache(maxsize=2**16)
def drop_bound(spoilt: int, repaired: int, num_texts: int, tail: float) -> float:
    """Upper bound, at confidence 1 - tail, on P(spoilt) - P(repaired), from counts among `num_texts` texts.

    The exact test of Berger and Boos (1994). The share of changed answers d = P(spoilt) + P(repaired) is bounded by
    Clopper and Pearson at a part of `tail`; a drop is refuted if, at every d up to that bound, a difference as small
    as the one seen is less probable than the rest of `tail`. The difference of counts plus `num_texts` is a sum of
    Bernoulli variables while d <= 1/2, so it is unimodal with a mode less than 1 from its mean (Darroch 1964), and its
    lower tail grows with d wherever the tail ends 2 below the mean: there the largest d alone has to be looked at.
    Drops nearer to what was seen than that are not refuted, and with d above 1/2 the bound is d itself.

    Bounding changes and direction each by itself and multiplying is simpler, and wider where texts change both ways.
    """
    spent = tail * _CHANGED_SHARE
    changed = clopper_pearson_upper(spoilt + repaired, num_texts, spent)
    nearest = max((spoilt - repaired + 2) / max(num_texts - 1, 1), 0.0)
    if changed > 0.5 or nearest >= changed:
        return changed
    count = np.arange(binom.ppf(1e-12, num_texts, changed), binom.isf(1e-12, num_texts, changed) + 1)
    weight = binom.pmf(count, num_texts, changed)
    most_spoilt = np.floor((count + spoilt - repaired) / 2)

    def probability(drop: float) -> float:
        """Of a difference at most as large as the one seen; the counts left out add at most 2e-12."""
        return float(weight @ binom.cdf(most_spoilt, count, (1 + drop / changed) / 2)) + 2e-12

    low, high = nearest, changed
    if probability(low) <= tail - spent:
        return low
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if probability(middle) <= tail - spent else (middle, high)
    return high


def calibrate(
    profile: ExitProfile,
    predicted: Callable[[float], Integers],
    promise: Promise,
    *,
    on_miss: OnMiss = "continue",
    speeds: Sequence[float],
) -> Calibration:
    """Find a speed that keeps a promise: fixed-sequence testing (Learn then Test, Angelopoulos et al. 2021).

    Speeds are walked in order and tested with an exact bound at the full confidence; the walk ends at the first that
    fails, and the last that passed is kept. Since nothing is tested after a failure, the probability of ever keeping
    a speed that breaks the promise is at most 1 - confidence, whatever the order, as long as it was fixed before
    looking at these texts. The texts must be fresh: neither trained on nor used to choose criterion, table,
    temperatures or the order.

    Args:
        profile: Profile of the calibration texts.
        predicted: Column predicted for each text at a given speed.
        promise: What must be kept.
        on_miss: The engine's rule, see `follow`.
        speeds: Speeds to try, in order, chosen before looking at these texts.

    Returns:
        The calibration; its speed is 0 (the full model) if not even the first speed passed.

    Raises:
        TooFewTextsError: If a run that changes no answer could not certify the promise on so few texts.
        ValueError: If the promise is about accuracy and the profile has no labels.
    """
    if promise.max_accuracy_drop is not None and profile.correct is None:
        raise ValueError("max_accuracy_drop needs labelled texts, got none with labels; use min_agreement instead.")
    check_enough(len(profile), promise)
    trials: list[TrialPoint] = []
    kept = 0.0
    for speed in speeds:
        trial = try_speed(profile, predicted(speed), promise, speed=speed, on_miss=on_miss)
        trials.append(trial)
        if not trial.passed:
            break
        kept = float(speed)
    return Calibration(kept, tuple(trials), len(profile))


def check_enough(num_texts: int, promise: Promise) -> None:
    """Refuse to certify a promise on too few texts, before any work is done.

    Raises:
        TooFewTextsError: If there are fewer than `Promise.texts_needed`.
    """
    if num_texts < promise.texts_needed:
        raise TooFewTextsError(
            f"{num_texts} calibration texts cannot certify {_describe(promise)}: at least {promise.texts_needed} "
            "are needed. Give more held-out texts, or ask for less. No speed was set."
        )


def try_speed(
    profile: ExitProfile, predicted: Integers, promise: Promise, *, speed: float, on_miss: OnMiss
) -> TrialPoint:
    """Hold one speed against a promise on texts that are all profiled; arguments as in `calibrate`."""
    rows, depths, tail = np.arange(len(profile)), np.asarray(profile.depths), 1 - promise.confidence
    column = follow(profile, predicted, speed=speed, on_miss=on_miss)
    if promise.min_agreement is not None:
        differs = int((~profile.agrees[rows, column]).sum())
        risk, bound = differs / len(rows), clopper_pearson_upper(differs, len(rows), tail)
    elif profile.correct is not None and profile.reference_correct is not None:
        full, deployed = profile.reference_correct, profile.correct[rows, column]
        risk, bound = float(full.mean() - deployed.mean()), risk_bound(full, deployed, tail)
    else:
        raise ValueError("max_accuracy_drop needs labelled texts, got none with labels; use min_agreement instead.")
    return TrialPoint(float(speed), float(depths[column].mean()), risk, bound, bound <= promise.allowed)


def _describe(promise: Promise) -> str:
    if promise.max_accuracy_drop is not None:
        what = f"an accuracy drop of at most {promise.max_accuracy_drop * 100:g} points"
    else:
        what = f"an agreement of at least {promise.min_agreement}"
    return f"{what} at {100 * promise.confidence:g} % confidence"
