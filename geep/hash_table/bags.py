"""One kernel from texts to exit layers: search the table, sum the rows, read the level off the sum.

A text is a run of symbols, non-negative integers. At each place begin `order` windows of 1 … `order` symbols. A window
of one symbol is the row of that number; longer ones are packed into 64 bits and looked up in a hash table, whose
values number the rows behind the symbols'. The caller says how windows are packed and what the rows mean.

One program (a warp) takes one text and holds its sums in registers, so neither rows nor windows are ever written to
memory. The texts know nothing of each other: no atomics, and a text's numbers do not depend on its neighbours.

The module needs Triton, as `triton.py` does. Read `_reduce_kernel`, then `reduce_bags`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from geep.hash_table.cpu import HashTable

# This one says what to install if Triton is missing.
from geep.hash_table.triton import check_device, find_in_slots, on_device_of, tl, triton

# Numbers in registers for a tile of rows; 32 places, one a lane, where the rows are short enough.
_TILE_NUMBERS = 2048
_LANES = 32


@dataclass(frozen=True, slots=True, eq=False)
class Bags:
    """What the kernel reads besides the texts; all tensors on one device.

    Args:
        table: Packed windows of two symbols and more to 0 … number of windows - 1.
        order: Longest window.
        symbol_bits: Bits of a symbol in a packed window.
        size_shift: Bit at which the number of symbols of a packed window stands.
        is_key: Whether a symbol counts and may stand in a window, bool, shape (num_symbols,).
        rows: A row for each symbol, then one for each window, float32, shape (num_rows, 1 + num_outputs), the last
            dimension contiguous. The first column is the score's.
        base: What a text without keys gets, float32, shape (1 + num_outputs,).
        edges: Scores between neighbouring levels, non-decreasing, float32, shape (num_levels - 1,).
    """

    table: HashTable
    order: int
    symbol_bits: int
    size_shift: int
    is_key: Tensor
    rows: Tensor
    base: Tensor
    edges: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class BagSums:
    """What the kernel says of each text.

    Args:
        layers: The layer of its score's level, int64, shape (num_texts,).
        scores: First base + mean of the first column over the text's keys, float32, shape (num_texts,).
        outputs: Other bases + sums of the other columns / sqrt(number of keys), float32, (num_texts, num_outputs).
    """

    layers: Tensor
    scores: Tensor
    outputs: Tensor


@triton.jit
def _sum_rows(
    rows: tl.tensor, row: tl.tensor, known: tl.tensor, stride: tl.tensor, width: tl.tensor, COLUMNS: tl.constexpr
) -> tl.tensor:
    """Return the sum of the known rows of a tile, shape (COLUMNS,)."""
    column = tl.arange(0, COLUMNS)
    numbers = tl.load(
        rows + row[:, None] * stride + column[None, :], mask=known[:, None] & (column < width)[None, :], other=0.0
    )
    return tl.sum(numbers, axis=0)


@triton.jit(do_not_specialize=["num_symbols", "stride", "width", "slot_mask", "num_edges"])
def _reduce_kernel(
    symbols: tl.tensor,
    offsets: tl.tensor,
    is_key: tl.tensor,
    rows: tl.tensor,
    base: tl.tensor,
    slot_keys: tl.tensor,
    slot_values: tl.tensor,
    edges: tl.tensor,
    layers: tl.tensor,
    text_layers: tl.tensor,
    text_scores: tl.tensor,
    text_outputs: tl.tensor,
    num_symbols: tl.tensor,
    stride: tl.tensor,
    width: tl.tensor,
    slot_mask: tl.tensor,
    num_edges: tl.tensor,
    ORDER: tl.constexpr,
    SYMBOL_BITS: tl.constexpr,
    SIZE_SHIFT: tl.constexpr,
    PLACES: tl.constexpr,
    COLUMNS: tl.constexpr,
    EDGES: tl.constexpr,
) -> None:
    """Reduce one text, a tile of places at a time."""
    text = tl.program_id(0).to(tl.int64)
    start = tl.load(offsets + text)
    end = tl.load(offsets + text + 1)
    sums = tl.zeros((COLUMNS,), tl.float32)
    num_keys = 0
    for first in range(start, end, PLACES):
        place = first + tl.arange(0, PLACES)
        packed = tl.load(symbols + place, mask=place < end, other=0)
        inside = (place < end) & tl.load(is_key + packed)
        sums += _sum_rows(rows, packed, inside, stride, width, COLUMNS)
        num_keys += tl.sum(inside.to(tl.int32), axis=0)
        for last in tl.static_range(1, ORDER):
            # Past the end of the text lies its neighbour, whose symbols are not read.
            symbol = tl.load(symbols + place + last, mask=place + last < end, other=0)
            inside = inside & (place + last < end) & tl.load(is_key + symbol)
            packed = (packed << SYMBOL_BITS) | symbol
            slot = find_in_slots(slot_keys, packed | ((last + 1) << SIZE_SHIFT), inside, slot_mask)
            row = num_symbols + tl.load(slot_values + slot, mask=slot >= 0, other=0)
            sums += _sum_rows(rows, row, slot >= 0, stride, width, COLUMNS)
            num_keys += tl.sum((slot >= 0).to(tl.int32), axis=0)
    column = tl.arange(0, COLUMNS)
    weight = tl.full((COLUMNS,), 1.0, tl.float32) * tl.maximum(num_keys, 1)
    answer = tl.where(column == 0, tl.div_rn(sums, weight), sums * tl.rsqrt(weight))
    answer += tl.load(base + column, mask=column < width, other=0.0)
    score = tl.sum(tl.where(column == 0, answer, 0.0), axis=0)
    edge = tl.arange(0, EDGES)
    below = tl.load(edges + edge, mask=edge < num_edges, other=float("inf")) <= score
    tl.store(text_layers + text, tl.load(layers + tl.sum(below.to(tl.int32), axis=0)))
    tl.store(text_scores + text, score)
    output = text * (width - 1) + column - 1
    tl.store(text_outputs + output, answer, mask=(column >= 1) & (column < width))


def reduce_bags(symbols: Tensor, lengths: Tensor, bags: Bags, layers: Tensor) -> BagSums:
    """Reduce a batch of texts in one kernel, without waiting for the device.

    What is summed in which order differs from `embedding_bag`, so sums differ by rounding; a level differs only where
    a score lies within that rounding of an edge.

    Args:
        symbols: Symbols of the texts one after another, each in 0 … num_symbols - 1 (not checked: the kernel reads
            there), int64, shape (num_places,).
        lengths: Symbols of each text, summing to num_places (not checked), int64, shape (num_texts,).
        bags: What is looked up and summed.
        layers: The layer of each level, int64, shape (num_levels,).

    Returns:
        One answer a text, in their order.

    Raises:
        ValueError: If a tensor is on another device than the rows, or the kernels cannot run there.
    """
    device = bags.rows.device
    check_device(device)
    slot_keys, slot_values = bags.table.slots
    tensors = (symbols, lengths, bags.is_key, bags.base, slot_keys, bags.edges, layers)
    if found := {tensor.device for tensor in tensors} - {device}:
        raise ValueError(f"Found tensors on {sorted(map(str, found))}, the rows on {device}; move one of them.")
    num_texts, width = lengths.numel(), bags.rows.shape[1]
    columns = triton.next_power_of_2(width)
    answers = BagSums(
        torch.empty(num_texts, dtype=torch.int64, device=device),
        torch.empty(num_texts, dtype=torch.float32, device=device),
        torch.empty(num_texts, width - 1, dtype=torch.float32, device=device),
    )
    with on_device_of(bags.rows):
        _reduce_kernel[(num_texts,)](
            symbols.contiguous(),
            F.pad(lengths.cumsum(0), (1, 0)),
            bags.is_key,
            bags.rows,
            bags.base,
            slot_keys,
            slot_values,
            bags.edges,
            layers,
            answers.layers,
            answers.scores,
            answers.outputs,
            bags.is_key.numel(),
            bags.rows.stride(0),
            width,
            bags.table.capacity - 1,
            bags.edges.numel(),
            ORDER=bags.order,
            SYMBOL_BITS=bags.symbol_bits,
            SIZE_SHIFT=bags.size_shift,
            PLACES=max(1, min(_LANES, _TILE_NUMBERS // columns)),
            COLUMNS=columns,
            EDGES=triton.next_power_of_2(max(1, bags.edges.numel())),
            num_warps=1,
        )
    return answers
