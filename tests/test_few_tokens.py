"""A layer on few tokens, in one call, gives what the layer's steps give, in 8 bits and in bfloat16."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_model
from hypothesis import given, settings, strategies as st
from torch import Tensor

from geep.backends import PackedBackend, TokenBatch, int8, kernels, onednn
from geep.backends.few_tokens import FewFloatTokens, FewTokens
from geep.backends.int8 import Int8Layer, observe
from geep.backends.layout import Layout
from geep.backends.onednn import FusedLayer
from geep.backends.packed_layer import PackedLayer, packed_layers

is_there = kernels.is_available()
in_8_bits = pytest.mark.skipif(
    not is_there or not kernels.needed().geep_has_vnni(), reason="not compiled, or a CPU without VNNI"
)
in_bfloat16 = pytest.mark.skipif(
    not is_there or not kernels.needed().geep_has_bfloat16(), reason="not compiled, or a CPU without bfloat16"
)
KINDS = [pytest.param("int8", marks=in_8_bits), pytest.param("bfloat16", marks=in_bfloat16)]
either = pytest.mark.parametrize("kind", KINDS)

HIDDEN = 64
SIZES = {"hidden_size": HIDDEN, "intermediate_size": 192, "num_attention_heads": 4}
FAMILIES = ("bert", "distilbert", "mpnet", "deberta-v2")


def plain(family: str = "bert", **changes: Any) -> PackedLayer:
    sizes = {"dim": HIDDEN, "hidden_dim": 192, "n_heads": 4} if family == "distilbert" else SIZES
    return packed_layers(make_model(family, **sizes, **changes))[0]


def made(kind: str, layer: PackedLayer) -> tuple[Int8Layer | FusedLayer, Tensor]:
    """The layer in a kind of numbers, and tokens like those it was made for."""
    tokens = torch.randn(200, HIDDEN, generator=torch.Generator().manual_seed(1))
    if kind == "bfloat16":
        found: Int8Layer | FusedLayer = FusedLayer.of(layer.to(torch.bfloat16))
        tokens = tokens.bfloat16()
    else:
        found = Int8Layer.of(layer, observe([layer], [(tokens, Layout(np.full(20, 10, dtype=np.int64)))]), 0)
    assert found.few is not None
    return found, tokens


def few(layer: Int8Layer | FusedLayer, hidden: Tensor, layout: Layout) -> Tensor:
    assert layer.few is not None
    return layer.few(hidden, layout)


def laid_out(*lengths: int) -> Layout:
    return Layout(np.array(lengths, dtype=np.int64))


@in_8_bits
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_in_8_bits_one_call_equals_the_steps(family: str, threads: int) -> None:
    layer, tokens = made("int8", plain(family))
    rows, apart = 0, 0
    for lengths in ([1], [5, 0, 8], [6], [7, 6], [12, 1, 1], [0, 3, 0], [32]):
        layout = laid_out(*lengths)
        hidden = tokens[: layout.num_tokens]
        found, expected = few(layer, hidden, layout), replace(layer, few=None)(hidden, layout)
        assert found.shape == expected.shape
        difference = (found - expected).norm(dim=1) / expected.norm(dim=1)
        assert difference.max() < 0.05
        rows, apart = rows + len(hidden), apart + int((difference > 1e-5).sum())
    # Where a number lies on the border of two steps of 8 bits it may be rounded either way; that is rare.
    assert apart <= 0.05 * rows


@in_bfloat16
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_in_bfloat16_one_call_is_as_near_the_layer_as_its_steps(family: str, threads: int) -> None:
    reference = plain(family)
    layer, tokens = made("bfloat16", reference)
    for lengths in ([1], [5, 0, 8], [6], [7, 6], [12, 1, 1], [0, 3, 0], [60]):
        layout = laid_out(*lengths)
        hidden = tokens[: layout.num_tokens]
        found, steps = few(layer, hidden, layout), replace(layer, few=None)(hidden, layout)
        expected = reference(hidden.float(), layout)
        assert found.dtype == torch.bfloat16
        assert (found - expected).norm() <= 1.2 * (steps - expected).norm() < 0.02 * expected.norm()


@either
@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
@torch.no_grad()
def test_every_activation_is_the_layers(kind: str, activation: str) -> None:
    reference = plain(hidden_act=activation)
    layer, tokens = made(kind, reference)
    layout = laid_out(20)
    found, expected = few(layer, tokens[:20], layout), replace(layer, few=None)(tokens[:20], layout)
    assert (found - expected).float().norm() < 0.01 * expected.float().norm()


@either
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=6))
@settings(deadline=None, max_examples=30)
@torch.no_grad()
def test_texts_alone_are_as_together(kind: str, lengths: list[int]) -> None:
    layer, tokens = made(kind, plain())
    layout = laid_out(*lengths)
    together = few(layer, tokens[: layout.num_tokens], layout)
    for start, stop in zip(layout.offsets.tolist(), layout.offsets.tolist()[1:], strict=False):
        assert torch.equal(few(layer, tokens[start:stop], laid_out(stop - start)), together[start:stop])


@either
@torch.no_grad()
def test_a_broken_text_is_broken_alone(kind: str) -> None:
    layer, tokens = made(kind, plain())
    layout, hidden = laid_out(4, 5, 6), tokens[:15].clone()
    whole = few(layer, hidden, layout)
    hidden[6, 3] = torch.nan
    broken = few(layer, hidden, layout)
    assert broken[6].isnan().all()
    assert torch.equal(broken[:4], whole[:4])
    assert torch.equal(broken[9:], whole[9:])
    assert hidden[6].isnan().sum() == 1  # what came is not changed


@either
@torch.no_grad()
def test_rows_of_no_text_become_zeros_and_missing_ones_are_refused(kind: str) -> None:
    layer, tokens = made(kind, plain())
    layout = laid_out(4, 5)
    assert not few(layer, tokens[:12], layout)[9:].any()
    with pytest.raises(ValueError, match="texts have 9 tokens, found rows for 8"):
        few(layer, tokens[:8], layout)
    assert few(layer, tokens[:0], laid_out(0, 0)).shape == (0, HIDDEN)


@either
@torch.no_grad()
def test_other_hidden_states_are_refused(kind: str) -> None:
    layer, tokens = made(kind, plain())
    other = torch.bfloat16 if kind == "int8" else torch.float32
    with pytest.raises(ValueError, match=f"numbers of {tokens.dtype} a token, found 64 of {other}"):
        few(layer, tokens[:4].to(other), laid_out(4))
    with pytest.raises(ValueError, match="reads 64 numbers .* found 32"):
        few(layer, tokens[:4, :32], laid_out(4))


@either
@torch.no_grad()
def test_texts_beyond_the_positions_are_refused(kind: str) -> None:
    layer, tokens = made(kind, plain("mpnet"))
    assert layer.attention.mixing is not None
    reach = layer.attention.mixing.reach
    assert reach is not None
    many = torch.zeros(reach + 1, HIDDEN, dtype=tokens.dtype)
    with pytest.raises(ValueError, match=f"positions for {reach} tokens, got a text of {reach + 1}; cut it"):
        few(layer, many, laid_out(reach + 1))


@either
@torch.no_grad()
def test_both_sides_of_the_border_answer_alike(kind: str) -> None:
    most = int8.FEW_TOKENS if kind == "int8" else onednn.FEW_TOKENS
    length = 32
    model, count = make_model(**SIZES), most // length + 2
    tokens = torch.randint(10, 100, (count * length,), generator=torch.Generator().manual_seed(0)).numpy()
    batch = TokenBatch(tokens, None, np.full(count, length, dtype=np.int64))
    hidden = PackedBackend.build(model, dtype="float32").start(batch).hidden
    ranges = observe(packed_layers(model), [(hidden, Layout(batch.lengths))]) if kind == "int8" else None
    backend = PackedBackend.build(model, dtype=kind, ranges=ranges)
    assert all(getattr(layer, "few", None) is not None for layer in backend.layers)

    def ran(some: TokenBatch) -> Tensor:
        live = backend.start(some)
        for layer in (1, 2, 3, 4):
            live = backend.advance(live, layer, len(some))
        return live.hidden.float()

    together = ran(batch)
    for text in range(count):
        alone = ran(batch.select(np.array([text])))
        there = together[text * length : (text + 1) * length]
        assert (alone - there).norm() < 0.05 * there.norm()


@in_8_bits
def test_8_bit_layers_that_it_is_not_made_for_go_the_other_way() -> None:
    layer, _ = made("int8", plain())
    assert isinstance(layer, Int8Layer)
    assert FewTokens.runs(layer.attention, 64, 192)
    assert not FewTokens.runs(layer.attention, 96, 192)
    assert not FewTokens.runs(layer.attention, 64, 96)
    assert not FewTokens.runs(replace(layer.attention, mixing=None), 64, 192)


@in_bfloat16
def test_bfloat16_layers_that_it_is_not_made_for_go_the_other_way() -> None:
    reference = plain().to(torch.bfloat16)
    attention = FusedLayer.of(reference).attention
    gelu = ("gelu", "none")
    assert FewFloatTokens.runs(reference, attention, gelu)
    assert not FewFloatTokens.runs(plain(), attention, gelu)  # float32
    assert not FewFloatTokens.runs(reference, attention, ("swish", ""))
    assert not FewFloatTokens.runs(replace(reference, norm_first=True), attention, gelu)
    assert not FewFloatTokens.runs(replace(reference, gate=reference.up), attention, gelu)
    assert not FewFloatTokens.runs(reference, replace(attention, mixing=None), gelu)
    assert FusedLayer.of(packed_layers(make_model("modernbert"))[1].to(torch.bfloat16)).few is None
    with pytest.raises(ValueError, match="does not run this attention"):
        FewFloatTokens(reference, replace(attention, mixing=None), gelu)
    with pytest.raises(ValueError, match="normalise behind attention"):
        FewFloatTokens(replace(reference, attention_norm=None), attention, gelu)
