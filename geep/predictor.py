"""Predict the exit layer of a text, and a first guess at its label, from its token ids alone.

The exit table is a bag of keys. A key is a token id or an n-gram of ids, each has a row of numbers, and what is said
about a text is a function of the sum of its rows: one `embedding_bag` for a whole batch. Unigrams address their row
directly (token ids are a perfect hash already); n-grams find theirs through a `HashTable`.

    token ids -> keys -> rows -> sum -> score -> level -> exit layer
                                    `-> lexical logits (exit 0)

Texts come packed: the token ids of all texts one after another and the number of tokens of each, no padding.

The room knows token ids and exits. It refuses to know models, tokenizers and schedules: who wants a table tells it
where the texts left. Read `Keys`, then `ExitTable`, `PREDICTORS`, `fit_levels` and last `ExitPredictor`.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_safetensors
from scipy import sparse
from sklearn.exceptions import ConvergenceWarning
from sklearn.isotonic import isotonic_regression
from sklearn.linear_model import LogisticRegression, Ridge
from torch import Tensor
from torch.nn import functional as F

from geep.hash_table import EMPTY_KEY, HashTable, kernels_run_on

if TYPE_CHECKING:
    from geep.hash_table.bags import Bags, BagSums

FILE_NAME = "exit_table.safetensors"
"""What a predictor's file is called inside a model folder."""

ABSENT_LOGIT = -30.0
"""Lexical logit of a label that no training text has: a probability of 1e-13, finite so that sums stay finite."""

_TOKEN_BITS = 18
_ORDER_SHIFT = 3 * _TOKEN_BITS
_MAX_NGRAM_ORDER = 3
_FORMAT = "geep exit table 1"
_METADATA = "exit_table"


