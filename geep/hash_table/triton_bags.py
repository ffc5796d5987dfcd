"""The kernel for GPUs: search the table, sum the rows, read the level off the sum, in one go; see `bags.py`.

Each window of a pair is held against those that begin at every place of the other run: texts are short and lie in the
nearest cache, and nothing is sorted or stored.

One program (a warp) takes one text and holds its sums in registers, so neither rows nor windows are ever written to
memory. The texts know nothing of each other: no atomics, and a text's numbers do not depend on its neighbours.

The module needs Triton, as `triton.py` does. Read `_reduce_kernel`, then `reduce_bags`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from geep.hash_table.bags import Bags, BagSums

# This one says what to install if Triton is missing.
from geep.hash_table.triton import check_device, find_in_slots, on_device_of, tl, triton

# Numbers in registers for a tile of rows; 32 places, one a lane, where the rows are short enough.
_TILE_NUMBERS = 2048
_LANES = 32


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


@triton.jit
def _count(chosen: tl.tensor) -> tl.tensor:
    """Return how many places of a tile are chosen."""
    return tl.sum(chosen.to(tl.int32), axis=0)


@triton.jit
def _sum_found(
    slot_keys: tl.tensor,
    slot_values: tl.tensor,
    slot_mask: tl.tensor,
    key: tl.tensor,
    wanted: tl.tensor,
    rows: tl.tensor,
    num_symbols: tl.tensor,
    stride: tl.tensor,
    width: tl.tensor,
    COLUMNS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Look a tile of packed keys up; return the sum of the rows of those wanted and known, and how many they are."""
    slot = find_in_slots(slot_keys, key, wanted, slot_mask)
    row = num_symbols + tl.load(slot_values + slot, mask=slot >= 0, other=0)
    return _sum_rows(rows, row, slot >= 0, stride, width, COLUMNS), _count(slot >= 0)


@triton.jit
def _end_of_first_run(
    symbols: tl.tensor, start: tl.tensor, end: tl.tensor, separator: tl.tensor, PLACES: tl.constexpr
) -> tl.tensor:
    """Return the place of the text's first separator, its end where there is none."""
    found = end
    for first in range(start, end, PLACES):
        place = first + tl.arange(0, PLACES)
        symbol = tl.load(symbols + place, mask=place < end, other=-1)
        found = tl.minimum(found, tl.min(tl.where(symbol == separator, place, end), axis=0))
    return found


@triton.jit
def _is_shared(
    symbols: tl.tensor,
    packed: tl.tensor,
    in_first: tl.tensor,
    start: tl.tensor,
    parting: tl.tensor,
    end: tl.tensor,
    SIZE: tl.constexpr,
    SYMBOL_BITS: tl.constexpr,
) -> tl.tensor:
    """Tell of a tile of packed windows which ones the other run has, too."""
    found = tl.zeros(packed.shape, tl.int1)
    for other in range(start, end):
        window = tl.load(symbols + other)
        for last in tl.static_range(1, SIZE):
            # Past the end -1 makes the window one that there is not.
            window = (window << SYMBOL_BITS) | tl.load(symbols + other + last, mask=other + last < end, other=-1)
        found = found | ((packed == window) & (in_first != (other < parting)))
    return found


