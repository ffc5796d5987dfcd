"""The table's kernel for CPUs says what its torch operations say, to the last bit."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from geep.hash_table import bag_kernel, cpp_bags
from geep.predictor import ExitPredictor, ExitTable
from geep.predictor.table import FittedTable, Levels, Lexical, ScoreRows

VOCAB_SIZE = 40
# 0 begins a text, 2 ends it, 1 is unknown; few others, so that n-grams repeat and stand in both texts of a pair.
SPECIAL_IDS, SEPARATOR = (0, 1, 2), 2
TOKENS = st.lists(st.integers(0, 8), max_size=30)

compiled = pytest.mark.skipif(not cpp_bags.is_available(), reason="geep was installed without a C++ compiler")


def pack(texts: list[list[int]]) -> tuple[Tensor, Tensor]:
    ids = torch.tensor([token for text in texts for token in text], dtype=torch.int64)
    return ids, torch.tensor([len(text) for text in texts], dtype=torch.int64)


def draw(count: int, seed: int) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 9, random.integers(0, 30)).tolist() for _ in range(count)]


def fitted(order: int, separator_id: int | None, num_labels: int, seed: int) -> FittedTable:
    """A table of some n-grams with rows, a prior and levels of chance; 0 labels: without exit 0."""
    texts = draw(30, seed)
    options = {"vocab_size": VOCAB_SIZE, "special_ids": SPECIAL_IDS, "separator_id": separator_id, "min_count": 2}
    table = ExitTable.build(
        *pack(texts),
        torch.zeros(30, 1, dtype=torch.int64),
        depths=(1, 2, 3),
        speeds=(0.5,),
        ngram_order=order,
        **options,
    )
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(table.num_rows, 1 + num_labels, generator=generator)
    rows[-1] = 0
    shares = (torch.arange(3)[None, None] >= torch.arange(8)[None, :, None] * 2 // 7).float()
    return FittedTable(
        "counts",
        table,
        ScoreRows(rows[:, :1].contiguous(), torch.tensor([0.25])),
        Levels(torch.linspace(-0.5, 0.75, 7)[None], shares),
        Lexical(rows[:, 1:].contiguous(), torch.randn(num_labels, generator=generator)) if num_labels else None,
    )


def assert_same(table: FittedTable, ids: Tensor, lengths: Tensor) -> None:
    expected = ExitPredictor(table, kernel="none").predict(ids, lengths, speed=0.5)
    found = ExitPredictor(table, kernel="cpp").predict(ids, lengths, speed=0.5)
    assert torch.equal(found.exit_layers, expected.exit_layers)
    assert torch.equal(found.scores, expected.scores)
    assert (found.lexical_logits is None) == (expected.lexical_logits is None)
    if found.lexical_logits is not None and expected.lexical_logits is not None:
        assert torch.equal(found.lexical_logits, expected.lexical_logits)


@compiled
@given(
    st.lists(TOKENS, max_size=8),
    st.integers(1, 3),
    st.sampled_from([None, SEPARATOR]),
    st.sampled_from([0, 1, 3, 18, 140]),
    st.integers(0, 3),
)
@settings(deadline=None, max_examples=200)
def test_the_kernel_equals_torch_operations(
    texts: list[list[int]], order: int, separator_id: int | None, num_labels: int, seed: int
) -> None:
    assert_same(fitted(order, separator_id, num_labels, seed), *pack(texts))


@compiled
@pytest.mark.parametrize("separator_id", [None, SEPARATOR], ids=["single texts", "pairs"])
def test_many_texts_are_divided_among_threads(separator_id: int | None) -> None:
    table, batch = fitted(3, separator_id, 6, 0), pack(draw(3000, 7))
    assert_same(table, *batch)
    assert ExitPredictor(table, kernel="cpp").predict(*batch, speed=0.5).exit_layers.unique().numel() == 3


@compiled
def test_a_score_on_an_edge_is_above_it() -> None:
    table = fitted(2, None, 0, 0)
    # A text without keys scores the prior, which is the fourth edge but one to the last bit.
    edges = torch.tensor([[-1.0, -0.5, 0.0, 0.25, 0.25, 0.5, 1.0]])
    table = FittedTable(table.kind, table.table, table.score_rows, Levels(edges, table.levels.cumulative))
    assert_same(table, *pack([[], [2], [4, 5]]))


@compiled
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_defaults_of_the_process_do_not_matter(dtype: torch.dtype) -> None:
    table, batch = fitted(2, None, 3, 0), pack(draw(20, 7))
    expected = ExitPredictor(table, kernel="none").predict(*batch, speed=0.5)
    torch.set_default_dtype(dtype)
    try:
        found = ExitPredictor(table, kernel="cpp").predict(*batch, speed=0.5)
    finally:
        torch.set_default_dtype(torch.float32)
    for name, tensor in vars(expected).items():
        assert torch.equal(getattr(found, name), tensor)


@compiled
@pytest.mark.parametrize(
    ("ids", "lengths", "message"),
    [
        ([3, 40], [2], r"input_ids must be within 0..39, found 3..40"),
        ([3, -1], [2], r"input_ids must be within 0..39, found -1..3"),
        ([3, 4], [1], "lengths must be >= 0 and sum to the number of tokens"),
        ([3, 4], [3], "lengths must be >= 0 and sum to the number of tokens"),
        ([3, 4], [4, -2], "lengths must be >= 0 and sum to the number of tokens"),
        ([3, 4], [2**62, 2**62, 2**62, 2**62, 2], "their sum overflows 64 bits"),
    ],
)
def test_what_does_not_fit_is_refused(ids: list[int], lengths: list[int], message: str) -> None:
    predictor = ExitPredictor(fitted(2, SEPARATOR, 2, 0), kernel="cpp")
    with pytest.raises(ValueError, match=message):
        predictor.predict(torch.tensor(ids), torch.tensor(lengths), speed=0.5)


@compiled
def test_other_types_and_shapes_are_refused() -> None:
    predictor = ExitPredictor(fitted(2, None, 2, 0), kernel="cpp")
    with pytest.raises(TypeError, match=r"input_ids must be torch.int64, got torch.int32"):
        predictor.predict(torch.tensor([3], dtype=torch.int32), torch.tensor([1]), speed=0.5)
    with pytest.raises(ValueError, match="input_ids must be flat"):
        predictor.predict(torch.tensor([[3]]), torch.tensor([1]), speed=0.5)
    with pytest.raises(ValueError, match=r"Found texts on \['meta'\], the table on a CPU"):
        predictor.predict(torch.tensor([3], device="meta"), torch.tensor([1]), speed=0.5)


def test_where_no_kernel_is_torch_operations_serve() -> None:
    code = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "geep.hash_table._bags" else find(name, *rest)
from geep.hash_table import bag_kernel
print(bag_kernel("cpu"), bag_kernel("meta"))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout.split()) == (0, ["none", "none"]), done.stderr
    assert bag_kernel("cpu") == ("cpp" if cpp_bags.is_available() else "none")