@dataclass(frozen=True, eq=False)
class Keys:
    """The keys a table knows, and the row of each.

    Rows 0 … vocab_size - 1 are the unigrams, row = token id. Then come the n-grams, row = vocab_size + value in the
    hash table. The last row is neutral: special tokens and unknown n-grams get it, its numbers are all zero, and it
    does not count as a key of the text. An n-gram never reaches across a text's border and holds no special token.

    Args:
        vocab_size: Number of token ids.
        special_ids: Ids that the tokenizer adds or that say nothing, such as [CLS], [SEP], [PAD] and [UNK].
        ngram_order: Longest n-gram, 1 to 3; 1 means token ids only.
        ngrams: N-grams packed into 64 bits to 0 … number of n-grams - 1.

    Raises:
        ValueError: If a number is out of range, or the ids are too large to be packed.
    """

    vocab_size: int
    special_ids: tuple[int, ...]
    ngram_order: int
    ngrams: HashTable

    def __post_init__(self) -> None:
        if self.vocab_size < 1:
            raise ValueError(f"vocab_size must be at least 1, got {self.vocab_size}; give the tokenizer's length.")
        if not 1 <= self.ngram_order <= _MAX_NGRAM_ORDER:
            raise ValueError(f"ngram_order must be within 1..{_MAX_NGRAM_ORDER}, got {self.ngram_order}; 2 is usual.")
        if self.ngram_order > 1 and self.vocab_size > 1 << _TOKEN_BITS:
            raise ValueError(
                f"vocab_size is {self.vocab_size}, n-grams are packed with {_TOKEN_BITS} bits a token and need at most "
                f"{1 << _TOKEN_BITS}; use ngram_order=1 with this tokenizer."
            )
        outside = [token for token in self.special_ids if not 0 <= token < self.vocab_size]
        if outside:
            raise ValueError(
                f"special_ids must be within 0..{self.vocab_size - 1}, got {outside}; "
                "raise vocab_size to the tokenizer's full length, added tokens included."
            )

    @property
    def num_rows(self) -> int:
        """Unigrams, n-grams and the neutral row."""
        return self.vocab_size + len(self.ngrams) + 1

    @property
    def neutral_row(self) -> int:
        """The row of everything that is no key: the last one."""
        return self.num_rows - 1

    def rows_of(self, input_ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows of the texts' keys and where each text begins in them, as `embedding_bag` takes them.

        Each token gives `ngram_order` rows: its own and those of the n-grams that begin at it. So the shapes follow
        from the input's alone, and a text's rows do not depend on its neighbours.

        Args:
            input_ids: Token ids of the texts one after another, int64, shape (num_tokens,).
            lengths: Tokens of each text, int64, shape (num_texts,); 0 is allowed.

        Returns:
            Rows, int64, shape (num_tokens * ngram_order,), and offsets, int64, shape (num_texts,).

        Raises:
            TypeError: If a tensor is not int64.
            ValueError: If the shapes do not fit together or an id is not in the vocabulary.
        """
        _check_texts(input_ids, lengths, self.vocab_size)
        usable = _usable(input_ids, self.special_ids)
        rows = torch.full((input_ids.numel(), self.ngram_order), self.neutral_row, device=input_ids.device)
        rows[:, 0] = torch.where(usable, input_ids, self.neutral_row)
        for column, (starts, packed) in enumerate(_ngrams(input_ids, lengths, usable, self.ngram_order), start=1):
            found = self.ngrams.find(packed)
            rows[starts, column] = torch.where(found >= 0, found + self.vocab_size, self.neutral_row)
        return rows.flatten(), (lengths.cumsum(0) - lengths) * self.ngram_order


@dataclass(frozen=True, eq=False)
class ExitTable:
    """How often each key stood in a text that left at each exit.

    Invariant: the counts are sums over the texts, so neither the order of the texts nor the device changes them, and
    the same texts always give the same bytes.

    Args:
        keys: The keys and their rows.
        depths: Layers of each possible exit, increasing; the last is the full model.
        speeds: The speeds at which the texts were run, increasing, within [0, 1].
        counts: Occurrences of each row's key, int32, shape (num_rows, num_speeds, num_depths).

    Raises:
        ValueError: If `depths` or `speeds` are not increasing or out of range, or the counts have another shape.
    """

    keys: Keys
    depths: tuple[int, ...]
    speeds: tuple[float, ...]
    counts: Tensor

    def __post_init__(self) -> None:
        if not self.depths or self.depths[0] < 1 or list(self.depths) != sorted(set(self.depths)):
            raise ValueError(f"depths must be increasing and at least 1, got {self.depths}; list each exit once.")
        if not self.speeds or not _is_grid(self.speeds):
            raise ValueError(f"speeds must be increasing and within [0, 1], got {self.speeds}; list each speed once.")
        shape = (self.keys.num_rows, len(self.speeds), len(self.depths))
        if self.counts.dtype != torch.int32 or tuple(self.counts.shape) != shape:
            raise ValueError(
                f"counts must be torch.int32 of shape {shape}, got {self.counts.dtype} of shape "
                f"{tuple(self.counts.shape)}; use ExitTable.build."
            )

    @classmethod
    def build(
        cls,
        input_ids: Tensor,
        lengths: Tensor,
        exit_indices: Tensor,
        *,
        depths: tuple[int, ...],
        speeds: tuple[float, ...],
        vocab_size: int,
        special_ids: Iterable[int],
        ngram_order: int = 2,
        min_count: int = 2,
        max_ngrams: int = 200_000,
    ) -> ExitTable:
        """Count the keys of texts whose exits are known.

        An n-gram gets a row if it occurs at least `min_count` times and is among the `max_ngrams` most frequent; of
        equally frequent ones those with smaller ids go first.

        Args:
            input_ids: Token ids of the texts one after another, int64, shape (num_tokens,).
            lengths: Tokens of each text, int64, shape (num_texts,).
            exit_indices: Place in `depths` of each text's exit, int64, shape (num_texts, num_speeds).
            depths: Layers of each possible exit, increasing; the last is the full model.
            speeds: The speeds at which the texts were run, increasing, within [0, 1].
            vocab_size: Number of token ids.
            special_ids: Ids that get no row, as in `Keys`.
            ngram_order: Longest n-gram, 1 to 3.
            min_count: Occurrences that an n-gram needs.
            max_ngrams: Most n-grams that get a row.

        Returns:
            The table, on the CPU.

        Raises:
            TypeError: If a tensor is not int64.
            ValueError: If shapes do not fit together or a number is out of range.
        """
        if min_count < 1 or max_ngrams < 0:
            raise ValueError(f"min_count must be >= 1 and max_ngrams >= 0, got {min_count} and {max_ngrams}.")
        input_ids, lengths, exit_indices = input_ids.cpu(), lengths.cpu(), exit_indices.cpu()
        special_ids = tuple(sorted(set(special_ids)))
        keys = Keys(vocab_size, special_ids, ngram_order, HashTable(1))
        _check_texts(input_ids, lengths, vocab_size)
        _check_exits("exit_indices", exit_indices, (lengths.numel(), len(speeds)), len(depths))
        usable = _usable(input_ids, special_ids)
        packed = [packed for _, packed in _ngrams(input_ids, lengths, usable, ngram_order)]
        if packed:
            keys = replace(keys, ngrams=_frequent(torch.cat(packed), min_count, max_ngrams))
        rows, _ = keys.rows_of(input_ids, lengths)
        text = _text_of(lengths * ngram_order, rows.numel())
        known = rows != keys.neutral_row
        rows, text = rows[known], text[known]
        num_depths = len(depths)
        counts = torch.empty((keys.num_rows, len(speeds), num_depths), dtype=torch.int32)
        for speed in range(len(speeds)):
            cells = rows * num_depths + exit_indices[text, speed]
            counts[:, speed] = torch.bincount(cells, minlength=keys.num_rows * num_depths).view(-1, num_depths)
        return cls(keys, tuple(depths), tuple(speeds), counts)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.keys.vocab_size

    @property
    def num_rows(self) -> int:
        """Unigrams, n-grams and the neutral row."""
        return self.keys.num_rows

    def rows_of(self, input_ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows of the texts' keys and where each text begins; see `Keys.rows_of`."""
        return self.keys.rows_of(input_ids, lengths)


@dataclass(frozen=True, eq=False)
class TrainingTexts:
    """Texts and where they left, what a row of `PREDICTORS` learns from; shapes as in `ExitTable.build`."""

    input_ids: Tensor
    lengths: Tensor
    exit_indices: Tensor


@dataclass(frozen=True, eq=False)
class ScoreRows:
    """What each key says about the exit layer: a text's score is `prior` + the mean of its keys' rows.

    Rows are differences from the prior, so a key that was never seen says nothing by being zero, and a text without
    keys scores the prior.

    Args:
        rows: Layers above or below the prior, float32, shape (num_rows, num_speeds).
        prior: Score of a text without keys, in layers, float32, shape (num_speeds,).
    """

    rows: Tensor
    prior: Tensor


def score_by_counts(table: ExitTable, texts: TrainingTexts, *, pseudo_count: float = 8.0) -> ScoreRows:
    """Score a key by the expected exit layer of the texts it stood in, smoothed with that of all keys (the paper).

    Args:
        table: The counts.
        texts: Not used: the table holds all that this row of `PREDICTORS` learns.
        pseudo_count: Occurrences that the global distribution is worth beside a key's own.

    Returns:
        Rows of differences from the global expectation; zero for a key that was never seen.
    """
    counts = table.counts.double()
    # Unigrams alone: n-grams would count the same tokens again.
    total = counts[: table.vocab_size].sum(0) + 1e-9
    prior = total / total.sum(1, keepdim=True)
    depths = torch.tensor(table.depths, dtype=torch.float64)
    smoothed = (counts + pseudo_count * prior) / (counts.sum(2, keepdim=True) + pseudo_count)
    return ScoreRows(((smoothed - prior) @ depths).float(), (prior @ depths).float())


def score_by_ridge(table: ExitTable, texts: TrainingTexts, *, alpha: float | None = None) -> ScoreRows:
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

PREDICTORS: dict[str, Callable[[ExitTable, TrainingTexts], ScoreRows]] = {
    "counts": score_by_counts,
    "fitted": score_by_ridge,
}
"""Ways to turn a table and the texts it was filled from into scores. A new row is a new predictor."""


@dataclass(frozen=True, eq=False)
class Levels:
    """What a score means: for each bin of scores, the distribution of the exits that texts in it really took.

    Invariant: along the bins of a speed the distributions never move towards shallower exits, at any quantile.

    Args:
        edges: Scores between neighbouring bins, float32, shape (num_speeds, num_bins - 1), non-decreasing.
        cumulative: Share of a bin's texts that had left at each exit, float32, shape (num_speeds, num_bins,
            num_depths), non-decreasing along the depths, 1 at the last.
    """

    edges: Tensor
    cumulative: Tensor

    def exit_indices(self, scores: Tensor, speed_index: int, quantile: float) -> Tensor:
        """Return the first exit by which at least `quantile` of the texts with such a score had left.

        Args:
            scores: Scores at one speed, float32, shape (num_texts,).
            speed_index: Which speed.
            quantile: Share of texts, in (0, 1].

        Returns:
            Places in the table's depths, int64, shape (num_texts,), non-decreasing in the score.
        """
        bins = torch.bucketize(scores, self.edges[speed_index], right=True)
        return self.exit_indices_of_bins(speed_index, quantile)[bins]

    def exit_indices_of_bins(self, speed_index: int, quantile: float) -> Tensor:
        """Return what `exit_indices` says for a score in each bin, int64, shape (num_bins,)."""
        return (self.cumulative[speed_index] < quantile).sum(1)


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
    _check_exits("exit_indices", exit_indices, tuple(scores.shape), num_depths)
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


@dataclass(frozen=True, eq=False)
class Lexical:
    """Exit 0, a guess at the label from the keys alone: logits = bias + sum of the keys' rows / sqrt(number of keys).

    Args:
        rows: float32, shape (num_rows, num_labels).
        bias: float32, shape (num_labels,).
    """

    rows: Tensor
    bias: Tensor


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


@dataclass(frozen=True, eq=False)
class ExitPrediction:
    """What the table says about a batch of texts.

    Args:
        exit_layers: Predicted encoder layers, each one of the table's depths, int64, shape (num_texts,).
        scores: Expected exit layer before the levels, float32, shape (num_texts,): an order, finer than the layers.
        lexical_logits: Logits of exit 0, float32, shape (num_texts, num_labels); `None` if no labels were learnt.
    """

    exit_layers: Tensor
    scores: Tensor
    lexical_logits: Tensor | None


class ExitPredictor:
    """Predict the exit layer of each text, and its label where the keys suffice, with one `embedding_bag` a batch.

    On a CUDA device with Triton a batch is one kernel instead (`geep.hash_table.bags`); see `to`.

    Invariant: a text's prediction does not depend on its neighbours in the batch, and nothing changes after
    construction; the rows of a speed are laid out when it is first asked for and kept. The kernel sums in another
    order: its scores and logits differ by rounding, its layers only where a score lies that close to a level's edge.

    Args:
        kind: The row of `PREDICTORS` that made the scores.
        table: The keys and counts.
        score_rows: What each key says about the exit layer.
        levels: What a score means.
        lexical: Exit 0, or `None`.
        multi_label: Whether the lexical logits are to be read by sigmoids instead of a softmax.
        fused: Whether to predict with the Triton kernel.

    Raises:
        ValueError: If a part does not fit the table, or holds a number that is not finite.
    """

    def __init__(
        self,
        kind: str,
        table: ExitTable,
        score_rows: ScoreRows,
        levels: Levels,
        lexical: Lexical | None = None,
        *,
        multi_label: bool = False,
        fused: bool = False,
    ) -> None:
        if kind not in PREDICTORS:
            raise ValueError(f"Unknown predictor {kind!r}; supported: {sorted(PREDICTORS)}.")
        num_speeds, num_depths = len(table.speeds), len(table.depths)
        num_bins = levels.cumulative.shape[1] if levels.cumulative.ndim == 3 else 1
        parts = {
            "score rows": (score_rows.rows, (table.num_rows, num_speeds)),
            "score prior": (score_rows.prior, (num_speeds,)),
            "level edges": (levels.edges, (num_speeds, num_bins - 1)),
            "level shares": (levels.cumulative, (num_speeds, num_bins, num_depths)),
        }
        if lexical is not None:
            num_labels = lexical.bias.numel()
            parts["label rows"] = (lexical.rows, (table.num_rows, num_labels))
            parts["label bias"] = (lexical.bias, (num_labels,))
        for name, (tensor, shape) in parts.items():
            if tensor.dtype != torch.float32 or tuple(tensor.shape) != shape or not bool(tensor.isfinite().all()):
                raise ValueError(
                    f"Found {name} of {tensor.dtype}, shape {tuple(tensor.shape)}, expected finite torch.float32 of "
                    f"shape {shape}; fit the predictor anew."
                )
        shares = levels.cumulative
        if (
            bool((levels.edges.diff(dim=1) < 0).any())
            or bool((shares.diff(dim=2) < 0).any())
            or bool((shares < 0).any())
            or not bool((shares[..., -1] == 1).all())
        ):
            raise ValueError("Found levels out of order, expected edges and shares that rise to 1; fit them anew.")
        self.kind = kind
        self.table = table
        self.multi_label = multi_label
        self._score_rows = score_rows
        self._levels = levels
        self._lexical = lexical
        self._fused = fused
        self._depths = torch.tensor(table.depths, device=score_rows.rows.device)
        self._matrices: dict[int, Tensor] = {}
        self._bags: dict[int, Bags] = {}

    @classmethod
    def fit(
        cls,
        kind: str,
        train_input_ids: Tensor,
        train_lengths: Tensor,
        train_exit_indices: Tensor,
        train_labels: Tensor | None,
        heldout_input_ids: Tensor,
        heldout_lengths: Tensor,
        heldout_exit_indices: Tensor,
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
    ) -> ExitPredictor:
        """Fill the table and fit scores and exit 0 on training texts, and the levels on held-out ones.

        Args:
            kind: A row of `PREDICTORS`: "counts" is the paper's, "fitted" a ridge regression.
            train_input_ids: Token ids of the texts one after another, int64, shape (num_tokens,).
            train_lengths: Tokens of each text, int64, shape (num_texts,).
            train_exit_indices: Place in `depths` of each text's exit, int64, shape (num_texts, num_speeds).
            train_labels: Labels as in `fit_lexical`, or `None` for no exit 0.
            heldout_input_ids: As above, of texts that the model was not trained on.
            heldout_lengths: As above.
            heldout_exit_indices: As above.
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

        Returns:
            The predictor, on the CPU.

        Raises:
            TypeError: If a tensor is not int64.
            ValueError: If `kind` is unknown, there are no texts, or shapes or numbers are off.
        """
        if kind not in PREDICTORS:
            raise ValueError(f"Unknown predictor {kind!r}; supported: {sorted(PREDICTORS)}.")
        if not train_lengths.numel() or not heldout_lengths.numel():
            raise ValueError(
                f"Found {train_lengths.numel()} training and {heldout_lengths.numel()} held-out texts, expected some "
                "of both; hold fewer texts out or bring more."
            )
        texts = TrainingTexts(train_input_ids.cpu(), train_lengths.cpu(), train_exit_indices.cpu())
        table = ExitTable.build(
            texts.input_ids,
            texts.lengths,
            texts.exit_indices,
            depths=depths,
            speeds=speeds,
            vocab_size=vocab_size,
            special_ids=special_ids,
            ngram_order=ngram_order,
            min_count=min_count,
            max_ngrams=max_ngrams,
        )
        if lexical is None and train_labels is not None:
            lexical = fit_lexical(
                table.keys,
                texts.input_ids,
                texts.lengths,
                train_labels,
                num_labels=num_labels,
                multi_label=multi_label,
            )
        score_rows = PREDICTORS[kind](table, texts)
        rows, offsets = table.rows_of(heldout_input_ids.cpu(), heldout_lengths.cpu())
        sums = F.embedding_bag(rows, _with_key_weight(table.keys, score_rows.rows), offsets, mode="sum")
        scores = sums[:, 1:] / sums[:, :1].clamp(min=1) + score_rows.prior
        levels = fit_levels(scores, heldout_exit_indices, num_depths=len(depths), num_bins=num_bins)
        return cls(kind, table, score_rows, levels, lexical, multi_label=multi_label)

    @property
    def depths(self) -> tuple[int, ...]:
        """Layers of each possible exit."""
        return self.table.depths

    @property
    def speeds(self) -> tuple[float, ...]:
        """The speeds for which there is a prediction; others take the nearest."""
        return self.table.speeds

    @property
    def lexical(self) -> Lexical | None:
        """Exit 0, `None` if there is none."""
        return self._lexical

    @property
    def num_labels(self) -> int | None:
        """Labels of exit 0, `None` if there is no exit 0."""
        return None if self._lexical is None else self._lexical.bias.numel()

    def predict(self, input_ids: Tensor, lengths: Tensor, *, speed: float, quantile: float = 0.5) -> ExitPrediction:
        """Predict where each text leaves.

        Args:
            input_ids: Token ids of the texts one after another, int64, shape (num_tokens,), on the table's device.
            lengths: Tokens of each text, int64, shape (num_texts,).
            speed: How soon texts leave, in [0, 1]; the nearest of `speeds` is taken, the slower one of two. 0 is
                the full model for every text.
            quantile: Share of such texts that should have left by the predicted layer, in (0, 1]; more is deeper.

        Returns:
            One prediction a text, in the caller's order.

        Raises:
            TypeError: If a tensor is not int64.
            ValueError: If `speed` or `quantile` is out of range, the shapes do not fit or an id is not in the
                vocabulary.
        """
        if not 0.0 <= speed <= 1.0:
            raise ValueError(f"speed must be within [0, 1], got {speed}; 0 is the full model.")
        if not 0.0 < quantile <= 1.0:
            raise ValueError(f"quantile must be in (0, 1], got {quantile}; 0.5 is the median.")
        index = self.speed_index(speed)
        if self._fused:
            found = self._reduce_fused(input_ids, lengths, index, quantile)
            layers, scores, logits = found.layers, found.scores, found.outputs
        else:
            rows, offsets = self.table.rows_of(input_ids, lengths)
            sums = F.embedding_bag(rows, self._matrix(index), offsets, mode="sum")
            num_keys = sums[:, 0].clamp(min=1)
            scores = sums[:, 1] / num_keys + self._score_rows.prior[index]
            layers = self._depths[self._levels.exit_indices(scores, index, quantile)]
            logits = sums[:, 2:] * num_keys.rsqrt()[:, None]
            if self._lexical is not None:
                logits += self._lexical.bias
        if speed == 0.0:
            layers = self._depths[-1].expand_as(layers).clone()
        return ExitPrediction(layers, scores, None if self._lexical is None else logits)

    def speed_index(self, speed: float) -> int:
        """Place among `speeds` of the one that serves a speed: the nearest, the slower one of two."""
        return min(range(len(self.speeds)), key=lambda each: (abs(self.speeds[each] - speed), each))

    @property
    def device(self) -> torch.device:
        """Where token ids are expected."""
        return self._depths.device

    def to(self, device: torch.device | str, *, fused: bool | None = None) -> ExitPredictor:
        """Return a copy that predicts on `device`; the counts, which no prediction reads, stay where they are.

        Args:
            device: Where token ids will be.
            fused: Whether to predict with the Triton kernel. `None` does so on CUDA devices where Triton is
                installed; `True` elsewhere needs Triton's interpreter.
        """
        keys = replace(self.table.keys, ngrams=self.table.keys.ngrams.to(device))
        return ExitPredictor(
            self.kind,
            replace(self.table, keys=keys),
            ScoreRows(*_moved(self._score_rows, device)),
            Levels(*_moved(self._levels, device)),
            None if self._lexical is None else Lexical(*_moved(self._lexical, device)),
            multi_label=self.multi_label,
            fused=kernels_run_on(torch.device(device).type) if fused is None else fused,
        )

    def save(self, path: str | Path, *, fingerprint: dict[str, str]) -> Path:
        """Write everything to one safetensors file; the same predictor gives the same bytes.

        The file appears whole or not at all: it is written under another name, flushed and renamed.

        Args:
            path: The file if it ends in `.safetensors`, else a folder that gets `exit_table.safetensors`.
            fingerprint: What the table belongs to, such as hashes of tokenizer and model. `load` asks for the same.

        Returns:
            The file.
        """
        path = _file(path)
        # Rows that were never counted are zero everywhere, so they need no place in the file.
        seen = torch.nonzero(self.table.counts.flatten(1).any(1))[:, 0]
        slots = self.table.keys.ngrams.state()
        tensors = {
            "rows": seen,
            "counts": self.table.counts[seen],
            "score_rows": self._score_rows.rows.cpu()[seen],
            "score_prior": self._score_rows.prior,
            "level_edges": self._levels.edges,
            "level_shares": self._levels.cumulative,
            "ngram_keys": slots["keys"],
            "ngram_values": slots["values"],
        }
        if self._lexical is not None:
            tensors["label_rows"] = self._lexical.rows.cpu()[seen]
            tensors["label_bias"] = self._lexical.bias
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        config = _FileConfig(
            kind=self.kind,
            depths=self.depths,
            speeds=self.speeds,
            vocab_size=self.table.vocab_size,
            special_ids=self.table.keys.special_ids,
            ngram_order=self.table.keys.ngram_order,
            multi_label=self.multi_label,
        )
        header = {"format": _FORMAT, "config": asdict(config), "fingerprint": fingerprint}
        text = json.dumps(header, sort_keys=True)
        # One entry for both: safetensors writes the entries of its metadata in an order that changes from run to run.
        metadata = {_METADATA: json.dumps({"header": text, "sha256": _digest(tensors, text)}, sort_keys=True)}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        try:
            with partial.open("wb") as file:
                file.write(save_safetensors(tensors, metadata))
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, path: str | Path, *, fingerprint: dict[str, str]) -> ExitPredictor:
        """Read what `save` wrote, and refuse anything else.

        Args:
            path: The file, or the folder it is in.
            fingerprint: What the table has to belong to.

        Returns:
            The predictor, on the CPU; its predictions equal the saved one's.

        Raises:
            FileNotFoundError: If there is no file.
            ValueError: If the file belongs to something else, is damaged, or holds shapes or numbers that cannot be.
        """
        path = _file(path)
        if not path.is_file():
            raise FileNotFoundError(f"No exit table at {path}; make one with `geep profile`.")
        advice = "make the table anew with `geep profile`."
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
        except SafetensorError as err:
            raise ValueError(f"{path} is no whole safetensors file ({err}), expected an exit table; {advice}") from err
        if _METADATA not in metadata:
            raise ValueError(f"{path} has metadata {sorted(metadata)}, expected [{_METADATA!r}]; {advice}")
        try:
            signed = json.loads(metadata[_METADATA])
            text, expected = signed["header"], signed["sha256"]
            header = json.loads(text)
            form, found, fields = header["format"], header["fingerprint"], header["config"]
        except (KeyError, TypeError, ValueError) as err:
            raise ValueError(
                f"The header of {path} cannot be read ({err!r}), expected what save wrote; {advice}"
            ) from err
        if form != _FORMAT:
            raise ValueError(f"{path} has format {form!r}, expected {_FORMAT!r}; {advice}")
        if expected != _digest(tensors, text):
            raise ValueError(f"The contents of {path} differ from their checksum, expected them unchanged; {advice}")
        if found != fingerprint:
            names = sorted(name for name in {*found, *fingerprint} if found.get(name) != fingerprint.get(name))
            raise ValueError(
                f"{path} belongs to another model or tokenizer: found { ({n: found.get(n) for n in names}) }, expected "
                f"{ ({n: fingerprint.get(n) for n in names}) }; {advice}"
            )
        try:
            return cls._from_tensors(fields, tensors)
        except (KeyError, TypeError, ValueError) as err:
            raise ValueError(f"{path} holds no usable exit table: {err} Expected what save wrote; {advice}") from err

    @classmethod
    def _from_tensors(cls, fields: dict[str, Any], tensors: dict[str, Tensor]) -> ExitPredictor:
        config = _FileConfig(**fields)
        ngrams = HashTable.from_state({"keys": tensors["ngram_keys"], "values": tensors["ngram_values"]})
        values = tensors["ngram_values"][tensors["ngram_keys"] != EMPTY_KEY].sort().values
        if not torch.equal(values, torch.arange(len(ngrams))):
            raise ValueError(f"Found n-gram rows other than 0..{len(ngrams) - 1}.")
        keys = Keys(config.vocab_size, tuple(config.special_ids), config.ngram_order, ngrams)
        rows, counts, score_rows = tensors["rows"], tensors["counts"], tensors["score_rows"]
        if (
            rows.dtype != torch.int64
            or rows.ndim != 1
            or bool((rows.diff() <= 0).any())
            or bool(((rows < 0) | (rows >= keys.neutral_row)).any())
        ):
            raise ValueError(f"Found rows that are not increasing within 0..{keys.neutral_row - 1}.")
        if counts.dtype != torch.int32 or bool((counts < 0).any()):
            raise ValueError(f"Found counts of {counts.dtype} or below 0.")
        table = ExitTable(keys, tuple(config.depths), tuple(config.speeds), _spread(keys, rows, "counts", counts))
        lexical = None
        if "label_rows" in tensors:
            lexical = Lexical(_spread(keys, rows, "label_rows", tensors["label_rows"]), tensors["label_bias"])
        return cls(
            config.kind,
            table,
            ScoreRows(_spread(keys, rows, "score_rows", score_rows), tensors["score_prior"]),
            Levels(tensors["level_edges"], tensors["level_shares"]),
            lexical,
            multi_label=config.multi_label,
        )

    def _matrix(self, speed_index: int) -> Tensor:
        """Return key weight, score and label rows side by side, shape (num_rows, 2 + num_labels)."""
        if speed_index not in self._matrices:
            parts = [self._score_rows.rows[:, speed_index : speed_index + 1]]
            if self._lexical is not None:
                parts.append(self._lexical.rows)
            self._matrices[speed_index] = _with_key_weight(self.table.keys, torch.cat(parts, 1))
        return self._matrices[speed_index]

    def _reduce_fused(self, input_ids: Tensor, lengths: Tensor, speed_index: int, quantile: float) -> BagSums:
        # Triton is no dependency of geep: only who predicts with the kernel needs it.
        from geep.hash_table.bags import Bags, reduce_bags

        keys = self.table.keys
        _check_texts(input_ids, lengths, keys.vocab_size)
        if speed_index not in self._bags:
            base = [self._score_rows.prior[speed_index : speed_index + 1]]
            if self._lexical is not None:
                base.append(self._lexical.bias)
            self._bags[speed_index] = Bags(
                table=keys.ngrams,
                order=keys.ngram_order,
                symbol_bits=_TOKEN_BITS,
                size_shift=_ORDER_SHIFT,
                is_key=_usable(torch.arange(keys.vocab_size, device=input_ids.device), keys.special_ids),
                # The kernel counts keys itself, so the key weight in the first column stays out.
                rows=self._matrix(speed_index)[:, 1:],
                base=torch.cat(base),
                edges=self._levels.edges[speed_index].contiguous(),
            )
        layers = self._depths[self._levels.exit_indices_of_bins(speed_index, quantile)]
        return reduce_bags(input_ids, lengths, self._bags[speed_index], layers)


