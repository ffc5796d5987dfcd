"""What rows are for: learned from, profiled, calibrated on. Test rows are not touched.

Read `divide`, then `holdout`. `DataPlan` is a way of dividing, in words that can be written down.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geep.data.datasets import load_dataset
from geep.data.rows import PAIR_COLUMN
from geep.data.splits import Dataset, Split


@dataclass(frozen=True, eq=False)
class Holdout:
    """A split cut in two: every row is in exactly one part, both in the original order.

    Attributes:
        rest: The rows that stay.
        held: The rows held out.
    """

    rest: Split
    held: Split


@dataclass(frozen=True, eq=False)
class Halves:
    """Held-out data cut in two: one half to build from, one half to promise by. No row is in both.

    Attributes:
        profile: Rows whose exits are profiled.
        calibration: Rows on which the promise is tested.
    """

    profile: Split
    calibration: Split


def holdout(split: Split, fraction: float, *, seed: int = 0, max_rows: int | None = None) -> Holdout:
    """Hold a random part of a split out.

    The same (length, labels, seed, fraction) always give the same cut. With one label a row the cut is stratified:
    each label keeps its share up to rounding and at least one row in ``rest``, and labels of two and more rows are in
    ``held`` as well wherever it has room for all of them.

    Args:
        split: At least two rows.
        fraction: Share of the rows to hold out, in (0, 1).
        seed: Seed of the cut.
        max_rows: Limit on the rows held out. None: no limit.

    Raises:
        ValueError: If the fraction or the limit is out of range, or there are fewer than two rows.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must be within (0, 1), got {fraction}.")
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows must be at least 1, got {max_rows}.")
    if len(split) < 2:
        raise ValueError(f"Holding rows out needs at least 2 rows, got {len(split)}.")
    target = min(max(1, round(len(split) * fraction)), len(split) - 1)
    if max_rows is not None:
        target = min(target, max_rows)
    order = np.random.default_rng(seed).permutation(len(split))
    if split.labels is not None and split.labels.ndim == 1:
        values, groups = np.unique(split.labels, return_inverse=True)
        counts = _shares(np.bincount(groups, minlength=len(values)), target)
        taken = [order[groups[order] == group][:count] for group, count in enumerate(counts)]
        held = np.concatenate(taken)
    else:
        held = order[:target]
    is_held = np.zeros(len(split), dtype=bool)
    is_held[held] = True
    return Holdout(rest=split.select(np.flatnonzero(~is_held)), held=split.select(np.flatnonzero(is_held)))


def _shares(sizes: NDArray[np.int64], target: int) -> NDArray[np.int64]:
    """Rows to take of each group: as near to its share as whole rows allow, and never a whole group."""
    quota = sizes * (target / sizes.sum())
    upper = sizes - 1
    lower = np.minimum(upper, 1)
    if lower.sum() > target:
        lower = np.zeros_like(sizes)
    counts: NDArray[np.int64] = np.clip(np.floor(quota).astype(np.int64), lower, upper)
    while counts.sum() < target and (counts < upper).any():
        counts[np.argmax(np.where(counts < upper, quota - counts, -np.inf))] += 1
    while counts.sum() > target:
        counts[np.argmax(np.where(counts > lower, counts - quota, -np.inf))] -= 1
    return counts


@dataclass(frozen=True, eq=False)
class Parts:
    """What training rows and development rows are for.

    Attributes:
        train: Rows that the model learns from; they also fill the exit table.
        profile: Rows that nothing was trained on: temperatures, criterion and the table's levels come from them.
        calibration: Rows that nothing was trained or chosen on: promises are certified on them.
        label_names: Names of the labels, by id.
        multi_label: Whether a row has any number of labels and not exactly one.
    """

    train: Split
    profile: Split
    calibration: Split
    label_names: tuple[str, ...]
    multi_label: bool

    def digests(self) -> dict[str, str]:
        """Return the digest of each part: the same rows in the same part give the same ones."""
        return {name: getattr(self, name).digest() for name in ("train", "profile", "calibration")}


def unseen(rows: Split, train: Split) -> Split:
    """Return the rows whose texts are not among the training rows', in order: what was learned proves nothing."""
    # Hashes are smaller than texts. A text that shares one by chance is left out, too: one in 2**60 or so.
    learned = {hash(text) for text in train.inputs}
    kept = [number for number, text in enumerate(rows.inputs) if hash(text) not in learned]
    return rows if len(kept) == len(rows) else rows.select(kept)


def divide(
    dataset: Dataset, *, fraction: float = 0.2, max_heldout: int = 8000, max_train: int | None = None, seed: int = 0
) -> Parts:
    """Decide which rows of a data set are learned from, profiled and calibrated on; the test rows are not touched.

    The held-out rows are the development split where there is one, else a share of the training rows. Training rows
    that `max_train` leaves out join them: promises are the tighter, the more rows they are certified on. The same data
    set and arguments always give the same parts.

    Args:
        dataset: The data set.
        fraction: Share of the training rows held out where there is no development split.
        max_heldout: Limit on the rows held out.
        max_train: Limit on the rows learned from, drawn after holding out. None: all.
        seed: Seed of the cuts.
    """
    if dataset.dev is not None:
        rest, held = dataset.train, dataset.dev
    else:
        cut = holdout(dataset.train, fraction, seed=seed, max_rows=max_heldout)
        rest, held = cut.rest, cut.held
    train = rest
    if max_train is not None and max_train < len(rest):
        order = np.random.default_rng(seed).permutation(len(rest))
        train = rest.select(np.sort(order[:max_train]))
        if (held.labels is None) == (rest.labels is None):
            held = held.join(rest.select(order[max_train:][: max(max_heldout - len(held), 0)]))
    parts = halves(held, seed=seed)
    return Parts(train, parts.profile, parts.calibration, dataset.label_names, dataset.multi_label)


def halves(split: Split, *, seed: int = 0) -> Halves:
    """Cut a split into a half for profiling and a half for calibration, as `holdout` does.

    Raises:
        ValueError: If there are fewer than two rows.
    """
    parts = holdout(split, 0.5, seed=seed)
    return Halves(profile=parts.rest, calibration=parts.held)


@dataclass(frozen=True, slots=True)
class DataPlan:
    """Where rows come from and how they are divided: the same plan finds the same rows again.

    Attributes:
        name: See `load_dataset`.
        data_dir: See `load_dataset`.
        holdout: Share of the training rows held out where there is no development split.
        max_train: Limit on the rows learned from. None: all.
        text_column: Column of the text.
        text_pair_column: Column of the second text.
        label_column: Column of the label.
        seed: Seed of the cuts.
    """

    name: str
    data_dir: str | None = None
    holdout: float = 0.2
    max_train: int | None = None
    text_column: str = "text"
    text_pair_column: str = PAIR_COLUMN
    label_column: str = "label"
    seed: int = 0  # folders made before it was noted have 0

    @property
    def columns(self) -> dict[str, Any]:
        """The columns by the names of `load_dataset`'s and `load_split`'s arguments."""
        return {
            "text_column": self.text_column,
            "text_pair_column": self.text_pair_column,
            "label_column": self.label_column,
        }

    def load(self) -> Dataset:
        """Load the data set; raises what `load_dataset` raises."""
        return load_dataset(self.name, data_dir=self.data_dir, **self.columns)

    def divide(self, dataset: Dataset) -> Parts:
        """Divide the data set that `load` gave."""
        return divide(dataset, fraction=self.holdout, max_train=self.max_train, seed=self.seed)

    def parts(self) -> Parts:
        """Load and divide."""
        return self.divide(self.load())
