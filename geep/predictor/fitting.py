"""Predictors are fitted here: scores, levels and exit 0, from texts whose exits are known."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.isotonic import isotonic_regression
from sklearn.linear_model import LogisticRegression, Ridge
from torch import Tensor
from torch.nn import functional as F

from geep.predictor.keys import Keys, text_hashes, text_of_rows, with_key_weight
from geep.predictor.predictor import ExitPredictor
from geep.predictor.table import ExitTable, FittedTable, Levels, Lexical, ScoreRows, check_exits

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
    counts = table.counts.double()
    # Unigrams alone: n-grams would count the same tokens again. In pairs those of both texts are among these.
    total = (counts if table.keys.separator_id is not None else counts[: table.vocab_size]).sum(0) + 1e-9
    prior = total / total.sum(1, keepdim=True)
    depths = torch.tensor(table.depths, dtype=torch.float64)
    smoothed = (counts + pseudo_count * prior) / (counts.sum(2, keepdim=True) + pseudo_count)
    return ScoreRows(((smoothed - prior) @ depths).float(), (prior @ depths).float())


def score_by_ridge(table: ExitTable, texts: TextExits, *, alpha: float | None = None) -> ScoreRows:
    """Score a key by its weight in a ridge regression of the exit layer on the mean of the keys, per speed.

    Where `counts` asks of each key alone in which texts it stands, the regression shares a text's depth out among the
    keys that explain it.

    Args:
        table: The keys.
        texts: Texts to fit on, with their exits.
        alpha: Ridge penalty. `None` takes the one of `RIDGE_ALPHAS` that best predicts every eighth text, all speeds
            together, from the others.

    Returns:
        Rows of weights; zero for a key that was never seen.
    """
    features = _features(table.keys, texts.input_ids, texts.lengths)
    layers = np.asarray(table.depths, dtype=np.float64)[texts.exit_indices.numpy()]
    rows = torch.zeros(table.num_rows, len(table.speeds))
    if not features.columns.size:
        return ScoreRows(rows, torch.from_numpy(layers.mean(0)).float())
    matrix = features.weighted(exponent=1.0)
    is_check = np.arange(len(layers)) % 8 == 7
    if alpha is None and is_check.any():
        fits = [_ridge(matrix[~is_check], layers[~is_check], each).predict(matrix[is_check]) for each in RIDGE_ALPHAS]
        errors = [np.square(fit.reshape(-1, len(table.speeds)) - layers[is_check]).sum() for fit in fits]
        alpha = RIDGE_ALPHAS[int(np.argmin(errors))]
    elif alpha is None:
        alpha = RIDGE_ALPHAS[-1]
    model = _ridge(matrix, layers, alpha)
    rows[torch.from_numpy(features.columns)] = features.rows(model.coef_)
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
    inverse_penalty: float = 1.0,
) -> Lexical:
    """Fit a logistic regression from a text's keys to its label: softmax, or a sigmoid per label if `multi_label`.

    Keys weigh by their inverse document frequency and texts by 1 / sqrt(number of keys). Both fold into the rows and
    one number a text, so prediction stays a sum. Chosen on the development splits of TREC, SST-2, AG News and
    THUCNews for log-loss and accuracy against no weighting, 1 / number of keys and the Euclidean norm.

    Args:
        keys: The keys and their rows.
        input_ids: Token ids of the texts one after another, int64, shape (num_tokens,).
        lengths: Tokens of each text, int64, shape (num_texts,).
        labels: int64, shape (num_texts,); if `multi_label`, numbers within [0, 1], shape (num_texts, num_labels),
            where 0.5 and above counts as true.
        num_labels: Number of labels. One that no text has gets the bias `ABSENT_LOGIT`.
        multi_label: Whether a text may have several labels.
        inverse_penalty: scikit-learn's C.

    Returns:
        The rows, on the CPU; zero for a key that was never seen.

    Raises:
        TypeError: If hard labels are not int64.
        ValueError: If there is no text, or shapes or labels are off.
    """
    targets = _check_labels(labels.cpu(), lengths.numel(), num_labels, multi_label)
    features = _features(keys, input_ids.cpu(), lengths.cpu())
    rows, bias = torch.zeros(keys.num_rows, num_labels), torch.zeros(num_labels)
    matrix, columns = features.weighted(exponent=0.5), torch.from_numpy(features.columns)
    if multi_label:
        for label in range(num_labels):
            share = targets[:, label].mean()
            if share in (0.0, 1.0) or not columns.numel():
                bias[label] = float(np.log(share / (1 - share))) if 0 < share < 1 else ABSENT_LOGIT * (1 - 2 * share)
            else:
                model = _logistic(matrix, targets[:, label], inverse_penalty)
                rows[columns, label] = features.rows(model.coef_)[:, 0]
                bias[label] = float(model.intercept_[0])
        return Lexical(rows, bias)
    present, frequency = np.unique(targets, return_counts=True)
    bias.fill_(ABSENT_LOGIT)
    if len(present) == 1 or not columns.numel():
        bias[torch.from_numpy(present)] = torch.from_numpy(np.log(frequency / frequency.sum())).float()
        return Lexical(rows, bias)
    model = _logistic(matrix, targets, inverse_penalty)
    weights, intercept = model.coef_, model.intercept_
    if len(present) == 2:
        # Of two labels scikit-learn keeps one log-odds; half of it to each side is the same softmax.
        weights, intercept = np.concatenate([-weights, weights]) / 2, np.concatenate([-intercept, intercept]) / 2
    places = torch.from_numpy(present)
    rows[columns[:, None], places[None, :]] = features.rows(weights)
    bias[places] = torch.from_numpy(intercept).float()
    return Lexical(rows, bias)


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
    max_ngrams: int = 200_000,
    num_bins: int = 16,
    lexical: Lexical | None = None,
    separator_id: int | None = None,
) -> ExitPredictor:
    """Fill the table and fit scores and exit 0 on training texts, and the levels on held-out ones.

    Args:
        kind: A row of `PREDICTORS`: "counts" is the paper's, "fitted" a ridge regression.
        seen: Texts that fill the table.
        labels: Their labels as in `fit_lexical`, or `None` for no exit 0.
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
    hashes = [text_hashes(part.input_ids, part.lengths) for part in (seen, heldout)]
    known = torch.cat(hashes).unique()
    return ExitPredictor(FittedTable(kind, table, score_rows, levels, lexical, multi_label, known))