@dataclass(frozen=True)
class _FileConfig:
    """The part of a file that is no tensor."""

    kind: str
    depths: tuple[int, ...]
    speeds: tuple[float, ...]
    vocab_size: int
    special_ids: tuple[int, ...]
    ngram_order: int
    multi_label: bool


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
    rows, _ = keys.rows_of(input_ids, lengths)
    text = _text_of(lengths * keys.ngram_order, rows.numel())
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


def _usable(input_ids: Tensor, special_ids: tuple[int, ...]) -> Tensor:
    return torch.isin(input_ids, torch.tensor(special_ids, dtype=torch.int64, device=input_ids.device), invert=True)


def _text_of(lengths: Tensor, total: int) -> Tensor:
    """Return the text that each of `total` entries belongs to."""
    texts = torch.arange(lengths.numel(), device=lengths.device)
    return texts.repeat_interleave(lengths, output_size=total)


def _ngrams(input_ids: Tensor, lengths: Tensor, usable: Tensor, order: int) -> list[tuple[Tensor, Tensor]]:
    """Return, for each size 2 … order, where n-grams begin and what they are packed to.

    18 bits a token below 2 bits of order: n-grams of different sizes never share a number, whatever their ids.
    """
    text = _text_of(lengths, input_ids.numel())
    packed, inside, found = input_ids, usable, []
    for size in range(2, order + 1):
        last = size - 1
        packed = (packed[:-1] << _TOKEN_BITS) | input_ids[last:]
        inside = inside[:-1] & usable[last:] & (text[:-last] == text[last:])
        starts = torch.nonzero(inside)[:, 0]
        found.append((starts, packed[starts] | (size << _ORDER_SHIFT)))
    return found


