"""Bounds are exact, walks end where they must, and promises are kept as often as they say."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, strategies as st
from numpy.typing import NDArray
from scipy.stats import binomtest, multinomial

from geep.promise import (
    RISKS,
    ConstantModelError,
    NothingCertifiedError,
    PairedCounts,
    Promise,
    TooFewTextsError,
    Trial,
    check_enough,
    clopper_pearson_upper,
    drop_bound,
    walk,
)

Flags = NDArray[np.bool_]
DROP, DISAGREEMENT = RISKS["max_accuracy_drop"], RISKS["min_agreement"]


def counts_of(full: Flags, deployed: Flags) -> PairedCounts:
    """Counts of texts of two labels, so that an answer changes where its being right does."""
    spoilt, repaired = int((full & ~deployed).sum()), int((~full & deployed).sum())
    return PairedCounts(len(full), spoilt + repaired, spoilt, repaired)


# Bounds


@given(st.integers(1, 400), st.data(), st.sampled_from([0.01, 0.05, 0.2]))
def test_the_exact_bound_is_scipys(trials: int, data: st.DataObject, tail: float) -> None:
    successes = data.draw(st.integers(0, trials))
    expected = binomtest(successes, trials, alternative="less").proportion_ci(1 - tail, method="exact").high
    assert clopper_pearson_upper(successes, trials, tail) == pytest.approx(expected, abs=1e-9)
    assert DISAGREEMENT.bound(PairedCounts(trials, successes), tail) == clopper_pearson_upper(successes, trials, tail)
    assert DISAGREEMENT.observed(PairedCounts(trials, successes)) == successes / trials


def test_nothing_seen_bounds_nothing() -> None:
    assert clopper_pearson_upper(0, 0, 0.05) == 1.0


@pytest.mark.parametrize(
    ("changed", "direction"), [(0.02, 0.8), (0.1, 0.55), (0.3, 0.5), (0.05, 1.0), (0.2, 0.3), (0.01, 0.6)]
)
def test_the_bound_on_the_drop_holds_as_often_as_it_says(changed: float, direction: float) -> None:
    random = np.random.default_rng(0)
    truth, held, rounds = changed * (2 * direction - 1), 0, 600
    for _ in range(rounds):
        full = random.random(300) < 0.5
        flips = random.random(300) < changed
        # Of the changed texts, a share `direction` was right before.
        full = np.where(flips, random.random(300) < direction, full)
        held += DROP.bound(counts_of(full, full ^ flips), 0.05) >= truth
    assert held >= rounds * 0.95 - 2 * math.sqrt(rounds * 0.05 * 0.95)


def test_the_bound_on_the_drop_is_never_below_what_was_seen() -> None:
    random = np.random.default_rng(0)
    for _ in range(100):
        full, deployed = random.random((2, 80)) < random.random((2, 1))
        counts = counts_of(full, deployed)
        assert DROP.observed(counts) == pytest.approx(full.mean() - deployed.mean())
        assert DROP.bound(counts, 0.05) >= full.mean() - deployed.mean()
    same = counts_of(np.ones(100, dtype=bool), np.ones(100, dtype=bool))
    assert clopper_pearson_upper(0, 100, 0.05) <= DROP.bound(same, 0.05) <= clopper_pearson_upper(0, 100, 0.005)


def test_the_bound_on_the_drop_is_exact() -> None:
    """Add up, over everything that 24 texts can show, the probability of a bound that is too low."""
    num_texts, tail = 24, 0.05
    counts = [(s, r) for s in range(num_texts + 1) for r in range(num_texts + 1 - s)]
    bounds = np.array([drop_bound(s, r, num_texts, tail) for s, r in counts])
    outcomes = np.array([(s, r, num_texts - s - r) for s, r in counts])
    worst = 0.0
    for spoilt in (0.03, 0.1, 0.2, 0.3, 0.4, 0.6, 0.9):
        for repaired in (0.0, 0.02, 0.1, 0.2, 0.35):
            if spoilt <= repaired or spoilt + repaired > 1:
                continue
            weights = multinomial.pmf(outcomes, num_texts, [spoilt, repaired, 1 - spoilt - repaired])
            worst = max(worst, float(weights[bounds < spoilt - repaired - 1e-9].sum()))
    assert 0.0 < worst <= tail


@pytest.mark.parametrize("num_texts", [200, 1000, 2500])
def test_more_texts_spoilt_is_a_higher_bound_and_more_repaired_beside_them_costs_little(num_texts: int) -> None:
    for repaired in (0, 3, 20):
        bounds = [drop_bound(spoilt, repaired, num_texts, 0.025) for spoilt in (0, 1, 4, 10, 30)]
        assert bounds == sorted(bounds)
    for spoilt in (1, 5, 20):
        # Changes that cancel: wider than none, narrower than if each were bounded by itself and multiplied.
        even = drop_bound(spoilt, spoilt, num_texts, 0.025)
        product = clopper_pearson_upper(2 * spoilt, num_texts, 0.025 * 0.35) * (
            2 * clopper_pearson_upper(spoilt, 2 * spoilt, 0.025 * 0.65) - 1
        )
        assert drop_bound(0, 0, num_texts, 0.025) < even < product * 0.9


@pytest.mark.parametrize("name", sorted(RISKS))
def test_every_risk_belongs_to_a_field_of_a_promise(name: str) -> None:
    promise = Promise(**{name: 0.75})
    assert promise.risk is RISKS[name]
    assert promise.allowed == pytest.approx(0.75 if name == "max_accuracy_drop" else 0.25)
    assert promise.needs_labels == (name == "max_accuracy_drop")


# Promises


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "one of max_accuracy_drop and min_agreement"),
        ({"max_accuracy_drop": 0.1, "min_agreement": 0.9}, "one of max_accuracy_drop"),
        ({"max_accuracy_drop": 0.0}, "max_accuracy_drop must lie between 0 and 1"),
        ({"max_accuracy_drop": 1.5}, "max_accuracy_drop must lie between 0 and 1"),
        ({"min_agreement": 1.0}, "min_agreement must lie between 0 and 1"),
        ({"min_agreement": math.nan}, "min_agreement must lie between 0 and 1"),
        ({"min_agreement": 0.9, "confidence": 1.0}, "confidence must lie in"),
        ({"min_agreement": 0.9, "confidence": 0.4}, "confidence must lie in"),
    ],
)
def test_a_promise_that_makes_no_sense_is_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Promise(**arguments)


PROMISES = st.builds(
    lambda kind, allowed, confidence: (
        Promise(max_accuracy_drop=allowed, confidence=confidence)
        if kind
        else Promise(min_agreement=1 - allowed, confidence=confidence)
    ),
    st.booleans(),
    st.floats(0.003, 0.3),
    st.sampled_from([0.5, 0.9, 0.95, 0.99]),
)


def unchanged(num_texts: int, promise: Promise) -> Trial:
    return Trial.of(promise, PairedCounts(num_texts, 0, 0, 0), speed=0.5, mean_exit_layer=1.0)


@given(PROMISES)
def test_the_texts_needed_are_exactly_enough(promise: Promise) -> None:
    check_enough(promise.texts_needed, promise)
    assert walk(lambda _: unchanged(promise.texts_needed, promise), [0.5]).speed == 0.5
    if promise.texts_needed > 1:
        assert not unchanged(promise.texts_needed - 1, promise).passed
    with pytest.raises(TooFewTextsError, match=f"at least {promise.texts_needed} are needed"):
        check_enough(promise.texts_needed - 1, promise)


def test_half_a_point_needs_hundreds_of_texts() -> None:
    assert 598 <= Promise(max_accuracy_drop=0.005).texts_needed < 1060
    assert Promise(min_agreement=0.99).texts_needed == math.ceil(math.log(0.05) / math.log(0.99))


@given(PROMISES)
def test_half_a_promise_has_half_the_error_probability(promise: Promise) -> None:
    half = promise.sharing(0.5)
    assert 1 - half.confidence == pytest.approx((1 - promise.confidence) / 2)
    assert (half.max_accuracy_drop, half.min_agreement) == (promise.max_accuracy_drop, promise.min_agreement)
    assert half.texts_needed >= promise.texts_needed


def test_what_cannot_be_certified_at_all_is_one_kind_of_error() -> None:
    assert issubclass(TooFewTextsError, NothingCertifiedError)
    assert issubclass(ConstantModelError, NothingCertifiedError)
    assert issubclass(NothingCertifiedError, ValueError)


def test_a_promise_says_itself_in_words() -> None:
    assert str(Promise(max_accuracy_drop=0.005)) == "an accuracy drop of at most 0.5 points at 95 % confidence"
    assert str(Promise(min_agreement=0.99, confidence=0.9)) == "an agreement of at least 0.99 at 90 % confidence"


# Walks


def test_an_accuracy_promise_without_labels_is_refused() -> None:
    unlabelled = PairedCounts(1000, 0)
    with pytest.raises(ValueError, match="needs labelled texts.*min_agreement"):
        Trial.of(Promise(max_accuracy_drop=0.05), unlabelled, speed=0.5, mean_exit_layer=1.0)
    assert Trial.of(Promise(min_agreement=0.9), unlabelled, speed=0.5, mean_exit_layer=1.0).passed


@pytest.mark.parametrize("promise", [Promise(max_accuracy_drop=0.05), Promise(min_agreement=0.95)])
def test_the_walk_ends_at_the_first_speed_that_fails(promise: Promise) -> None:
    # Too much is lost at 0.3 alone; what lies behind would be well again and is not tried.
    def trial_at(speed: float) -> Trial:
        lost = 300 if speed == 0.3 else 0
        return Trial.of(promise, PairedCounts(1000, lost, lost, 0), speed=speed, mean_exit_layer=3 - speed)

    found = walk(trial_at, [0.05, 0.15, 0.2, 0.3, 0.4, 0.5])
    assert found.speed == 0.2
    assert [(trial.speed, trial.passed) for trial in found.trials] == [
        (0.05, True),
        (0.15, True),
        (0.2, True),
        (0.3, False),
    ]
    assert [trial.risk for trial in found.trials] == pytest.approx([0, 0, 0, 0.3])
    assert [trial.mean_exit_layer for trial in found.trials] == pytest.approx([2.95, 2.85, 2.8, 2.7])
    assert all(trial.bound >= trial.risk for trial in found.trials)
    assert all(trial.passed == (trial.bound <= promise.allowed) for trial in found.trials)


def test_nothing_that_passes_leaves_the_full_model() -> None:
    promise = Promise(min_agreement=0.9)
    found = walk(
        lambda speed: Trial.of(promise, PairedCounts(1000, 1000), speed=speed, mean_exit_layer=1.0), [0.1, 0.2]
    )
    assert found.speed == 0.0
    assert len(found.trials) == 1
    assert walk(lambda _: pytest.fail("tried"), []).speed == 0.0


# Shares of the texts at uncertainty 1 that a classifier spoils, repairs and answers otherwise, wrong as before.
WORLDS = {
    "an exit that only spoils": (0.3, 0.0, 0.0),
    "an exit that repairs nearly as much": (0.5, 0.4, 0.05),
    "an exit that errs otherwise": (0.2, 0.05, 0.3),
}


@pytest.mark.parametrize("name", sorted(RISKS))
@pytest.mark.parametrize("world", sorted(WORLDS))
@pytest.mark.parametrize("num_walks", [1, 2])
def test_promises_are_broken_no_more_often_than_they_say(name: str, world: str, num_walks: int) -> None:
    """Draw calibration texts of a classifier whose true risk at every speed is known on paper.

    A text's uncertainty u is uniform in [0, 1]. At a speed s the texts below s leave early, and of those at u a share
    rate * u is spoilt, repaired or changed: the shares over all texts are rate * s² / 2.
    """
    rates = WORLDS[world]
    promise = Promise(**{name: 0.02 if name == "max_accuracy_drop" else 0.95})
    speeds = np.linspace(0.05, 1, 20).tolist()

    def truth(speed: float) -> float:
        spoilt, repaired, otherwise = (rate * speed**2 / 2 for rate in rates)
        return spoilt - repaired if name == "max_accuracy_drop" else spoilt + repaired + otherwise

    assert max(map(truth, speeds)) > promise.allowed  # there is something to break
    random, num_texts, rounds = np.random.default_rng(0), 700, 400
    borders = np.cumsum(rates)
    each = promise if num_walks == 1 else promise.sharing(0.5)
    broken, kept = 0, []
    for _ in range(rounds):
        unsure = random.random(num_texts)
        fate = np.searchsorted(borders, random.random(num_texts) / unsure)  # 0: spoilt, 1: repaired, 2: changed

        def trial_at(speed: float, unsure: NDArray[np.float64] = unsure, fate: NDArray[np.int64] = fate) -> Trial:
            left = np.bincount(fate[unsure < speed], minlength=4)
            counts = PairedCounts(num_texts, int(left[:3].sum()), int(left[0]), int(left[1]))
            return Trial.of(each, counts, speed=speed, mean_exit_layer=1 - speed)

        # The second walk begins further up, in an order that was fixed beforehand.
        orders = [speeds, speeds[8:]][:num_walks]
        speed = max(walk(trial_at, order).speed for order in orders)
        broken += truth(speed) > promise.allowed
        kept.append(speed)
    assert broken <= rounds * 0.05 + 2 * math.sqrt(rounds * 0.05 * 0.95)
    assert float(np.mean(kept)) > 0.1  # and it is no empty promise


def test_a_walk_that_went_on_after_a_failure_would_break_promises_more_often() -> None:
    """What the stop is good for: without it, every speed is another chance to be lucky."""
    promise, random, rounds = Promise(min_agreement=0.95), np.random.default_rng(0), 400
    bad = 0.0501  # a hair more than allowed, at every one of 20 speeds, each on its own texts
    trials = [
        [
            Trial.of(promise, PairedCounts(700, int(random.binomial(700, bad))), speed=speed, mean_exit_layer=1.0)
            for speed in np.linspace(0.05, 1, 20).tolist()
        ]
        for _ in range(rounds)
    ]
    ways: dict[str, Callable[[list[Trial]], float]] = {
        "the walk": lambda row: walk({trial.speed: trial for trial in row}.__getitem__, [t.speed for t in row]).speed,
        "the best of all": lambda row: max((trial.speed for trial in row if trial.passed), default=0.0),
    }
    broken = {name: float(np.mean([way(row) > 0 for row in trials])) for name, way in ways.items()}
    assert broken["the walk"] <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / rounds)
    assert broken["the best of all"] > 0.3


def test_trials_of_a_walk_are_in_the_order_walked() -> None:
    promise, order = Promise(min_agreement=0.5), [0.9, 0.1, 0.5]
    found = walk(lambda speed: Trial.of(promise, PairedCounts(99, 0), speed=speed, mean_exit_layer=1.0), order)
    assert [trial.speed for trial in found.trials] == order
    assert found.speed == 0.5  # the last that passed, not the highest
