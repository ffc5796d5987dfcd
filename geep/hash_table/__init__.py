"""A hash table from 64-bit keys to 64-bit values whose bytes depend only on its contents.

The room knows integers and tensors; it refuses to know what a key means. Read `cpu.py`: it is the reference that any
other implementation has to equal, byte for byte. `triton.py` is that other implementation, for GPUs, and `bags.py` a
kernel that searches a table and sums rows in one go; both need Triton. `devices.py` says which table a device gets.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