def _frequent(packed: Tensor, min_count: int, max_ngrams: int) -> HashTable:
    """Number the most frequent n-grams in the order of their packed ids."""
    ngrams, counts = packed.unique(return_counts=True)
    ngrams, counts = ngrams[counts >= min_count], counts[counts >= min_count]
    # `unique` sorts, so a stable sort by frequency leaves ties in the order of their ids.
    kept = ngrams[counts.sort(descending=True, stable=True).indices[:max_ngrams]].sort().values
    # Half empty: a search in a fuller table takes several times as many rounds.
    table = HashTable(max(2 * kept.numel(), 2))
    table.insert_or_assign(kept, torch.arange(kept.numel()))
    return table


def _with_key_weight(keys: Keys, rows: Tensor) -> Tensor:
    """Put a column before `rows` that is 1 for every key and 0 for the neutral row: its sum counts a text's keys."""
    weight = torch.ones(keys.num_rows, 1, device=rows.device)
    weight[-1] = 0
    return torch.cat([weight, rows], 1)


def _spread(keys: Keys, rows: Tensor, name: str, values: Tensor) -> Tensor:
    """Put the values of the given rows into a tensor of all rows, zero elsewhere."""
    if values.ndim < 2 or values.shape[0] != rows.numel():
        raise ValueError(f"Found {name} of shape {tuple(values.shape)} for {rows.numel()} rows.")
    spread = torch.zeros(keys.num_rows, *values.shape[1:], dtype=values.dtype)
    spread[rows] = values
    return spread


