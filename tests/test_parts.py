"""What rows are for: each has one use, and what certifies is like what comes."""

from __future__ import annotations

import logging
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from geep.calibration import Route
from geep.data import Dataset, Parts, Split, distinct, divide, thirds
from geep.data.parts import ROWS_TO_CERTIFY
from geep.promise import Promise


def rows_of(prefix: str, count: int, *, labelled: bool = True) -> Split:
    labels = np.arange(count) % 3 if labelled else None
    return Split([f"{prefix}{number}" for number in range(count)], None, labels, f"{prefix}.jsonl")


def dataset_of(num_train: int, num_dev: int | None, *, labelled: bool = True) -> Dataset:
    dev = None if num_dev is None else rows_of("d", num_dev, labelled=labelled)
    return Dataset("toy", ("a", "b", "c"), rows_of("t", num_train), dev, rows_of("x", 10), False)


def kinds(part: Split) -> set[str]:
    """Which splits the rows of a part came from."""
    return {text[0] for text in part.texts}


def check(parts: Parts) -> None:
    used = [*parts.train.texts, *parts.profile.texts, *parts.calibration.texts]
    assert len(used) == len(set(used))
    for part in (parts.train, parts.profile, parts.calibration):
        if part.labels is not None:
            assert all(int(text[1:]) % 3 == label for text, label in zip(part.texts, part.labels, strict=True))


def test_rows_to_certify_are_enough_for_the_usual_promise() -> None:
    needed = Route.all_to(Promise(max_accuracy_drop=0.005))[0].each.texts_needed
    assert 0.8 * ROWS_TO_CERTIFY < needed <= ROWS_TO_CERTIFY


@pytest.mark.parametrize("max_train", [None, 30, 79])
def test_without_a_dev_split_training_rows_are_held_out_and_those_left_out_join(max_train: int | None) -> None:
    dataset = dataset_of(100, None)
    parts = divide(dataset, max_train=max_train)
    check(parts)
    assert len(parts.train) == min(max_train or 80, 80)
    assert len(parts.train) + len(parts.profile) + len(parts.calibration) == 100
    assert parts.calibration.origin == "training rows held out of t.jsonl"
    few = divide(dataset, max_train=max_train, max_heldout=25)
    assert len(few.profile) + len(few.calibration) <= 25


@pytest.mark.parametrize("max_train", [None, 500])
@pytest.mark.parametrize("labelled", [True, False])
def test_a_large_dev_split_is_cut_and_nothing_joins_it(max_train: int | None, labelled: bool) -> None:
    parts = divide(dataset_of(5000, 2 * ROWS_TO_CERTIFY, labelled=labelled), max_train=max_train)
    check(parts)
    assert kinds(parts.profile) == kinds(parts.calibration) == {"d"}
    assert len(parts.calibration) == pytest.approx(2 * len(parts.profile), abs=6)
    assert len(parts.profile) + len(parts.calibration) == 2 * ROWS_TO_CERTIFY
    assert len(parts.train) == (max_train or 5000)
    assert parts.calibration.origin == "part of the development split of d.jsonl"


@pytest.mark.parametrize(("max_train", "num_profile"), [(None, 1000), (2500, 2500), (4500, 1000)])
def test_a_smaller_dev_split_certifies_alone(max_train: int | None, num_profile: int) -> None:
    parts = divide(dataset_of(5000, 1200), max_train=max_train)
    check(parts)
    assert kinds(parts.calibration) == {"d"}
    assert len(parts.calibration) == 1200
    assert kinds(parts.profile) == {"t"}
    assert len(parts.profile) == num_profile
    assert len(parts.train) == min(max_train or 4000, 4000)
    assert parts.calibration.origin == "the development split of d.jsonl"
    assert parts.profile.origin == "training rows held out of t.jsonl"


def test_a_dev_split_lends_rows_to_profile_where_training_rows_are_few() -> None:
    parts = divide(dataset_of(60, 1200))
    check(parts)
    assert len(parts.train) == 48
    assert (len(parts.profile), len(parts.calibration)) == (200, 1200 - 188)
    assert kinds(parts.profile) == {"t", "d"}
    assert kinds(parts.calibration) == {"d"}
    assert parts.profile.origin == "training rows held out of t.jsonl and the development split of d.jsonl"


def test_a_dev_split_too_small_to_certify_is_joined_with_a_word(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        parts = divide(dataset_of(5000, 60))
    check(parts)
    assert kinds(parts.calibration) == kinds(parts.profile) == {"d", "t"}
    assert abs(sum(text[0] == "d" for text in parts.calibration.texts) - 40) <= 10
    assert "has 60 rows, too few" in caplog.text
    assert "1000 held-out training rows are profiled and calibrated on beside them" in caplog.text
    assert "name others with --calibration" in caplog.text
    assert parts.calibration.origin == "the development split of d.jsonl and training rows held out of t.jsonl"
    caplog.clear()
    lacking = divide(dataset_of(5000, 60, labelled=False))
    assert kinds(lacking.calibration) == {"t"}
    assert "in their place, since only one of the two has labels" in caplog.text


@settings(max_examples=100, deadline=None)
@given(labels=st.lists(st.integers(0, 30), min_size=2, max_size=200), seed=st.integers(0, 5))
def test_a_third_and_the_rest_share_every_label_and_lose_none(labels: list[int], seed: int) -> None:
    split = Split([str(number) for number in range(len(labels))], None, np.array(labels), "somewhere")
    cut = thirds(split, seed=seed)
    assert thirds(split, seed=seed).profile.texts == cut.profile.texts
    assert sorted([*cut.profile.texts, *cut.calibration.texts], key=int) == split.texts
    assert cut.calibration.texts == sorted(cut.calibration.texts, key=int)
    assert abs(len(cut.profile) - len(labels) / 3) < 1
    assert len(cut.profile)
    assert cut.profile.origin == cut.calibration.origin == "somewhere"
    assert cut.profile.labels is not None
    assert cut.calibration.labels is not None
    one, other = Counter(cut.profile.labels.tolist()), Counter(cut.calibration.labels.tolist())
    assert all(abs(2 * one[label] - other[label]) <= 2 for label in set(labels))


def test_labels_of_a_single_row_reach_both_parts() -> None:
    """Put to one side all of them, the other would never meet what is rare."""
    split = Split([str(number) for number in range(60)], None, np.arange(60))
    cut = thirds(split)
    assert (len(cut.profile), len(cut.calibration)) == (20, 40)
    # Neither the label's number nor its place decides.
    sides = [str(number) in set(cut.calibration.texts) for number in range(60)]
    assert all(sides != [number % 3 != turn for number in range(60)] for turn in range(3))


def test_a_part_of_rows_says_where_they_came_from() -> None:
    one, other = rows_of("a", 4), rows_of("b", 3)
    assert one.select([0, 2]).origin == "a.jsonl"
    assert one.join(other).origin == "a.jsonl and b.jsonl"
    assert one.join(one).origin == "a.jsonl"
    assert one.join(Split(["x"], None, np.array([0]))).origin == "a.jsonl"


def test_of_each_text_the_first_row_stays() -> None:
    rows = Split(["a b", "c", "A  b", "a b ", "d"], labels=np.arange(5))
    found = distinct(rows)
    assert (list(found.texts), found.labels.tolist()) == (["a b", "c", "d"], [0, 1, 4])
    pairs = distinct(Split(["a", "a", "a"], ["b", "c", "B"]))
    assert list(pairs.inputs) == [("a", "b"), ("a", "c")]
    assert distinct(found) is found
