"""Worker: ONNX Runtime at full depth, float32 and dynamic int8, texts sorted by length."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import graph
import onnxruntime
from worker import Job, Loaded, Outcome, Way, best_batch_size, classify_sorted, serve, versions


def load(job: Job) -> Loaded:
    """Offer both dtypes."""
    tokenizer = graph.tokenizer_of(job)
    ways = []
    for dtype, path in (("float32", graph.full(job)), ("int8", graph.dynamic_int8(job))):
        forward = _forward(path, job.threads)
        classify = partial(_classify, tokenizer, forward, job)
        size, seconds = best_batch_size(job.trial(by_length=True), classify)
        ways.append(
            Way(
                name=f"ONNX Runtime {dtype}",
                group=f"onnxruntime-{dtype}",
                setting="length-sorted, full depth" + (", dynamic, per channel" if dtype == "int8" else ""),
                run=lambda count, classify=classify, size=size: classify(job.texts[:count], size),
                seconds_per_text=seconds,
                batch_size=size,
                about={"dtype": dtype},
            )
        )
    return ways, versions("onnxruntime", "onnx", "transformers", "tokenizers"), {}


def _classify(tokenizer: Any, forward: Any, job: Job, texts: list[str], batch_size: int) -> Outcome:
    return classify_sorted(tokenizer, forward, texts, batch_size, job.max_length)


def _forward(path: Path, threads: int) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda ids, mask: session.run(None, {"input_ids": ids, "attention_mask": mask})[0]


if __name__ == "__main__":
    serve(load)
