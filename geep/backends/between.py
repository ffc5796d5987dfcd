"""What stands between two 8-bit products of a layer, in one call of our own kernel (`between.cpp`)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from geep.backends import kernels
from geep.backends.kernels import Rounding

WIDE = 32
"""Wide channels in float32 that `Between` is made for; the hidden states are a multiple of as many wide."""

ACTIVATIONS = {("gelu", "none"): 0, ("gelu", "tanh"): 1, ("relu", ""): 2}
"""Activations of `Between`, by oneDNN's names and algorithms."""


class _Between(ctypes.Structure):
    """`Between` of between.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("norm", "norm_bias")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("up", "up_bias", "down", "inverse_step", "zero")),
        *((name, ctypes.c_int64) for name in ("hidden", "activation")),
    )


class Between:
    """What stands between two 8-bit products of a layer, in one call.

    Args:
        norm: Weight, bias and epsilon of the norm behind attention, (hidden,).
        up: Weight (32, hidden) and bias (32,) of the wide channels that stay in float32.
        down: Weight (hidden, 32) back from them.
        activation: Of the wide channels, a key of `ACTIVATIONS`.
        rounding: Of the normalised sums, for the first wide product.
    """

    def __init__(
        self,
        norm: tuple[Tensor, Tensor | None, float],
        up: tuple[Tensor, Tensor | None],
        down: Tensor,
        activation: tuple[str, str],
        rounding: Rounding,
    ) -> None:
        weight, bias, eps = norm
        self._weights = (
            weight.contiguous(),
            torch.zeros_like(weight) if bias is None else bias.contiguous(),
            up[0].t().contiguous(),
            torch.zeros_like(up[0][:, 0]) if up[1] is None else up[1].contiguous(),
            down.t().contiguous(),
        )
        self._rounding = rounding
        norm_weight, norm_bias, *others = (each.data_ptr() for each in self._weights)
        self._between = _Between(
            norm_weight,
            norm_bias,
            eps,
            *others,
            rounding.inverse_step.data_ptr(),
            rounding.zero.data_ptr(),
            hidden=len(weight),
            activation=ACTIVATIONS[activation],
        )

    @staticmethod
    def runs(hidden: int, num_channels: int, activation: tuple[str, str]) -> bool:
        """Whether the kernel is compiled, and made for such a layer."""
        return kernels.is_available() and not hidden % WIDE and num_channels == WIDE and activation in ACTIVATIONS

    @property
    def address(self) -> int:
        """Where the kernel finds what it reads, as long as this is there."""
        return ctypes.addressof(self._between)

    def __call__(self, sums: Tensor) -> tuple[Tensor, Tensor]:
        """Normalise and round; the sums are changed.

        Args:
            sums: Of attention's output and the layer's input, float32, (num_rows, hidden), on a CPU.

        Returns:
            The normalised sums plus what the float32 channels add to them, (num_rows, hidden), and the normalised ones
            in 8 bits.
        """
        sums = sums.contiguous()
        rounded = torch.empty_like(sums, dtype=torch.uint8)
        places = sums.data_ptr(), rounded.data_ptr(), len(sums)
        kernels.needed().geep_between(ctypes.byref(self._between), *places, torch.get_num_threads())
        return sums, rounded
