"""What a table says of texts, from their symbols: windows are searched, rows are summed, a level is read off the sum.

A text is a run of symbols, non-negative integers. At each place begin `order` windows of 1 … `order` symbols. A window
of one symbol is the row of that number; longer ones are packed into 64 bits and looked up in a hash table, whose
values number the rows behind the symbols'. The caller says how windows are packed and what the rows mean.

A text may also be two runs, parted by a separator. A window that both have is another key than one of either alone,
and counts where it stands in the first; and what the two have in common is counted.

Two kernels do it in one call: `cpp_bags.py` on CPUs, `triton_bags.py` on GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from geep.hash_table.cpu import HashTable


@dataclass(frozen=True, slots=True, eq=False)
class Bags:
    """What a kernel reads besides the texts; all tensors on one device.

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
        separator: The symbol that ends the first run of a text, no key; `None` reads each text as one run.
        shared_shift: Bit of a packed window that both runs have, and of counted keys, which are packed like windows
            of no symbol.
        num_buckets: Buckets of a counted key.
    """

    table: HashTable
    order: int
    symbol_bits: int
    size_shift: int
    is_key: Tensor
    rows: Tensor
    base: Tensor
    edges: Tensor
    separator: int | None = None
    shared_shift: int = 0
    num_buckets: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class BagSums:
    """What a kernel says of each text.

    Args:
        layers: The layer of its score's level, int64, shape (num_texts,).
        scores: First base + mean of the first column over the text's keys, float32, shape (num_texts,).
        outputs: Other bases + sums of the other columns / sqrt(number of keys), float32, (num_texts, num_outputs).
    """

    layers: Tensor
    scores: Tensor
    outputs: Tensor
