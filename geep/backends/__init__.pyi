from .cuda import CudaBackend as CudaBackend
from .cuda import CudaOptions as CudaOptions
from .packed import PackedBackend as PackedBackend
from .padded import PaddedBackend as PaddedBackend
from .protocol import Backend as Backend
from .protocol import TokenBatch as TokenBatch
from .registry import BACKENDS as BACKENDS