@dataclass(frozen=True, eq=False)
class _Features:
    """How often each key stands in each text, only for the keys that stand in any.

    Args:
        matrix: Occurrences, shape (num_texts, num_columns).
        columns: The row of each column's key, shape (num_columns,), increasing.
        num_keys: Keys of each text, at least 1, shape (num_texts,).
        scale: Inverse document frequency of each column, shape (num_columns,).
    """

    matrix: sparse.csr_matrix
    columns: np.ndarray[Any, np.dtype[np.int64]]
    num_keys: np.ndarray[Any, np.dtype[np.float64]]
    scale: np.ndarray[Any, np.dtype[np.float64]]

    def weighted(self, *, exponent: float) -> sparse.csr_matrix:
        """Return occurrences times the keys' scale, each text divided by its number of keys to the `exponent`."""
        by_text = sparse.diags_array(self.num_keys**-exponent)
        return sparse.csr_matrix(by_text @ self.matrix @ sparse.diags_array(self.scale))

    def rows(self, weights: np.ndarray[Any, Any]) -> Tensor:
        """Fold the scale into a model's weights: shape (num_columns, num_outputs)."""
        return torch.from_numpy(np.atleast_2d(weights).T * self.scale[:, None]).float()


def _features(keys: Keys, input_ids: Tensor, lengths: Tensor) -> _Features:
    rows, offsets = keys.rows_of(input_ids, lengths)
    text = text_of_rows(offsets, rows.numel())
    known = rows != keys.neutral_row
    columns, places = rows[known].unique(return_inverse=True)
    shape = (lengths.numel(), columns.numel())
    pairs = (np.ones(places.numel()), (text[known].numpy(), places.numpy()))
    matrix = sparse.coo_matrix(pairs, shape=shape).tocsr()
    num_keys = np.maximum(np.bincount(text[known].numpy(), minlength=shape[0]), 1).astype(np.float64)
    # `tocsr` has summed the duplicates: one entry is one text that has the key.
    document_frequency = np.bincount(matrix.indices, minlength=shape[1])
    scale = np.log((1 + shape[0]) / (1 + document_frequency)) + 1
    return _Features(matrix, columns.numpy(), num_keys, scale)


def _ridge(matrix: sparse.csr_matrix, layers: np.ndarray[Any, Any], alpha: float) -> Ridge:
    with warnings.catch_warnings():
        # Stopping early is a little more regularisation, nothing to warn about.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return Ridge(alpha=alpha, solver="sparse_cg", tol=1e-4, max_iter=200).fit(matrix, layers)


def _logistic(matrix: sparse.csr_matrix, labels: np.ndarray[Any, Any], inverse_penalty: float) -> LogisticRegression:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=inverse_penalty, tol=1e-4, max_iter=100).fit(matrix, labels)


def _check_labels(labels: Tensor, num_texts: int, num_labels: int, multi_label: bool) -> np.ndarray[Any, Any]:
    """Return the labels as integers or, if `multi_label`, as zeros and ones."""
    shape = (num_texts, num_labels) if multi_label else (num_texts,)
    if tuple(labels.shape) != shape or not num_texts:
        raise ValueError(f"labels must have shape {shape} with at least one text, got {tuple(labels.shape)}.")
    if multi_label:
        if not bool(((labels >= 0) & (labels <= 1)).all()):
            raise ValueError("multi-label labels must be within [0, 1]; give 1 for each label that a text has.")
        return (labels >= 0.5).numpy().astype(np.float64)
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be torch.int64, got {labels.dtype}; set multi_label=True for one number a label.")
    if bool(((labels < 0) | (labels >= num_labels)).any()):
        raise ValueError(
            f"labels must be within 0..{num_labels - 1}, found {int(labels.min())}..{int(labels.max())}; "
            "leave texts without a label out."
        )
    return labels.numpy()
