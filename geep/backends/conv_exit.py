"""The convolutional exit in one call of our own kernel (`conv_exit.cpp`): few texts pay for the number of calls."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from geep.backends import kernels

COLUMNS = 64
"""Columns of a product of `ConvExit`: its channels, and what its wider part is a multiple of."""


class _Exit(ctypes.Structure):
    """`Exit` of conv_exit.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("narrow", "convolution", "dense", "out")),
        *((name, ctypes.c_void_p) for name in ("narrow_bias", "convolution_bias", "dense_bias", "out_bias")),
        *((name, ctypes.c_int64) for name in ("hidden", "reach", "dense_width", "num_labels", "parts")),
    )


class _Texts(ctypes.Structure):
    """`Texts` of conv_exit.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("hidden", "texts", "halves")),
        ("num_texts", ctypes.c_int64),
        ("logits", ctypes.c_void_p),
    )


class ConvExit:
    """A convolutional exit in one call, computed in float32; see `geep.modeling.ConvHead`.

    Args:
        narrow: Weight (64, hidden) and bias (64,) that narrow the tokens.
        convolution: The same of the convolution, (64, (2 reach + 1) * 64) for neighbours side by side.
        dense: The same of what reads the pooled features, (width, features), the width a multiple of 64.
        out: The same of the labels, (num_labels, width).
        dtype: Of hidden states, and in which the matrices but the last are kept: one of `kernels.DTYPES`.
        tells_texts_apart: Whether the two texts of a pair are pooled apart and compared.

    Raises:
        ValueError: If widths or dtype are others.
    """

    def __init__(
        self,
        *,
        narrow: tuple[Tensor, Tensor],
        convolution: tuple[Tensor, Tensor],
        dense: tuple[Tensor, Tensor],
        out: tuple[Tensor, Tensor],
        dtype: torch.dtype,
        tells_texts_apart: bool,
    ) -> None:
        channels, hidden = narrow[0].shape
        reach, features = convolution[0].shape[1] // COLUMNS // 2, (8 if tells_texts_apart else 2) * COLUMNS
        widths = ((COLUMNS, (2 * reach + 1) * COLUMNS), (len(dense[0]) // COLUMNS * COLUMNS, features))
        found = tuple(convolution[0].shape), tuple(dense[0].shape)
        biased = all(bias.shape == weight.shape[:1] for weight, bias in (narrow, convolution, dense, out))
        fits = found == widths and biased and out[0].shape[1] == len(dense[0])
        if channels != COLUMNS or not fits or hidden % kernels.LANES or dtype not in kernels.DTYPES:
            raise ValueError(
                f"The exit's kernel is made for {COLUMNS} channels and hidden states of {kernels.DTYPES}, a multiple "
                f"of {kernels.LANES} wide; found {channels} channels, {hidden} wide in {dtype}. Use `ConvHead`."
            )
        self.dtype, self.hidden, self.num_labels = dtype, hidden, len(out[0])
        self.tells_texts_apart = tells_texts_apart
        inputs = [weight.detach().t().to(dtype).contiguous() for weight, _ in (narrow, convolution, dense)]
        floats = [out[0], *(bias for _, bias in (narrow, convolution, dense, out))]
        # Kept, for the kernel knows where they lie.
        self._weights = (*inputs, *(each.detach().float().contiguous() for each in floats))
        self._exit = _Exit(
            *(weight.data_ptr() for weight in self._weights),
            hidden=hidden,
            reach=reach,
            dense_width=len(dense[0]),
            num_labels=self.num_labels,
            parts=2 if tells_texts_apart else 1,
        )

    def __call__(self, hidden: Tensor, offsets: Tensor, halves: Tensor) -> Tensor:
        """Answer texts.

        Args:
            hidden: Their tokens, (num_tokens or more, hidden), in the exit's dtype, on a CPU.
            offsets: Where each text begins, and the end of the last, int64, (num_texts + 1,).
            halves: Where pairs are told apart, the same of the two texts of each pair, (2 num_texts + 1,); else
                `offsets`.

        Returns:
            Logits, float32, (num_texts, num_labels).

        Raises:
            ValueError: If shapes or dtype do not fit.
            MemoryError: If there is no memory for what lies between.
        """
        library, num_texts = kernels.needed(), len(offsets) - 1
        parts = 2 if self.tells_texts_apart else 1
        kernels.check_rows(len(hidden), _num_tokens(offsets, halves))
        if hidden.dtype != self.dtype or hidden.shape[1] != self.hidden or len(halves) != parts * num_texts + 1:
            raise ValueError(
                f"The exit reads hidden states {self.hidden} wide in {self.dtype} of {parts} texts each, found "
                f"{hidden.shape[1]} wide in {hidden.dtype} and {len(halves) - 1} texts for {num_texts}."
            )
        hidden, out = hidden.contiguous(), torch.empty(num_texts, self.num_labels, dtype=torch.float32, device="cpu")
        texts = _Texts(hidden.data_ptr(), offsets.data_ptr(), halves.data_ptr(), num_texts, out.data_ptr())
        kind = kernels.KINDS[self.dtype, False]
        if library.geep_conv_exit(ctypes.byref(self._exit), ctypes.byref(texts), kind, torch.get_num_threads()):
            raise MemoryError(f"An exit of {num_texts} texts found no memory for what it reads of them.")
        return out


def _num_tokens(offsets: Tensor, halves: Tensor) -> int:
    """Tokens of texts, after a look at what says where they lie, for the kernel reads there."""
    for each in (offsets, halves):
        if each.dtype != torch.int64 or each.device.type != "cpu" or not each.is_contiguous():
            raise ValueError(
                f"Expected where texts begin in one int64 row on a CPU, found {each.dtype} on {each.device}."
            )
    num_tokens = int(offsets[-1])
    if halves is not offsets and int(halves[-1]) != num_tokens:
        raise ValueError(f"The texts have {num_tokens} tokens, their halves {int(halves[-1])}.")
    return num_tokens
