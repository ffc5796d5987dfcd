"""A hash table from 64-bit keys to 64-bit values whose bytes depend only on its contents.

The room knows integers and tensors; it refuses to know what a key means. Read `cpu.py`: it is the reference that any
other implementation has to equal, byte for byte.
"""

from geep.hash_table.cpu import EMPTY_KEY, MISSING, HashTable

__all__ = ["EMPTY_KEY", "MISSING", "HashTable"]