def _moved(record: ScoreRows | Levels | Lexical, device: torch.device | str) -> list[Tensor]:
    return [tensor.to(device) for tensor in vars(record).values()]


def _file(path: str | Path) -> Path:
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / FILE_NAME


def _digest(tensors: dict[str, Tensor], header: str) -> str:
    """Return a checksum of header, names, types, shapes and bytes: a length alone does not show a hole in a file."""
    digest = hashlib.sha256(header.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _is_grid(speeds: tuple[float, ...]) -> bool:
    return speeds[0] >= 0 and speeds[-1] <= 1 and list(speeds) == sorted(set(speeds))


def _check_texts(input_ids: Tensor, lengths: Tensor, vocab_size: int) -> None:
    for name, tensor in (("input_ids", input_ids), ("lengths", lengths)):
        if tensor.dtype != torch.int64:
            raise TypeError(f"{name} must be torch.int64, got {tensor.dtype}; convert them with .long().")
        if tensor.ndim != 1:
            raise ValueError(f"{name} must be flat, got shape {tuple(tensor.shape)}; pack the texts without padding.")
    # One look at the numbers, for each makes the host wait for a GPU.
    zero = input_ids.new_zeros(1)
    ids, counts = (tensor if tensor.numel() else zero for tensor in (input_ids, lengths))
    shortest, total, smallest, largest = torch.stack([counts.min(), counts.sum(), ids.min(), ids.max()]).tolist()
    if shortest < 0 or total != input_ids.numel():
        raise ValueError(
            f"lengths must be >= 0 and sum to the number of tokens: found a sum of {total} for "
            f"{input_ids.numel()} tokens; give the number of tokens of each text, special ones included."
        )
    if smallest < 0 or largest >= vocab_size:
        raise ValueError(
            f"input_ids must be within 0..{vocab_size - 1}, found {smallest}..{largest}; "
            "use the tokenizer that the table was built with."
        )


def _check_exits(name: str, exit_indices: Tensor, shape: tuple[int, ...], num_depths: int) -> None:
    if exit_indices.dtype != torch.int64:
        raise TypeError(f"{name} must be torch.int64, got {exit_indices.dtype}; convert them with .long().")
    if tuple(exit_indices.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(exit_indices.shape)}; give one a text and speed.")
    if bool(((exit_indices < 0) | (exit_indices >= num_depths)).any()):
        raise ValueError(
            f"{name} must be within 0..{num_depths - 1}, found {int(exit_indices.min())}..{int(exit_indices.max())}; "
            "give places in depths, not layers."
        )


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
