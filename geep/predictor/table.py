"""What is known of each key, and parts of a predictor that are checked to fit each other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from geep.hash_table import HashTable
from geep.predictor.keys import Keys, check_texts, text_of_rows
from geep.predictor.parts import frequent_ngrams, parts_of

MAX_NGRAMS = 200_000
"""N-grams that get a row, unless others are asked for."""


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
        max_ngrams: int = MAX_NGRAMS,
        separator_id: int | None = None,
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
            separator_id: The special id that ends the first text of a pair, `None` for single texts; see `Keys`.

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
        keys = Keys(vocab_size, special_ids, ngram_order, HashTable(1), separator_id)
        check_texts(input_ids, lengths, vocab_size)
        check_exits("exit_indices", exit_indices, (lengths.numel(), len(speeds)), len(depths))
        ngrams = frequent_ngrams(keys, input_ids, lengths, min_count=min_count, max_ngrams=max_ngrams)
        keys = replace(keys, ngrams=ngrams)
        num_depths = len(depths)
        counts = torch.zeros((keys.num_rows, len(speeds), num_depths), dtype=torch.int32)
        for part in parts_of(input_ids, lengths):
            rows, offsets = keys.rows_of(part.input_ids, part.lengths)
            known = rows != keys.neutral_row
            text, rows = text_of_rows(offsets, rows.numel())[known], rows[known]
            for speed in range(len(speeds)):
                cells = rows * num_depths + exit_indices[part.texts, speed][text]
                found = torch.bincount(cells, minlength=keys.num_rows * num_depths)
                counts[:, speed] += found.view(-1, num_depths)
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


@dataclass(frozen=True, eq=False)
class Lexical:
    """Exit 0, a guess at the label from the keys alone: logits = bias + sum of the keys' rows / sqrt(number of keys).

    Args:
        rows: float32, shape (num_rows, num_labels).
        bias: float32, shape (num_labels,).
    """

    rows: Tensor
    bias: Tensor


@dataclass(frozen=True, eq=False)
class FittedTable:
    """A table and what was learned from it: everything a predictor asks and its file holds.

    Args:
        kind: The row of `PREDICTORS` that made the scores.
        table: The keys and counts.
        score_rows: What each key says about the exit layer.
        levels: What a score means.
        lexical: Exit 0, or `None`.
        multi_label: Whether the lexical logits are to be read by sigmoids instead of a softmax.
        seen: Hashes of the texts that all of it was learned from (`text_hashes`), int64, increasing: what was learned
            or chosen on a text proves nothing on it.

    Raises:
        ValueError: If a part does not fit the table, or holds a number that is not finite.
    """

    kind: str
    table: ExitTable
    score_rows: ScoreRows
    levels: Levels
    lexical: Lexical | None = None
    multi_label: bool = False
    seen: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    def __post_init__(self) -> None:
        table, levels, lexical = self.table, self.levels, self.lexical
        num_speeds, num_depths = len(table.speeds), len(table.depths)
        num_bins = levels.cumulative.shape[1] if levels.cumulative.ndim == 3 else 1
        parts = {
            "score rows": (self.score_rows.rows, (table.num_rows, num_speeds)),
            "score prior": (self.score_rows.prior, (num_speeds,)),
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
        if self.seen.dtype != torch.int64 or self.seen.ndim != 1 or bool((self.seen.diff() <= 0).any()):
            raise ValueError("Found hashes of seen texts that do not rise, expected int64 ones; fit them anew.")
        shares = levels.cumulative
        if (
            bool((levels.edges.diff(dim=1) < 0).any())
            or bool((shares.diff(dim=2) < 0).any())
            or bool((shares < 0).any())
            or not bool((shares[..., -1] == 1).all())
        ):
            raise ValueError("Found levels out of order, expected edges and shares that rise to 1; fit them anew.")


def _is_grid(speeds: tuple[float, ...]) -> bool:
    return speeds[0] >= 0 and speeds[-1] <= 1 and list(speeds) == sorted(set(speeds))


def check_exits(name: str, exit_indices: Tensor, shape: tuple[int, ...], num_depths: int) -> None:
    """Refuse exits of another type or shape, or that are no places in the depths."""
    if exit_indices.dtype != torch.int64:
        raise TypeError(f"{name} must be torch.int64, got {exit_indices.dtype}; convert them with .long().")
    if tuple(exit_indices.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(exit_indices.shape)}; give one a text and speed.")
    if bool(((exit_indices < 0) | (exit_indices >= num_depths)).any()):
        raise ValueError(
            f"{name} must be within 0..{num_depths - 1}, found {int(exit_indices.min())}..{int(exit_indices.max())}; "
            "give places in depths, not layers."
        )
