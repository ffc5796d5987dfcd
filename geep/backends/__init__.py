"""Backends: ways to run an encoder layer by layer on texts that leave at different depths."""

from typing import Any

from geep.backends.cuda import CudaBackend, CudaOptions
from geep.backends.onnx import OnnxBackend
from geep.backends.packed import PackedBackend
from geep.backends.padded import PaddedBackend
from geep.backends.protocol import Backend, TokenBatch

BACKENDS: dict[str, type[Any]] = {
    "packed": PackedBackend,
    "padded": PaddedBackend,
    "cuda": CudaBackend,
    "onnx": OnnxBackend,
}

__all__ = [
    "BACKENDS",
    "Backend",
    "CudaBackend",
    "CudaOptions",
    "OnnxBackend",
    "PackedBackend",
    "PaddedBackend",
    "TokenBatch",
]
