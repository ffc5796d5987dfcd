"""Worker: sentence-transformers, which sorts by length itself: `encode` with the head as modules, and CrossEncoder."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import CrossEncoder, SentenceTransformer, models
from transformers import AutoModelForSequenceClassification
from worker import Job, Loaded, Outcome, Way, best_batch_size, serve, versions


def load(job: Job) -> Loaded:
    """Offer CrossEncoder, and `encode` where the head is the mean head, which its modules can spell exactly."""
    torch.set_num_threads(job.threads)
    plain = str(Path(job.export_dir) / "plain")
    cross = CrossEncoder(plain, device="cpu", max_length=job.max_length)
    # Its input is a pair; the empty second half costs the special tokens around it.
    lines = [
        ("CrossEncoder", "second text empty", partial(_cross, cross), job.options["not_comparable"] or PAIRS),
    ]
    if job.options["head"] == "mean":
        lines.append(("encode", "head as Dense modules", partial(_encode, _encoder_with_head(plain, job)), None))
    ways = []
    for name, setting, classify, not_comparable in lines:
        size, seconds = best_batch_size(job.trial(by_length=True), classify)
        ways.append(
            Way(
                name=f"sentence-transformers {name}",
                group="sentence-transformers",
                setting=f"its own length sorting, {setting}",
                run=lambda count, classify=classify, size=size: classify(job.texts[:count], size),
                seconds_per_text=seconds,
                batch_size=size,
                not_comparable=not_comparable,
                about={"dtype": "float32"},
            )
        )
    return ways, versions("sentence-transformers", "transformers", "torch", "tokenizers"), {}


PAIRS = "texts go in as pairs with an empty second half"


def _encoder_with_head(plain: str, job: Job) -> Any:
    """Encoder, mean of the tokens, linear and tanh, linear: the full model."""
    classifier = AutoModelForSequenceClassification.from_pretrained(plain, dtype=torch.float32)
    transformer = models.Transformer(plain, max_seq_length=job.max_length)
    linears = (classifier.bert.pooler.dense, classifier.classifier)
    dense = []
    for linear, activation in zip(linears, (torch.nn.Tanh(), torch.nn.Identity()), strict=True):
        module = models.Dense(linear.in_features, linear.out_features, activation_function=activation)
        module.linear.load_state_dict(linear.state_dict())
        dense.append(module)
    pooling = models.Pooling(linears[0].in_features, pooling_mode="mean")
    return SentenceTransformer(modules=[transformer, pooling, *dense], device="cpu")


def _encode(model: Any, texts: list[str], batch_size: int) -> Outcome:
    logits = model.encode(list(texts), batch_size=batch_size, show_progress_bar=False)
    return Outcome(logits.argmax(-1).tolist())


def _cross(model: Any, texts: list[str], batch_size: int) -> Outcome:
    scores = model.predict([(text, "") for text in texts], batch_size=batch_size, show_progress_bar=False)
    return Outcome(scores.argmax(-1).tolist())


if __name__ == "__main__":
    serve(load)
