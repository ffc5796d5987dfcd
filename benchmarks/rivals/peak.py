"""Worker: the machine's own peak in matrix products, in the dtypes it has, by torch."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from worker import Job, Loaded, Outcome, Way, serve, versions

# (tokens, in, out) of the layers of a 384-wide and a 768-wide encoder, and a square product as large as caches like.
SHAPES: tuple[tuple[int, int, int], ...] = ((2048, 384, 1536), (2048, 1536, 384), (2048, 768, 3072), (2048, 2048, 2048))
REPEATS = 5


def load(job: Job) -> Loaded:
    """Offer one way: the best of several products of several shapes in each dtype."""
    torch.set_num_threads(job.threads)
    return [Way("matrix products", "peak", "best of several", _measure)], versions("torch"), {}


def _measure(_count: int) -> Outcome:
    found: dict[str, dict[str, float]] = {}
    for dtype, make in _products().items():
        found[dtype] = {"x".join(map(str, shape)): _best_rate(make(*shape), shape) for shape in SHAPES}
    return Outcome(extra={"gflops": found})


def _products() -> dict[str, Callable[[int, int, int], Callable[[], object]]]:
    """Makers of products, by dtype; one that the machine has no fast kernel for is left out."""

    def floats(dtype: torch.dtype) -> Callable[[int, int, int], Callable[[], object]]:
        def make(rows: int, inner: int, columns: int) -> Callable[[], object]:
            left, right = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
            return lambda: torch.nn.functional.linear(left, right)

        return make

    def integers(rows: int, inner: int, columns: int) -> Callable[[], object]:
        left = torch.randint(-127, 127, (rows, inner), dtype=torch.int8)
        right = torch.randint(-127, 127, (columns, inner), dtype=torch.int8).t()
        return lambda: torch._int_mm(left, right)

    makers = {"float32": floats(torch.float32), "int8": integers}
    if torch.cpu._is_avx512_bf16_supported():
        makers["bfloat16"] = floats(torch.bfloat16)
    return makers


def _best_rate(product: Callable[[], object], shape: tuple[int, int, int]) -> float:
    """Billions of operations a second (a multiply and an add are two), best of several."""
    product()
    seconds = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        product()
        seconds.append(time.perf_counter() - begin)
    rows, inner, columns = shape
    return 2e-9 * rows * inner * columns / min(seconds)


if __name__ == "__main__":
    serve(load)
