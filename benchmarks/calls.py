"""Where the time of a small call goes: 1, 8, 32 and 128 texts a call, as a server makes them, to the microsecond.

Measured, for each folder that is certified, in its own dtype, and each size of a call, in one interleaved run:

- milliseconds of `Engine.predict_columns` as certified and at speed 0 (all layers), and of Hugging Face's pipeline on
  the folder's full model in float32, padded by call;
- mean layers of the texts, the deepest layer of a call, and `kept`: the share of the layers saved that became time;
- in a pass of its own, in which every step is timed: the tokenizer, what the table says, embeddings, layers, exits,
  picking those who go on, and the rest of a run. Timing a step takes a microsecond or two, which the rest bears; what
  `predict_columns` does before and after a run is in the milliseconds alone.

Not measured: settings that are calibrated for calls of a size (`geep calibrate --by-time --call-size`), which the race
(`throughput.py`) takes where they are faster; texts that wait for each other.

    python benchmarks/calls.py --data-dir DATA --folders runs/sst2 runs-int8/sst2

appends to benchmarks/results/calls.jsonl; lines of the same data set and dtype are replaced.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tables import Line, append, read
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

import geep
from geep.backends import TokenBatch
from geep.data import DataPlan
from geep.evaluation.race import cpu_name
from geep.folder import Provenance

RESULTS = Path(__file__).parent / "results" / "calls.jsonl"

SIZES = (1, 8, 32, 128)
MOST_TEXTS = 512
ROUNDS = 5
# Of the slowest way in a round; ways take turns on the same calls.
SECONDS = 0.7


def main() -> None:
    """Measure every folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder of data set folders")
    parser.add_argument("--folders", nargs="+", required=True, help="certified models, as `geep calibrate` leaves them")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), help="texts a call, by commas")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    sizes = [int(size) for size in args.sizes.split(",")]
    for folder in args.folders:
        lines = list(of_folder(folder, args.data_dir, sizes))
        _forget(args.output, lines[0])
        for line in lines:
            append(args.output, line)
            print({name: line[name] for name in ("data", "dtype", "texts_per_call", "ms", "kept")}, flush=True)


def _forget(path: Path, of: Line) -> None:
    """Leave out what is measured anew."""
    kept = [line for line in read(path) if (line["data"], line["dtype"]) != (of["data"], of["dtype"])]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
    path.write_text(text, encoding="utf-8")


def of_folder(folder: str, data_dir: Path, sizes: list[int]) -> Iterator[Line]:
    """Lines of a certified model, on test texts of what it was made of."""
    plan = DataPlan(**Provenance.read(folder).data)
    test = replace(plan, data_dir=str(data_dir)).load().test
    if test is None:
        raise SystemExit(f"{plan.name} has no test split.")
    rows = np.random.default_rng(0).permutation(len(test))[:MOST_TEXTS]
    texts = test.select(np.sort(rows)).inputs
    engine = geep.Engine.from_pretrained(folder, device="cpu")
    if engine.settings.speed == 0:
        raise SystemExit(f"{folder} runs all layers of every text; calibrate it first.")
    yield from measured(engine, _pipeline(folder), plan.name, texts, sizes)


def measured(
    engine: geep.Engine, other: Callable[[list[Any]], object], data: str, texts: Sequence[Any], sizes: list[int]
) -> Iterator[Line]:
    """A line for each size of a call; `other` is what a call is compared with."""
    ways = {
        "certified": engine.predict_columns,
        "full": lambda call: engine.predict_columns(call, speed=0.0),
        "pipeline": other,
    }
    for size in sizes:
        if size > len(texts):
            raise SystemExit(f"Found {len(texts)} texts, expected at least a call of {size}.")
        calls = [texts[start : start + size] for start in range(0, len(texts) - size + 1, size)]
        calls, seconds = _interleaved(ways, calls)
        answers = [engine.predict_columns(call).exit_layers for call in calls]
        mean = float(np.concatenate(answers).mean())
        saved = 1 - mean / engine.depths[-1]
        ms = {name: 1000 * value for name, value in seconds.items()}
        yield {
            "kind": "call",
            "data": data,
            "dtype": engine.deployment.dtype,
            "texts_per_call": size,
            "tokens_per_call": float(np.mean([engine.tokenize(call).batch.lengths.sum() for call in calls])),
            "mean_layers": mean,
            "deepest": float(np.mean([layers.max() for layers in answers])),
            "layers": engine.depths[-1],
            "ms": ms,
            "kept": (1 - ms["certified"] / ms["full"]) / saved if saved else None,
            "steps_ms": {name: 1000 * value for name, value in _steps(engine, calls).items()},
            "machine": {"device": cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__},
        }


