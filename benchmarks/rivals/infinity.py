"""Worker: infinity-emb's classify, which batches by itself, on the plain Hugging Face folder."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from infinity_emb import EngineArgs, SyncEngineArray
from worker import BATCH_SIZES, Job, Loaded, Outcome, Way, best_batch_size, serve, versions

MODEL = "model"


def load(job: Job) -> Loaded:
    """Offer one way. The batch size is the engine's, so each size that is tried is an engine."""
    torch.set_num_threads(job.threads)
    engines = {size: _engine(job, size) for size in BATCH_SIZES}
    classify = partial(_classify, job, engines)
    size, seconds = best_batch_size(job.trial(by_length=True), classify)
    for other in list(engines):
        if other != size:
            engines.pop(other).stop()
    time.sleep(2)  # their threads look up every few tenths of a second
    way = Way(
        name="infinity-emb classify",
        group="infinity-emb",
        setting="its own batching, full depth",
        run=lambda count: classify(job.texts[:count], size),
        seconds_per_text=seconds,
        batch_size=size,
        not_comparable=job.options["not_comparable"],
        about={"dtype": "float32"},
    )
    return [way], versions("infinity-emb", "sentence-transformers", "transformers", "torch", "tokenizers"), {}


def _engine(job: Job, batch_size: int) -> Any:
    arguments = EngineArgs(
        model_name_or_path=str(Path(job.export_dir) / "plain"),
        served_model_name=MODEL,
        engine="torch",
        device="cpu",
        dtype="float32",
        batch_size=batch_size,
        model_warmup=False,
        bettertransformer=False,  # torch no longer has what it needs
    )
    return SyncEngineArray.from_args([arguments])


def _classify(job: Job, engines: dict[int, Any], texts: list[str], batch_size: int) -> Outcome:
    scores, _ = engines[batch_size].classify(model=MODEL, sentences=list(texts)).result()
    ids = {label: number for number, label in enumerate(job.label_names)}
    return Outcome([ids[max(row, key=lambda each: each["score"])["label"]] for row in scores])


if __name__ == "__main__":
    serve(load)
