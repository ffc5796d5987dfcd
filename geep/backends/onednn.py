"""Packed layers on oneDNN's CPU kernels: weights laid out once, bias, activation and residual inside the product.

The same layer as `PackedLayer`, with the same weights: only the passes over memory between the products are gone, and
the weights are reordered at build time instead of at each call. Kernels: oneDNN's inner product with post-operations,
which torch's own compiler uses on CPUs (torch.ops.mkldnn).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from geep.backends.packed_layer import LengthRun, Norm, PackedLayer, attend

# Activations that oneDNN applies inside a product: its name and algorithm for those that transformers names.
FUSED_ACTIVATIONS: Mapping[str, tuple[str, str]] = {
    "gelu": ("gelu", "none"),
    "gelu_new": ("gelu", "tanh"),
    "gelu_pytorch_tanh": ("gelu", "tanh"),
    "relu": ("relu", ""),
}


def is_available() -> bool:
    """Whether this build of torch has the fused linear layer."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@dataclass(frozen=True, slots=True)
class FusedLinear:
    """A linear layer in oneDNN's own weight layout."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor) -> Self:
        """Lay out a weight (out, in); costs a copy of it."""
        return cls(torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None), bias)

    def __call__(self, x: Tensor, activation: tuple[str, str] = ("none", "")) -> Tensor:
        """Return activation(x W' + b)."""
        name, algorithm = activation
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, name, [], algorithm)

    def plus(self, x: Tensor, residual: Tensor) -> Tensor:
        """Return x W' + b + residual."""
        return torch.ops.mkldnn._linear_pointwise(x, residual, self.weight, self.bias, "add")


@dataclass(frozen=True, slots=True)
class FusedLayer:
    """`PackedLayer` on fused kernels, float32 or bfloat16; equal to it up to rounding."""

    qkv: FusedLinear
    out: FusedLinear
    up: FusedLinear
    down: FusedLinear
    attention_norm: Norm
    output_norm: Norm
    fused: tuple[str, str]
    activation: Callable[[Tensor], Tensor] | None  # where it cannot be fused
    num_heads: int

    @classmethod
    def of(cls, layer: PackedLayer) -> Self:
        """Lay out the weights of a layer."""
        is_fused = layer.activation_name in FUSED_ACTIVATIONS
        return cls(
            qkv=FusedLinear.of(*layer.qkv),
            out=FusedLinear.of(*layer.out),
            up=FusedLinear.of(*layer.up),
            down=FusedLinear.of(*layer.down),
            attention_norm=layer.attention_norm,
            output_norm=layer.output_norm,
            fused=FUSED_ACTIVATIONS[layer.activation_name] if is_fused else ("none", ""),
            activation=None if is_fused else layer.activation,
            num_heads=layer.num_heads,
        )

    def __call__(self, hidden: Tensor, runs: Sequence[LengthRun]) -> Tensor:
        """Run the layer on packed tokens (num_tokens, hidden)."""
        mixed = attend(self.qkv(hidden), runs, self.num_heads)
        hidden = self.attention_norm(self.out.plus(mixed, hidden))
        wide = self.up(hidden, self.fused)
        if self.activation is not None:
            wide = self.activation(wide)
        return self.output_norm(self.down.plus(wide, hidden))