@triton.jit
def _share(part: tl.tensor, whole: tl.tensor, BUCKETS: tl.constexpr) -> tl.tensor:
    """Return the bucket of part / whole, 0 of nothing."""
    return tl.minimum(part * BUCKETS // tl.maximum(whole, 1), BUCKETS - 1)


@triton.jit
def _counted_keys(
    kind: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    shared_first: tl.tensor,
    shared_second: tl.tensor,
    shared_twos: tl.tensor,
    BUCKETS: tl.constexpr,
    SHARED_SHIFT: tl.constexpr,
) -> tl.tensor:
    """Return the keys of a text's counts, a tile with one of each kind.

    Symbols of the first run and of the second that the other has not (kinds 0 and 1), the shares that it has (2, 3),
    and the share of shared symbols at which a shared window of two begins (4).
    """
    bucket = tl.where(kind == 0, tl.minimum(first - shared_first, BUCKETS - 1), 0)
    bucket = tl.where(kind == 1, tl.minimum(second - shared_second, BUCKETS - 1), bucket)
    bucket = tl.where(kind == 2, _share(shared_first, first, BUCKETS), bucket)
    bucket = tl.where(kind == 3, _share(shared_second, second, BUCKETS), bucket)
    bucket = tl.where(kind == 4, _share(shared_twos, shared_first + shared_second, BUCKETS), bucket)
    return (kind * BUCKETS + bucket).to(tl.int64) | (1 << SHARED_SHIFT)


@triton.jit(do_not_specialize=["num_symbols", "stride", "width", "slot_mask", "num_edges", "separator"])
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
    separator: tl.tensor,
    ORDER: tl.constexpr,
    SYMBOL_BITS: tl.constexpr,
    SIZE_SHIFT: tl.constexpr,
    PLACES: tl.constexpr,
    COLUMNS: tl.constexpr,
    EDGES: tl.constexpr,
    RUNS: tl.constexpr,
    SHARED_SHIFT: tl.constexpr,
    BUCKETS: tl.constexpr,
) -> None:
    """Reduce one text, a tile of places at a time."""
    text = tl.program_id(0).to(tl.int64)
    start = tl.load(offsets + text)
    end = tl.load(offsets + text + 1)
    sums = tl.zeros((COLUMNS,), tl.float32)
    num_keys = 0
    if RUNS == 2:
        parting = _end_of_first_run(symbols, start, end, separator, PLACES)
        num_first = 0
        num_second = 0
        shared_first = 0
        shared_second = 0
        shared_twos = 0
    for first in range(start, end, PLACES):
        place = first + tl.arange(0, PLACES)
        packed = tl.load(symbols + place, mask=place < end, other=0)
        inside = (place < end) & tl.load(is_key + packed)
        own = inside
        if RUNS == 2:
            in_first = place < parting
            shared = inside & _is_shared(symbols, packed, in_first, start, parting, end, 1, SYMBOL_BITS)
            own = inside & ~shared
            num_first += _count(inside & in_first)
            num_second += _count(inside & ~in_first)
            shared_first += _count(shared & in_first)
            shared_second += _count(shared & ~in_first)
            key = packed | (1 << SIZE_SHIFT) | (1 << SHARED_SHIFT)
            found, num_found = _sum_found(
                slot_keys, slot_values, slot_mask, key, shared & in_first, rows, num_symbols, stride, width, COLUMNS
            )
            sums += found
            num_keys += num_found
        sums += _sum_rows(rows, packed, own, stride, width, COLUMNS)
        num_keys += _count(own)
        for last in tl.static_range(1, ORDER):
            # Past the end of the text lies its neighbour, whose symbols are not read.
            symbol = tl.load(symbols + place + last, mask=place + last < end, other=0)
            inside = inside & (place + last < end) & tl.load(is_key + symbol)
            packed = (packed << SYMBOL_BITS) | symbol
            key = packed | ((last + 1) << SIZE_SHIFT)
            wanted = inside
            if RUNS == 2:
                shared = inside & _is_shared(symbols, packed, in_first, start, parting, end, last + 1, SYMBOL_BITS)
                if last == 1:
                    shared_twos += _count(shared)
                key = key | (shared.to(tl.int64) << SHARED_SHIFT)
                wanted = inside & (in_first | ~shared)
            found, num_found = _sum_found(
                slot_keys, slot_values, slot_mask, key, wanted, rows, num_symbols, stride, width, COLUMNS
            )
            sums += found
            num_keys += num_found
    if RUNS == 2:
        # Five kinds; a tile is a power of two.
        kind = tl.arange(0, 8)
        key = _counted_keys(
            kind, num_first, num_second, shared_first, shared_second, shared_twos, BUCKETS, SHARED_SHIFT
        )
        wanted = (kind < 5) & (num_first > 0) & (num_second > 0)
        found, num_found = _sum_found(
            slot_keys, slot_values, slot_mask, key, wanted, rows, num_symbols, stride, width, COLUMNS
        )
        sums += found
        num_keys += num_found
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
            -1 if bags.separator is None else bags.separator,
            ORDER=bags.order,
            SYMBOL_BITS=bags.symbol_bits,
            SIZE_SHIFT=bags.size_shift,
            PLACES=max(1, min(_LANES, _TILE_NUMBERS // columns)),
            COLUMNS=columns,
            EDGES=triton.next_power_of_2(max(1, bags.edges.numel())),
            RUNS=1 if bags.separator is None else 2,
            SHARED_SHIFT=bags.shared_shift,
            BUCKETS=bags.num_buckets,
            num_warps=1,
        )
    return answers
