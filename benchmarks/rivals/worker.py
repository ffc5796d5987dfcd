"""What a worker process does: it loads one system and answers its parent, one JSON line for each JSON line.

This file runs in every rival's own virtual environment, so it knows the standard library and NumPy, nothing else. A
system is a list of `Way`s (a model and how it is called). The parent says which way to run and when; between two orders
the process waits on standard input, so that it takes nothing from the others.

    {"do": "load"}                                      -> {"ok": {"ways": [...], "versions": {...}, ...}}
    {"do": "run", "way": NAME, "count": N}              -> {"ok": {"seconds": 1.2, "answers": [...], ...}}
    anything that raises                                -> {"error": "..."}; the process goes on
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Batch sizes among which a system that works by batches finds its best.
BATCH_SIZES: tuple[int, ...] = (1, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one run gave, in the order of the texts.

    Attributes:
        answers: Label ids.
        layers: Encoder layers run for each text; None: all of them.
        extra: Whatever else was measured: seconds of parts, operations, ….
    """

    answers: list[int] = field(default_factory=list)
    layers: list[int] | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Way:
    """One way of running a system.

    Attributes:
        name: Unique name.
        group: What it is compared as; see `throughput.py`.
        setting: What was set, in words.
        run: Runs the first `count` texts from raw text (or, in groups without texts, whatever it measures).
        seconds_per_text: Of the trial, for the parent's estimate.
        batch_size: Best batch size, where there is one.
        not_comparable: Why its answers say nothing about accuracy; None: they do.
        seconds_per_run: Of the trial, where the cost does not depend on the number of texts.
        about: Further facts for the result line.
    """

    name: str
    group: str
    setting: str
    run: Callable[[int], Outcome]
    seconds_per_text: float = 0.0
    batch_size: int | None = None
    not_comparable: str | None = None
    seconds_per_run: float = 0.0
    about: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Job:
    """What a worker is told once, in a file.

    Attributes:
        texts: Texts to time, in random order: the first n of them are a fair sample for every n.
        labels: Their label ids; None without labels.
        calibration_texts: Training texts for quantisers that look at data.
        label_names: Names of the labels in the order of their ids.
        export_dir: Folder of the exported model: `plain/` (a Hugging Face folder), `full.ts` (TorchScript).
        model_dir: The geep folder.
        max_length: Longest text in tokens.
        threads: Threads to use.
        labelled_texts: Texts with labels that the full model was trained, profiled or calibrated on, for rivals that
            learn by themselves.
        labelled: Their label ids.
        options: What this worker alone is told.
    """

    texts: list[str]
    labels: list[int] | None
    calibration_texts: list[str]
    label_names: list[str]
    export_dir: str
    model_dir: str
    max_length: int
    threads: int
    labelled_texts: list[str] = field(default_factory=list)
    labelled: list[int] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, options: dict[str, Any]) -> Job:
        """Read the parent's file; `options` come from the command line."""
        return cls(**json.loads(path.read_text(encoding="utf-8")), options=options)

    def save(self, path: Path) -> None:
        """Write the file that workers read."""
        values = {name: value for name, value in asdict(self).items() if name != "options"}
        path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")

    def trial(self, *, by_length: bool) -> list[str]:
        """Few texts for finding a batch size.

        A system that sorts all texts gets neighbours of the sorted order, since that is what its batches will be made
        of; one that takes texts as they come gets the first ones.
        """
        size = max(BATCH_SIZES)
        if not by_length:
            return self.texts[:size]
        ordered = sorted(self.texts, key=len)
        start = max((len(ordered) - size) // 2, 0)
        return ordered[start : start + size]


def seconds_of(run: Callable[[], object]) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def best_batch_size(texts: Sequence[str], run: Callable[[Sequence[str], int], object]) -> tuple[int, float]:
    """Try every size on a few texts, after a run that is not counted: the fastest, and its seconds for a text."""
    sizes = [size for size in BATCH_SIZES if size <= len(texts)] or [len(texts)]
    run(texts, sizes[-1])
    seconds = {size: seconds_of(lambda size=size: run(texts, size)) for size in sizes}
    best = min(sizes, key=lambda size: seconds[size])
    return best, seconds[best] / len(texts)


def padded_batches(
    ids: Sequence[Sequence[int]], batch_size: int, pad: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
    """Cut texts, sorted by length, into padded batches: (positions of the texts, input ids, 0/1 mask)."""
    order = np.argsort([len(row) for row in ids], kind="stable")
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        lengths = np.array([len(ids[row]) for row in rows])
        mask = np.arange(lengths.max()) < lengths[:, None]
        padded = np.full(mask.shape, pad, dtype=np.int64)
        padded[mask] = np.concatenate([ids[row] for row in rows])
        yield rows, padded, mask.astype(np.int64)


# Batches of input ids and mask, padded, to their logits in the same order; how many run at a time is its own affair.
Forward = Callable[[Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]]], Iterable[NDArray[Any]]]


