"""A layer on few tokens, in 8 bits or bfloat16, in one call of our own kernel (`few_tokens.cpp`)."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from geep.backends import kernels
from geep.backends.attention import PackedAttention
from geep.backends.between import ACTIVATIONS, Between
from geep.backends.kernels import Rounding
from geep.backends.layout import Layout, check_reach
from geep.backends.packed_layer import Norm, PackedLayer

COLUMNS = 64
"""Columns of a product at once: widths are multiples of it."""


class _Linear(ctypes.Structure):
    """`Linear` of few_tokens.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "scale", "bias")),
        *((name, ctypes.c_int64) for name in ("depth", "width")),
    )


class _Norm(ctypes.Structure):
    """`Norm` of few_tokens.cpp."""

    _fields_ = (*((name, ctypes.c_void_p) for name in ("weight", "bias")), ("eps", ctypes.c_float))


class _Layer(ctypes.Structure):
    """`Layer` of few_tokens.cpp."""

    _fields_ = (
        *((name, _Linear) for name in ("qkv", "out", "up", "down")),
        *((name, ctypes.c_void_p) for name in ("inverse_step", "zero", "attention", "between")),
        *((name, ctypes.c_float) for name in ("wide_inverse_step", "wide_zero")),
        ("last", _Norm),
    )


