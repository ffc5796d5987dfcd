"""The kernel for CPUs (`bags.cpp`): search the table, sum the rows, read the level off the sum, in one call.

It is compiled when the package is installed, where a C++ compiler is at hand, and runs on any CPU. Its numbers are
those of `ExitPredictor.predict`'s torch operations to the last bit; a few texts take a small part of their time.
"""

from __future__ import annotations

import ctypes
from functools import cache

import torch
from torch import Tensor

from geep.compiled import load_compiled
from geep.hash_table.bags import Bags, BagSums


class _Bags(ctypes.Structure):
    """`Bags` of bags.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("slot_keys", "slot_values")),
        ("slot_mask", ctypes.c_int64),
        ("is_key", ctypes.c_void_p),
        ("num_symbols", ctypes.c_int64),
        ("rows", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("stride", "width")),
        *((name, ctypes.c_void_p) for name in ("base", "edges")),
        ("num_edges", ctypes.c_int64),
        ("layers", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("order", "symbol_bits", "size_shift", "separator")),
        *((name, ctypes.c_int64) for name in ("shared_shift", "num_buckets")),
    )


class _Texts(ctypes.Structure):
    """`Texts` of bags.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("symbols", "lengths")),
        *((name, ctypes.c_int64) for name in ("num_places", "num_texts")),
        *((name, ctypes.c_void_p) for name in ("layers", "scores", "outputs")),
    )


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled kernel; None where it was not compiled."""
    return load_compiled("geep.hash_table._bags", _declare)


def _declare(library: ctypes.CDLL) -> None:
    library.geep_reduce_bags.argtypes = (ctypes.POINTER(_Bags), ctypes.POINTER(_Texts), ctypes.c_int)


def is_available() -> bool:
    """Whether the kernel was compiled."""
    return _library() is not None


def reduce_bags(symbols: Tensor, lengths: Tensor, bags: Bags, layers: Tensor) -> BagSums | None:
    """Reduce a batch of texts on a CPU.

    Args:
        symbols: Symbols of the texts one after another, int64, shape (num_places,).
        lengths: Symbols of each text, int64, shape (num_texts,).
        bags: What is looked up and summed, on a CPU.
        layers: The layer of each level, int64, shape (num_levels,).

    Returns:
        One answer a text, in their order; None if the tensors are no int64 rows on a CPU, the lengths do
        not sum to the number of places, or one of the symbols is none of the table's.

    Raises:
        RuntimeError: If the kernel was not compiled.
        MemoryError: If there is no memory for the windows of a pair.
    """
    library = _library()
    if library is None:
        raise RuntimeError("geep was installed without its CPU kernels; install a C++ compiler and geep once more.")
    if any(each.dtype != torch.int64 or each.ndim != 1 or each.device.type != "cpu" for each in (symbols, lengths)):
        return None
    num_texts, width = lengths.numel(), bags.rows.shape[1]
    # Of the tensors that came, for torch's defaults of dtype and device are the process's.
    rows = bags.rows
    found = BagSums(symbols.new_empty(num_texts), rows.new_empty(num_texts), rows.new_empty(num_texts, width - 1))
    slot_keys, slot_values = bags.table.slots
    symbols, lengths, layers = symbols.contiguous(), lengths.contiguous(), layers.contiguous()
    table = _Bags(
        slot_keys=slot_keys.data_ptr(),
        slot_values=slot_values.data_ptr(),
        slot_mask=bags.table.capacity - 1,
        is_key=bags.is_key.data_ptr(),
        num_symbols=bags.is_key.numel(),
        rows=bags.rows.data_ptr(),
        stride=bags.rows.stride(0),
        width=width,
        base=bags.base.data_ptr(),
        edges=bags.edges.data_ptr(),
        num_edges=bags.edges.numel(),
        layers=layers.data_ptr(),
        order=bags.order,
        symbol_bits=bags.symbol_bits,
        size_shift=bags.size_shift,
        separator=-1 if bags.separator is None else bags.separator,
        shared_shift=bags.shared_shift,
        num_buckets=bags.num_buckets,
    )
    texts = _Texts(
        symbols.data_ptr(),
        lengths.data_ptr(),
        symbols.numel(),
        num_texts,
        found.layers.data_ptr(),
        found.scores.data_ptr(),
        found.outputs.data_ptr(),
    )
    failed = library.geep_reduce_bags(ctypes.byref(table), ctypes.byref(texts), torch.get_num_threads())
    if failed == 2:
        raise MemoryError(f"A table found no memory for the windows of {num_texts} texts.")
    return None if failed else found
