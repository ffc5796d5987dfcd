"""Predictors are fitted here: scores, levels and exit 0, from texts whose exits are known."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.isotonic import isotonic_regression
from sklearn.linear_model import Ridge
from torch import Tensor
from torch.nn import functional as F

from geep.predictor.features import Features
from geep.predictor.keys import Keys, text_hashes, with_key_weight
from geep.predictor.linear import SIGMOIDS, SOFTMAX, fit_best, for_choosing
from geep.predictor.parts import parts_of
from geep.predictor.predictor import ExitPredictor
from geep.predictor.table import MAX_NGRAMS, ExitTable, FittedTable, Levels, Lexical, ScoreRows, check_exits

ABSENT_LOGIT = -30.0
"""Lexical logit of a label that no training text has: a probability of 1e-13, finite so that sums stay finite."""


@dataclass(frozen=True, eq=False)
class TextExits:
    """Texts and where they left, what a predictor is fitted on.

    Attributes:
        input_ids: Token ids of the texts one after another, int64, shape (num_tokens,).
        lengths: Tokens of each text, int64, shape (num_texts,).
        exit_indices: Place in the depths of each text's exit, int64, shape (num_texts, num_speeds).
    """

    input_ids: Tensor
    lengths: Tensor
    exit_indices: Tensor


def score_by_counts(table: ExitTable, texts: TextExits, *, pseudo_count: float = 8.0) -> ScoreRows:
    """Score a key by the expected exit layer of the texts it stood in, smoothed with that of all keys (the paper).

    Args:
        table: The counts.
        texts: Not used: the table holds all that this row of `PREDICTORS` learns.
        pseudo_count: Occurrences that the global distribution is worth beside a key's own.

    Returns:
        Rows of differences from the global expectation; zero for a key that was never seen.
    """
    depths = torch.tensor(table.depths, dtype=torch.float64)
    rows, priors = torch.empty(table.num_rows, len(table.speeds)), torch.empty(len(table.speeds))
    # One speed after another: the counts of all, in doubles, are by far the largest thing there is.
    for speed in range(len(table.speeds)):
        counts = table.counts[:, speed].double()
        # Unigrams alone: n-grams would count the same tokens again. In pairs those of both texts are among these.
        total = (counts if table.keys.separator_id is not None else counts[: table.vocab_size]).sum(0) + 1e-9
        prior = total / total.sum()
        smoothed = (counts + pseudo_count * prior) / (counts.sum(1, keepdim=True) + pseudo_count)
        rows[:, speed], priors[speed] = (smoothed - prior) @ depths, prior @ depths
    return ScoreRows(rows, priors)


def score_by_ridge(table: ExitTable, texts: TextExits, *, alpha: float | None = None) -> ScoreRows:
    """Score a key by its weight in a ridge regression of the exit layer on the mean of the keys, per speed.

    Where `counts` asks of each key alone in which texts it stands, the regression shares a text's depth out among the
    keys that explain it.

    Args:
        table: The keys.
        texts: Texts to fit on, with their exits.
        alpha: Ridge penalty. `None` takes the one of `RIDGE_ALPHAS` that best predicts some texts, all speeds together,
            from others (`for_choosing`).

    Returns:
        Rows of weights; zero for a key that was never seen.
    """
    features = Features.of(table.keys, texts.input_ids, texts.lengths)
    layers = np.asarray(table.depths, dtype=np.float32)[texts.exit_indices.numpy()]
    rows = torch.zeros(table.num_rows, len(table.speeds))
    if not features.columns.numel():
        return ScoreRows(rows, torch.from_numpy(layers.mean(0)))
    matrix, few = features.weighted(exponent=1.0), for_choosing(len(layers))
    if alpha is None and few.check.size:
        learned, checked = (matrix[few.learn], layers[few.learn]), matrix[few.check]
        fits = [_ridge(*learned, each).predict(checked) for each in RIDGE_ALPHAS]
        errors = [np.square(fit.reshape(-1, len(table.speeds)) - layers[few.check]).sum() for fit in fits]
        alpha = RIDGE_ALPHAS[int(np.argmin(errors))]
    elif alpha is None:
        alpha = RIDGE_ALPHAS[-1]
    model = _ridge(matrix, layers, alpha)
    rows[features.columns] = features.rows(np.atleast_2d(model.coef_).T)
    return ScoreRows(rows, torch.from_numpy(np.atleast_1d(model.intercept_)).float())


RIDGE_ALPHAS: tuple[float, ...] = (0.3, 1.0, 3.0, 10.0)
"""Penalties that `score_by_ridge` tries, from weak to strong."""


PREDICTORS: dict[str, Callable[[ExitTable, TextExits], ScoreRows]] = {
    "counts": score_by_counts,
    "fitted": score_by_ridge,
}
"""Ways to turn a table and the texts it was filled from into scores. A new row is a new predictor."""


def fit_levels(
    scores: Tensor, exit_indices: Tensor, *, num_depths: int, num_bins: int = 16, smoothing: float = 4.0
) -> Levels:
    """Learn from held-out texts which exits stand behind a score.

    A mean over keys is shrunk towards the prior and the exits of training texts are too early, so a score is only an
    order. Its scale comes from here: bins of equal mass, and in each the exits seen. Bins are noisy, so neighbours
    that disagree with the order are pooled (isotonic regression of each cumulative probability, which keeps the
    total mass where a running maximum would push texts deeper). Without this a text with a higher score could be sent
    to a shallower exit by chance alone, and the scheduler's order by depth would contradict the order by score.

    Args:
        scores: Scores of texts that were not trained on, shape (num_texts, num_speeds).
        exit_indices: Their exits, int64, shape (num_texts, num_speeds).
        num_depths: Number of possible exits.
        num_bins: Most bins a speed gets; there are fewer when a bin would have fewer than 16 texts.
        smoothing: Texts of the speed's overall distribution that are added to each bin.

    Returns:
        The levels, on the CPU.

    Raises:
        TypeError: If `exit_indices` is not int64.
        ValueError: If there is no text, a score is not finite, or shapes or exits are off.
    """
    if scores.ndim != 2 or not scores.numel():
        raise ValueError(
            f"Found scores of shape {tuple(scores.shape)}, expected (num_texts, num_speeds) with at least "
            "one text; give held-out texts."
        )
    if num_bins < 1 or not smoothing > 0:
        raise ValueError(f"num_bins must be >= 1 and smoothing > 0, got {num_bins} and {smoothing}.")
    scores, exit_indices = scores.float().cpu(), exit_indices.cpu()
    check_exits("exit_indices", exit_indices, tuple(scores.shape), num_depths)
    if not bool(scores.isfinite().all()):
        raise ValueError("Found a score that is not finite, expected numbers; fit the predictor anew.")
    num_texts, num_speeds = scores.shape
    num_bins = max(1, min(num_bins, num_texts // 16))
    # Edges half way between two scores: a rounding difference of another machine moves no text across.
    first = torch.arange(1, num_bins) * num_texts // num_bins
    order = scores.sort(dim=0).values
    edges = ((order[first] + order[first - 1]) / 2).T.contiguous()
    cumulative = torch.ones(num_speeds, num_bins, num_depths)
    for speed in range(num_speeds):
        bins = torch.bucketize(scores[:, speed].contiguous(), edges[speed], right=True)
        cells = bins * num_depths + exit_indices[:, speed]
        counts = torch.bincount(cells, minlength=num_bins * num_depths).view(num_bins, num_depths).double()
        counts += smoothing * counts.sum(0) / num_texts
        weight = counts.sum(1)
        share = (counts.cumsum(1) / weight[:, None]).numpy()
        for depth in range(num_depths - 1):
            pooled = isotonic_regression(share[:, depth], sample_weight=weight.numpy(), increasing=False)
            cumulative[speed, :, depth] = torch.from_numpy(pooled.copy()).float()
    # Pooling keeps the order of the depths but for rounding.
    return Levels(edges, cumulative.clamp(0, 1).cummax(2).values)


def fit_lexical(
    keys: Keys,
    input_ids: Tensor,
    lengths: Tensor,
    labels: Tensor,
    *,
    num_labels: int,
    multi_label: bool = False,
    penalty: float | None = None,
) -> Lexical:
    """Fit a logistic regression from a text's keys to its label: softmax, or a sigmoid per label if `multi_label`.

    Taught by a full model's probabilities it learns more of a text than its most likely label, and labels that people
    gave can be mixed in: any probabilities will do.

    Keys weigh by their inverse document frequency and texts by 1 / sqrt(number of keys). Both fold into the rows and
    one number a text, so prediction stays a sum. Chosen on the development splits of TREC, SST-2, AG News and
    THUCNews for log-loss and accuracy against no weighting, 1 / number of keys and the Euclidean norm.

    Args:
        keys: The keys and their rows.
        input_ids: Token ids of the texts one after another, int64, shape (num_tokens,).
        lengths: Tokens of each text, int64, shape (num_texts,).
        labels: Probabilities within [0, 1], shape (num_texts, num_labels), which sum to 1 unless `multi_label`; or
            label ids, int64, shape (num_texts,).
        num_labels: Number of labels. One that no text has (0 for all) gets the bias `ABSENT_LOGIT`.
        multi_label: Whether a text may have several labels.
        penalty: Half of it times the squared weights is added to the loss (scikit-learn's 1 / C). `None` takes the one
            of `LEXICAL_PENALTIES` that best foretells every eighth text.

    Returns:
        The rows, on the CPU; zero for a key that was never seen.

    Raises:
        TypeError: If label ids are not int64.
        ValueError: If there is no text, or shapes or labels are off.
    """
    targets = _check_targets(labels.cpu(), lengths.numel(), num_labels, multi_label)
    features = Features.of(keys, input_ids.cpu(), lengths.cpu())
    share = targets.mean(0, dtype=np.float64)
    penalties = LEXICAL_PENALTIES if penalty is None else (penalty,)
    rows, bias = torch.zeros(keys.num_rows, num_labels), torch.full((num_labels,), ABSENT_LOGIT)
    is_open = (share > 0) & (share < 1) if multi_label else share > 0
    columns = torch.from_numpy(np.flatnonzero(is_open))
    if multi_label:
        bias[torch.from_numpy(share == 1)] = -ABSENT_LOGIT
    if not columns.numel() or (columns.numel() == 1 and not multi_label):
        # No doubt about any label.
        bias[columns] = 0.0
        return Lexical(rows, bias)
    targets = targets[:, is_open]
    is_odds = not multi_label and columns.numel() == 2
    if is_odds:
        # Of two labels one log-odds, half of it to each side, is the same softmax.
        targets = targets[:, 1:]
    matrix, loss = features.weighted(exponent=0.5), SIGMOIDS if multi_label or is_odds else SOFTMAX
    model = fit_best(matrix, np.ascontiguousarray(targets), loss, penalties)
    weights, intercept = features.rows(model.weights), torch.from_numpy(model.bias).float()
    if is_odds:
        weights, intercept = torch.cat([-weights, weights], 1) / 2, torch.cat([-intercept, intercept]) / 2
    rows[features.columns[:, None], columns[None, :]] = weights
    bias[columns] = intercept
    return Lexical(rows, bias)


LEXICAL_PENALTIES: tuple[float, ...] = (10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01)
"""Penalties that `fit_lexical` tries, from strong to weak: short texts took the strong ones, long texts the weak."""


def fit_predictor(
    kind: str,
    seen: TextExits,
    labels: Tensor | None,
    heldout: TextExits,
    *,
    depths: tuple[int, ...],
    speeds: tuple[float, ...],
    num_labels: int,
    vocab_size: int,
    special_ids: Iterable[int],
    multi_label: bool = False,
    ngram_order: int = 2,
    min_count: int = 2,
    max_ngrams: int = MAX_NGRAMS,
    num_bins: int = 16,
    lexical: Lexical | None = None,
    separator_id: int | None = None,
) -> ExitPredictor:
    """Fill the table and fit scores and exit 0 on training texts, and the levels on held-out ones.

    Args:
        kind: A row of `PREDICTORS`: "counts" is the paper's, "fitted" a ridge regression.
        seen: Texts that fill the table.
        labels: Their label ids or probabilities as in `fit_lexical`, or `None` for no exit 0.
        heldout: Texts that the model was not trained on.
        depths: Layers of each possible exit, increasing; the last is the full model.
        speeds: The speeds at which the texts were run, increasing, within [0, 1].
        num_labels: Number of labels of the model.
        vocab_size: Number of token ids.
        special_ids: Ids that get no row, as in `Keys`.
        multi_label: Whether a text may have several labels.
        ngram_order: Longest n-gram, 1 to 3.
        min_count: Occurrences that an n-gram needs.
        max_ngrams: Most n-grams that get a row.
        num_bins: Bins of scores; see `fit_levels`.
        lexical: Exit 0 of a predictor fitted on the same texts and labels, which is not fitted again: it does not
            depend on the exits.
        separator_id: The special id that ends the first text of a pair, `None` for single texts; see `Keys`.

    Returns:
        The predictor, on the CPU.

    Raises:
        TypeError: If a tensor is not int64.
        ValueError: If `kind` is unknown, there are no texts, or shapes or numbers are off.
    """
    if kind not in PREDICTORS:
        raise ValueError(f"Unknown predictor {kind!r}; supported: {sorted(PREDICTORS)}.")
    if not seen.lengths.numel() or not heldout.lengths.numel():
        raise ValueError(
            f"Found {seen.lengths.numel()} training and {heldout.lengths.numel()} held-out texts, expected some "
            "of both; hold fewer texts out or bring more."
        )
    seen, heldout = (TextExits(*(part.cpu() for part in vars(texts).values())) for texts in (seen, heldout))
    table = ExitTable.build(
        seen.input_ids,
        seen.lengths,
        seen.exit_indices,
        depths=depths,
        speeds=speeds,
        vocab_size=vocab_size,
        special_ids=special_ids,
        ngram_order=ngram_order,
        min_count=min_count,
        max_ngrams=max_ngrams,
        separator_id=separator_id,
    )
    if lexical is None and labels is not None:
        lexical = fit_lexical(
            table.keys, seen.input_ids, seen.lengths, labels, num_labels=num_labels, multi_label=multi_label
        )
    score_rows = PREDICTORS[kind](table, seen)
    rows, offsets = table.rows_of(heldout.input_ids, heldout.lengths)
    sums = F.embedding_bag(rows, with_key_weight(table.keys, score_rows.rows), offsets, mode="sum")
    scores = sums[:, 1:] / sums[:, :1].clamp(min=1) + score_rows.prior
    levels = fit_levels(scores, heldout.exit_indices, num_depths=len(depths), num_bins=num_bins)
    parts = (part for texts in (seen, heldout) for part in parts_of(texts.input_ids, texts.lengths))
    known = torch.cat([text_hashes(part.input_ids, part.lengths) for part in parts]).unique()
    return ExitPredictor(FittedTable(kind, table, score_rows, levels, lexical, multi_label, known))


def _ridge(matrix: sparse.csr_matrix, layers: np.ndarray[Any, Any], alpha: float) -> Ridge:
    with warnings.catch_warnings():
        # Stopping early is a little more regularisation, nothing to warn about.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return Ridge(alpha=alpha, solver="sparse_cg", tol=1e-4, max_iter=200).fit(matrix, layers)


def _check_targets(labels: Tensor, num_texts: int, num_labels: int, multi_label: bool) -> NDArray[np.float32]:
    """Return labels as probabilities, (num_texts, num_labels)."""
    soft = (num_texts, num_labels)
    shapes = [soft] if multi_label else [(num_texts,), soft]
    if tuple(labels.shape) not in shapes or not num_texts:
        raise ValueError(
            f"labels must have shape {' or '.join(map(str, shapes))} with at least one text, got {tuple(labels.shape)}."
        )
    if labels.ndim == 2:
        if not bool(((labels >= 0) & (labels <= 1)).all()):
            raise ValueError("probabilities must be within [0, 1]; give 1 for each label that a text has.")
        if not multi_label and not bool(((labels.sum(1, dtype=torch.float64) - 1).abs() < 1e-3).all()):
            raise ValueError("a text's probabilities must sum to 1; set multi_label=True where labels are independent.")
        return labels.float().numpy()
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be torch.int64, got {labels.dtype}; give ids, or a probability for each label.")
    if bool(((labels < 0) | (labels >= num_labels)).any()):
        raise ValueError(
            f"labels must be within 0..{num_labels - 1}, found {int(labels.min())}..{int(labels.max())}; "
            "leave texts without a label out."
        )
    return F.one_hot(labels, num_labels).float().numpy()
