"""A hash table from 64-bit keys to 64-bit values whose bytes depend only on its contents.

The room knows integers and tensors; it refuses to know what a key means. Read `cpu.py`: it is the reference that any
other implementation has to equal, byte for byte. `triton.py` is that other implementation, for GPUs, and `bags.py` a
kernel that searches a table and sums rows in one go; both need Triton and are imported by those who use them.
"""

from geep.hash_table.cpu import EMPTY_KEY, MISSING, HashTable, kernels_run_on

__all__ = ["EMPTY_KEY", "MISSING", "HashTable", "kernels_run_on"]
