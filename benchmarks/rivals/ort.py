"""Worker: ONNX Runtime at full depth, float32 and dynamic int8, texts sorted by length."""

from __future__ import annotations

from pathlib import Path

import graph
import onnxruntime
from worker import Forward, Job, Loaded, serve, sorted_way, versions


def load(job: Job) -> Loaded:
    """Offer both dtypes."""
    tokenizer = graph.tokenizer_of(job)
    ways = [
        sorted_way(
            job,
            tokenizer,
            _forward(path, job.threads),
            name=f"ONNX Runtime {dtype}",
            group=f"onnxruntime-{dtype}",
            setting="length-sorted, full depth" + (", dynamic, per channel" if dtype == "int8" else ""),
            dtype=dtype,
        )
        for dtype, path in (("float32", graph.full(job)), ("int8", graph.dynamic_int8(job)))
    ]
    return ways, versions("onnxruntime", "onnx", "transformers", "tokenizers"), {}


def _forward(path: Path, threads: int) -> Forward:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda batches: (session.run(None, {"input_ids": ids, "attention_mask": mask})[0] for ids, mask in batches)


if __name__ == "__main__":
    serve(load)
