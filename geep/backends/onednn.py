"""Packed layers on oneDNN's CPU kernels: weights laid out once, bias, activation and residual inside the product.

The same layer as `PackedLayer`, with the same weights: only the passes over memory between the products are gone, and
the weights are reordered at build time instead of at each call. Kernels: oneDNN's inner product with post-operations,
which torch's own compiler uses on CPUs (torch.ops.mkldnn).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from geep.backends.attention import PackedAttention
from geep.backends.few_tokens import FewFloatTokens
from geep.backends.layout import Layout
from geep.backends.packed_layer import PackedLayer

# Activations that oneDNN applies inside a product: its name and algorithm for those that transformers names.
FUSED_ACTIVATIONS: Mapping[str, tuple[str, str]] = {
    "gelu": ("gelu", "none"),
    "gelu_new": ("gelu", "tanh"),
    "gelu_pytorch_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
}


FEW_TOKENS = 128
"""Tokens up to which a layer is one call (12x384 on two AMD EPYC cores): of more, oneDNN's products are faster."""


def is_available() -> bool:
    """Whether this build of torch has the fused linear layer."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def multiplies_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 itself (AVX-512 BF16, AMX): about twice as fast as float32, else slower."""
    return is_available() and bool(torch.cpu._is_avx512_bf16_supported())


def pad_rows(x: Tensor) -> Tensor:
    """Add rows of zeros up to one of few sizes: sixteen to each power of two, so at most a sixteenth more from 128 on.

    oneDNN makes a kernel for every number of rows that it meets, which takes as long as running it, and keeps it.
    Staircases have nearly as many sizes as there are layers to run.
    """
    num_rows = len(x)
    step = max(8, 1 << max((num_rows - 1).bit_length() - 5, 0))
    missing = -num_rows % step
    return F.pad(x, (0, 0, 0, missing)) if missing else x


@dataclass(frozen=True, slots=True)
class FusedLinear:
    """A linear layer in oneDNN's own weight layout."""

    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> Self:
        """Lay out a weight (out, in); costs a copy of it."""
        return cls(torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None), bias)

    def __call__(self, x: Tensor, activation: tuple[str, str] = ("none", "")) -> Tensor:
        """Return activation(x W' + b)."""
        name, algorithm = activation
        # Named overloads: finding the one that fits writes the tensors of the others into an error message first.
        return torch.ops.mkldnn._linear_pointwise.default(x, self.weight, self.bias, name, [], algorithm)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """Return x W' + b + residual."""
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add")

    def times(self, x: Tensor, factor: Tensor) -> Tensor:
        """Return (x W' + b) · factor."""
        return torch.ops.mkldnn._linear_pointwise.binary(x, factor, self.weight, self.bias, "mul")


@dataclass(frozen=True, slots=True)
class FusedLayer:
    """`PackedLayer` on fused kernels, float32 or bfloat16; equal to it up to rounding."""

    qkv: FusedLinear
    attention: PackedAttention
    out: FusedLinear
    up: FusedLinear
    gate: FusedLinear | None
    down: FusedLinear
    fused: tuple[str, str] | None  # None: the activation cannot be applied inside a product
    few: FewFloatTokens | None  # all of it in one call, for few tokens; None: our kernel does not run this
    layer: PackedLayer

    @classmethod
    def of(cls, layer: PackedLayer) -> Self:
        """Lay out the weights of a layer."""
        attention = PackedAttention.of(layer.qkv, layer.num_heads, layer.mixer)
        fused = FUSED_ACTIVATIONS.get(layer.activation_name)
        few = None
        if fused is not None and FewFloatTokens.runs(layer, attention, fused):
            few = FewFloatTokens(layer, attention, fused)
        return cls(
            qkv=FusedLinear.of(*layer.qkv),
            attention=attention,
            out=FusedLinear.of(*layer.out),
            up=FusedLinear.of(*layer.up),
            gate=None if layer.gate is None else FusedLinear.of(*layer.gate),
            down=FusedLinear.of(*layer.down),
            fused=fused,
            few=few,
            layer=layer,
        )

    def __call__(self, hidden: Tensor, layout: Layout) -> Tensor:
        """Run the layer on packed tokens (num_tokens, hidden)."""
        if self.few is not None and len(hidden) <= FEW_TOKENS:
            return self.few(hidden, layout)
        num_tokens, hidden, layer = len(hidden), pad_rows(hidden), self.layer
        mixed = self.attention(self.qkv(layer.before(hidden)), layout)
        hidden, read = layer.between(self.out.plus(mixed, hidden))
        wide = layer.activation(self.up(read)) if self.fused is None else self.up(read, self.fused)
        if self.gate is not None:
            wide = self.gate.times(read, wide)
        return layer.after(self.down.plus(wide, hidden))[:num_tokens]

    def first_tokens(self, hidden: Tensor, layout: Layout) -> Tensor:
        """Run the layer for the first token of each text; so few rows that the plain layer serves."""
        return self.layer.first_tokens(hidden, layout)
