"""Which keys stand in which texts, as a sparse matrix: what regressions on keys are fitted on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from geep.predictor.keys import Keys, text_of_rows
from geep.predictor.parts import parts_of

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Features:
    """How often each key stands in each text, only for the keys that stand in any.

    Args:
        matrix: Occurrences, float32, shape (num_texts, num_columns).
        columns: The row of each column's key, int64, shape (num_columns,), increasing.
        num_keys: Keys of each text, at least 1, shape (num_texts,).
        scale: Inverse document frequency of each column, shape (num_columns,).
    """

    matrix: sparse.csr_matrix
    columns: Tensor
    num_keys: Floats
    scale: Floats

    @classmethod
    def of(cls, keys: Keys, input_ids: Tensor, lengths: Tensor) -> Features:
        """Find the keys of texts: ids one after another, int64, (num_tokens,); tokens of each, int64, (num_texts,)."""
        num_texts = lengths.numel()
        found: list[tuple[NDArray[np.int32], Floats]] = []
        num_keys, entries = np.empty(num_texts, np.float32), np.zeros(num_texts + 1, np.int64)
        document_frequency = np.zeros(keys.num_rows, np.int64)
        for part in parts_of(input_ids, lengths):
            rows, offsets = keys.rows_of(part.input_ids, part.lengths)
            known = rows != keys.neutral_row
            text = text_of_rows(offsets, rows.numel())[known]
            each = torch.bincount(text, minlength=part.lengths.numel()).numpy()
            ends = np.concatenate([[0], each.cumsum()])
            ones, indices = np.ones(ends[-1], np.float32), rows[known].int().numpy()
            block = sparse.csr_matrix((ones, indices, ends), shape=(len(each), keys.num_rows))
            block.sum_duplicates()  # from here one entry is one text that has the key
            found.append((block.indices, block.data))
            num_keys[part.texts] = np.maximum(each, 1)
            entries[1:][part.texts] = np.diff(block.indptr)
            document_frequency += np.bincount(block.indices, minlength=keys.num_rows)
        columns = np.flatnonzero(document_frequency)
        place = np.zeros(keys.num_rows, np.int32)
        place[columns] = np.arange(len(columns))
        indices = np.concatenate([np.empty(0, np.int32), *(place[rows] for rows, _ in found)])
        data = np.concatenate([np.empty(0, np.float32), *(counts for _, counts in found)])
        matrix = sparse.csr_matrix((data, indices, entries.cumsum()), shape=(num_texts, len(columns)))
        scale = np.log((1 + num_texts) / (1 + document_frequency[columns])) + 1
        return cls(matrix, torch.from_numpy(columns), num_keys, scale.astype(np.float32))

    def weighted(self, *, exponent: float) -> sparse.csr_matrix:
        """Return occurrences times the keys' scale, each text divided by its number of keys to the `exponent`."""
        matrix = self.matrix.copy()
        matrix.data *= self.scale[matrix.indices]
        matrix.data *= np.repeat(self.num_keys**-exponent, np.diff(matrix.indptr))
        return matrix

    def rows(self, weights: NDArray[np.floating]) -> Tensor:
        """Fold the scale into a model's weights, (num_columns, num_outputs)."""
        return torch.from_numpy(weights * self.scale[:, None]).float()
