"""CPU kernels of our own (`*.cpp`): attention of packed texts, exits, and what stands between 8-bit products.

They are compiled when the package is installed, where a C++ compiler is at hand. Where none was, backends use torch's
kernels, which give the same up to rounding and take several times as long on short texts; `why_not_available` says what
to do. Texts of any lengths lie side by side, so nothing is padded, and a call is one call whatever the lengths.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from geep.backends.layout import Layout, check_reach
from geep.compiled import load_compiled

HEADS = (16, 32, 64)
"""Widths of an attention head for which `attend` is compiled."""

LANES = 16
"""Numbers that the kernels read at once; what they read may have to reach that much further."""

DTYPES = (torch.float32, torch.bfloat16)
"""Dtypes that `attend` takes."""

KINDS = {(torch.float32, False): 0, (torch.bfloat16, False): 1, (torch.float32, True): 2}


class _Attention(ctypes.Structure):
    """`Attention` of kernels.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("qkv", "out", "offsets")),
        *((name, ctypes.c_int64) for name in ("num_texts", "longest", "num_heads", "head")),
        ("scale", ctypes.c_float),
        ("bias", ctypes.c_void_p),
        ("bias_heads", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("by_content", ctypes.c_void_p),
        ("by_position", ctypes.c_void_p),
        ("turns", ctypes.c_void_p),
        ("window", ctypes.c_int64),
        ("inverse_step", ctypes.c_void_p),
        ("zero", ctypes.c_void_p),
    )


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they were not compiled, or not for this machine."""
    library = load_compiled("geep.backends._kernels", _declare)
    return library if library is not None and library.geep_runs_here() else None


def _declare(library: ctypes.CDLL) -> None:
    library.geep_attend.argtypes = (ctypes.POINTER(_Attention), ctypes.c_int, ctypes.c_int)
    pointers, sizes = (ctypes.c_void_p, ctypes.c_void_p), (ctypes.c_int64, ctypes.c_int64)
    library.geep_round.argtypes = (*pointers, *sizes, *pointers, ctypes.c_int)
    library.geep_neighbours.argtypes = (*pointers, ctypes.c_void_p, *sizes, ctypes.c_int64, ctypes.c_int)
    library.geep_pool.argtypes = (*pointers, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, *sizes, ctypes.c_int)
    library.geep_conv_exit.argtypes = (*pointers, ctypes.c_int, ctypes.c_int)
    library.geep_between.argtypes = (ctypes.c_void_p, *pointers, ctypes.c_int64, ctypes.c_int)
    library.geep_between.restype = None
    library.geep_few_tokens_bfloat16.argtypes = (*pointers, *pointers, *sizes, ctypes.c_int)
    library.geep_few_tokens.argtypes = (*pointers, *pointers, *sizes, ctypes.c_int)
    library.geep_round.restype = library.geep_neighbours.restype = library.geep_pool.restype = None


def is_available() -> bool:
    """Whether the kernels were compiled for this machine."""
    return _library() is not None


def why_not_available() -> str:
    """What to tell a user whose installation lacks the kernels."""
    return (
        "geep was installed without its CPU kernels, or with older ones, expected them for full speed (a layer takes "
        "up to 1.4 times as long); install a C++ compiler (g++ or clang++, with OpenMP) and geep once more."
    )


@dataclass(frozen=True, slots=True)
class Mixing:
    """What attention knows beside queries, keys and values.

    Attributes:
        scale: Of the scores; None: one over the root of a head's width.
        bias: Added to scores: the number for distance key - query at column distance + (columns - 1) / 2, float32,
            (num_heads or 1, columns); the first and last `LANES` are read and not used. None: nothing is added.
        distances: What queries and what keys are multiplied with besides, by distance as `bias`, a table for each
            coordinate of a head, float32, (num_heads, head, columns); None: with nothing (all but DeBERTa).
        turns: What turns queries and keys at each position, pairs of coordinates lying side by side: cosines, then
            sines with the sign that each coordinate takes, float32, (positions, 2, head); None: nothing is turned.
        window: Largest distance at which tokens see each other; None: any. `bias` has to tell them apart, too.
        reach: Tokens of the longest text that bias and turns are made for; None: any.
    """

    scale: float | None = None
    bias: Tensor | None = None
    distances: tuple[Tensor, Tensor] | None = None
    turns: Tensor | None = None
    window: int | None = None
    reach: int | None = None


@dataclass(frozen=True, slots=True)
class Rounding:
    """How numbers become unsigned 8-bit ones: each channel over its step, plus its zero point, the fraction cut off.

    Attributes:
        inverse_step: float32, (width,).
        zero: With a half added, so that cutting rounds, float32, (width,).
    """

    inverse_step: Tensor
    zero: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Round float32 rows (num_rows, width) on a CPU."""
        library = _library()
        if library is None:
            # By way of 16 bits, for which CPUs have an instruction.
            return torch.addcmul(self.zero, x, self.inverse_step).clamp_(0, 255).to(torch.int16).to(torch.uint8)
        x, out = x.contiguous(), torch.empty(x.shape, dtype=torch.uint8)
        steps = self.inverse_step.data_ptr(), self.zero.data_ptr()
        library.geep_round(x.data_ptr(), out.data_ptr(), len(x), x.shape[1], *steps, torch.get_num_threads())
        return out


