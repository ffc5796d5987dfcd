from .cuda import CudaBackend as CudaBackend, CudaOptions as CudaOptions
from .packed import PackedBackend as PackedBackend
from .padded import PaddedBackend as PaddedBackend
from .protocol import Backend as Backend, TokenBatch as TokenBatch, token_positions as token_positions
from .registry import BACKENDS as BACKENDS
