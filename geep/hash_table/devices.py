"""Which table and which kernel a device gets; the only file that knows them all."""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch

from geep.hash_table import cpp_bags
from geep.hash_table.cpu import HashTable

logger = logging.getLogger(__name__)

BagKernel = Literal["none", "cpp", "triton"]
"""What sums the rows of texts: torch operations, `cpp_bags.py` or `triton_bags.py`."""


@cache
def kernels_run_on(device_type: str) -> bool:
    """Tell whether the Triton kernels are the ones to use on a device of this type; say once if they are missed."""
    if device_type != "cuda":
        return False
    if find_spec("triton") is None:
        logger.warning(
            "Triton is not installed: the hash table runs as torch operations on CUDA, which gives the same results "
            "more slowly; pip install 'geep[gpu]' brings the kernels."
        )
        return False
    return True


def on_device(table: HashTable, device: torch.device | str) -> HashTable:
    """Return a copy of a table on `device`, with the same bytes.

    On a CUDA device where Triton is installed it is a `geep.hash_table.triton.TritonHashTable`, elsewhere the
    reference, which runs on any device.
    """
    device = torch.device(device)
    if not kernels_run_on(device.type):
        return HashTable.copy_of(table, device)
    # Triton is no dependency of geep: only who has a GPU needs it.
    from geep.hash_table.triton import TritonHashTable

    return TritonHashTable.copy_of(table, device)


def bag_kernel(device_type: str) -> BagKernel:
    """The kernel for texts on a device of this type, where there is one."""
    if kernels_run_on(device_type):
        return "triton"
    return "cpp" if device_type == "cpu" and cpp_bags.is_available() else "none"