def describe(num_heads: int, head: int, mixing: Mixing, rounding: Rounding | None) -> _Attention:
    """What all calls of an attention share, where its kernel reads it; the tensors have to stay."""
    call = _Attention(
        num_heads=num_heads,
        head=head,
        scale=head**-0.5 if mixing.scale is None else mixing.scale,
        window=-1 if mixing.window is None else mixing.window,
    )
    if mixing.bias is not None:
        call.bias, call.bias_heads, call.columns = mixing.bias.data_ptr(), *mixing.bias.shape
    if mixing.distances is not None:
        call.by_content, call.by_position = (vectors.data_ptr() for vectors in mixing.distances)
        call.columns = mixing.distances[0].shape[2]
    if mixing.turns is not None:
        call.turns = mixing.turns.data_ptr()
    if rounding is not None:
        call.inverse_step, call.zero = rounding.inverse_step.data_ptr(), rounding.zero.data_ptr()
    return call


def attend(qkv: Tensor, layout: Layout, num_heads: int, mixing: Mixing, *, rounding: Rounding | None = None) -> Tensor:
    """Let every token look at its text.

    Args:
        qkv: Queries, keys and values, (num_tokens, 3 width), float32 or bfloat16, on a CPU.
        layout: Where the texts lie.
        num_heads: Attention heads; their width is one of `HEADS`.
        mixing: What else attention knows.
        rounding: Makes the result 8 bits wide; for float32.

    Returns:
        (num_tokens, width), in the dtype of `qkv` or uint8. Rows after the last text are zeros.

    Raises:
        ValueError: If the texts have more tokens than there are, one of them has more than there are positions for, or
            no such kernel is compiled.
        MemoryError: If there is no memory for the scores.
    """
    library = needed()
    num_tokens, width = qkv.shape[0], qkv.shape[1] // 3
    head = width // num_heads
    check_rows(num_tokens, layout.num_tokens)
    if mixing.reach is not None:
        check_reach(layout.longest, mixing.reach)
    if head not in HEADS or (qkv.dtype, rounding is not None) not in KINDS:
        raise ValueError(
            f"Attention runs heads of {HEADS} in float32 or bfloat16, found {head} in {qkv.dtype}; use `attend_runs`."
        )
    dtype = qkv.dtype if rounding is None else torch.uint8
    out = torch.empty(num_tokens, width, dtype=dtype)
    out[layout.num_tokens :].zero_()
    qkv = qkv.contiguous()
    call = describe(num_heads, head, mixing, rounding)
    call.qkv, call.out, call.offsets = qkv.data_ptr(), out.data_ptr(), layout.offsets.ctypes.data
    call.num_texts, call.longest = len(layout.lengths), layout.longest
    kind = KINDS[qkv.dtype, rounding is not None]
    if library.geep_attend(ctypes.byref(call), kind, torch.get_num_threads()):
        raise MemoryError(f"Attention of a text of {layout.longest} tokens found no memory for its scores.")
    return out


def neighbours(rows: Tensor, offsets: Tensor, reach: int) -> Tensor:
    """Put the rows around each side by side, those of its text alone; zeros where there are none.

    Args:
        rows: (num_tokens or more, width), contiguous, on a CPU.
        offsets: Where each text begins, and the end of the last, int64, (num_texts + 1,).
        reach: Rows to each side.

    Returns:
        (len(rows), (2 reach + 1) * width); zeros in rows of no text.
    """
    library, width, num_tokens = needed(), rows.shape[1], int(offsets[-1])
    check_rows(len(rows), num_tokens)
    out = rows.new_empty(len(rows), (2 * reach + 1) * width)
    out[num_tokens:].zero_()
    places = rows.data_ptr(), out.data_ptr(), offsets.data_ptr(), len(offsets) - 1
    library.geep_neighbours(*places, width * rows.element_size(), reach, torch.get_num_threads())
    return out


def mean_and_max(one: Tensor, other: Tensor, offsets: Tensor) -> Tensor:
    """Mean and maximum of each text's rows of a sum; zeros for a text without any.

    Args:
        one: (num_tokens or more, width), contiguous, of one of `DTYPES`, on a CPU; the width is a multiple of `LANES`.
        other: The same, added to it.
        offsets: As of `neighbours`.

    Returns:
        (num_texts, 2 width).
    """
    library, (num_texts, width) = needed(), (len(offsets) - 1, one.shape[1])
    check_rows(min(len(one), len(other)), int(offsets[-1]))
    out = one.new_empty(num_texts, 2 * width)
    places = one.data_ptr(), other.data_ptr(), out.data_ptr(), KINDS[one.dtype, False], offsets.data_ptr()
    library.geep_pool(*places, num_texts, width, torch.get_num_threads())
    return out


def check_rows(there: int, needed: int) -> None:
    """The kernels read memory, so they must not be told of more than there is."""
    if needed > there:
        raise ValueError(f"The texts have {needed} tokens, found rows for {there}.")


def needed() -> ctypes.CDLL:
    """The compiled kernels.

    Raises:
        RuntimeError: If they were not compiled for this machine.
    """
    library = _library()
    if library is None:
        raise RuntimeError(why_not_available())
    return library
