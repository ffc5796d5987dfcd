from .cpu import EMPTY_KEY as EMPTY_KEY
from .cpu import MISSING as MISSING
from .cpu import HashTable as HashTable
from .devices import kernels_run_on as kernels_run_on
from .devices import on_device as on_device
