"""Staircases hold each text once, deepest first, within the budget."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import assume, given, strategies as st
from scipy.optimize import nnls

from geep.scheduler import CostModel, Staircase, Timings, budget_cuts, expected_seconds, schedule, thin_out

TEXTS = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 40)), max_size=60)
BUDGETS = st.integers(1, 200)


def staircases(texts: list[tuple[int, int]], budget: int) -> list[Staircase]:
    return schedule([layer for layer, _ in texts], [length for _, length in texts], max_batch_tokens=budget)


@given(TEXTS, BUDGETS)
def test_each_text_stands_in_one_staircase_with_its_own_layer_and_length(
    texts: list[tuple[int, int]], budget: int
) -> None:
    found = staircases(texts, budget)
    assert sorted(index for each in found for index in each.indices.tolist()) == list(range(len(texts)))
    for each in found:
        own = [texts[index] for index in each.indices]
        assert list(zip(each.exit_layers.tolist(), each.lengths.tolist(), strict=True)) == own


@given(TEXTS, BUDGETS)
def test_deeper_texts_come_first_and_lengths_ascend_within_a_layer(texts: list[tuple[int, int]], budget: int) -> None:
    row = [texts[index] for each in staircases(texts, budget) for index in each.indices]
    assert row == sorted(row, key=lambda text: (-text[0], text[1]))


@given(TEXTS, BUDGETS)
def test_texts_that_are_alike_keep_the_callers_order(texts: list[tuple[int, int]], budget: int) -> None:
    found = [int(index) for each in staircases(texts, budget) for index in each.indices]
    assert found == sorted(range(len(texts)), key=lambda index: (-texts[index][0], texts[index][1], index))


@given(TEXTS, BUDGETS)
def test_no_staircase_exceeds_the_budget_unless_one_text_does(texts: list[tuple[int, int]], budget: int) -> None:
    for each in staircases(texts, budget):
        assert len(each.indices) >= 1
        # A text without tokens needs no room; beside it, a text above the budget stands alone.
        assert each.lengths.sum() <= budget or len(each.indices) == 1


@given(TEXTS, BUDGETS)
def test_prefix_of_a_layer_is_as_long_as_counting_says(texts: list[tuple[int, int]], budget: int) -> None:
    for each in staircases(texts, budget):
        for layer in range(1, 15):
            assert each.texts_at(layer) == sum(1 for exit_layer in each.exit_layers if exit_layer >= layer)


@given(st.lists(st.integers(0, 40), max_size=60), BUDGETS)
def test_cuts_are_whole_and_as_few_as_can_be(lengths: list[int], budget: int) -> None:
    cuts = budget_cuts(np.array(lengths, dtype=np.int64), max_tokens=budget)
    assert [place for start, stop in cuts for place in range(start, stop)] == list(range(len(lengths)))
    slow, used = 0, 0
    for place, length in enumerate(lengths):  # greedy is optimal for ranges in order
        if place == 0 or used + length > budget:
            slow, used = slow + 1, 0
        used += length
    assert len(cuts) == slow


def test_no_texts_make_no_staircases() -> None:
    assert schedule([], [], max_batch_tokens=1) == []


def test_a_small_case_by_hand() -> None:
    first, second = schedule([1, 3, 1, 2], [5, 4, 2, 9], max_batch_tokens=13)
    assert (first.indices.tolist(), first.exit_layers.tolist(), first.lengths.tolist()) == ([1, 3], [3, 2], [4, 9])
    assert (second.indices.tolist(), second.exit_layers.tolist(), second.lengths.tolist()) == ([2, 0], [1, 1], [2, 5])
    assert [first.texts_at(layer) for layer in (1, 2, 3, 4)] == [2, 2, 1, 0]


@pytest.mark.parametrize(
    ("layers", "lengths", "budget", "message"),
    [
        ([1, 2], [3], 10, r"two equal rows, got shapes \(2,\), \(1,\)"),
        ([[1]], [[1]], 10, "two equal rows"),
        ([1], [3], 0, "at least 1, got 0"),
        ([0, 1], [3, 3], 10, "layer 0 do not run"),
        ([1], [-1], 10, "minima 1 and -1"),
    ],
)
def test_impossible_tasks_are_refused(layers: list[int], lengths: list[int], budget: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule(layers, lengths, max_batch_tokens=budget)


# Costs


@given(st.floats(0, 1e-3), st.floats(1e-8, 1e-4))
def test_a_cost_model_finds_the_parts_of_a_cost(fixed: float, slope: float) -> None:
    sizes = (64, 256, 1024)
    timings = Timings(sizes, tuple(fixed + slope * size for size in sizes))
    cost = CostModel.fit(timings, timings)
    assert np.allclose([cost.layer_seconds, cost.check_seconds], fixed, rtol=1e-5, atol=1e-9)
    assert np.allclose([cost.token_seconds, cost.text_seconds], slope, rtol=1e-5)
    enough = cost.batch_tokens(waste=0.05)
    assert cost.layer_seconds <= 0.0501 * (cost.layer_seconds + enough * cost.token_seconds)
    assert enough == 1 or cost.layer_seconds > 0.0499 * (cost.layer_seconds + (enough - 1) * cost.token_seconds)


@given(st.lists(st.tuples(st.integers(1, 5000), st.floats(1e-6, 1.0)), min_size=2, max_size=8))
def test_a_line_is_the_best_that_is_not_negative(calls: list[tuple[int, float]]) -> None:
    """The two parts are those of SciPy's non-negative least squares on the relative error."""
    sizes, seconds = zip(*calls, strict=True)
    assume(len(set(sizes)) > 1)
    found = np.array(Timings(sizes, seconds).line())
    design = np.stack([1 / np.array(seconds), np.array(sizes) / np.array(seconds)], axis=1)
    expected, error = nnls(design, np.ones(len(calls)))
    assert (found >= 0).all()
    assert found[1] > 0
    scale = np.linalg.norm(design, axis=0)
    if expected[1] * scale[1] > 1e-9:
        # Compared by what they lose, too: where the two columns are nearly alike many lines are as good.
        assert np.linalg.norm(design @ found - 1) == pytest.approx(error, rel=1e-6, abs=1e-7)
        if np.linalg.cond(design / scale) < 1e4:
            assert np.allclose(found * scale, expected * scale, rtol=1e-5, atol=1e-5)
    else:
        # Longer calls that take no longer: the fixed part is the best, and what a token costs is made up.
        assert found[0] == pytest.approx(expected[0], rel=1e-6)