def _pipeline(folder: str) -> Callable[[list[Any]], object]:
    """Hugging Face's own way, on the same full model."""
    make: Any = pipeline  # its overloads name every kind of model there is
    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    found = make("text-classification", model=model.eval(), tokenizer=tokenizer, device="cpu", truncation=True)

    def answer(call: list[Any]) -> object:
        inputs = [text if isinstance(text, str) else {"text": text[0], "text_pair": text[1]} for text in call]
        return found(inputs, batch_size=len(inputs))

    return answer


def _interleaved(
    ways: dict[str, Callable[[list[Any]], object]], calls: list[list[Any]]
) -> tuple[list[list[Any]], dict[str, float]]:
    """The calls that were timed, and seconds of a call: medians of rounds; ways take turns on the same calls."""
    slowest = 0.0
    for answer in ways.values():
        answer(calls[0])
        begin = time.perf_counter()
        answer(calls[-1])
        slowest = max(slowest, time.perf_counter() - begin)
    count = int(min(max(SECONDS / slowest, 4), len(calls)))
    rounds = [[calls[(turn * count + place) % len(calls)] for place in range(count)] for turn in range(ROUNDS)]
    timed = [call for picked in rounds for call in picked]
    times = defaultdict(list)
    for name, answer in ways.items():
        # As in a process that has run for a while: oneDNN makes a kernel for each number of tokens that is new to it.
        for call in timed if name != "pipeline" else []:
            answer(call)
    for picked in rounds:
        for name, answer in ways.items():
            answer(picked[-1])  # what the way before has put out of the caches comes back
            begin = time.perf_counter()
            for call in picked:
                answer(call)
            times[name].append((time.perf_counter() - begin) / count)
    return timed, {name: statistics.median(found) for name, found in times.items()}


class _TimedBackend:
    """A backend whose steps are timed."""

    def __init__(self, backend: Any, clock: Clock) -> None:
        self.backend, self.clock, self.keeps_above = backend, clock, backend.keeps_above

    def start(self, batch: TokenBatch) -> Any:
        with self.clock("embed"):
            return self.backend.start(batch)

    def advance(self, *args: Any, **options: Any) -> Any:
        with self.clock("layers"):
            return self.backend.advance(*args, **options)

    def exit_logits(self, *args: Any, **options: Any) -> Tensor:
        with self.clock("exits"):
            found: Tensor = self.backend.exit_logits(*args, **options)
            return found

    def select(self, live: Any, rows: NDArray[np.int64]) -> Any:
        with self.clock("select"):
            return self.backend.select(live, rows)

    def concat(self, lives: Any) -> Any:
        with self.clock("select"):
            return self.backend.concat(lives)


class Clock:
    """Adds up the seconds of steps by name."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time what stands inside."""
        begin = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - begin


def _steps(engine: geep.Engine, calls: list[list[Any]]) -> dict[str, float]:
    """Seconds of each step of a call, and of what is none of them."""
    clock = Clock()
    course = replace(engine.course, backend=_TimedBackend(engine.course.backend, clock))  # type: ignore[arg-type]
    for _ in range(2):  # the first one warms up
        clock.seconds.clear()
        for call in calls:
            with clock("whole"):
                with clock("tokenise"):
                    tokens = engine.tokenize(call)
                with clock("table"):
                    plan = engine.plan(tokens.batch)
                with clock("run"):
                    course.run(tokens.batch, plan, engine.settings)
    each = {name: seconds / len(calls) for name, seconds in clock.seconds.items()}
    inside = sum(each.get(name, 0.0) for name in ("embed", "layers", "exits", "select"))
    each["rest"] = each.pop("run") - inside
    return each


if __name__ == "__main__":
    main()
