"""Worker: OpenVINO at full depth: float32, the precision it chooses, static int8, weights compressed to 8 bits.

One batch at a time on all cores, and, in the forms that are fast, several at a time, as many as it finds best. Option
`cascade`: geep's table before the static int8 form, as `table_first.py` reads it; None leaves it out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import graph
import nncf
import openvino
from numpy.typing import NDArray
from table_first import table_first
from worker import Forward, Job, Loaded, Way, seconds_of, serve, sorted_way, versions

# Activations that share a scale. One scale for a whole row (the largest number) is not run in int8 on CPUs: it takes
# as long as float32.
DYNAMIC_GROUP = "128"
TRIAL_TEXTS = 512


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
    ways = []
    for how, run, dtypes in (
        ("", _one_by_one, {dtype for dtype, *_ in forms}),
        (", several batches at a time", _several, {"own precision", "int8"}),
    ):
        for dtype, setting, model, properties in forms:
            if dtype not in dtypes:
                continue
            forward = run(core, model, job.threads, properties)
            # Kernels are made for every shape that is met the first time; a warm-up that meets all is fair to it.
            way = sorted_way(
                job,
                tokenizer,
                forward,
                warm_all=True,
                name=f"OpenVINO {dtype}{how}",
                group=f"openvino-{dtype}{how}",
                setting=f"length-sorted, {setting}",
                dtype=dtype,
            )
            ways.append(way)
            if dtype == "int8" and job.options.get("cascade"):
                ways.append(_after_the_table(job, tokenizer, forward, way))
    return ways, versions("openvino", "nncf", "transformers", "tokenizers"), {}


def _after_the_table(job: Job, tokenizer: Any, forward: Forward, way: Way) -> Way:
    """A form with geep's table before it, warmed on the shapes of what the table leaves over."""
    run = table_first(job, forward, way.batch_size or 1, tokenizer.pad_token_id)
    run(len(job.texts))
    count = min(len(job.texts), TRIAL_TEXTS)
    return replace(
        way,
        name=f"the table, then {way.name}",
        group="table-first",
        setting="the table where it is certain, else all layers",
        run=run,
        seconds_per_text=seconds_of(lambda: run(count)) / count,
    )


def _compiled(core: Any, model: Any, hint: str, threads: int, more: dict[str, str]) -> Any:
    return core.compile_model(model, "CPU", {"PERFORMANCE_HINT": hint, "INFERENCE_NUM_THREADS": threads, **more})


def _one_by_one(core: Any, model: Any, threads: int, more: dict[str, str]) -> Forward:
    request = _compiled(core, model, "LATENCY", threads, more).create_infer_request()
    return lambda batches: (request.infer(list(batch))[0] for batch in batches)


def _several(core: Any, model: Any, threads: int, more: dict[str, str]) -> Forward:
    queue = openvino.AsyncInferQueue(_compiled(core, model, "THROUGHPUT", threads, more))

    def forward(batches: Sequence[Any]) -> list[NDArray[Any]]:
        logits: list[Any] = [None] * len(batches)

        def note(request: Any, place: int) -> None:
            logits[place] = request.get_output_tensor().data.copy()

        queue.set_callback(note)
        for place, batch in enumerate(batches):
            queue.start_async(list(batch), place)
        queue.wait_all()
        return logits

    return forward


if __name__ == "__main__":
    serve(load)