def test_a_cost_model_never_has_negative_parts() -> None:
    falling = CostModel.fit(Timings((64, 1024), (2.0, 1.0)))
    assert falling.layer_seconds >= 0
    assert falling.token_seconds > 0
    assert falling.check_seconds == falling.text_seconds == 0
    assert CostModel.fit(Timings((100, 200), (1.0, 3.0))).layer_seconds == 0
    with pytest.raises(ValueError, match="at least two sizes"):
        CostModel.fit(Timings((64, 64), (1.0, 1.0)))


# What a run takes


def seconds_of(cost: CostModel, *, budget: int = 10, window: int = 100) -> float:
    """Three texts of 10 tokens: one asked at 1 and answered there, one asked at 1 and 3, one by the lexical exit."""
    first, last, lengths = np.array([1, 1, 0]), np.array([1, 3, 0]), np.array([10, 10, 10])
    return expected_seconds(first, last, lengths, [1, 3], cost, max_batch_tokens=budget, window_tokens=window)


def test_seconds_by_hand() -> None:
    # Live tokens: 20, 10, 10 at layers 1 to 3. Texts asked: 2 at layer 1, 1 at layer 3.
    assert seconds_of(CostModel(0, 1, 0, 0)) == pytest.approx(40 / 3)
    assert seconds_of(CostModel(1, 0, 0, 0)) == pytest.approx(4 / 3)
    assert seconds_of(CostModel(0, 0, 1, 0)) == pytest.approx(3 / 3)
    assert seconds_of(CostModel(0, 0, 0, 1)) == pytest.approx(3 / 3)
    # Batches larger than a window are never full: one for each layer, and for each check, of each window.
    assert seconds_of(CostModel(1, 0, 0, 0), budget=1000, window=30) == pytest.approx(3 / 3)
    assert seconds_of(CostModel(0, 0, 1, 0), budget=1000, window=15) == pytest.approx(2 * 2 / 3)


