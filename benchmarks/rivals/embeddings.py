"""Worker: static embeddings (model2vec), an encoder's tokens each embedded once and for all, and a classifier on them.

As model2vec's users have it: the embeddings are distilled from an encoder, then trained together with the classifier on
the rows that the full model was made of, until a tenth of them gets no better. Of which encoder: the option `encoder`,
else the fine-tuned full model's.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from model2vec.distill import distill_from_model
from model2vec.train import StaticModelForClassification
from transformers import AutoModel, AutoTokenizer
from worker import Job, Loaded, encoderless_way, serve, versions

DIMENSIONS = 256


def load(job: Job) -> Loaded:
    """Distil, learn, and offer it."""
    if not job.labelled_texts:
        raise ValueError("The rows that the full model was made of have no labels to learn from.")
    encoder = job.options.get("encoder", str(Path(job.export_dir) / "plain"))
    model, tokenizer = AutoModel.from_pretrained(encoder, dtype="float32"), AutoTokenizer.from_pretrained(encoder)
    static = distill_from_model(model, tokenizer, pca_dims=DIMENSIONS, device="cpu")
    learner = StaticModelForClassification.from_static_model(model=static)
    learner.fit(job.labelled_texts, [str(label) for label in job.labelled], device="cpu")
    classifier = learner.to_pipeline()

    way = encoderless_way(
        job,
        lambda texts: np.asarray(classifier.predict(texts)).astype(np.int64).tolist(),
        name="static embeddings, model2vec",
        group="embeddings",
        setting=f"distilled, {static.dim} dimensions, trained",
    )
    return [way], versions("model2vec", "torch"), {"encoder": Path(encoder).name}


if __name__ == "__main__":
    serve(load)
