"""What rows are for: learned from, profiled, calibrated on. Test rows are not touched.

Read `divide`, then `holdout`. `DataPlan` is a way of dividing, in words that can be written down.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from geep.data.datasets import load_dataset
from geep.data.rows import PAIR_COLUMN
from geep.data.splits import Dataset, Split, folded, load_split

logger = logging.getLogger(__name__)

ROWS_TO_CERTIFY = 1000
"""Held-out rows that can certify the usual promise, half a point of accuracy at 95 %: its careful walk needs 828."""


# Rows without which temperatures and settings are mostly luck.
_ROWS_TO_PROFILE = 200


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
class HeldOut:
    """Held-out data cut in two: a third to build from, two thirds to promise by. No row is in both.

    What may be promised is bounded by the rows that certify, long before settings gain by rows to choose them on.

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
        unlabelled: Further texts, whose labels are not known or not read: exits are fitted on them, too. None: there
            are none.
    """

    train: Split
    profile: Split
    calibration: Split
    label_names: tuple[str, ...]
    multi_label: bool
    unlabelled: Split | None = None

    def __post_init__(self) -> None:
        more = self.unlabelled
        if more is not None and (more.text_pairs is None) != (self.train.text_pairs is None):
            kinds = ["single texts" if part.text_pairs is None else "pairs" for part in (self.train, more)]
            raise ValueError(
                f"The training rows are {kinds[0]} and the texts without labels {kinds[1]}, expected both alike."
            )

    def origins(self) -> dict[str, str]:
        """Return where the rows of each part came from, in words."""
        return {name: part.origin for name, part in self._there.items()}

    def digests(self) -> dict[str, str]:
        """Return the digest of each part: the same rows in the same part give the same ones."""
        return {name: part.digest() for name, part in self._there.items()}

    @property
    def _there(self) -> dict[str, Split]:
        parts = {"train": self.train, "profile": self.profile, "calibration": self.calibration}
        return parts if self.unlabelled is None else {**parts, "unlabelled": self.unlabelled}

    @property
    def teaching(self) -> Split:
        """Texts that exits and their table learn from: the training rows, or with further texts all, without labels."""
        return self.train if self.unlabelled is None else self.train.join(self.unlabelled)

    @property
    def learned(self) -> tuple[Split, ...]:
        """All parts that certify nothing, since something was learned or chosen on them."""
        return (self.train, self.profile, *([] if self.unlabelled is None else [self.unlabelled]))


def unseen(rows: Split, *used: Split) -> Split:
    """Return the rows whose texts are in none of the other splits, in order, whatever their case and blanks.

    What was learned or chosen on a text proves nothing on that text.
    """
    # Hashes are smaller than texts. A text that shares one by chance is left out, too: one in 2**60 or so.
    learned = {_hash(text) for part in used for text in part.inputs}
    kept = [number for number, text in enumerate(rows.inputs) if _hash(text) not in learned]
    return rows if len(kept) == len(rows) else rows.select(kept)


def distinct(rows: Split) -> Split:
    """Return the first row of each text, in order; case and blanks make no other text."""
    seen: set[int] = set()
    kept = []
    for number, text in enumerate(rows.inputs):
        found = _hash(text)
        if found not in seen:
            seen.add(found)
            kept.append(number)
    return rows if len(kept) == len(rows) else rows.select(kept)


def _hash(text: Sequence[str]) -> int:
    parts = (text,) if isinstance(text, str) else text
    return hash(tuple(map(folded, parts)))


def divide(
    dataset: Dataset,
    *,
    fraction: float = 0.2,
    max_heldout: int = 8000,
    max_train: int | None = None,
    seed: int = 0,
    unlabelled: Split | None = None,
) -> Parts:
    """Decide which rows of a data set are learned from, profiled and calibrated on; the test rows are not touched.

    What certifies a promise has to be like the texts to come, which is what a development split is for:

    - One of at least twice `ROWS_TO_CERTIFY` is profiled and calibrated on (see `thirds`).
    - A smaller one of at least `ROWS_TO_CERTIFY` certifies alone. Rows to profile are those that `max_train` leaves
      out, else a share of the training rows; where these are few, it lends some.
    - One that is too small to certify anything is joined by such training rows; a warning says how many.
    - Without one, a share of the training rows is held out, and those that `max_train` leaves out join them.

    `Split.origin` of each part says where its rows came from. The same data set and arguments always give the same
    parts.

    Args:
        dataset: The data set.
        fraction: Share of the training rows held out where the development split does not suffice.
        max_heldout: Limit on the training rows held out.
        max_train: Limit on the rows learned from, drawn after holding out. None: all.
        seed: Seed of the cuts.
        unlabelled: Further texts that exits may be fitted on. Those that are in a part already, or in the test split,
            are left out, and so are copies; labels are not looked at.

    Raises:
        ValueError: If none of the further texts is left, or they are pairs and the rows are not, or the reverse.
    """
    dev = dataset.dev
    if dev is not None and is_cut(dev):
        train, _ = _limited(dataset.train, max_train, seed)
        cut_in_two = thirds(_from(dev, "part of the development split"), seed=seed)
        profile, calibration = cut_in_two.profile, cut_in_two.calibration
    elif dev is not None and len(dev) >= ROWS_TO_CERTIFY:
        train, left_out = _limited(dataset.train, max_train, seed)
        if len(left_out) < ROWS_TO_CERTIFY:
            cut = holdout(dataset.train, fraction, seed=seed, max_rows=max_heldout)
            train, left_out = _limited(cut.rest, max_train, seed)
            left_out = cut.held
        profile = _from(left_out.select(range(min(len(left_out), max_heldout))), "training rows held out")
        calibration = _from(dev, "the development split")
        lacking = _ROWS_TO_PROFILE - len(profile)
        if lacking > 0 and (dev.labels is None) == (profile.labels is None):
            lent = holdout(calibration, lacking / len(dev), seed=seed)
            profile, calibration = profile.join(lent.held), lent.rest
    else:
        cut = holdout(dataset.train, fraction, seed=seed, max_rows=max_heldout)
        train, left_out = _limited(cut.rest, max_train, seed)
        room = max(max_heldout - len(cut.held), 0)
        held = _from(cut.held.join(left_out.select(range(min(len(left_out), room)))), "training rows held out")
        if dev is not None:
            is_alike = (dev.labels is None) == (held.labels is None)
            logger.warning(
                "The development split has %d rows, too few to certify a promise (%d at least): %d held-out training "
                "rows are profiled and calibrated on %s. If texts to come are unlike them, name others with "
                "--calibration.",
                len(dev),
                ROWS_TO_CERTIFY,
                len(held),
                "beside them" if is_alike else "in their place, since only one of the two has labels",
            )
            held = _from(dev, "the development split").join(held) if is_alike else held
        cut_in_two = thirds(held, seed=seed)
        profile, calibration = cut_in_two.profile, cut_in_two.calibration
    parts = Parts(train, profile, calibration, dataset.label_names, dataset.multi_label)
    return parts if unlabelled is None else replace(parts, unlabelled=_further(unlabelled, parts, dataset.test))


def _further(texts: Split, parts: Parts, test: Split | None) -> Split:
    """Texts that are in no part and not in the test split, without labels and copies."""
    replace(parts, unlabelled=texts)  # pairs or single texts, as the rows are
    different = distinct(Split(texts.texts, texts.text_pairs, origin=texts.origin))
    found = different if test is None else unseen(different, test)
    if len(found) < len(different):
        logger.warning(
            "%d of %d texts without labels are in the test split, and are left out: what is reported on a text proves "
            "little once exits have learned from it.",
            len(different) - len(found),
            len(different),
        )
    found = unseen(found, parts.train, parts.profile, parts.calibration)
    if not len(found):
        raise ValueError(
            f"Of {len(texts)} texts without labels none is left that is not in the data set, expected further ones; "
            "leave them out."
        )
    return found


def is_cut(dev: Split) -> bool:
    """Whether a development split is large enough that a part of it certifies and the rest is profiled on."""
    return len(dev) >= 2 * ROWS_TO_CERTIFY


def _limited(rows: Split, most: int | None, seed: int) -> tuple[Split, Split]:
    """Rows that are learned from, in their order, and those left out, at random."""
    if most is None or most >= len(rows):
        return rows, rows.select(())
    order = np.random.default_rng(seed).permutation(len(rows))
    return rows.select(np.sort(order[:most])), rows.select(order[most:])


def _from(rows: Split, origin: str) -> Split:
    return replace(rows, origin=f"{origin} of {rows.origin}" if rows.origin else origin)


def thirds(split: Split, *, seed: int = 0) -> HeldOut:
    """Cut a split into a third for profiling and two thirds for calibration, both in its order.

    With one label a row, every third of the rows of each label is for profiling. Labels of a single row fall to either
    part: none of the two is without what is rare.

    Raises:
        ValueError: If there are fewer than two rows.
    """
    if len(split) < 2:
        raise ValueError(f"A cut needs at least 2 rows, got {len(split)}.")
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(split))
    if split.labels is not None and split.labels.ndim == 1:
        # Labels one after another, in an order that says nothing, their rows shuffled.
        _, groups = np.unique(split.labels, return_inverse=True)
        turn = generator.permutation(int(groups.max()) + 1)
        order = order[np.argsort(turn[groups[order]], kind="stable")]
    profile = np.zeros(len(split), dtype=bool)
    profile[order[int(generator.integers(min(3, len(split)))) :: 3]] = True
    return HeldOut(profile=split.select(np.flatnonzero(profile)), calibration=split.select(np.flatnonzero(~profile)))


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
        quoting: Whether fields of CSV and TSV may be quoted; see `geep.data.read_rows`.
        unlabelled: File of further texts that exits are fitted on; see `divide`. None: there is none.
    """

    name: str
    data_dir: str | None = None
    holdout: float = 0.2
    max_train: int | None = None
    text_column: str = "text"
    text_pair_column: str = PAIR_COLUMN
    label_column: str = "label"
    seed: int = 0  # folders made before it was noted have 0
    quoting: bool | None = None
    unlabelled: str | None = None

    @property
    def columns(self) -> dict[str, Any]:
        """How columns are found, by the names of `load_dataset`'s and `load_split`'s arguments."""
        return {
            "text_column": self.text_column,
            "text_pair_column": self.text_pair_column,
            "label_column": self.label_column,
            "quoting": self.quoting,
        }

    def load(self, *, cache_dir: str | os.PathLike[str] | None = None, local_files_only: bool = False) -> Dataset:
        """Load the data set; arguments and errors are those of `load_dataset`."""
        options: dict[str, Any] = {"cache_dir": cache_dir, "local_files_only": local_files_only}
        return load_dataset(self.name, data_dir=self.data_dir, **options, **self.columns)

    def divide(self, dataset: Dataset) -> Parts:
        """Divide the data set that `load` gave, and read the file of further texts."""
        further = None
        if self.unlabelled is not None:
            columns = {name: value for name, value in self.columns.items() if name != "label_column"}
            further = load_split(self.unlabelled, **columns)
        return divide(dataset, fraction=self.holdout, max_train=self.max_train, seed=self.seed, unlabelled=further)

    def parts(self) -> Parts:
        """Load and divide."""
        return self.divide(self.load())