def test_seconds_of_calls_by_hand() -> None:
    first, last, lengths = np.array([1, 1, 0]), np.array([1, 3, 0]), np.array([10, 10, 10])

    def layers_of(call_size: int) -> float:
        budget = {"max_batch_tokens": 10**6, "window_tokens": 10**6}
        return expected_seconds(first, last, lengths, [1, 3], CostModel(1, 0, 0, 0), call_size=call_size, **budget)

    # A text of three runs layer 1 alone, one runs all three: of one-text calls each layer is its own.
    assert layers_of(1) == pytest.approx(2 / 3 + 1 / 3 + 1 / 3)
    # Of two texts a call runs layer 1 but where neither does, and layers 2 and 3 where either does.
    assert layers_of(2) == pytest.approx((1 - 1 / 9) / 2 + 2 * (1 - 4 / 9) / 2)
    assert layers_of(1000) == pytest.approx(3 / 1000)


def test_of_few_texts_a_call_fewer_exits_pay() -> None:
    sure_at, lengths = np.array([1, 2, 3, 4] * 10), np.full(40, 10)

    def asked(call_size: int | None) -> tuple[int, ...]:
        def seconds(layers: tuple[int, ...]) -> float:
            checks = np.array([*layers, 4])
            last, first = checks[np.searchsorted(checks, sure_at)], np.full(40, checks[0])
            cost = CostModel(1.0, 0.1, 1.5, 0.0)
            sizes = {"max_batch_tokens": 500, "window_tokens": 5000, "call_size": call_size}
            return expected_seconds(first, last, lengths, checks.tolist(), cost, **sizes)

        return thin_out((1, 2, 3), seconds)

    # Of one text a check takes three quarters of a layer, which a quarter of the texts save at the first exit; of a full
    # batch next to nothing.
    assert (asked(1), asked(None)) == ((2, 3), (1, 2, 3))


@given(TEXTS.filter(lambda texts: any(length for _, length in texts)), BUDGETS)
def test_full_runs_take_every_layer_of_every_token(texts: list[tuple[int, int]], budget: int) -> None:
    layers, lengths = (np.array(column) for column in zip(*texts, strict=True))
    cost = CostModel(0, 2.0, 0, 1.0)
    found = expected_seconds(layers, layers, lengths, range(1, 13), cost, max_batch_tokens=budget, window_tokens=500)
    assert found * len(texts) == pytest.approx(2.0 * (layers * lengths).sum() + len(texts))


@pytest.mark.parametrize("numbers", [(0, 0, 0, 0), (-1, 1, 1, 1), (1, float("nan"), 1, 1), (1, 1, 1, float("inf"))])
def test_costs_that_cannot_be_are_refused(numbers: tuple[float, float, float, float]) -> None:
    with pytest.raises(ValueError, match="Costs must be finite"):
        CostModel(*numbers)


def test_no_tokens_take_no_estimate() -> None:
    none = np.array([], dtype=np.int64)
    with pytest.raises(ValueError, match="no tokens"):
        expected_seconds(none, none, none, [1], CostModel(1, 1, 1, 1), max_batch_tokens=1, window_tokens=1)


@given(st.lists(st.floats(-1, 1), max_size=7))
def test_thinning_out_finds_the_best_set_where_layers_do_not_depend_on_each_other(worth: list[float]) -> None:
    layers = tuple(range(1, len(worth) + 1))

    def seconds(kept: tuple[int, ...]) -> float:
        return 10 - sum(worth[layer - 1] for layer in kept)

    found = thin_out(layers, seconds)
    best = min(seconds(kept) for size in range(len(layers) + 1) for kept in combinations(layers, size))
    assert seconds(found) == pytest.approx(best, abs=1e-9)
    assert list(found) == sorted(found)


@given(st.integers(0, 6), st.integers(0, 1000))
def test_thinning_out_is_never_worse_than_keeping_all(count: int, seed: int) -> None:
    random, known = np.random.default_rng(seed), {}

    def seconds(kept: tuple[int, ...]) -> float:
        return known.setdefault(kept, float(random.random()))

    layers = tuple(range(count))
    assert seconds(thin_out(layers, seconds)) <= seconds(layers)