def sorted_logits(
    ids: Sequence[Sequence[int]], forward: Forward, batch_size: int, pad: int
) -> Iterator[tuple[NDArray[np.int64], NDArray[Any]]]:
    """Run texts in padded batches, sorted by length: (positions of the texts, their logits) of each batch."""
    rows, batches = [], []
    for places, padded, mask in padded_batches(ids, batch_size, pad):
        rows.append(places)
        batches.append((padded, mask))
    yield from zip(rows, forward(batches), strict=True)


def classify_sorted(
    tokenizer: Any,
    forward: Forward,
    texts: Sequence[str],
    batch_size: int,
    max_length: int,
) -> Outcome:
    """Tokenise, sort by length, pad, run, put back in order; the seconds of tokenising are told apart."""
    begin = time.perf_counter()
    ids = tokenizer(
        list(texts),
        truncation=True,
        max_length=max_length,
        return_attention_mask=False,
        return_token_type_ids=False,
    )["input_ids"]
    tokenised = time.perf_counter()
    answers = np.empty(len(texts), dtype=np.int64)
    for places, logits in sorted_logits(ids, forward, batch_size, tokenizer.pad_token_id):
        answers[places] = logits.argmax(-1)
    return Outcome(answers.tolist(), extra={"tokenise": tokenised - begin, "from_ids": time.perf_counter() - tokenised})


def sorted_way(job: Job, tokenizer: Any, forward: Forward, *, warm_all: bool = False, **named: str) -> Way:
    """A way that runs `classify_sorted` at its best batch size; `named` are the way's name, group, setting and dtype.

    Args:
        job: The texts.
        tokenizer: Their tokenizer.
        forward: Batches of padded ids and mask to logits.
        warm_all: Whether to run all texts once before any is timed, where kernels are made for every new shape.
        **named: `name`, `group`, `setting`, `dtype`.
    """

    def classify(texts: Sequence[str], batch_size: int) -> Outcome:
        return classify_sorted(tokenizer, forward, texts, batch_size, job.max_length)

    size, seconds = best_batch_size(job.trial(by_length=True), classify)
    if warm_all:
        classify(job.texts, size)
    return Way(
        name=named["name"],
        group=named["group"],
        setting=named["setting"],
        run=lambda count: classify(job.texts[:count], size),
        seconds_per_text=seconds,
        batch_size=size,
        about={"dtype": named["dtype"]},
    )


def encoderless_way(job: Job, predict: Callable[[list[str]], list[int]], *, name: str, group: str, setting: str) -> Way:
    """A way that runs no encoder layer; `predict` gives label ids of texts. Run once before it is timed."""

    def run(count: int) -> Outcome:
        return Outcome(predict(job.texts[:count]), [0] * count)

    run(len(job.texts))
    seconds = seconds_of(lambda: run(len(job.texts)))
    return Way(name, group, setting, run, seconds_per_text=seconds / len(job.texts))


def versions(*packages: str) -> dict[str, str]:
    """Installed versions of packages."""
    return {name: importlib.metadata.version(name) for name in packages}


# What a worker's file gives: the ways it offers, the versions it runs, and whatever else the parent should know.
Loaded = tuple[list[Way], dict[str, str], dict[str, Any]]


def serve(load: Callable[[Job], Loaded]) -> None:
    """Answer orders until standard input ends."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--job", type=Path, required=True)
    parser.add_argument("--options", type=json.loads, default={})
    args = parser.parse_args()
    # Libraries print; the parent's channel must hold nothing but answers.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    ways: dict[str, Way] = {}
    for line in sys.stdin:
        order = json.loads(line)
        try:
            if order["do"] == "load":
                found, found_versions, about = load(Job.read(args.job, args.options))
                ways = {way.name: way for way in found}
                answer: dict[str, Any] = {
                    "ways": [
                        {name: value for name, value in _fields(way).items() if name != "run"} for way in ways.values()
                    ],
                    "versions": found_versions,
                    "about": about,
                }
            else:
                answer = _timed(ways[order["way"]], order["count"])
            reply = {"ok": answer}
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}"}
        channel.write(json.dumps(reply) + "\n")
        channel.flush()


def _fields(way: Way) -> dict[str, Any]:
    return {name: getattr(way, name) for name in Way.__dataclass_fields__}


def _timed(way: Way, count: int) -> dict[str, Any]:
    # The garbage of the run before is not this one's cost.
    gc.collect()
    begin = time.perf_counter()
    outcome = way.run(count)
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, **asdict(outcome)}
