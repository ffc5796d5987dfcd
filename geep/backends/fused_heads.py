"""The convolutional exit on oneDNN's and our own kernels: few texts pay for the number of calls, not for products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from geep.backends import kernels
from geep.backends.conv_exit import ConvExit
from geep.backends.onednn import FUSED_ACTIVATIONS, FusedLinear, pad_rows
from geep.modeling import ConvHead, Spans, compared

_GELU, _TANH = FUSED_ACTIVATIONS["gelu"], ("tanh", "")


# Tokens up to which our own kernel, one call in float32, is faster than oneDNN's products, of which an exit is four: by
# dtype of the hidden states (12x384 on two AMD EPYC cores).
_FEW_TOKENS = {torch.float32: 384, torch.bfloat16: 192}


@dataclass(frozen=True, slots=True)
class FusedConvHead:
    """`ConvHead`, equal to it up to rounding.

    Attributes:
        few: All of it in one call, for few tokens; None where hidden states are no multiple of 16 wide.
    """

    few: ConvExit | None
    narrow: FusedLinear
    convolution: FusedLinear
    dense: FusedLinear
    out: FusedLinear
    reach: int
    tells_texts_apart: bool

    @classmethod
    def of(cls, head: ConvHead, dtype: torch.dtype) -> Self:
        """Lay out the weights of a head for hidden states of a dtype."""

        def fused(weight: Tensor, bias: Tensor) -> FusedLinear:
            return FusedLinear.of(weight.detach().to(dtype), bias.detach().to(dtype))

        return cls(
            few=None if head.narrow.in_features % kernels.LANES else _in_one_call(head, dtype),
            narrow=fused(head.narrow.weight, head.narrow.bias),
            convolution=fused(head.by_neighbour(), head.convolution.bias),
            dense=fused(head.dense.weight, head.dense.bias),
            out=fused(head.out.weight, head.out.bias),
            reach=head.width // 2,
            tells_texts_apart=head.tells_texts_apart,
        )

    def forward_packed(self, hidden: Tensor, spans: Spans) -> Tensor:
        """Map packed texts to logits; arguments as `PooledHead.forward_packed`."""
        if self.few is not None and spans.num_tokens <= _FEW_TOKENS[hidden.dtype]:
            return self.few(hidden, spans.offsets, spans.parts.offsets if self.tells_texts_apart else spans.offsets)
        tokens = self.narrow(pad_rows(hidden), _GELU)
        # Of no text what stands behind the last token is the neighbour.
        near = self.convolution(kernels.neighbours(tokens, spans.offsets, self.reach), _GELU)
        if self.tells_texts_apart:
            pairs = kernels.mean_and_max(tokens, near, spans.parts.offsets)
            features = compared(pairs[::2], pairs[1::2])
        else:
            features = kernels.mean_and_max(tokens, near, spans.offsets)
        return self.out(self.dense(pad_rows(features), _TANH))[: len(spans.lengths)]


def _in_one_call(head: ConvHead, dtype: torch.dtype) -> ConvExit:
    return ConvExit(
        narrow=(head.narrow.weight, head.narrow.bias),
        convolution=(head.by_neighbour(), head.convolution.bias),
        dense=(head.dense.weight, head.dense.bias),
        out=(head.out.weight, head.out.bias),
        dtype=dtype,
        tells_texts_apart=head.tells_texts_apart,
    )
