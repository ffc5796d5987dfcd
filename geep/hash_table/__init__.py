"""A hash table from 64-bit keys to 64-bit values whose bytes depend only on its contents.

The room knows integers and tensors; it refuses to know what a key means. Read `cpu.py`: it is the reference that any
other implementation has to equal, byte for byte. `triton.py` is that other implementation, for GPUs. `bags.py` says
what searching a table and summing rows in one go is: `cpp_bags.py` does it on CPUs, `triton_bags.py` on GPUs.
`devices.py` says which table and which kernel a device gets.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
