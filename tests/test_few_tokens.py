"""An 8-bit layer on few tokens, in one call, gives what the layer's steps give."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_model
from hypothesis import given, settings, strategies as st
from torch import Tensor

from geep.backends import PackedBackend, TokenBatch, kernels
from geep.backends.few_tokens import FewTokens
from geep.backends.int8 import FEW_TOKENS, Int8Layer, observe
from geep.backends.layout import Layout
from geep.backends.packed_layer import packed_layers

pytestmark = pytest.mark.skipif(
    not kernels.is_available() or not kernels.needed().geep_has_vnni(), reason="not compiled, or a CPU without VNNI"
)

SIZES = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4}
FAMILIES = ("bert", "distilbert", "mpnet", "deberta-v2")


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def made(family: str = "bert", **changes: Any) -> tuple[Int8Layer, Tensor]:
    """A layer, and tokens like those it was made for."""
    sizes = {"dim": 64, "hidden_dim": 192, "n_heads": 4} if family == "distilbert" else SIZES
    model = make_model(family, **sizes, **changes)
    (layer, *_), tokens = packed_layers(model), torch.randn(200, 64, generator=torch.Generator().manual_seed(1))
    ranges = observe([layer], [(tokens, Layout(np.full(20, 10, dtype=np.int64)))])
    return Int8Layer.of(layer, ranges, 0), tokens


def by_steps(layer: Int8Layer, hidden: Tensor, layout: Layout) -> Tensor:
    return replace(layer, few=None)(hidden, layout)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_one_call_equals_the_steps(family: str, threads: int) -> None:
    layer, tokens = made(family)
    assert layer.few is not None
    rows, apart = 0, 0
    for lengths in ([1], [5, 0, 8], [6], [7, 6], [12, 1, 1], [0, 3, 0], [FEW_TOKENS]):
        layout = Layout(np.array(lengths, dtype=np.int64))
        hidden = tokens[: layout.num_tokens]
        found, expected = layer.few(hidden, layout), by_steps(layer, hidden, layout)
        assert found.shape == expected.shape
        difference = (found - expected).norm(dim=1) / expected.norm(dim=1)
        assert difference.max() < 0.05
        rows, apart = rows + len(hidden), apart + int((difference > 1e-5).sum())
    # Where a number lies on the border of two steps of 8 bits it may be rounded either way; that is rare.
    assert apart <= 0.05 * rows


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
@torch.no_grad()
def test_every_activation_is_the_layers(activation: str) -> None:
    layer, tokens = made(hidden_act=activation)
    assert layer.few is not None
    layout = Layout(np.array([20], dtype=np.int64))
    found, expected = layer.few(tokens[:20], layout), by_steps(layer, tokens[:20], layout)
    assert (found - expected).norm() < 0.01 * expected.norm()


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6))
@settings(deadline=None, max_examples=30)
@torch.no_grad()
def test_texts_alone_are_as_together(lengths: list[int]) -> None:
    layer, tokens = made()
    assert layer.few is not None
    layout = Layout(np.array(lengths, dtype=np.int64))
    together = layer.few(tokens[: layout.num_tokens], layout)
    for start, stop in zip(layout.offsets.tolist(), layout.offsets.tolist()[1:], strict=False):
        alone = layer.few(tokens[start:stop], Layout(np.array([stop - start], dtype=np.int64)))
        assert torch.equal(alone, together[start:stop])


@torch.no_grad()
def test_a_broken_text_is_broken_alone() -> None:
    layer, tokens = made()
    assert layer.few is not None
    layout, hidden = Layout(np.array([4, 5, 6], dtype=np.int64)), tokens[:15].clone()
    whole = layer.few(hidden, layout)
    hidden[6, 3] = torch.nan
    broken = layer.few(hidden, layout)
    assert broken[6].isnan().all()
    assert torch.equal(broken[:4], whole[:4])
    assert torch.equal(broken[9:], whole[9:])
    assert hidden[6].isnan().sum() == 1  # what came is not changed


@torch.no_grad()
def test_rows_of_no_text_become_zeros_and_missing_ones_are_refused() -> None:
    layer, tokens = made()
    assert layer.few is not None
    layout = Layout(np.array([4, 5], dtype=np.int64))
    assert not layer.few(tokens[:12], layout)[9:].any()
    with pytest.raises(ValueError, match="texts have 9 tokens, found rows for 8"):
        layer.few(tokens[:8], layout)
    assert layer.few(tokens[:0], Layout(np.zeros(2, dtype=np.int64))).shape == (0, 64)


@torch.no_grad()
def test_both_sides_of_the_border_answer_alike() -> None:
    model = make_model(**SIZES)
    tokens = torch.randint(10, 100, (3 * FEW_TOKENS,)).numpy()
    batch = TokenBatch(tokens, None, np.full(3, FEW_TOKENS, dtype=np.int64))
    plain = PackedBackend.build(model, dtype="float32")
    ranges = observe(packed_layers(model), [(plain.start(batch).hidden, Layout(batch.lengths))])
    backend = PackedBackend.build(model, dtype="int8", ranges=ranges)

    def ran(some: TokenBatch) -> Tensor:
        live = backend.start(some)
        for layer in (1, 2, 3, 4):
            live = backend.advance(live, layer, len(some))
        return live.hidden

    together = ran(batch)
    for text in range(3):
        alone = ran(batch.select(np.array([text])))
        there = together[text * FEW_TOKENS : (text + 1) * FEW_TOKENS]
        assert (alone - there).norm() < 0.05 * there.norm()


def test_layers_that_it_is_not_made_for_go_the_other_way() -> None:
    layer, _ = made()
    assert FewTokens.runs(layer.attention, 64, 192)
    assert not FewTokens.runs(layer.attention, 96, 192)
    assert not FewTokens.runs(layer.attention, 64, 96)
    assert not FewTokens.runs(replace(layer.attention, mixing=None), 64, 192)
    with pytest.raises(ValueError, match="does not run this attention"):
        FewTokens({}, replace(layer.attention, mixing=None), layer.between, (0.1, 3), layer.layer.output_norm)
