from .cuda import CudaBackend as CudaBackend, CudaOptions as CudaOptions
from .packed import PackedBackend as PackedBackend
from .padded import PaddedBackend as PaddedBackend
from .protocol import Backend as Backend, TokenBatch as TokenBatch
from .registry import BACKENDS as BACKENDS
