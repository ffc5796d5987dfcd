"""Logistic regression of sparse features towards soft targets, which scikit-learn's does not take.

The losses are convex, and SciPy's L-BFGS finds their minimum; all outputs share a pass over the features. Read `Loss`,
`fit_linear`, then `fit_best`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import minimize
from scipy.special import expit, log_softmax

Floats = NDArray[np.floating[Any]]

# Texts whose outputs are held at once.
_BLOCK = 1 << 16

# Texts on which a penalty is chosen, at most: it is a prior's, and hardly changes with their number.
_CHOOSE_ON = 1 << 15

# Every eighth text says which penalty is best.
_CHECK_EVERY = 8

# Nearer to the minimum the answers on other texts stay what they are.
_OPTIONS = {"maxiter": 100, "ftol": 1e-5, "gtol": 1e-7}


@dataclass(frozen=True)
class Loss:
    """What a model is fitted by: convex in the outputs, a sum over texts.

    Attributes:
        slope: Of outputs and targets, both (num_texts, num_outputs), the loss and its gradient by the outputs.
        constant: Of the targets' mean, (num_outputs,), the best outputs where nothing is known of a text.
    """

    slope: Callable[[Floats, Floats], tuple[float, Floats]]
    constant: Callable[[Floats], Floats]


@dataclass(frozen=True, eq=False)
class LinearModel:
    """Outputs = features @ weights + bias.

    Attributes:
        weights: Shape (num_columns, num_outputs).
        bias: Shape (num_outputs,).
    """

    weights: Floats
    bias: Floats

    def outputs(self, matrix: sparse.csr_matrix) -> Floats:
        """Return the outputs of each text, float32, shape (num_texts, num_outputs)."""
        found: Floats = matrix @ self.weights.astype(np.float32)
        return found + self.bias.astype(np.float32)


def _softmax(outputs: Floats, targets: Floats) -> tuple[float, Floats]:
    logs = log_softmax(outputs, axis=1)
    return -float((targets * logs).sum(dtype=np.float64)), np.exp(logs) - targets


def _sigmoids(outputs: Floats, targets: Floats) -> tuple[float, Floats]:
    losses = np.logaddexp(0, outputs) - targets * outputs
    return float(losses.sum(dtype=np.float64)), expit(outputs) - targets


SOFTMAX = Loss(_softmax, np.log)
SIGMOIDS = Loss(_sigmoids, lambda mean: np.log(mean / (1 - mean)))


def fit_linear(
    matrix: sparse.csr_matrix, targets: Floats, loss: Loss, *, penalty: float, start: LinearModel
) -> LinearModel:
    """Minimise a loss plus penalty / 2 times the squared weights; the bias is free.

    The same numbers give the same model on one machine, to the bit.

    Args:
        matrix: Features, float32, shape (num_texts, num_columns).
        targets: Probabilities, float32, shape (num_texts, num_outputs); none is 0, or 1, for all texts.
        loss: `SOFTMAX` or `SIGMOIDS`.
        penalty: Above 0; scikit-learn's 1 / C.
        start: Where to begin: near the minimum few steps are left.
    """
    num_texts, shape = len(targets), (matrix.shape[1] + 1, targets.shape[1])
    blocks = list(_blocks(matrix, targets))

    def objective(flat: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        both = flat.reshape(shape)
        model, slope = LinearModel(both[:-1].astype(np.float32), both[-1]), np.zeros(shape)
        total = penalty / 2 * float(np.square(both[:-1]).sum())
        slope[:-1] = penalty * both[:-1]
        for rows, wanted in blocks:
            value, by_output = loss.slope(model.outputs(rows), wanted)
            total += value
            slope[:-1] += rows.T @ by_output
            slope[-1] += by_output.sum(0, dtype=np.float64)
        return total / num_texts, slope.ravel() / num_texts

    first = np.concatenate([start.weights, start.bias[None]])
    # Half the usual number of past steps: each is as long as all weights, which may be tens of millions.
    options = {**_OPTIONS, "maxcor": 5}
    found = minimize(objective, first.ravel(), jac=True, method="L-BFGS-B", options=options).x.reshape(shape)
    return LinearModel(found[:-1], found[-1])


def fit_best(matrix: sparse.csr_matrix, targets: Floats, loss: Loss, penalties: Sequence[float]) -> LinearModel:
    """Fit with the penalty that best foretells some texts from others (`for_choosing`), in the end on all.

    Penalties are tried from the strongest on, each from where the one before ended, until one is worse.

    Args:
        matrix: As in `fit_linear`.
        targets: As in `fit_linear`.
        loss: As in `fit_linear`.
        penalties: From strong to weak. Where there are too few texts to choose on, the first is taken.
    """
    # Of all texts: among those to learn from an output may lack texts.
    constant = loss.constant(targets.mean(0, dtype=np.float64))
    model = found = LinearModel(np.zeros((matrix.shape[1], targets.shape[1])), constant)
    rows, best, least = for_choosing(len(targets)), penalties[0], np.inf
    if rows.check.size and len(penalties) > 1:
        learned = matrix[rows.learn], targets[rows.learn]
        for penalty in penalties:
            found = fit_linear(*learned, loss, penalty=penalty, start=found)
            value, _ = loss.slope(found.outputs(matrix[rows.check]), targets[rows.check])
            if value >= least:
                break
            best, model, least = penalty, found, value
    return fit_linear(matrix, targets, loss, penalty=best, start=model)


@dataclass(frozen=True, eq=False)
class ForChoosing:
    """Texts on which a penalty is chosen: fitted to those to learn from, it is judged on those to check.

    Attributes:
        learn: Their places, int64.
        check: Places of the others, int64; empty where there are fewer than eight texts.
    """

    learn: NDArray[np.int64]
    check: NDArray[np.int64]


def for_choosing(num_texts: int) -> ForChoosing:
    """Of many texts take a part, evenly spread; every eighth of them checks."""
    places = np.arange(0, num_texts, max(1, -(-num_texts // _CHOOSE_ON)))
    is_check = np.arange(len(places)) % _CHECK_EVERY == _CHECK_EVERY - 1
    return ForChoosing(places[~is_check], places[is_check])


def _blocks(matrix: sparse.csr_matrix, targets: Floats) -> list[tuple[sparse.csr_matrix, Floats]]:
    """Cut features and targets into blocks of texts, without copying them."""
    found = []
    for first in range(0, len(targets), _BLOCK):
        last = min(first + _BLOCK, len(targets))
        start, end = matrix.indptr[first], matrix.indptr[last]
        parts = matrix.data[start:end], matrix.indices[start:end], matrix.indptr[first : last + 1] - start
        found.append((sparse.csr_matrix(parts, shape=(last - first, matrix.shape[1])), targets[first:last]))
    return found
