"""The convolutional exit in one call gives what the model's own head gives, for texts of any lengths."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from geep.backends import kernels
from geep.backends.conv_exit import ConvExit
from geep.backends.fused_heads import FusedConvHead
from geep.modeling import ConvHead, Spans

pytestmark = pytest.mark.skipif(not kernels.is_available(), reason="the kernels were not compiled")

HIDDEN = 48
LENGTHS = st.lists(st.one_of(st.integers(0, 14), st.sampled_from([23, 24, 25, 70])), max_size=9)


def make_head(*, pairs: bool, num_labels: int = 3, hidden: int = HIDDEN) -> ConvHead:
    torch.manual_seed(0)
    config = SimpleNamespace(
        hidden_size=hidden, separator_id=3 if pairs else None, classifier_dropout=0.0, num_labels=num_labels
    )
    return ConvHead(config).requires_grad_(False).eval()


def make_exit(head: ConvHead, dtype: torch.dtype) -> ConvExit:
    found = FusedConvHead.of(head, dtype).few
    assert found is not None
    return found


def rounded(head: ConvHead, dtype: torch.dtype) -> ConvHead:
    """The head with those matrices that are kept in the dtype rounded to it, computing in float32."""
    other = copy.deepcopy(head)
    for linear in (other.narrow, other.convolution, other.dense):
        linear.weight.copy_(linear.weight.to(dtype))
    return other


def texts_of(lengths: list[int], *, seed: int = 0) -> tuple[Tensor, Spans]:
    """Hidden states, and where they lie; every text is a pair cut in its middle, where pairs are told apart."""
    offsets = torch.tensor(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    hidden = torch.randn(int(offsets[-1]), HIDDEN, generator=torch.Generator().manual_seed(seed))
    return hidden, Spans(offsets, len(hidden), max(lengths, default=0), torch.tensor(lengths, dtype=torch.int64) // 2)


def ask(found: ConvExit, hidden: Tensor, spans: Spans) -> Tensor:
    return found(hidden, spans.offsets, spans.parts.offsets if found.tells_texts_apart else spans.offsets)


@pytest.mark.parametrize("dtype", kernels.DTYPES, ids=str)
@pytest.mark.parametrize("pairs", [False, True], ids=["single texts", "pairs"])
@given(lengths=LENGTHS, num_labels=st.integers(1, 5), seed=st.integers(0, 5))
@settings(deadline=None, max_examples=40)
def test_one_call_equals_the_head(
    pairs: bool, dtype: torch.dtype, lengths: list[int], num_labels: int, seed: int
) -> None:
    head = make_head(pairs=pairs, num_labels=num_labels)
    hidden, spans = texts_of(lengths, seed=seed)
    hidden = hidden.to(dtype)
    found = ask(make_exit(head, dtype), hidden, spans)
    expected = rounded(head, dtype).forward_packed(hidden.float(), spans)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_texts_alone_are_answered_as_together(threads: int) -> None:
    for pairs in (False, True):
        found, lengths = make_exit(make_head(pairs=pairs), torch.float32), [3, 0, 70, 11, 1, 24]
        hidden, spans = texts_of(lengths)
        together = ask(found, hidden, spans)
        for place, (start, stop) in enumerate(zip(spans.offsets.tolist(), spans.offsets.tolist()[1:], strict=False)):
            _, alone = texts_of([lengths[place]])
            assert torch.equal(ask(found, hidden[start:stop], alone)[0], together[place])


@pytest.mark.parametrize("dtype", kernels.DTYPES, ids=str)
def test_a_broken_text_is_broken_alone(dtype: torch.dtype) -> None:
    found, lengths = make_exit(make_head(pairs=False), dtype), [7, 3, 12]
    hidden, spans = texts_of(lengths)
    whole = ask(found, hidden.to(dtype), spans)
    hidden[8, 5] = torch.nan
    broken = ask(found, hidden.to(dtype), spans)
    assert broken[1].isnan().all()
    assert torch.equal(broken[[0, 2]], whole[[0, 2]])


def test_far_from_zero_it_stays_with_the_head() -> None:
    head = make_head(pairs=False)
    hidden, spans = texts_of([5, 9])
    torch.testing.assert_close(
        ask(make_exit(head, torch.float32), 1000 * hidden, spans),
        head.forward_packed(1000 * hidden, spans),
        atol=1e-5,
        rtol=1e-4,
    )


def test_both_sides_of_the_border_answer_alike() -> None:
    head = make_head(pairs=True)
    fused = FusedConvHead.of(head, torch.float32)
    for lengths in ([9] * 3, [9] * 100):
        hidden, spans = texts_of(lengths)
        torch.testing.assert_close(
            fused.forward_packed(hidden, spans), head.forward_packed(hidden, spans), atol=1e-5, rtol=1e-5
        )


def test_hidden_states_of_another_width_go_the_other_way() -> None:
    head = make_head(pairs=False, hidden=24)
    fused = FusedConvHead.of(head, torch.float32)
    assert fused.few is None
    hidden, spans = texts_of([4, 5])
    torch.testing.assert_close(
        fused.forward_packed(hidden[:, :24].contiguous(), spans),
        head.forward_packed(hidden[:, :24], spans),
        atol=1e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_defaults_of_the_process_do_not_matter(dtype: torch.dtype) -> None:
    found = make_exit(make_head(pairs=False), torch.float32)
    hidden, spans = texts_of([4, 5])
    expected = ask(found, hidden, spans)
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            answered = ask(found, hidden, spans)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(answered, expected)


def test_what_does_not_fit_is_refused() -> None:
    found = make_exit(make_head(pairs=True), torch.float32)
    hidden, spans = texts_of([4, 5])
    with pytest.raises(ValueError, match="texts have 9 tokens, found rows for 8"):
        ask(found, hidden[:8], spans)
    with pytest.raises(ValueError, match=r"48 wide in torch.float32 of 2 texts each, found 48 wide in torch.bfloat16"):
        ask(found, hidden.bfloat16(), spans)
    with pytest.raises(ValueError, match="and 2 texts for 2"):
        found(hidden, spans.offsets, spans.offsets)
    with pytest.raises(ValueError, match=r"one int64 row on a CPU, found torch.int32"):
        found(hidden, spans.offsets.int(), spans.parts.offsets)
    with pytest.raises(ValueError, match="The texts have 9 tokens, their halves 8"):
        found(hidden, spans.offsets, spans.parts.offsets.clamp(max=8))
    head = make_head(pairs=False)
    parts = {name: (getattr(head, name).weight, getattr(head, name).bias) for name in ("narrow", "dense", "out")}
    with pytest.raises(ValueError, match=r"made for 64 channels .* Use `ConvHead`"):
        ConvExit(
            **parts,
            convolution=(head.convolution.weight[:, :-1], head.convolution.bias),
            dtype=torch.float32,
            tells_texts_apart=False,
        )
