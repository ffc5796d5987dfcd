"""Packed texts a part at a time: what is made of each token is never held for all of them at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from geep.hash_table import HashTable
from geep.predictor.keys import Keys

MOST_TOKENS = 1 << 20
"""Tokens of a part: enough that the steps of Python between two parts cost nothing."""

MOST_NGRAMS = 1 << 24
"""N-grams that are sorted at once, in about half a gigabyte."""


@dataclass(frozen=True, eq=False)
class Part:
    """Some texts in a row.

    Args:
        texts: Which ones.
        input_ids: Their token ids one after another, int64, shape (num_tokens,).
        lengths: Tokens of each, int64, shape (num_texts,).
    """

    texts: slice
    input_ids: Tensor
    lengths: Tensor


def parts_of(input_ids: Tensor, lengths: Tensor, *, most_tokens: int | None = None) -> Iterator[Part]:
    """Cut texts into parts of at most `most_tokens` tokens (None: `MOST_TOKENS`), but at least one text."""
    most = MOST_TOKENS if most_tokens is None else most_tokens
    ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    first = 0
    while first < lengths.numel():
        start = int(ends[first])
        last = max(first + 1, int(torch.searchsorted(ends, start + most, right=True)) - 1)
        yield Part(slice(first, last), input_ids[start : int(ends[last])], lengths[first:last])
        first = last


def frequent_ngrams(
    keys: Keys, input_ids: Tensor, lengths: Tensor, *, min_count: int, max_ngrams: int, most_ngrams: int | None = None
) -> HashTable:
    """Number the most frequent n-grams of texts in the order of their packed ids.

    Exact, in bounded memory, and the same whatever the order of the texts: n-grams are divided by a hash, and one class
    of them is counted at a time, for which the texts are read again.

    Args:
        keys: What an n-gram is; its own n-grams are not looked at.
        input_ids: Token ids of the texts one after another, int64, shape (num_tokens,).
        lengths: Tokens of each text, int64, shape (num_texts,).
        min_count: Occurrences that an n-gram needs.
        max_ngrams: How many are kept; of equally frequent ones those with smaller packed ids.
        most_ngrams: How many are sorted at once, about. None: `MOST_NGRAMS`.
    """
    # In pairs a token that both texts have is looked up, too.
    most = input_ids.numel() * (keys.ngram_order - (keys.separator_id is None))
    num_classes = -(-most // (MOST_NGRAMS if most_ngrams is None else most_ngrams))
    best, frequency = torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    for each in range(num_classes):
        found = []
        for part in parts_of(input_ids, lengths):
            packed = keys.pack(part.input_ids, part.lengths).packed
            found.append(packed if num_classes == 1 else packed[_class_of(packed, num_classes) == each])
        ngrams, counts = torch.cat(found).unique(return_counts=True)
        enough = counts >= min_count
        best, order = torch.cat([best, ngrams[enough]]).sort()
        frequency = torch.cat([frequency, counts[enough]])[order]
        # A stable sort by frequency leaves ties in the order of their ids.
        kept = frequency.sort(descending=True, stable=True).indices[:max_ngrams]
        best, frequency = best[kept], frequency[kept]
    best = best.sort().values
    # Half empty: a search in a fuller table takes several times as many rounds.
    table = HashTable(max(2 * best.numel(), 2))
    table.insert_or_assign(best, torch.arange(best.numel()))
    return table


def _class_of(packed: Tensor, num_classes: int) -> Tensor:
    # Fibonacci hashing: the product's high bits depend on all of the key's.
    return ((packed * -7046029254386353131) >> 40) % num_classes
