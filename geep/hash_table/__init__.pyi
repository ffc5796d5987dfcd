from .cpu import EMPTY_KEY as EMPTY_KEY, MISSING as MISSING, HashTable as HashTable
from .devices import (
    BagKernel as BagKernel,
    bag_kernel as bag_kernel,
    kernels_run_on as kernels_run_on,
    on_device as on_device,
)
