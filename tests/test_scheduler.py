"""Staircases hold each text once, deepest first, within the budget."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from geep.scheduler import CostModel, Staircase, budget_cuts, schedule

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
def test_a_cost_model_finds_the_two_parts_of_a_cost(fixed: float, slope: float) -> None:
    tokens = np.array([64, 256, 1024])
    cost = CostModel.fit(tokens, fixed + slope * tokens)
    assert np.allclose(cost.seconds(tokens), fixed + slope * tokens, rtol=1e-6)
    enough = cost.batch_tokens(waste=0.05)
    assert cost.layer_seconds <= 0.0501 * cost.seconds(enough)
    assert enough == 1 or cost.layer_seconds > 0.0499 * cost.seconds(enough - 1)


def test_a_cost_model_never_has_negative_parts() -> None:
    falling = CostModel.fit([64, 1024], [2.0, 1.0])
    assert falling.layer_seconds >= 0
    assert falling.token_seconds > 0
    assert CostModel.fit([100, 200], [1.0, 3.0]).layer_seconds == 0
    with pytest.raises(ValueError, match="at least two sizes"):
        CostModel.fit([64, 64], [1.0, 1.0])
    with pytest.raises(ValueError, match="time larger batches"):
        CostModel(0.1, 0.0)
