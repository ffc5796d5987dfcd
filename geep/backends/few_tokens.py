"""An 8-bit layer on few tokens, in one call of our own kernel (`few_tokens.cpp`)."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from geep.backends import kernels
from geep.backends.attention import PackedAttention
from geep.backends.between import Between
from geep.backends.kernels import Rounding
from geep.backends.layout import Layout, check_reach
from geep.backends.packed_layer import Norm

COLUMNS = 64
"""Columns of a product at once: widths are multiples of it."""


class _Linear(ctypes.Structure):
    """`Linear` of few_tokens.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "scale", "bias")),
        *((name, ctypes.c_int64) for name in ("depth", "width")),
    )


class _Layer(ctypes.Structure):
    """`Layer` of few_tokens.cpp."""

    _fields_ = (
        *((name, _Linear) for name in ("qkv", "out", "up", "down")),
        *((name, ctypes.c_void_p) for name in ("inverse_step", "zero", "attention", "between")),
        *((name, ctypes.c_float) for name in ("wide_inverse_step", "wide_zero")),
        *((name, ctypes.c_void_p) for name in ("norm", "norm_bias")),
        ("eps", ctypes.c_float),
    )


@dataclass(frozen=True, slots=True, eq=False)
class RoundedLinear:
    """A linear layer in 8 bits.

    Attributes:
        weight: int8, (out, in).
        scale: What a step of each output's weights is worth, float32, (out,).
        bias: float32, (out,).
        quantise: Rounding of its float32 inputs.
    """

    weight: Tensor
    scale: Tensor
    bias: Tensor
    quantise: Rounding


class _ByColumns:
    """A linear layer as the kernel reads it, its weights by sixteen columns: (out / 16, in / 4, 16, 4)."""

    def __init__(self, linear: RoundedLinear) -> None:
        width, depth = linear.weight.shape
        self._weight = linear.weight.view(width // 16, 16, depth // 4, 4).transpose(1, 2).contiguous()
        self._numbers = linear.scale.contiguous(), linear.bias.contiguous()
        places = (each.data_ptr() for each in (self._weight, *self._numbers))
        self.struct = _Linear(*places, depth, width)


class FewTokens:
    """An 8-bit layer on few tokens; see `geep.backends.int8.Int8Layer`.

    Args:
        linears: By name: qkv, out, up and down.
        attention: The layer's.
        between: What stands behind attention.
        wide: Step and zero point of the wide part.
        norm: Of the layer's output.
    """

    def __init__(
        self,
        linears: Mapping[str, RoundedLinear],
        attention: PackedAttention,
        between: Between,
        wide: tuple[float, int],
        norm: Norm,
    ) -> None:
        if attention.mixing is None:
            raise ValueError("The kernel does not run this attention, expected one of `Mixing`.")
        self._reach = attention.mixing.reach
        first, mixed = linears["qkv"].quantise, linears["out"].quantise
        head = linears["out"].weight.shape[1] // attention.num_heads
        # All of it is kept, for the kernel knows where it lies.
        self._attention = kernels.describe(attention.num_heads, head, attention.mixing, mixed)
        self._linears = {name: _ByColumns(linears[name]) for name in ("qkv", "out", "up", "down")}
        bias = torch.zeros_like(norm.weight) if norm.bias is None else norm.bias
        self._norm = norm.weight.contiguous(), bias.contiguous()
        self._others = first, mixed, between, attention
        self._layer = _Layer(
            *(each.struct for each in self._linears.values()),
            first.inverse_step.data_ptr(),
            first.zero.data_ptr(),
            ctypes.addressof(self._attention),
            between.address,
            1 / wide[0],
            wide[1] + 0.5,
            *(each.data_ptr() for each in self._norm),
            norm.eps,
        )

    @staticmethod
    def runs(attention: PackedAttention, hidden: int, wide: int) -> bool:
        """Whether the kernel is compiled, runs on this CPU, and is made for such a layer."""
        if not kernels.is_available() or not kernels.needed().geep_has_vnni():
            return False
        return attention.mixing is not None and not hidden % COLUMNS and not wide % COLUMNS

    def __call__(self, hidden: Tensor, layout: Layout) -> Tensor:
        """Run the layer on packed tokens (num_tokens, hidden), float32 in and out, on a CPU.

        Raises:
            ValueError: If the texts have more tokens than there are, or one has more than there are positions for.
            MemoryError: If there is no memory for what lies between.
        """
        kernels.check_rows(len(hidden), layout.num_tokens)
        if self._reach is not None:
            check_reach(layout.longest, self._reach)
        hidden = hidden.contiguous()
        out = torch.empty_like(hidden)
        out[layout.num_tokens :].zero_()
        places = hidden.data_ptr(), out.data_ptr(), layout.offsets.ctypes.data
        sizes = len(layout.lengths), layout.longest, torch.get_num_threads()
        if kernels.needed().geep_few_tokens(ctypes.byref(self._layer), *places, *sizes):
            raise MemoryError(f"A layer of {layout.num_tokens} tokens found no memory for what lies between.")
        return out
