"""Worker: OpenVINO at full depth: float32, the precision it chooses, static int8, weights compressed to 8 bits."""

from __future__ import annotations

from typing import Any

import graph
import nncf
import openvino
from worker import Job, Loaded, serve, sorted_way, versions

# Activations that share a scale. One scale for a whole row (the largest number) is not run in int8 on CPUs: it takes
# as long as float32.
DYNAMIC_GROUP = "128"


def load(job: Job) -> Loaded:
    """Offer the three forms."""
    core, tokenizer = openvino.Core(), graph.tokenizer_of(job)
    full = core.read_model(graph.full(job))
    compressed = nncf.compress_weights(core.read_model(graph.full(job)), mode=nncf.CompressWeightsMode.INT8_SYM)
    forms: list[tuple[str, str, Any, dict[str, str]]] = [
        ("float32", "full depth", full, {"INFERENCE_PRECISION_HINT": "f32"}),
        # bfloat16 where the CPU has it.
        ("own precision", "full depth, the precision that it chooses", full, {}),
        ("int8", "post-training quantisation by NNCF", core.read_model(graph.static_int8(job)), {}),
        (
            "int8-weights",
            "int8 weights, activations quantised as they come",
            compressed,
            {"DYNAMIC_QUANTIZATION_GROUP_SIZE": DYNAMIC_GROUP},
        ),
    ]
    ways = [
        sorted_way(
            job,
            tokenizer,
            _forward(core, model, job.threads, properties),
            # Kernels are made for every shape that is met the first time; a warm-up that meets all is fair to it.
            warm_all=True,
            name=f"OpenVINO {dtype}",
            group=f"openvino-{dtype}",
            setting=f"length-sorted, {setting}",
            dtype=dtype,
        )
        for dtype, setting, model, properties in forms
    ]
    return ways, versions("openvino", "nncf", "transformers", "tokenizers"), {}


def _forward(core: Any, model: Any, threads: int, properties: dict[str, str]) -> Any:
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        **properties,
    }
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    return lambda ids, mask: request.infer([ids, mask])[0]


if __name__ == "__main__":
    serve(load)
