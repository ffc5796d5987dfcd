"""Worker: OpenVINO at full depth, float32, static int8 by NNCF, and compressed weights with dynamic quantisation."""

from __future__ import annotations

from functools import partial
from typing import Any

import graph
import nncf
import openvino
from worker import Job, Loaded, Outcome, Way, best_batch_size, classify_sorted, serve, versions

# Activations that share a scale. One scale for a whole row (the largest number) is not run in int8 on CPUs: it takes
# as long as float32.
DYNAMIC_GROUP = "128"


def load(job: Job) -> Loaded:
    """Offer the three forms."""
    core, tokenizer = openvino.Core(), graph.tokenizer_of(job)
    full = core.read_model(graph.full(job))
    compressed = nncf.compress_weights(core.read_model(graph.full(job)), mode=nncf.CompressWeightsMode.INT8_SYM)
    forms: list[tuple[str, str, Any, dict[str, str]]] = [
        ("float32", "full depth", full, {}),
        ("int8", "post-training quantisation by NNCF", core.read_model(graph.static_int8(job)), {}),
        (
            "int8-weights",
            "int8 weights, activations quantised as they come",
            compressed,
            {"DYNAMIC_QUANTIZATION_GROUP_SIZE": DYNAMIC_GROUP},
        ),
    ]
    ways = []
    for dtype, setting, model, properties in forms:
        classify = partial(_classify, tokenizer, _forward(core, model, job.threads, properties), job)
        size, seconds = best_batch_size(job.trial(by_length=True), classify)
        # Kernels are made for every shape that is met the first time; a warm-up that meets all is fair to it.
        classify(job.texts, size)
        ways.append(
            Way(
                name=f"OpenVINO {dtype}",
                group=f"openvino-{dtype}",
                setting=f"length-sorted, {setting}",
                run=lambda count, classify=classify, size=size: classify(job.texts[:count], size),
                seconds_per_text=seconds,
                batch_size=size,
                about={"dtype": dtype},
            )
        )
    return ways, versions("openvino", "nncf", "transformers", "tokenizers"), {}


def _classify(tokenizer: Any, forward: Any, job: Job, texts: list[str], batch_size: int) -> Outcome:
    return classify_sorted(tokenizer, forward, texts, batch_size, job.max_length)


def _forward(core: Any, model: Any, threads: int, properties: dict[str, str]) -> Any:
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",
        **properties,
    }
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    return lambda ids, mask: request.infer([ids, mask])[0]


if __name__ == "__main__":
    serve(load)