class _FloatLinear(ctypes.Structure):
    """`FloatLinear` of few_tokens.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
        *((name, ctypes.c_int64) for name in ("depth", "width")),
    )


class _FloatLayer(ctypes.Structure):
    """`FloatLayer` of few_tokens.cpp."""

    _fields_ = (
        *((name, _FloatLinear) for name in ("qkv", "out", "up", "down")),
        ("attention", ctypes.c_void_p),
        *((name, _Norm) for name in ("middle", "last")),
        ("activation", ctypes.c_int64),
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


def _by_columns(weight: Tensor, together: int) -> Tensor:
    """A weight (out, in) as kernels read it: by sixteen columns, (out / 16, in / together, 16, together)."""
    width, depth = weight.shape
    return weight.view(width // 16, 16, depth // together, together).transpose(1, 2).contiguous()


def _is_made_for(attention: PackedAttention, hidden: int, wide: int) -> bool:
    return attention.mixing is not None and not hidden % COLUMNS and not wide % COLUMNS


class _OneCall:
    """What both kinds share. Tensors that a kernel is told of are kept, for it knows where they lie."""

    def __init__(self, attention: PackedAttention, hidden: int, mixed: Rounding | None) -> None:
        if attention.mixing is None:
            raise ValueError("The kernel does not run this attention, expected one of `Mixing`.")
        self._mixer, self._mixed = attention, mixed
        self._reach = attention.mixing.reach
        self._attention = kernels.describe(attention.num_heads, hidden // attention.num_heads, attention.mixing, mixed)
        self._kept: list[Tensor] = []
        self._hidden = hidden

    def _place(self, tensor: Tensor) -> int:
        """Keep a tensor, and say where it lies."""
        self._kept.append(tensor.contiguous())
        return self._kept[-1].data_ptr()

    def _norm(self, norm: Norm) -> _Norm:
        bias = torch.zeros_like(norm.weight) if norm.bias is None else norm.bias
        return _Norm(self._place(norm.weight.float()), self._place(bias.float()), norm.eps)

    dtype: ClassVar[torch.dtype]
    """Of hidden states."""

    def _run(self, *arguments: int) -> int:
        raise NotImplementedError

    def __call__(self, hidden: Tensor, layout: Layout) -> Tensor:
        """Run the layer on packed tokens (num_tokens, hidden), in its dtype, on a CPU.

        Raises:
            ValueError: If hidden states are others, the texts have more tokens than there are, or one has more than
                there are positions for.
            MemoryError: If there is no memory for what lies between.
        """
        if hidden.dtype != self.dtype or hidden.shape[1] != self._hidden:
            raise ValueError(
                f"The layer reads {self._hidden} numbers of {self.dtype} a token, found {hidden.shape[1]} of "
                f"{hidden.dtype}."
            )
        kernels.check_rows(len(hidden), layout.num_tokens)
        if self._reach is not None:
            check_reach(layout.longest, self._reach)
        hidden = hidden.contiguous()
        out = torch.empty_like(hidden)
        out[layout.num_tokens :].zero_()
        places = hidden.data_ptr(), out.data_ptr(), layout.offsets.ctypes.data
        if self._run(*places, len(layout.lengths), layout.longest, torch.get_num_threads()):
            raise MemoryError(f"A layer of {layout.num_tokens} tokens found no memory for what lies between.")
        return out


class FewTokens(_OneCall):
    """An 8-bit layer on few tokens; see `geep.backends.int8.Int8Layer`.

    Args:
        linears: By name: qkv, out, up and down.
        attention: The layer's.
        between: What stands behind attention.
        wide: Step and zero point of the wide part.
        norm: Of the layer's output.
    """

    dtype = torch.float32

    def __init__(
        self,
        linears: Mapping[str, RoundedLinear],
        attention: PackedAttention,
        between: Between,
        wide: tuple[float, int],
        norm: Norm,
    ) -> None:
        first = linears["qkv"]
        super().__init__(attention, first.weight.shape[1], linears["out"].quantise)
        self._between = between
        self._layer = _Layer(
            *(self._linear(linears[name]) for name in ("qkv", "out", "up", "down")),
            self._place(first.quantise.inverse_step),
            self._place(first.quantise.zero),
            ctypes.addressof(self._attention),
            between.address,
            1 / wide[0],
            wide[1] + 0.5,
            self._norm(norm),
        )

    def _linear(self, linear: RoundedLinear) -> _Linear:
        width, depth = linear.weight.shape
        numbers = self._place(linear.scale), self._place(linear.bias)
        return _Linear(self._place(_by_columns(linear.weight, 4)), *numbers, depth, width)

    @staticmethod
    def runs(attention: PackedAttention, hidden: int, wide: int) -> bool:
        """Whether the kernel is compiled, runs on this CPU, and is made for such a layer."""
        is_here = kernels.is_available() and bool(kernels.needed().geep_has_vnni())
        return is_here and _is_made_for(attention, hidden, wide)

    def _run(self, *arguments: int) -> int:
        return int(kernels.needed().geep_few_tokens(ctypes.byref(self._layer), *arguments))


class FewFloatTokens(_OneCall):
    """A bfloat16 layer on few tokens; see `geep.backends.onednn.FusedLayer`.

    Args:
        layer: The plain layer, its matrices in bfloat16.
        attention: Its attention.
        activation: Of the wide part, a key of `ACTIVATIONS`.
    """

    dtype = torch.bfloat16

    def __init__(self, layer: PackedLayer, attention: PackedAttention, activation: tuple[str, str]) -> None:
        if layer.attention_norm is None:
            raise ValueError("The kernel runs layers that normalise behind attention, found one that does not.")
        super().__init__(attention, layer.qkv[0].shape[1], None)
        self._layer = _FloatLayer(
            *(self._linear(*linear) for linear in (layer.qkv, layer.out, layer.up, layer.down)),
            ctypes.addressof(self._attention),
            *(self._norm(norm) for norm in (layer.attention_norm, layer.output_norm)),
            ACTIVATIONS[activation],
        )

    def _linear(self, weight: Tensor, bias: Tensor | None) -> _FloatLinear:
        width, depth = weight.shape
        floats = torch.zeros_like(weight[:, 0], dtype=torch.float32) if bias is None else bias.float()
        return _FloatLinear(self._place(_by_columns(weight, 2)), self._place(floats), depth, width)

    @staticmethod
    def runs(layer: PackedLayer, attention: PackedAttention, activation: tuple[str, str] | None) -> bool:
        """Whether the kernel is compiled, runs on this CPU, and is made for such a layer."""
        is_here = kernels.is_available() and bool(kernels.needed().geep_has_bfloat16())
        is_plain = not layer.norm_first and layer.gate is None and layer.attention_norm is not None
        weight = layer.up[0]
        return (
            is_here
            and is_plain
            and weight.dtype == torch.bfloat16
            and activation in ACTIVATIONS
            and _is_made_for(attention, weight.shape[1], weight.shape[0])
        )

    def _run(self, *arguments: int) -> int:
        return int(kernels.needed().geep_few_tokens_bfloat16(ctypes.byref(self._layer), *arguments))
