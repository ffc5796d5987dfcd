"""Worker: Hugging Face's text-classification pipeline: arrival order, length-sorted, bfloat16, compiled, a static cut.

Option `static_depth`: the model cut to its first layers with the exit that sits there, which is what one would make
without early exit; None leaves it out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import pipeline
from worker import Job, Loaded, Outcome, Way, best_batch_size, serve, versions

from geep.backends.onednn import multiplies_bfloat16
from geep.engine import load_model
from geep.modeling import GeepForSequenceClassification, family_of


def load(job: Job) -> Loaded:
    """Offer the pipeline both ways, and the cut model where one is asked for."""
    torch.set_num_threads(job.threads)
    model, tokenizer = load_model(job.model_dir)
    lines = [
        ("HF pipeline", "pipeline", "arrival order", model, False),
        ("HF pipeline, length-sorted", "pipeline-sorted", "sorted by length", model, True),
    ]
    fastest: Any = copy.deepcopy(model)
    if multiplies_bfloat16():
        half: Any = copy.deepcopy(model).to(torch.bfloat16)
        lines.append(("HF pipeline, bfloat16", "pipeline-bfloat16", "sorted by length, bfloat16", half, True))
        fastest = copy.deepcopy(half)
    dtype = str(fastest.dtype).removeprefix("torch.")
    # Of any number of texts of any length: a compilation for each shape would take hours.
    fastest.compile(dynamic=True)
    setting = f"sorted by length, {dtype}, torch.compile"
    lines.append((f"HF pipeline, compiled, {dtype}", "pipeline-compiled", setting, fastest, True))
    depth = job.options.get("static_depth")
    if depth is not None:
        cut = first_layers(model, depth)
        lines.append((f"HF pipeline, first {depth} layers", "static", f"sorted by length, {depth} layers", cut, True))
    ways = [_way(job, tokenizer, *line) for line in lines]
    return ways, versions("torch", "transformers", "tokenizers"), {}


def _way(job: Job, tokenizer: Any, name: str, group: str, setting: str, model: nn.Module, by_length: bool) -> Way:
    make: Any = pipeline  # its overloads name every kind of model there is
    call = make("text-classification", model=model.train(mode=False), tokenizer=tokenizer, device="cpu")
    classify: Callable[[Sequence[str], int], Outcome] = partial(_classify, job, call, by_length)
    size, seconds = best_batch_size(job.trial(by_length=by_length), classify)
    layers = model.config.num_hidden_layers

    def run(count: int) -> Outcome:
        return Outcome(classify(job.texts[:count], size).answers, [layers] * count)

    about = {"dtype": str(model.dtype).removeprefix("torch.")}
    return Way(name, group, setting, run, seconds_per_text=seconds, batch_size=size, about=about)


def _classify(job: Job, call: Any, by_length: bool, texts: Sequence[str], batch_size: int) -> Outcome:
    order = np.argsort([len(text) for text in texts], kind="stable") if by_length else np.arange(len(texts))
    # Given a generator, the pipeline keeps its data loader busy; given a list, it warns of just that.
    found = call((texts[i] for i in order.tolist()), batch_size=batch_size, truncation=True, max_length=job.max_length)
    ids = {label: number for number, label in enumerate(job.label_names)}
    answers = np.empty(len(texts), dtype=np.int64)
    answers[order] = [ids[each["label"]] for each in found]
    return Outcome(answers.tolist())


def first_layers(model: GeepForSequenceClassification, depth: int) -> GeepForSequenceClassification:
    """Cut a model to its first layers; the exit that sits there becomes its only classifier."""
    head = model.head_at(depth)
    cut = copy.deepcopy(model)
    family = family_of(cut.encoder.config)
    *parents, name = family.layers.split(".")
    parent = cut.encoder.get_submodule(".".join(parents))
    setattr(parent, name, nn.ModuleList(list(cut.encoder.get_submodule(family.layers))[:depth]))
    cut.encoder.config.num_hidden_layers = depth
    cut.config.encoder_config.num_hidden_layers = depth
    cut.config.exit_layers = []
    cut.exits, cut.teacher = nn.ModuleList(), copy.deepcopy(head)
    return cut


if __name__ == "__main__":
    serve(load)
