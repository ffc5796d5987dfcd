"""Our own CPU kernels give what torch's give, in every family, for texts of any lengths."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SEP, alone, make_model, random_batch
from hypothesis import given, settings, strategies as st
from test_backends import one_walk
from test_mixers import every_setting, longest

from geep.backends import PackedBackend, kernels
from geep.backends.attention import PackedAttention, attend_runs
from geep.backends.fused_heads import FusedConvHead
from geep.backends.kernels import LANES, Mixing, Rounding, attend, mean_and_max, neighbours
from geep.backends.layout import Layout
from geep.backends.mixers import Disentangled, DistanceBias, DotProduct, Mixer, Rotary
from geep.backends.packed import spans_of
from geep.modeling.heads import _mean_and_max_packed

compiled = pytest.mark.skipif(not kernels.is_available(), reason="the kernels were not compiled")

REACH = 70

MIXERS = (
    "dot",
    "scaled dot",
    "distances",
    "disentangled",
    "disentangled queries",
    "disentangled keys",
    "turned",
    "turned, window 3",
    "turned, window 20",
)

LENGTHS = st.lists(st.one_of(st.integers(0, 40), st.sampled_from([1, 15, 16, 17, 33, REACH])), min_size=1, max_size=8)


def mixer_named(name: str, head: int) -> Mixer:
    if name == "distances":
        return DistanceBias(torch.randn(2, 2 * REACH - 1))
    if name.startswith("disentangled"):
        keys, queries = (
            None if name.endswith(other) else torch.randn(2, 9, head) / head**0.5 for other in ("keys", "queries")
        )
        return Disentangled(0.2, keys, queries, torch.randint(0, 9, (2 * REACH - 1,)))
    if name.startswith("turned"):
        angles = torch.rand(REACH, head // 2) * 6
        window = int(name.split()[-1]) if "window" in name else None
        return Rotary.of(torch.polar(torch.ones_like(angles), angles), window, torch.float32)
    return DotProduct(0.07 if name == "scaled dot" else None)


@compiled
@settings(deadline=None, max_examples=120)
@given(LENGTHS, st.sampled_from(MIXERS), st.sampled_from(kernels.HEADS), st.sampled_from(kernels.DTYPES))
def test_attention_equals_that_by_runs(lengths: list[int], name: str, head: int, dtype: torch.dtype) -> None:
    torch.manual_seed(sum(lengths))
    layout, mixer = Layout(np.array(lengths, dtype=np.int64)), mixer_named(name, head)
    qkv = torch.randn(layout.num_tokens + 3, 6 * head).to(dtype)  # three rows that belong to no text
    found = attend(qkv, layout, 2, mixer.mixing)
    expected = attend_runs(qkv.clone(), layout, 2, mixer)
    assert found.dtype == dtype
    assert not found[layout.num_tokens :].any()
    # bfloat16 has 8 digits in base 2, and both round what they have in float32.
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    assert torch.allclose(found.float(), expected.float(), atol=tolerance, rtol=tolerance)


@compiled
def test_a_text_is_answered_alike_whatever_lies_beside_it(threads: int) -> None:
    lengths = np.array([9, 30, 0, 1, 17, 9, 64])
    layout, qkv = Layout(lengths), torch.randn(int(lengths.sum()), 3 * 4 * 32)
    together = attend(qkv, layout, 4, Mixing(0.2))
    for start, length in zip(layout.offsets, lengths, strict=False):
        one = attend(qkv[start : start + length], Layout(np.array([length])), 4, Mixing(0.2))
        assert torch.equal(one, together[start : start + length])


@compiled
@settings(deadline=None, max_examples=30)
@given(st.integers(1, 70), st.integers(1, 90), st.integers(0, 9))
def test_numbers_are_rounded_as_torch_rounds_them(rows: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    # Powers of two, so that neither way rounds before.
    rounding = Rounding(2.0 ** torch.randint(2, 7, (width,)), torch.randint(0, 256, (width,)) + 0.5)
    x = torch.randn(rows, width)
    expected = (x * rounding.inverse_step + rounding.zero).clamp(0, 255).to(torch.uint8)
    assert torch.equal(rounding(x), expected)
    assert torch.equal(rounding(x.t().contiguous().t()), expected)  # in another order in memory


@compiled
@pytest.mark.parametrize("name", MIXERS)
def test_attention_in_8_bits_is_attention_rounded(name: str, threads: int) -> None:
    layout, mixer = Layout(np.array([12, 40, 3])), mixer_named(name, 32)
    qkv = torch.randn(layout.num_tokens, 3 * 64)
    rounding = Rounding(torch.full((64,), 64.0), torch.full((64,), 128.5))
    attention = PackedAttention(2, mixer, mixer.mixing)
    expected = rounding(attention(qkv.clone(), layout))
    assert torch.equal(attention(qkv.clone(), layout, rounding), expected)
    by_runs = PackedAttention(2, mixer, None)
    assert int((by_runs(qkv.clone(), layout, rounding).int() - expected.int()).abs().max()) <= 1


@compiled
@every_setting
@torch.no_grad()
def test_every_family_equals_hugging_face_on_them(family: str, changes: dict[str, Any]) -> None:
    model = make_model(family, hidden_size=32, num_attention_heads=2, **changes)
    batch = random_batch(8, seed=2, longest=longest(family))
    built = PackedBackend.build(model, dtype="float32")
    assert all(layer.attention.mixing is not None for layer in built.layers)  # type: ignore[attr-defined]
    assert sum(one_walk(model, built, batch, alone(model, batch), seed) for seed in range(3)) > 10


@compiled
def test_texts_beyond_the_positions_are_refused() -> None:
    layout = Layout(np.array([3, REACH + 1]))
    for name in ("distances", "turned"):
        mixer = mixer_named(name, 16)
        with pytest.raises(ValueError, match=f"positions for {REACH} tokens, got a text of {REACH + 1}; cut it"):
            PackedAttention(2, mixer, mixer.mixing)(torch.zeros(layout.num_tokens, 96), layout)


@compiled
def test_kernels_of_older_sources_are_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    class Older:
        """Lacks what was added since, as a library that was compiled before does."""

        def __init__(self, path: str) -> None:
            self.geep_attend = lambda: None
            self.geep_runs_here = lambda: 1

    monkeypatch.setattr(kernels.ctypes, "CDLL", Older)
    kernels._library.cache_clear()
    try:
        assert not kernels.is_available()
    finally:
        monkeypatch.undo()
        kernels._library.cache_clear()
    assert kernels.is_available()


@compiled
def test_no_kernel_reads_what_is_not_there() -> None:
    layout, offsets = Layout(np.array([3, 4])), torch.tensor([0, 3, 7])
    with pytest.raises(ValueError, match="texts have 7 tokens, found rows for 6"):
        attend(torch.zeros(6, 96), layout, 2, Mixing(1.0))
    with pytest.raises(ValueError, match="texts have 7 tokens, found rows for 6"):
        neighbours(torch.zeros(6, 16), offsets, 1)
    with pytest.raises(ValueError, match="texts have 7 tokens, found rows for 6"):
        mean_and_max(torch.zeros(7, 16), torch.zeros(6, 16), offsets)
    with pytest.raises(ValueError, match="found 24 in torch.float32; use `attend_runs`"):
        attend(torch.zeros(7, 144), layout, 2, Mixing(1.0))


@compiled
def test_what_the_kernel_reads_beyond_a_table_lies_inside_it() -> None:
    bias = mixer_named("distances", 16).mixing.bias
    assert bias is not None
    assert bias.shape[1] == 2 * REACH - 1 + 2 * LANES
    # The table's middle stays where it was, so that a distance has the same place from both ends.
    assert bias.shape[1] % 2 == 1


@torch.no_grad()
def test_without_them_torchs_kernels_answer_and_it_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model("bert", hidden_size=32, num_attention_heads=2)
    batch = random_batch(8, seed=2)
    monkeypatch.setattr(kernels, "_library", lambda: None)
    with caplog.at_level(logging.WARNING):
        built = PackedBackend.build(model, dtype="float32")
    assert "install a C++ compiler" in caplog.text
    assert sum(one_walk(model, built, batch, alone(model, batch), seed) for seed in range(3)) > 10
    with pytest.raises(RuntimeError, match="without its CPU kernels"):
        attend(torch.zeros(3, 96), Layout(np.array([3])), 2, Mixing(1.0))


# Exits


@compiled
@settings(deadline=None, max_examples=40)
@given(LENGTHS, st.sampled_from(kernels.DTYPES), st.integers(0, 3))
def test_what_exits_read_is_what_the_heads_read(lengths: list[int], dtype: torch.dtype, reach: int) -> None:
    torch.manual_seed(sum(lengths))
    layout = Layout(np.array(lengths, dtype=np.int64))
    spans = spans_of(layout, None, torch.device("cpu"))
    one, other = torch.randn(2, layout.num_tokens, 32).to(dtype)
    expected = (
        torch.cat([one, one.new_zeros(1, 32)])
        .index_select(0, spans.neighbours(reach))
        .reshape(len(one), 32 * (2 * reach + 1))
    )
    # Rows of no text behind those of the texts have no neighbours, and are nobody's.
    more = torch.cat([one, torch.ones(2, 32, dtype=dtype)])
    found = neighbours(more, spans.offsets, reach)
    assert torch.equal(found[: len(one)], expected)
    assert not found[len(one) :].any()
    pooled = mean_and_max(more, torch.cat([other, torch.ones(2, 32, dtype=dtype)]), spans.offsets)
    wanted = _mean_and_max_packed(one.float() + other.float(), spans)
    assert pooled.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2**-7
    assert torch.allclose(pooled.float(), wanted, atol=tolerance, rtol=tolerance)


@compiled
@pytest.mark.parametrize("dtype", kernels.DTYPES, ids=str)
@pytest.mark.parametrize("pairs", [False, True])
@torch.no_grad()
def test_the_convolutional_exit_equals_the_models(pairs: bool, dtype: torch.dtype) -> None:
    model = make_model(head="conv", separator_id=SEP if pairs else None)
    batch = random_batch(40, seed=1, pairs=pairs)
    built = PackedBackend.build(model, dtype=str(dtype).split(".")[-1])
    assert isinstance(built.heads[1], FusedConvHead)
    live = built.start(batch)
    for start, stop in ((0, 40), (7, 8), (11, 11)):
        found = built.exit_logits(live, 1, start, stop).float()
        expected = built.exit_logits(live, 1, start, stop, head=model.head_at(1))
        assert found.shape == expected.shape
        if len(found):
            assert (found - expected).norm() <= (1e-5 if dtype == torch.float32 else 0.06) * expected.norm()
