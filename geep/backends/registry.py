"""Which backends there are; a new one is a row here."""

from __future__ import annotations

from typing import Any

from geep.backends.cuda import CudaBackend
from geep.backends.packed import PackedBackend
from geep.backends.padded import PaddedBackend

# The order matters: the first row that supports an encoder's family is its default. On a GPU cuda comes first.
BACKENDS: dict[str, type[Any]] = {
    "packed": PackedBackend,
    "padded": PaddedBackend,
    "cuda": CudaBackend,
}
